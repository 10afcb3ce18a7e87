"""What drawing K tokens instead of summing exactly does to the fitted line: equation (6), measured.

One trace under hlm serves every K: each grid of K temperatures is a function of the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from calibrate.decode.engine import DecodingSettings, decode
from calibrate.decode.models import TransformerModel
from calibrate.decode.recording import Columns
from calibrate.decode.streams import PERTURBATION
from calibrate.pairs.loading import LoadedPair
from calibrate.run.errors import UsageError
from calibrate.run.folder import Figure, provenance, write_json
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.clusters import jackknife_correlation_interval, sum_by_prompt
from hlmtheory.policies import make_policy
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

ATTENUATION_NAME = "attenuation.json"
NUM_TEMPERATURES = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class AttenuationTrace:
    """Tokens of one run under hlm, with the uncertainty of several grids.

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

    def __post_init__(self) -> None:
        shape = (len(self.rejection_prob), len(self.num_temperatures))
        for name in ("exact", "sampled", "variance"):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}: needed is {shape}, tokens by grids")
        if self.prompt_index.shape != shape[:1]:
            raise ValueError(
                f"prompt_index has shape {self.prompt_index.shape}: needed {shape[:1]}"
            )


@dataclass(frozen=True)
class AttenuationRow:
    """One K: the line predicted from exact u, and the one measured on drawn u_K.

    Attributes
    ----------
    num_temperatures : int
        K.
    reliability : float
        lambda_K.
    exact_correlation : float
        r of beta and the exact u of this grid.
    predicted_correlation, predicted_slope : float
        sqrt(lambda_K) r and lambda_K a.
    measured_correlation, measured_slope : Figure
        Of beta on u_K, with intervals clustered by prompt.
    correlation_gap, slope_gap : Figure
        Measured less predicted. The interval leaves out one prompt at a time in both, so that what
        they share, the choice of prompts, cancels: it is much shorter than the one above.
    num_tokens, num_prompts : int
    """

    num_temperatures: int
    reliability: float
    exact_correlation: float
    predicted_correlation: float
    predicted_slope: float
    measured_correlation: Figure
    measured_slope: Figure
    correlation_gap: Figure
    slope_gap: Figure
    num_tokens: int
    num_prompts: int


def decode_attenuation_trace(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    settings: DecodingSettings,
    num_temperatures: Sequence[int] = NUM_TEMPERATURES,
    theta_max: float = 2.0,
) -> AttenuationTrace:
    """Decode once under hlm and record u, u_K and its variance for every K.

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

    Raises
    ------
    UsageError
        If a K is outside 2 to 128.
    """
    most = PERTURBATION.stop - PERTURBATION.start
    for number in num_temperatures:
        if not 2 <= number <= most:
            raise UsageError(f"num_temperatures = {number}: allowed is 2 to {most}")
    grids = [temperatures(number, theta_max) for number in num_temperatures]

    def observe(
        z: torch.Tensor, draft: torch.Tensor, x: torch.Tensor, uniforms: np.ndarray
    ) -> Columns:
        draws = torch.from_numpy(uniforms[:, PERTURBATION]).to(z.device, z.dtype)
        at_draft = draft[:, None]
        exact, sampled, variance = [], [], []
        for grid in grids:
            p = perturbed_probabilities(z, at_draft, grid, log_partitions(z, grid))[:, 0]  # (B, K)
            exact.append(1.0 - p.mean(-1))
            sampled.append(sampled_uncertainty(p, draws[:, : len(grid.values)]))
            variance.append(sampled_uncertainty_variance(p))
        return {
            "grid_exact": torch.stack(exact, -1).cpu().numpy(),  # (B, G)
            "grid_sampled": torch.stack(sampled, -1).cpu().numpy(),
            "grid_variance": torch.stack(variance, -1).cpu().numpy(),
        }

    parts: list[Columns] = []
    index_of = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    batches = decode(
        TransformerModel(pair.slm, pair.vocab_size),
        TransformerModel(pair.llm, pair.vocab_size),
        prompts,
        make_policy("hlm"),
        settings,
        pair.eos_token_ids,
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
    """
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
        measured_correlation=Figure(float(whole.measured.correlation), *(interval or (None, None))),
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


def _jackknife(value: np.ndarray, left_out: np.ndarray, confidence: float) -> Figure:
    """Student-t interval from the values with one prompt left out."""
    num = len(left_out)
    if num < 3:
        return Figure(float(value))
    error = float(((num - 1) / num * np.sum((left_out - left_out.mean()) ** 2)) ** 0.5)
    half = float(stats.t.ppf(0.5 + confidence / 2, num - 1)) * error
    return Figure(float(value), float(value) - half, float(value) + half)


def write_attenuation(
    run: Path, table: Sequence[AttenuationRow], pair: dict[str, Any], command: Sequence[str] = ()
) -> dict[str, Any]:
    """Write RUN/attenuation.json and return its content: a row for each K, most K last.

    `pair` says which models the tokens are from; see `calibrate.fit.calibration.pair_identity`.
    """
    rows = sorted(table, key=lambda row: row.num_temperatures)
    result: dict[str, Any] = {
        "pair": pair,
        **provenance(command),
        "rows": [asdict(row) for row in rows],
    }
    write_json(run / ATTENUATION_NAME, result)
    return result
