"""From a fit to thresholds, sizes, and what they are predicted to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from calibrate.derive.answers import answer_threshold
from calibrate.derive.certify import caps_at, certificates, certified_thresholds
from calibrate.derive.predict import (
    METRICS,
    RANGES,
    UNITS,
    Economics,
    is_bounded,
    metrics,
    policy_atoms,
    source_sha256,
)
from calibrate.derive.roads import Roads
from calibrate.fit.thresholds import DerivedThreshold, derive_thresholds
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import as_figure
from calibrate.run.folder import read_record
from calibrate.run.records import (
    CalibrationRecord,
    Certificate,
    DeriveRequest,
    Figure,
    LearnedModel,
    OperatingPoint,
    PolicyInfo,
)
from calibrate.run.traces import Trace, read_calibration_trace
from hlmtheory.policies import (
    DeriveOptions,
    Fitted,
    GatedPolicy,
    Policy,
    policy_class,
    policy_from_settings,
)
from hlmtheory.risk import SkipAtoms
from hlmtheory.scores import Score, score_named
from hlmtheory.thresholds import Threshold

UNGATED = "none"
"""Rule of a policy without a threshold."""

Gate: TypeAlias = tuple[SkipAtoms, list[DerivedThreshold]]
"""Pieces of drafts with the score that a gate sees, and its threshold under every rule."""


@dataclass(frozen=True)
class Offer:
    """One setting of one policy; a gated one still without its own threshold.

    Attributes
    ----------
    label : str
        Behind the rule's name; empty for the first setting of a policy.
    settings : dict
        As its class reads them back.
    policy : Policy
        Gated ones at a threshold that means nothing yet.
    """

    label: str
    settings: dict[str, Any]
    policy: Policy


@dataclass
class Study:
    """All that a derivation is made from, with the thresholds that its gates share.

    Attributes
    ----------
    roads : Roads
        The calibration's contexts, and a pilot's.
    calibration : CalibrationRecord
    request : DeriveRequest
    economics : Economics
    options : DeriveOptions
    """

    roads: Roads
    calibration: CalibrationRecord
    request: DeriveRequest
    economics: Economics
    options: DeriveOptions
    _gates: dict[str, tuple[Gate, tuple[float | None, bool]]] = field(default_factory=dict)

    @property
    def trace(self) -> Trace:
        """The calibration's, along the server's outputs."""
        return self.roads.server

    @property
    def score(self) -> Score:
        """What gates compare with their thresholds."""
        return score_of(self.request.score, self.calibration.learned)

    @cached_property
    def offers(self) -> dict[str, list[Offer]]:
        """Every setting of each requested policy; none where the trace lacks what it needs.

        Raises
        ------
        UsageError
            If a setting is not possible on this trace.
        """
        return {source: self._offers(source) for source in self.request.policies}

    @property
    def policies(self) -> list[Policy]:
        """All of them, one a setting."""
        return [offer.policy for offers in self.offers.values() for offer in offers]

    def _offers(self, source: str) -> list[Offer]:
        fit, step = self.calibration.fit, self.trace.step()
        fitted = Fitted(fit.slope.value or 0.0, fit.intercept.value or 0.0, step)
        start = self.score.low if np.isfinite(self.score.low) else 0.0
        try:
            offers = [
                Offer(label, settings, policy_from_settings(source, settings, start, self.score))
                for label, settings in policy_class(source).variants(fitted, self.options)
            ]
            offers += [
                Offer(
                    f"{offer.label}@cap-{cap:g}",
                    offer.settings | {"cap": cap},
                    replace(offer.policy, cap=cap),
                )
                for offer in offers
                if isinstance(offer.policy, GatedPolicy)
                for cap in self.caps()
            ]
            for offer in offers:  # what it remembers may not be recorded at these settings
                offer.policy.memory().update(self.trace.step(slice(0, 1)))
        except ValueError as error:
            raise UsageError(_refusal(source, error)) from None
        return offers

    def caps(self, alpha: float | None = None) -> list[float]:
        """Answer caps asked for, at one budget or at any, rising."""
        budgets = self.request.risks if alpha is None else (alpha,)
        delta, num, texts = 1 - self.request.confidence, self.trace.num_prompts, self.request
        return sorted({c for a in budgets for c in caps_at(texts.answer_caps, a, delta, num)})

    @property
    def max_tokens(self) -> int:
        """Tokens that an answer could have, fixed before the calibration."""
        return self.calibration.settings.max_new_tokens

    def gate(self, policy: GatedPolicy) -> Gate:
        """What a policy's gate sees, and its thresholds; policies that skip alike share them."""
        key = repr(policy)
        if key not in self._gates:
            atoms = policy_atoms(self.trace, replace(policy, cap=None))
            certified = (policy.cap, policy.verifies_whole)  # what certificates look at beside
            alike = (
                known
                for known, other in self._gates.values()
                if other == certified and _same(known[0], atoms)
            )
            found = next(alike, None) or (atoms, self._thresholds(policy, atoms))
            self._gates[key] = found, certified
        return self._gates[key][0]

    def _thresholds(self, policy: GatedPolicy, atoms: SkipAtoms) -> list[DerivedThreshold]:
        """Of every rule; under a cap the certified ones alone, at the budgets that ask for it."""

        def certified(alpha: float) -> list[Threshold]:
            share = 1 if policy.cap is None else len(self.caps(alpha))
            return certified_thresholds(
                self.trace, policy, atoms, alpha, (1 - self.request.confidence) / share,
                self.request.certify, self.max_tokens,
            )  # fmt: skip

        if policy.cap is None:
            return derive_thresholds(
                atoms, self.score, self.trace, self.calibration, self.request, certified
            )
        budgets = [alpha for alpha in self.request.risks if policy.cap in self.caps(alpha)]
        return [DerivedThreshold(one) for alpha in budgets for one in certified(alpha)]

    def certificates(self) -> tuple[Certificate, ...]:
        """What every test certifies for the first gate that sees its score and nothing else."""
        plain = (
            one for one in self.policies if isinstance(one, GatedPolicy) and not one.needs_attention
        )
        first = next(plain, None)
        if first is None or not np.isfinite(first.score.low):
            return ()
        request = self.request
        return certificates(
            self.trace, first, request.risks, request.confidence, request.certify,
            request.answer_caps, self.max_tokens,
        )  # fmt: skip

    def answer_thresholds(self, policy: GatedPolicy) -> list[DerivedThreshold]:
        """Those that keep the budgets for whole answers, which are about a policy's own outputs."""
        atoms, _ = self.gate(policy)
        return [
            DerivedThreshold(answer_threshold(self.trace, policy, atoms, alpha))
            for alpha in self.request.answer_risks
        ]

    def predict(self, policy: Policy) -> tuple[dict[str, Figure], tuple[str, ...]]:
        """Predicted metrics with intervals for the calibration's sampling of prompts.

        And which of them are upper bounds.
        """
        prediction = self.roads.prediction(policy)
        found = metrics(prediction, self.economics)
        confidence = self.request.confidence
        figures = {
            name: as_figure(found[name], UNITS[name], confidence, *RANGES[name]) for name in METRICS
        }
        return figures, ("answer_divergence",) if is_bounded(prediction.server) else ()


