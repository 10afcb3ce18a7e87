"""What a policy's own outputs do to the contexts that follow, measured within one set of reruns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from calibrate.derive.roads import Roads
from calibrate.run.figure import curve, figure
from calibrate.run.records import ContextShift, Figure, OperatingPoint, PooledShift
from calibrate.run.traces import Trace
from calibrate.validate.comparison import common_strata, stratum_numbers
from hlmtheory.clusters import RatioEstimate, error_terms, estimate_of, mean_over_tokens
from hlmtheory.policies import GatedPolicy, Policy

Loss = Callable[[Trace], np.ndarray]

NUM_PARTS = 4
"""Parts of an answer that the shift is told for."""


@dataclass(frozen=True)
class Shift:
    """The shift of one rerun, with what its errors are made of.

    Attributes
    ----------
    record : ContextShift
    below_threshold : RatioEstimate
        Its influence is of the rerun's prompts.
    predicted : RatioEstimate or None
        Of the calibration's prompts.
    by_part : list of RatioEstimate
    """

    record: ContextShift
    below_threshold: RatioEstimate
    predicted: RatioEstimate | None
    by_part: list[RatioEstimate]


def context_shift(
    point: OperatingPoint,
    policy: Policy,
    roads: Roads,
    rerun: Trace,
    references: Sequence[Trace],
    confidence: float,
) -> Shift | None:
    r"""Shift of one policy; docs/theory.md, (37).

    .. math:: \Delta = \hat E_{policy}[L] - \frac1R \sum_r \hat E_{server, r}[L]

    with L whether the score of the drawn draft is at most the threshold, beta times that, and the
    score. Every rerun whose outputs follow the server's law is a draw of one law: the mean of them
    is the reference. Paired by prompt, sharpest against the one with the same random numbers.

    Parameters
    ----------
    point : OperatingPoint
    policy : Policy
        The point's.
    roads : Roads
        That the predictions were made from.
    rerun : Trace
        Of the policy.
    references : sequence of Trace
        Of policies that follow the server, on the same prompts.
    confidence : float

    Returns
    -------
    Shift, or None where no threshold decides or no reference is of the same prompts.
    """
    others = [one for one in references if one.prompt_ids == rerun.prompt_ids]
    if not isinstance(policy, GatedPolicy) or not others:
        return None
    strata = _strata(roads.server, rerun)

    def of_score(trace: Trace) -> np.ndarray:
        return np.asarray(policy.score.of_draft(trace.step()), dtype=float)

    def below(trace: Trace) -> np.ndarray:
        return np.asarray(policy.score.skips(trace.step(), policy.threshold), dtype=float)

    def risk(trace: Trace) -> np.ndarray:
        return np.asarray(below(trace) * trace["rejection_prob"])

    def change(loss: Loss) -> RatioEstimate:
        return _less(_mean(rerun, loss), [_mean(one, loss) for one in others])

    length = 1 + max(int(one["step"].max()) for one in (rerun, *others))
    starts = np.unique(np.linspace(0, length, NUM_PARTS + 1).astype(int))[:-1]

    def in_part(number: int) -> Loss:
        def loss(trace: Trace) -> np.ndarray:
            part = np.searchsorted(starts, trace["step"], side="right") - 1
            return np.where(part == number, below(trace), np.nan)

        return loss

    by_part = [change(in_part(number)) for number in range(len(starts))]
    skip, predicted = change(below), roads.shift(policy, lambda trace: _mean(trace, below))
    record = ContextShift(
        policy=point.policy,
        rule=point.rule,
        below_threshold=_figure(skip, strata, confidence),
        predicted=Figure(value=None)
        if predicted is None
        else _figure(predicted, stratum_numbers(roads.server.categories), confidence),
        risk=_figure(change(risk), strata, confidence),
        score=_figure(change(of_score), strata, confidence),
        by_step=curve(starts.tolist(), [_of_strata(one, strata) for one in by_part], confidence),
        num_references=len(others),
        num_prompts=rerun.num_prompts,
    )
    return Shift(record, skip, predicted, by_part)


def pooled_shift(
    shifts: Sequence[Shift], roads: Roads, rerun: Trace, confidence: float
) -> PooledShift | None:
    """The mean of all shifts of the share below the threshold, and one test of it.

    All gated reruns, each counted once, and nothing chosen after looking; None without one. A
    prompt's part in all of them is one term, so reruns may depend on one another as they like.
    """
    if not shifts:
        return None
    strata = _strata(roads.server, rerun)
    pooled = _average([one.below_threshold for one in shifts])
    error = error_terms(pooled.influence, strata)
    spread = error.standard_error
    p_value = 2 * stats.t.sf(abs(pooled.value) / spread, error.freedom) if spread > 0 else None
    known = [one.predicted for one in shifts if one.predicted is not None]
    starts = shifts[0].record.by_step.grid
    alike = [one.by_part for one in shifts if one.record.by_step.grid == starts]
    parts = [_average(list(part)) for part in zip(*alike, strict=True)]
    return PooledShift(
        below_threshold=_figure(pooled, strata, confidence),
        p_value=None if p_value is None else float(p_value),
        predicted=_figure(_average(known), stratum_numbers(roads.server.categories), confidence)
        if len(known) == len(shifts)
        else Figure(value=None),
        by_step=curve(starts, [_of_strata(part, strata) for part in parts], confidence),
        num_reruns=len(shifts),
        num_prompts=rerun.num_prompts,
    )


def _strata(calibration: Trace, rerun: Trace) -> np.ndarray | None:
    shared = common_strata(calibration.categories, rerun.categories)
    return stratum_numbers(rerun.categories) if shared else None


def _mean(trace: Trace, loss: Loss) -> RatioEstimate:
    return mean_over_tokens(loss(trace), trace.prompt_index, trace.num_prompts)


def _less(own: RatioEstimate, others: Sequence[RatioEstimate]) -> RatioEstimate:
    """The first less the mean of the others, paired by prompt."""
    mean = _average(list(others))
    influence = np.nan_to_num(own.influence) - mean.influence
    return estimate_of(own.value - mean.value, influence)


def _average(estimates: Sequence[RatioEstimate]) -> RatioEstimate:
    influence = np.mean([np.nan_to_num(one.influence) for one in estimates], axis=0)
    return estimate_of(float(np.mean([one.value for one in estimates])), influence)


def _of_strata(estimate: RatioEstimate, strata: np.ndarray | None) -> RatioEstimate:
    """The same with the error of prompts that were drawn stratum by stratum."""
    error = error_terms(estimate.influence, strata)
    return RatioEstimate(
        estimate.value, error.standard_error, error.freedom + 1, estimate.influence
    )


def _figure(estimate: RatioEstimate, strata: np.ndarray | None, confidence: float) -> Figure:
    found = _of_strata(estimate, strata)
    return figure(found.value, *(found.interval(confidence) or ()))
