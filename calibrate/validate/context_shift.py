"""What a policy's own outputs do to the contexts that follow, measured within one set of reruns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from calibrate.run.figure import figure
from calibrate.run.records import ContextShift, Figure, OperatingPoint
from calibrate.run.traces import Trace
from calibrate.validate.comparison import common_strata, difference_error, stratum_numbers
from hlmtheory.clusters import ErrorTerms, RatioEstimate, error_terms, mean_over_tokens
from hlmtheory.policies import GatedPolicy, Policy

Loss = Callable[[Trace], np.ndarray]


def is_reference(policy: Policy) -> bool:
    """Whether outputs follow the server's law, as a calibration's do, from the device's drafts."""
    return policy.follows_server and policy.role == "both"


def context_shift(
    point: OperatingPoint,
    policy: Policy,
    calibration: Trace,
    rerun: Trace,
    reference: Trace,
    confidence: float,
) -> ContextShift | None:
    r"""Shift of one policy; docs/theory.md, (37).

    .. math:: \Delta = \hat E_{policy}[L] - \hat E_{server}[L], \qquad
              L = 1\{s \le s_{th}\},\ \beta\, 1\{s \le s_{th}\},\ s

    with the score s of the gate, on the same prompts. Predictions are made along the server's
    outputs; Delta is what they leave out. Paired by prompt, so that what prompts differ in is no
    error; Student-t interval, prompts stratified by category where they have one.

    Parameters
    ----------
    point : OperatingPoint
    policy : Policy
        The point's.
    calibration : Trace
        That the predictions were made from.
    rerun : Trace
        Of the policy.
    reference : Trace
        Of a policy that :func:`is_reference`, on the same prompts with the same random numbers.
    confidence : float

    Returns
    -------
    ContextShift, or None where no threshold decides or prompts differ.
    """
    if not isinstance(policy, GatedPolicy) or rerun.prompt_ids != reference.prompt_ids:
        return None
    shared = common_strata(calibration.categories, reference.categories)
    strata = stratum_numbers(rerun.categories) if shared else None

    def score(trace: Trace) -> np.ndarray:
        return np.asarray(policy.score.of_draft(trace.step()), dtype=float)

    def below(trace: Trace) -> np.ndarray:
        return np.asarray(policy.score.skips(trace.step(), policy.threshold), dtype=float)

    def risk(trace: Trace) -> np.ndarray:
        return np.asarray(below(trace) * trace["rejection_prob"])

    def estimate(loss: Loss, trace: Trace) -> RatioEstimate:
        return mean_over_tokens(loss(trace), trace.prompt_index, trace.num_prompts)

    def with_interval(value: float, error: ErrorTerms | None) -> Figure:
        if error is None or not error.freedom:
            return figure(value)
        half = float(stats.t.ppf(0.5 + confidence / 2, error.freedom)) * error.standard_error
        return figure(value, value - half, value + half)

    def change(loss: Loss) -> Figure:
        own, other = estimate(loss, rerun), estimate(loss, reference)
        error = error_terms(own.influence - other.influence, strata)
        return with_interval(own.value - other.value, error)

    def of_prompts(loss: Loss) -> Figure:
        before, now = estimate(loss, calibration), estimate(loss, reference)
        error = difference_error(before.influence, before.influence, now.influence, shared)
        return with_interval(now.value - before.value, error)

    return ContextShift(
        policy=point.policy,
        rule=point.rule,
        below_threshold=change(below),
        risk_below_threshold=change(risk),
        score=change(score),
        prompts_below_threshold=of_prompts(below),
        prompts_risk=of_prompts(risk),
        num_prompts=rerun.num_prompts,
    )