def _same(first: SkipAtoms, second: SkipAtoms) -> bool:
    return np.array_equal(first.score, second.score) and np.array_equal(first.mass, second.mass)


def score_of(name: str, learned: LearnedModel | None) -> Score:
    """A score by name, a learned one with the model that the calibration fitted."""
    try:
        return score_named(name, None if learned is None else learned.model_dump())
    except ValueError as error:
        raise UsageError(f"--score {name}: {error}") from None


def plain_gate(run: Path, score_name: str) -> tuple[Trace, GatedPolicy, CalibrationRecord]:
    """A run's trace, the gate that sees a score and nothing else, and what was fitted.

    The gate is at a threshold that means nothing yet.

    Raises
    ------
    UsageError
        For an unknown score, or a learned one that the calibration did not fit.
    UserError
        If the run is not calibrated, or its trace lacks tokens or the score's columns.
    """
    calibration = read_record(run, CalibrationRecord)
    score = score_of(score_name, calibration.learned)
    trace = read_calibration_trace(run, calibration)
    policy = GatedPolicy(threshold=max(score.low, 0.0), score=score)
    try:
        policy.atoms(trace.step(slice(0, 1)))
    except ValueError as error:
        raise UserError(f"RUN {run}: {error}; calibrate with --trace full") from None
    return trace, policy, calibration


