"""Everything that calibration.json says, from a trace."""

from __future__ import annotations

import numpy as np

from calibrate.fit.estimators import compare_scores
from calibrate.fit.line import fit_line, relation
from calibrate.run.errors import UserError
from calibrate.run.figure import AMOUNT, SHARE, as_figure, curve
from calibrate.run.records import AttentionSummary, CalibrationRecord, Curve, Figure, RunRecord
from calibrate.run.traces import Trace
from hlmtheory.agreement import disagreement_log_e_value
from hlmtheory.clusters import mean_over_tokens, ratio_of_sums
from hlmtheory.importance import normalised_entropy

ATTENTION_COLUMNS = ("attention_entropy", "attention_sink", "context_attention", "num_attended")


def summarise(trace: Trace, info: RunRecord, confidence: float = 0.95) -> CalibrationRecord:
    """The content of calibration.json from a run's trace and its run.json.

    Raises
    ------
    UserError
        If mean beta and mean total variation differ by more than draws can.
    """
    refuse_disagreement(trace)
    u, beta, index = trace["uncertainty"], trace["rejection_prob"], trace.prompt_index
    can_reject = trace["target_prob"] < trace["draft_prob"]
    fit = fit_line(u, beta, can_reject, index, trace.num_prompts, confidence)
    estimators, learned = compare_scores(trace, confidence)
    return CalibrationRecord(
        pair=info.pair,
        settings=info.settings,
        num_prompts=trace.num_prompts,
        num_tokens=trace.num_tokens,
        confidence=confidence,
        fit=fit,
        rejection_excess=as_figure(
            mean_over_tokens(beta - trace["tv_distance"], index, trace.num_prompts), "", confidence
        ),
        relation=relation(u, beta, index, trace.num_prompts, fit, confidence),
        estimators=estimators,
        learned=learned,
        attention=_attention(trace, confidence),
        timings=info.timings,
    )


def refuse_disagreement(trace: Trace) -> None:
    """Refuse a trace whose drafts were not drawn from the law that it recorded.

    Raises
    ------
    UserError
        By chance with a probability of at most 1e-6.
    """
    beta, tv = trace["rejection_prob"], trace["tv_distance"]
    if disagreement_log_e_value(beta, tv) >= np.log(1e6):
        raise UserError(
            f"mean rejection probability {beta.mean():.4g}, mean total variation {tv.mean():.4g} "
            f"of {trace.num_tokens} tokens: equal but for the draws, which explain this once in a "
            "million; the drafts are not the law's, so nothing is fitted; please report it"
        )


def _attention(trace: Trace, confidence: float) -> AttentionSummary | None:
    """Statistics of the attention rows; None where the trace has none."""
    if any(name not in trace for name in ATTENTION_COLUMNS):
        return None

    def mean(name: str, unit: str = "") -> Figure:
        estimate = mean_over_tokens(trace[name], trace.prompt_index, trace.num_prompts)
        return as_figure(estimate, unit, confidence, *AMOUNT)

    # The sink is no part of the entropy.
    share = normalised_entropy(trace["attention_entropy"], trace["num_attended"] - 1.0)
    return AttentionSummary(
        entropy=mean("attention_entropy", "nat"),
        sink=mean("attention_sink"),
        context=mean("context_attention"),
        normalised_entropy_by_step=_by_step(trace, share, confidence),
        sink_by_step=_by_step(trace, trace["attention_sink"], confidence),
    )


def _by_step(trace: Trace, values: np.ndarray, confidence: float) -> Curve:
    """Means by position in the answer, from 0; positions without a value are left out."""
    known = np.isfinite(values)
    steps = trace["step"].astype(np.int64)
    shape = (trace.num_prompts, int(steps.max()) + 1)
    cell = trace.prompt_index[known] * shape[1] + steps[known]
    sums, counts = (
        np.bincount(cell, weights=weights, minlength=shape[0] * shape[1]).reshape(shape)
        for weights in (values[known], np.ones(int(known.sum())))
    )
    grid = np.flatnonzero(counts.any(axis=0))
    estimates = [ratio_of_sums(sums[:, step], counts[:, step]) for step in grid]
    return curve(grid, estimates, confidence, *SHARE)
