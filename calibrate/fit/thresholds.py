"""The threshold of every rule on one trace, with its interval where the rule has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.fit.estimators import NUM_RESAMPLES
from calibrate.run.figure import figure
from calibrate.run.records import CalibrationRecord, DeriveRequest, Figure
from calibrate.run.traces import Trace
from hlmtheory.clusters import (
    bootstrap_totals,
    percentile_interval,
    resample_prompts,
    sum_by_prompt,
)
from hlmtheory.relation import line_moments, line_of_totals
from hlmtheory.risk import SkipAtoms, skip_risk_sums
from hlmtheory.scores import ExactUncertainty, Score
from hlmtheory.thresholds import (
    Threshold,
    risk_averse_threshold,
    risk_budget_threshold,
    risk_prone_threshold,
)

THRESHOLD_BINS = 400


@dataclass(frozen=True)
class DerivedThreshold:
    """A threshold and its cluster-bootstrap interval; None where its rule has none.

    The interval is of what a gate can be set to: it ends where the score does.
    """

    threshold: Threshold
    interval: tuple[float, float] | None = None

    @property
    def figure(self) -> Figure:
        """As results carry it; no value where the rule has no solution."""
        return figure(self.threshold.value, *(self.interval or ()))


def derive_thresholds(
    atoms: SkipAtoms,
    score: Score,
    trace: Trace,
    calibration: CalibrationRecord,
    request: DeriveRequest,
    certified: Callable[[float], Sequence[Threshold]],
) -> list[DerivedThreshold]:
    """Every rule's threshold with its cluster-bootstrap interval.

    The papers' linear rules rest on the line of beta on the score; for u that is the calibration's
    own. Bootstrap intervals of the risk budget are taken at THRESHOLD_BINS quantiles.

    Parameters
    ----------
    atoms : SkipAtoms
        What the gate sees of the trace, importance taken in.
    score : Score
    trace : Trace
    calibration : CalibrationRecord
    request : DeriveRequest
        Its budgets and confidence.
    certified : callable
        The certified thresholds of a budget.
    """
    counts = resample_prompts(atoms.num_prompts, NUM_RESAMPLES, np.random.default_rng(0))

    def interval(values: np.ndarray) -> tuple[float, float] | None:
        ends = percentile_interval(values, atoms.num_prompts, request.confidence)
        if ends is None:
            return None
        low, high = np.clip(ends, score.low, score.high)
        return float(low), float(high)

    can_reject = (trace["target_prob"] < trace["draft_prob"]).astype(float)
    moments = line_moments(score.of_draft(trace.step()), trace["rejection_prob"])
    moments = np.column_stack([moments, can_reject])
    moments = sum_by_prompt(moments, trace.prompt_index, trace.num_prompts)  # (P, 7)
    slope, intercept, delta = (float(part[0]) for part in _line(moments.sum(0, keepdims=True)))
    if score.name == ExactUncertainty.name:  # to the last digit what calibration.json says
        fit = calibration.fit
        slope, intercept, delta = (
            float(number.value or 0.0) for number in (fit.slope, fit.intercept, fit.delta)
        )
    slopes, intercepts, deltas = _line(bootstrap_totals(moments, counts))
    with np.errstate(divide="ignore", invalid="ignore"):
        averse, prone = -intercepts / slopes, (deltas - intercepts) / slopes
    bounds = (score.low, score.high)
    out = [
        DerivedThreshold(risk_averse_threshold(slope, intercept, *bounds), interval(averse)),
        DerivedThreshold(risk_prone_threshold(slope, intercept, delta, *bounds), interval(prone)),
    ]
    sums = skip_risk_sums(atoms, atoms.quantiles(THRESHOLD_BINS))
    risk = sums.resampled(counts).rates()[1]
    edges = np.append(sums.thresholds, score.low)  # the last stands for no threshold inside
    for alpha in request.risks:
        inside = (risk <= alpha).sum(axis=1)
        out += [
            DerivedThreshold(
                risk_budget_threshold(atoms, alpha, score.high), interval(edges[inside - 1])
            ),
            *map(DerivedThreshold, certified(alpha)),
        ]
    return out


def _line(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, intercept and Delta of totals (R, 7); slope 0 where the score does not vary."""
    line = line_of_totals(totals[:, :6])
    flat = np.isnan(line.slope)
    mean = totals[:, 2] / totals[:, 0]
    return (
        np.where(flat, 0.0, line.slope),
        np.where(flat, mean, line.intercept),
        totals[:, 6] / totals[:, 0],
    )