def policy_infos(sources: Sequence[str]) -> tuple[PolicyInfo, ...]:
    """How the policies asked for are named and drawn.

    Raises
    ------
    UsageError
        If one is unknown, or two have one name.
    """
    infos: dict[str, PolicyInfo] = {}
    for source in sources:
        try:
            kind = policy_class(source)
        except ValueError as error:
            raise UsageError(_refusal(source, error)) from None
        if kind.name in infos:
            raise UsageError(f"--policy {source}: another one is named {kind.name}; rename it")
        infos[kind.name] = PolicyInfo(
            name=kind.name,
            label=kind.label,
            source=None if source == kind.name else source,
            source_sha256=None if source == kind.name else source_sha256(source),
            paper=kind.paper,
            gated=kind.gated,
            color=kind.color,
            dashes=kind.dashes,
            marker=kind.marker,
        )
    return tuple(infos.values())


def _refusal(source: str, error: ValueError) -> str:
    return f"--policy {source}: {str(error).removeprefix(f'policy {source}: ')}"


def operating_points(study: Study) -> list[tuple[OperatingPoint, Policy | None]]:
    """Points of every requested policy under every rule, with the policy of feasible ones."""
    points: list[tuple[OperatingPoint, Policy | None]] = []
    for source, offers in study.offers.items():
        if not offers:
            reason = "the trace lacks columns that it needs; calibrate again with --trace full"
            points.append((_infeasible(policy_class(source).name, reason), None))
        for offer in offers:
            policy = offer.policy
            if isinstance(policy, GatedPolicy):
                derived = [*study.gate(policy)[1], *study.answer_thresholds(policy)]
                points += [_gated_point(study, offer, policy, one) for one in derived]
            else:
                points.append((_ungated_point(study, offer), policy))
    return points


def _gated_point(
    study: Study, offer: Offer, policy: GatedPolicy, derived: DerivedThreshold
) -> tuple[OperatingPoint, Policy | None]:
    threshold = derived.threshold
    predicted, reason = _undefined(), threshold.reason
    at_most: tuple[str, ...] = ()
    if threshold.feasible:
        policy = policy.with_threshold(threshold.value)
        predicted, at_most = study.predict(policy)
        reason = policy.remark or reason or _degenerate(predicted["skip_rate"].value)
    point = OperatingPoint(
        policy=policy.name,
        rule=threshold.rule + offer.label,
        family=threshold.family,
        variant=offer.label.removeprefix("@"),
        score=study.score.name,
        budget=threshold.budget,
        weighting=threshold.weighting,
        confidence=threshold.confidence,
        bound=threshold.bound,
        uncertainty_threshold=derived.figure,
        feasible=threshold.feasible,
        reason=reason,
        settings=offer.policy.settings(),
        predicted=predicted,
        at_most=at_most,
    )
    return point, policy if threshold.feasible else None


def _ungated_point(study: Study, offer: Offer) -> OperatingPoint:
    found = _infeasible(offer.policy.name, offer.policy.remark)
    predicted, at_most = study.predict(offer.policy)
    return found.model_copy(
        update={
            "rule": UNGATED + offer.label,
            "variant": offer.label.removeprefix("@"),
            "feasible": True,
            "settings": offer.settings,
            "predicted": predicted,
            "at_most": at_most,
        }
    )


def _infeasible(policy: str, reason: str) -> OperatingPoint:
    return OperatingPoint(
        policy=policy, rule=UNGATED, family=UNGATED, variant="", score=None, budget=None,
        weighting=None, confidence=None, bound=None, uncertainty_threshold=Figure(value=None),
        feasible=False, reason=reason, settings={}, predicted=_undefined(),
    )  # fmt: skip


def _undefined() -> dict[str, Figure]:
    return {metric: Figure(value=None, unit=UNITS[metric]) for metric in METRICS}


def _degenerate(skip_rate: float | None) -> str:
    """What is degenerate about skipping all or nothing; up to the rounding of float32 masses."""
    if skip_rate is not None and skip_rate <= 0:
        return "degenerate: no calibration token is skipped"
    if skip_rate is not None and skip_rate >= 1 - 1e-6:
        return "degenerate: every calibration token is skipped"
    return ""
