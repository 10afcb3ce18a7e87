"""What a policy's own outputs do to the contexts that follow, measured within one set of reruns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from calibrate.derive.operating_points import policy_from_settings
from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from calibrate.validate.comparison import common_strata, difference_error, stratum_numbers
from hlmtheory.clusters import ErrorTerms, RatioEstimate, error_terms, mean_over_tokens
from hlmtheory.gates import UncertaintyGate, UncertaintyImportanceGate

Loss = Callable[[Trace], np.ndarray]

REFERENCE = ("hlm", "none")
"""The rerun whose outputs follow the server's law, as those of the calibration do."""


@dataclass(frozen=True)
class ContextShift:
    """How a policy's contexts differ from the server's, at the policy's own threshold.

    Attributes
    ----------
    policy, rule : str
    below_threshold : Figure
        Change of P(u <= u_th): of the skip rate, where uncertainty alone decides.
    risk_below_threshold : Figure
        Change of E[beta 1{u <= u_th}].
    uncertainty : Figure
        Change of E[u].
    prompts_below_threshold, prompts_risk : Figure
        What is left of the first two in measured less predicted: `hlm` on the rerun's prompts less
        the calibration, with the interval of (36).
    num_prompts : int
    """

    policy: str
    rule: str
    below_threshold: Figure
    risk_below_threshold: Figure
    uncertainty: Figure
    prompts_below_threshold: Figure
    prompts_risk: Figure
    num_prompts: int


def context_shift(
    point: dict[str, Any],
    calibration: Trace,
    rerun: Trace,
    reference: Trace,
    confidence: float,
) -> ContextShift | None:
    r"""Shift of one policy; docs/theory.md, (37).

    .. math:: \Delta = \hat E_{policy}[L] - \hat E_{hlm}[L], \qquad
              L = 1\{u \le u_{th}\},\ \beta\, 1\{u \le u_{th}\},\ u

    on the same prompts. Predictions are made along the server's outputs; Delta is what they leave
    out. Paired by prompt, so that what prompts differ in is no error; Student-t interval, prompts
    stratified by category where they have one.

    Parameters
    ----------
    point : dict
        An entry of operating_points.json.
    calibration : Trace
        That the predictions were made from.
    rerun : Trace
        Of the policy.
    reference : Trace
        Of `hlm` on the same prompts with the same random numbers.
    confidence : float

    Returns
    -------
    ContextShift, or None where no threshold on uncertainty decides or prompts differ.
    """
    policy = policy_from_settings(
        point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
    )
    gate = policy.gate
    if (
        not isinstance(gate, UncertaintyGate | UncertaintyImportanceGate)
        or rerun.prompt_ids != reference.prompt_ids
    ):
        return None
    shared = common_strata(calibration.categories, reference.categories)
    strata = stratum_numbers(rerun.categories) if shared else None

    def below(trace: Trace) -> np.ndarray:
        return (trace["uncertainty"] <= gate.threshold).astype(float)

    def risk(trace: Trace) -> np.ndarray:
        return below(trace) * trace["rejection_prob"]

    def estimate(loss: Loss, trace: Trace) -> RatioEstimate:
        return mean_over_tokens(loss(trace), trace.prompt_index, trace.num_prompts)

    def figure(value: float, error: ErrorTerms | None) -> Figure:
        if error is None or not error.freedom:
            return Figure(value)
        half = float(stats.t.ppf(0.5 + confidence / 2, error.freedom)) * error.standard_error
        return Figure(value, value - half, value + half)

    def change(loss: Loss) -> Figure:
        own, other = estimate(loss, rerun), estimate(loss, reference)
        error = error_terms(own.influence - other.influence, strata)
        return figure(own.value - other.value, error)

    def of_prompts(loss: Loss) -> Figure:
        before, now = estimate(loss, calibration), estimate(loss, reference)
        error = difference_error(before.influence, now.influence, shared)
        return figure(now.value - before.value, error)

    return ContextShift(
        point["policy"],
        point["rule"],
        change(below),
        change(risk),
        change(lambda trace: trace["uncertainty"]),
        of_prompts(below),
        of_prompts(risk),
        rerun.num_prompts,
    )
