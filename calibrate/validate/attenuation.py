"""What drawing K tokens instead of summing exactly does to the fitted line: equation (6), measured.

One trace serves every K, for each grid of K temperatures is a function
of the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import figure
from calibrate.run.folder import provenance, read_record, write_record
from calibrate.run.prompts import Prompt, TokenizedPrompt, read_prompts, tokenize_prompts
from calibrate.run.records import (
    AttenuationRecord,
    AttenuationRow,
    CalibrationRecord,
    Figure,
    RunRecord,
)
from calibrate.validate.validation import check_pair
from hlmtheory.clusters import jackknife_correlation_interval, sum_by_prompt
from hlmtheory.policies import calibration_policy
from hlmtheory.relation import Line, line_moments, line_of_totals
from hlmtheory.uncertainty import (
    Attenuation,
    attenuation,
    log_partitions,
    perturbed_probabilities,
    sampled_uncertainty,
    sampled_uncertainty_variance,
    temperatures,
)

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodingSettings
    from calibrate.decode.recording import Columns
    from calibrate.pairs.registry import LoadedPair
    from hlmtheory.steps import LawStep

NUM_TEMPERATURES = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class AttenuationTrace:
    """Tokens decoded losslessly, with the uncertainty of several grids.

    Attributes
    ----------
    num_temperatures : tuple of int
        K of each column, G of them.
    exact, sampled, variance : float array (N, G)
        u of the K-temperature grid, one draw of u_K, and Var(u_K | s, d).
    rejection_prob : float array (N,)
        beta of the draft.
    prompt_index : int array (N,)
    num_prompts : int
    """

    num_temperatures: tuple[int, ...]
    exact: np.ndarray
    sampled: np.ndarray
    variance: np.ndarray
    rejection_prob: np.ndarray
    prompt_index: np.ndarray
    num_prompts: int


def decode_attenuation_trace(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    settings: DecodingSettings,
    num_temperatures: Sequence[int] = NUM_TEMPERATURES,
    theta_max: float = 2.0,
    on_step: Callable[[int, int], None] | None = None,
) -> AttenuationTrace:
    """Decode once, losslessly, and record u, u_K and its variance for every K.

    The grids share the perturbation uniforms of a token: grid K compares its K probabilities with
    the first K of the 128 columns. Within a grid the columns are independent, which is all that
    (6) needs; rows of the table are therefore dependent on one another, each is right by itself.

    Parameters
    ----------
    pair : LoadedPair
    prompts : sequence of TokenizedPrompt
    settings : DecodingSettings
        Its own `thetas` are recorded by the engine as ever and not used here.
    num_temperatures : sequence of int
        K of each grid, from 2 to 128.
    theta_max : float
        Largest temperature of every grid, > 0.
    on_step : callable, optional
        See :func:`calibrate.decode.engine.decode`.

    Raises
    ------
    UsageError
        If a K is outside 2 to 128.
    """
    from calibrate.decode.engine import decode
    from calibrate.decode.models import transformer_models
    from calibrate.decode.streams import PERTURBATION

    most = PERTURBATION.stop - PERTURBATION.start
    for number in num_temperatures:
        if not 2 <= number <= most:
            raise UsageError(f"num_temperatures = {number}: allowed is 2 to {most}")
    grids = [temperatures(number, theta_max) for number in num_temperatures]

    def observe(step: LawStep) -> Columns:
        at_draft = step["draft_token"][:, None]
        draws = step.noise.perturbation
        exact, sampled, variance = [], [], []
        for grid in grids:
            partitions = log_partitions(step.logits, grid)
            p = perturbed_probabilities(step.logits, at_draft, grid, partitions)[:, 0]  # (B, K)
            exact.append(1.0 - p.mean(-1))
            sampled.append(sampled_uncertainty(p, draws[:, : p.shape[-1]].to(p.dtype)))
            variance.append(sampled_uncertainty_variance(p))
        kinds = {"grid_exact": exact, "grid_sampled": sampled, "grid_variance": variance}
        return {
            name: np.stack([one.cpu().numpy() for one in values], -1)  # (B, G)
            for name, values in kinds.items()
        }

    parts: list[Columns] = []
    index_of = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    batches = decode(
        *transformer_models(pair),
        prompts,
        calibration_policy(),
        settings,
        pair.eos_token_ids,
        on_step,
        observer=observe,
    )
    for batch in batches:
        places = np.array([index_of[prompt_id] for prompt_id in batch.prompt_ids])
        parts.append({**batch.columns, "prompt_index": places[batch.columns["row"]]})

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    return AttenuationTrace(
        tuple(num_temperatures),
        joined("grid_exact").astype(np.float64),
        joined("grid_sampled").astype(np.float64),
        joined("grid_variance").astype(np.float64),
        joined("rejection_prob").astype(np.float64),
        joined("prompt_index"),
        len(prompts),
    )


def attenuation_table(
    trace: AttenuationTrace, confidence: float = 0.95
) -> tuple[AttenuationRow, ...]:
    r"""Predicted and measured line for each K; docs/theory.md, (6).

    .. math:: r_K = \sqrt{\lambda_K}\, r, \qquad a_K = \lambda_K\, a

    r, a and lambda_K come from the exact u of the same K temperatures and its sampling variance;
    no drawn u_K enters the prediction.

    Parameters
    ----------
    trace : AttenuationTrace
        Of at least three prompts, for intervals.
    confidence : float
        In (0, 1).

    Returns
    -------
    tuple of AttenuationRow
        One for each K, in the trace's order.

    Raises
    ------
    UserError
        If every draft is as likely to be rejected as any other: there is no line then.
    """
    if np.ptp(trace.rejection_prob) == 0:
        raise UserError(
            f"every draft has rejection probability {trace.rejection_prob[0]:g}: there is no line "
            "to attenuate; choose a pair, or a sampling, that disagrees now and then"
        )
    return tuple(_row(trace, column, confidence) for column in range(len(trace.num_temperatures)))


def _row(trace: AttenuationTrace, column: int, confidence: float) -> AttenuationRow:
    u, drawn = trace.exact[:, column], trace.sampled[:, column]
    beta, variance = trace.rejection_prob, trace.variance[:, column]
    moments = np.column_stack([line_moments(u, beta), line_moments(drawn, beta), variance])
    by_prompt = sum_by_prompt(moments, trace.prompt_index, trace.num_prompts)
    by_prompt = by_prompt[by_prompt[:, 0] > 0]  # (P, 13)
    total = by_prompt.sum(0)
    left_out = total - by_prompt
    whole, without = _predicted_and_measured(total), _predicted_and_measured(left_out)
    interval = jackknife_correlation_interval(
        by_prompt, lambda sums: _predicted_and_measured(sums).measured.correlation, confidence
    )
    return AttenuationRow(
        num_temperatures=trace.num_temperatures[column],
        reliability=float(whole.predicted.reliability),
        exact_correlation=float(whole.exact.correlation),
        predicted_correlation=float(whole.predicted.correlation),
        predicted_slope=float(whole.predicted.slope),
        measured_correlation=figure(float(whole.measured.correlation), *(interval or (None, None))),
        measured_slope=_jackknife(whole.measured.slope, without.measured.slope, confidence),
        correlation_gap=_jackknife(whole.correlation_gap, without.correlation_gap, confidence),
        slope_gap=_jackknife(whole.slope_gap, without.slope_gap, confidence),
        num_tokens=len(u),
        num_prompts=len(by_prompt),
    )


@dataclass(frozen=True)
class _Lines:
    """Both lines, from totals (..., 13) of :func:`_row`: every field has the leading shape."""

    exact: Line
    predicted: Attenuation
    measured: Line

    @property
    def correlation_gap(self) -> np.ndarray:
        return self.measured.correlation - self.predicted.correlation

    @property
    def slope_gap(self) -> np.ndarray:
        return self.measured.slope - self.predicted.slope


def _predicted_and_measured(totals: np.ndarray) -> _Lines:
    exact, measured = line_of_totals(totals[..., :6]), line_of_totals(totals[..., 6:12])
    noise = totals[..., 12] / totals[..., 0]
    predicted = attenuation(exact.variance, noise, exact.slope, exact.correlation)
    return _Lines(exact, predicted, measured)


def _jackknife(value: float | np.ndarray, left_out: np.ndarray, confidence: float) -> Figure:
    """Student-t interval from the values with one prompt left out."""
    value = float(value)
    num = len(left_out)
    if num < 3:
        return figure(value)
    error = float(((num - 1) / num * np.sum((left_out - left_out.mean()) ** 2)) ** 0.5)
    half = float(stats.t.ppf(0.5 + confidence / 2, num - 1)) * error
    return figure(value, value - half, value + half)


@dataclass(frozen=True)
class AttenuationPlan:
    """What one `hlm attenuation` is to decode, checked before any model is loaded."""

    run: Path
    calibration: CalibrationRecord
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    command: tuple[str, ...]


def prepare_attenuation(
    run: Path,
    limit: int = 48,
    max_new_tokens: int = 32,
    command: Sequence[str] = (),
    replace: bool = False,
) -> AttenuationPlan:
    """Take the first `limit` prompts of the calibration itself; loads no model.

    A study that the run holds is replaced on request only.

    Raises
    ------
    UserError, UsageError
        If the run is not calibrated, its prompts are no longer where they were, or it holds such a
        study already.
    """
    if (run / AttenuationRecord.file_name).is_file() and not replace:
        raise UsageError(
            f"RUN {run}: holds {AttenuationRecord.file_name}; --replace measures it anew"
        )
    calibration = read_record(run, CalibrationRecord)
    wanted = read_record(run, RunRecord).prompt_ids[:limit]
    source = calibration.settings.prompts
    found = {p.prompt_id: p for p in read_prompts(None if source == "shipped" else source)}
    for prompt_id in wanted:
        if prompt_id not in found:
            raise UsageError(f"{source}: holds no prompt {prompt_id!r} any more; calibrate again")
    prompts = tuple(found[prompt_id] for prompt_id in wanted)
    return AttenuationPlan(run, calibration, prompts, max_new_tokens, tuple(command))


def write_attenuation(
    plan: AttenuationPlan,
    pair: LoadedPair,
    on_step: Callable[[int, int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> AttenuationRecord:
    """Decode, and write RUN/attenuation.json: a row for each K, most K last."""
    from calibrate.decode.engine import DecodingSettings
    from calibrate.decode.memory import automatic_batch_size

    check_pair(plan.calibration, pair)
    num = plan.max_new_tokens
    prompts = tokenize_prompts(plan.prompts, pair.tokenizer, num, pair.max_context)
    settings = DecodingSettings(
        sampling=plan.calibration.settings.sampling,
        max_new_tokens=num,
        batch_size=automatic_batch_size(pair, prompts, num),
        seed=plan.calibration.settings.seed,
        trace="minimal",
    )
    if on_total is not None:
        on_total(len(prompts) * num)
    trace = decode_attenuation_trace(pair, prompts, settings, on_step=on_step)
    confidence = plan.calibration.confidence
    result = AttenuationRecord(
        pair=plan.calibration.pair,
        confidence=confidence,
        provenance=provenance(plan.command),
        rows=attenuation_table(trace, confidence),
    )
    write_record(plan.run, result)
    return result
