"""`hlm validate`: run the whole pipeline again at the derived settings and compare.

The prompts are fresh, the seed is fresh, and the tokens are decoded by the policy itself, not
replayed from the calibration trace. What is compared is the theory; device, link and model times
are the ones the predictions were made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from calibrate.estimates import as_figure, share_figure
from calibrate.operating_points import policy_from_settings
from calibrate.policy_tokens import METRICS, UNITS, Economics, measured_tokens, metrics
from calibrate.prompts import TokenizedPrompt
from calibrate.runs import Figure
from calibrate.traces import Trace, write_shard
from hlmtheory.clusters import RatioEstimate, mean_over_tokens
from hlmtheory.policies import Policy

if TYPE_CHECKING:
    from calibrate.engine import DecodedBatch, DecodingSettings
    from calibrate.pairs import LoadedPair

OnStep = Callable[[int, int], None]

# Sums of float32 probabilities over a vocabulary, relative to figures of size one or more.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Cell:
    """One predicted figure against its measurement.

    Attributes
    ----------
    policy, rule, metric : str
    predicted : Figure
        Interval for the *rerun's* figure: calibration and validation sampling both.
    measured : Figure
        With its own sampling interval.
    covered : bool or None
        Whether the measured value lies inside the predicted interval; None where there is none.
    """

    policy: str
    rule: str
    metric: str
    predicted: Figure
    measured: Figure
    covered: bool | None

    @property
    def fixed(self) -> bool:
        """Whether the policy alone fixes the figure: the prediction leaves room for rounding only.

        A rerun in which a rare event did not happen has no spread either, but can miss.
        """
        low, high, value = self.predicted.low, self.predicted.high, self.predicted.value
        if low is None or high is None or value is None:
            return False
        return high - low <= 4 * ROUNDING * max(abs(value), 1.0)  # both ends, and rounding itself


def prediction_interval(
    predicted: Figure, num_calibration: int, measured: RatioEstimate, confidence: float
) -> tuple[float, float] | None:
    r"""Interval in which a rerun on other prompts is expected to fall.

    .. math:: \hat\theta \pm t_{n+m-2}\, s \sqrt{1/n + 1/m}, \qquad
              s^2 = \frac{(n-1)\, n\, \mathrm{se}_n^2 + (m-1)\, m\, \mathrm{se}_m^2}{n + m - 2}

    with n calibration and m validation prompts and standard errors clustered by prompt:
    docs/theory.md, (36). The spread between prompts is pooled, because a rerun in which a rare
    event did not happen would otherwise understate it exactly where it matters. Where neither side
    varies (a policy that always skips) the interval is the value with room for float32 rounding.

    Parameters
    ----------
    predicted : Figure
        With its calibration interval at the same confidence.
    num_calibration : int
        Calibration prompts, n.
    measured : RatioEstimate
        Of the rerun.
    confidence : float

    Returns
    -------
    (low, high), or None where one prompt on either side leaves no spread to go by.
    """
    value = float(predicted.value or 0.0)
    num_validation = measured.num_prompts
    if num_calibration < 2 and num_validation < 2:
        return None
    half = 0.0
    if predicted.low is not None and predicted.high is not None:
        half = (predicted.high - predicted.low) / 2
    upper = 0.5 + confidence / 2
    se_cal = half / float(stats.t.ppf(upper, max(num_calibration - 1, 1)))
    se_val = measured.standard_error if np.isfinite(measured.standard_error) else 0.0
    freedom = max(num_calibration + num_validation - 2, 1)
    pooled = (
        (num_calibration - 1) * num_calibration * se_cal**2
        + (num_validation - 1) * num_validation * se_val**2
    ) / freedom
    spread = (pooled * (1 / num_calibration + 1 / num_validation)) ** 0.5
    margin = float(stats.t.ppf(upper, freedom)) * spread + ROUNDING * max(abs(value), 1.0)
    return value - margin, value + margin


def decode_policies(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    policies: Mapping[str, Policy],
    settings: DecodingSettings,
    on_step: OnStep | None = None,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[DecodedBatch]]:
    """Decode the same prompts under every policy: batch by batch, so that prompts are read once.

    Parameters
    ----------
    pair : LoadedPair
    prompts : sequence of TokenizedPrompt
    policies : mapping of str to Policy
    settings : DecodingSettings
    on_step : callable, optional
        See :func:`calibrate.engine.decode`.
    on_batch : callable, optional
        Told the number of this batch of one policy, how many there are in all, and its label.
    """
    from calibrate.engine import batches_by_length, decode
    from calibrate.models import TransformerModel

    slm = TransformerModel(pair.slm, pair.vocab_size, reuse_prefill=True)
    llm = TransformerModel(pair.llm, pair.vocab_size, reuse_prefill=True)
    batches = batches_by_length(prompts, settings.batch_size)
    decoded: dict[str, list[DecodedBatch]] = {label: [] for label in policies}
    number = 0
    for batch in batches:
        for label, policy in policies.items():
            number += 1
            if on_batch is not None:
                on_batch(number, len(batches) * len(policies), label)
            decoded[label] += decode(slm, llm, batch, policy, settings, pair.eos_token_ids, on_step)
    return decoded


def keep_rerun(path: Path, batches: Sequence[DecodedBatch], header: dict[str, Any]) -> None:
    """Keep the batches of one policy in one file."""
    prompt_ids: list[str] = []
    categories: list[str] = []
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in batch.columns.items():
            shifted = values + len(prompt_ids) if name == "row" else values
            parts.setdefault(name, []).append(shifted)
        prompt_ids += batch.prompt_ids
        categories += batch.categories
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    write_shard(path, columns, prompt_ids, header, categories)


def entries_per_sent_token(point: dict[str, Any], trace: Trace, confidence: float) -> Figure:
    """Probabilities sent with a token that is sent, measured; none where nothing is sent."""
    policy = policy_from_settings(
        point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
    )
    tokens = measured_tokens(trace, policy)
    sent = np.where(tokens.skipped < 0.5, tokens.num_entries, np.nan)
    if point["policy"] in ("slm", "llm") or not np.isfinite(sent).any():
        return Figure(None)
    return as_figure(
        mean_over_tokens(sent, tokens.prompt_index, tokens.num_prompts), "", confidence
    )


def compare(
    point: dict[str, Any],
    trace: Trace,
    economics: Economics,
    num_calibration: int,
    confidence: float,
) -> list[Cell]:
    """Cells of one operating point: every metric, predicted against measured.

    Parameters
    ----------
    point : dict
        An entry of operating_points.json.
    trace : Trace
        Of the rerun under that point.
    economics : Economics
        The one the predictions were made with.
    num_calibration : int
        Calibration prompts behind the predictions.
    confidence : float
    """
    policy = policy_from_settings(
        point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
    )
    measured = metrics(measured_tokens(trace, policy), economics)
    cells = []
    for metric in METRICS:
        predicted = Figure(**point["predicted"][metric])
        estimate = measured[metric]
        interval = prediction_interval(predicted, num_calibration, estimate, confidence)
        low, high = interval if interval is not None else (None, None)
        cells.append(
            Cell(
                point["policy"],
                point["rule"],
                metric,
                Figure(predicted.value, low, high, UNITS[metric]),
                as_figure(estimate, UNITS[metric], confidence),
                None if interval is None else bool(interval[0] <= estimate.value <= interval[1]),
            )
        )
    return cells


def coverage(cells: Sequence[Cell], confidence: float) -> dict[str, Any]:
    """Covered cells out of all, with the exact binomial interval of the share.

    `tested` leaves out the figures that a policy fixes by itself, whose comparison is arithmetic.
    The interval treats cells as independent, which those of one rerun are not: it is a lower
    bound on the width.
    """
    tested = [cell for cell in cells if not cell.fixed]
    return {**_share(cells, confidence), "tested": _share(tested, confidence)}


def _share(cells: Sequence[Cell], confidence: float) -> dict[str, Any]:
    judged = [cell.covered for cell in cells if cell.covered is not None]
    covered, total = sum(judged), len(judged)
    share = share_figure(covered, total, confidence)
    return {"covered": covered, "total": total, "share": asdict(share)}
