"""Certified thresholds of a run: which losses, under which caps, by which tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.derive.predict import CHUNK, policy_atoms, policy_steps, remembered
from calibrate.run.errors import UsageError
from calibrate.run.figure import SHARE, as_figure, figure
from calibrate.run.records import Certificate
from calibrate.run.traces import Trace
from hlmtheory.answer_cap import cap_fraction, capped_skips, suggested_cap
from hlmtheory.clusters import ratio_of_sums, sum_by_prompt
from hlmtheory.divergence import parting_probability
from hlmtheory.guarantees import (
    GridLosses,
    conformal_on_grid,
    conformal_threshold,
    fixed_sequence_threshold,
    learn_then_test_threshold,
)
from hlmtheory.kinds import Certified, TestMethod
from hlmtheory.policies import GatedPolicy
from hlmtheory.risk import SkipAtoms, SkipRiskSums, skip_risk_sums
from hlmtheory.steps import Step
from hlmtheory.thresholds import Threshold

AUTO = "auto"
TESTS: tuple[TestMethod, ...] = ("betting", "wsr", "hoeffding-bentkus", "t")
"""Tests that are compared: the one that thresholds are derived by comes first."""
CAPPED_TESTS: tuple[TestMethod, ...] = ("betting", "wsr")


def parse_cap(text: str) -> float | None:
    """A cap from the command line; None for one chosen from budget, confidence and prompts.

    Raises
    ------
    UsageError
        If it is neither a cap nor `auto`.
    """
    if text == AUTO:
        return None
    try:
        return float(cap_fraction(float(text)))
    except ValueError:
        raise UsageError(
            f"--answer-cap {text}: allowed are multiples of 0.001 above 0 and below 1, and {AUTO}"
        ) from None


def check_caps(texts: Sequence[str], certified: Certified) -> None:
    """Refuse texts that are no caps, and any beside answers, whose loss no cap bounds; (52).

    Raises
    ------
    UsageError
    """
    for text in texts:
        parse_cap(text)
    if texts and certified == "answers":
        raise UsageError(
            f"--answer-cap {texts[0]}: a cap does not bound the loss of --certify answers; leave "
            "it out, or certify prompts or tokens"
        )


def caps_at(texts: Sequence[str], alpha: float, delta: float, num_prompts: int) -> list[float]:
    """Caps of one budget, rising; `auto` is none where the budget needs none."""
    found = (parse_cap(text) for text in texts)
    chosen = (suggested_cap(alpha, delta, num_prompts) if one is None else one for one in found)
    return sorted({one for one in chosen if one is not None and one > alpha})


def grid_losses(
    trace: Trace,
    policy: GatedPolicy,
    certified: Certified = "prompts",
    max_tokens: int | None = None,
) -> GridLosses:
    """What each threshold of the score's fixed grid does to each prompt, under the policy's cap.

    Without a cap losses are averaged over the draft. Under one they are read off the drafts that
    were drawn, for these decide what is still allowed: then a prompt's loss is at most the cap.

    Parameters
    ----------
    trace : Trace
        A lossless one.
    policy : GatedPolicy
        Without a cap for answers.
    certified : {"prompts", "tokens", "answers"}
    max_tokens : int, optional
        That the trace ran under.

    Raises
    ------
    UsageError
        If the score has no bounds.
    """
    try:
        grid = policy.score.fixed_grid(trace.axes.vocab_size)
    except ValueError as error:
        raise UsageError(f"--score: {error}") from None
    plain = replace(policy, cap=None)
    sums = (
        _averaged(trace, plain, certified, grid)
        if policy.cap is None
        else _drawn(trace, plain, policy.cap, grid)
    )
    return GridLosses(sums, certified, max_tokens, policy.cap)


def _averaged(
    trace: Trace, policy: GatedPolicy, certified: Certified, grid: np.ndarray
) -> SkipRiskSums:
    if certified != "answers":
        return skip_risk_sums(policy_atoms(trace, policy), grid)
    shape = (trace.num_prompts, len(grid))
    skipped, log_kept = np.zeros(shape), np.zeros(shape)
    for number, step in enumerate(policy_steps(trace, policy)):
        score, mass, rejection = policy.atoms(step)
        own = np.arange(len(mass))  # every token stands for itself
        found = skip_risk_sums(
            SkipAtoms.of_candidates(score, mass, rejection, own, len(mass)), grid
        )
        index = trace.prompt_index[number * CHUNK : number * CHUNK + len(mass)]
        names = ("tv_distance", "output_prob", "output_target_prob")
        parting = parting_probability(found.rejected, *(step[name] for name in names))
        with np.errstate(divide="ignore"):
            kept = np.log1p(-parting)
        skipped += sum_by_prompt(found.skipped, index, trace.num_prompts)
        log_kept += sum_by_prompt(kept, index, trace.num_prompts)
    num_tokens = np.bincount(trace.prompt_index, minlength=trace.num_prompts).astype(float)
    return SkipRiskSums(grid, skipped, -np.expm1(log_kept), num_tokens)


def _drawn(trace: Trace, policy: GatedPolicy, cap: float, grid: np.ndarray) -> SkipRiskSums:
    step = Step(trace.axes, remembered(trace, policy))
    wanted = [policy.with_threshold(one).gate_of_draft(step) for one in grid]
    index, num = trace.prompt_index, trace.num_prompts
    done = capped_skips(np.stack(wanted, axis=-1), index, cap)
    lost = trace["rejection_prob"][:, None]
    skipped, rejected = (
        sum_by_prompt(values.astype(float), index, num) for values in (done, done * lost)
    )
    return SkipRiskSums(grid, skipped, rejected, np.bincount(index, minlength=num).astype(float))


def certified_thresholds(
    trace: Trace,
    policy: GatedPolicy,
    atoms: SkipAtoms,
    alpha: float,
    delta: float,
    certified: Certified,
    max_tokens: int,
) -> list[Threshold]:
    """The conformal threshold and that of Learn-then-Test; under a cap the second alone.

    Parameters
    ----------
    trace, policy
        As in :func:`grid_losses`.
    atoms : SkipAtoms
        What the policy's gate sees: without a cap all of its scores are candidates.
    alpha, delta : float
    certified : {"prompts", "tokens", "answers"}
    max_tokens : int
    """
    if policy.cap is None and certified != "answers":
        most = max_tokens if certified == "tokens" else None
        high = policy.score.high
        return [
            conformal_threshold(atoms, alpha, high, max_tokens=most),
            learn_then_test_threshold(atoms, alpha, delta, high, max_tokens=most),
        ]
    if certified == "answers" and not policy.verifies_whole:
        reason = (
            "answers are certified for accept/resample with the whole of x, and this sends less"
        )
        return [_refused(family, alpha, reason) for family in ("conformal", "ltt")]
    grid = grid_losses(trace, policy, certified, max_tokens)
    tested = fixed_sequence_threshold(grid, alpha, delta)
    return [tested] if policy.cap is not None else [conformal_on_grid(grid, alpha), tested]


def _refused(family: str, alpha: float, reason: str) -> Threshold:
    rule = f"{family}-{alpha:g}"
    return Threshold(rule, family, float("nan"), False, reason, alpha, "answers")


def certificates(
    trace: Trace,
    policy: GatedPolicy,
    budgets: Sequence[float],
    confidence: float,
    certified: Certified,
    cap_texts: Sequence[str],
    max_tokens: int,
) -> tuple[Certificate, ...]:
    """What every test certifies at every budget for one gate, without and under each cap.

    Caps that are asked for together share delta equally, so that one may be chosen among them
    after looking; `auto` and no cap are each a choice made before.

    Parameters
    ----------
    trace : Trace
    policy : GatedPolicy
        At any threshold, without a cap.
    budgets : sequence of float
    confidence : float
    certified : {"prompts", "tokens", "answers"}
    cap_texts : sequence of str
        As --answer-cap takes them; none for answers.
    max_tokens : int
    """
    out = []
    order = _by_hash(trace.prompt_ids)
    grids: dict[float | None, GridLosses] = {}
    for alpha in budgets:
        caps = caps_at(cap_texts, alpha, 1 - confidence, trace.num_prompts)
        for cap in (None, *caps):
            if cap not in grids:
                capped = replace(policy, cap=cap)
                grids[cap] = grid_losses(trace, capped, certified, max_tokens).in_order(order)
            share = 1 if cap is None else len(caps)
            for test in TESTS if cap is None else CAPPED_TESTS:
                level, promised = (1 - confidence) / share, holds(test, trace.categories)
                out.append(_certificate(grids[cap], alpha, level, test, confidence, promised))
    return tuple(out)


def holds(test: TestMethod, categories: Sequence[str]) -> bool:
    """Whether a test promises its confidence, of prompts of these categories, or of none.

    Categories have fixed numbers of prompts, which are no draws of one law: WSR, which learns as it
    goes, needs them to be; (51).
    """
    return test != "t" and (test != "wsr" or len(set(categories)) < 2)


def _by_hash(prompt_ids: Sequence[str]) -> np.ndarray:
    """An order that has nothing to do with what ids say, such as a topic or a place in a file."""
    keys = [hashlib.sha256(prompt_id.encode()).digest() for prompt_id in prompt_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def _certificate(
    grid: GridLosses,
    alpha: float,
    delta: float,
    test: TestMethod,
    confidence: float,
    guaranteed: bool,
) -> Certificate:
    found = fixed_sequence_threshold(grid, alpha, delta, test)
    sums, skip_rate = grid.sums, figure(0.0)
    if found.feasible:
        place = int(np.flatnonzero(sums.thresholds == found.value)[0])
        share = ratio_of_sums(sums.skipped[:, place], sums.num_tokens)
        skip_rate = as_figure(share, "", confidence, *SHARE)
    return Certificate(
        rule=test + ("" if grid.cap is None else f"@cap-{grid.cap:g}"),
        test=test,
        certified=grid.certified,
        guaranteed=guaranteed,
        cap=grid.cap,
        budget=alpha,
        confidence=1 - delta,
        feasible=found.feasible,
        reason=found.reason,
        threshold=found.value if found.feasible else None,
        skip_rate=skip_rate,
        bound=found.bound,
    )
