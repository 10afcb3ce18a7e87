"""What the two strictness parameters of ui-hlm trade: predictions over a grid of (k, gamma).

Assumption: the importance is ours, docs/theory.md, (31); see hlmtheory.importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrate.decode.recording import TOPK_ATTENTION_GRID
from calibrate.derive.optimum import thin_prompts
from calibrate.derive.policy_tokens import UNITS, Economics, metrics, predicted_tokens
from calibrate.run.figure import as_figure
from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from hlmtheory.policies import ImportanceSettings, make_policy
from hlmtheory.thresholds import (
    Threshold,
    risk_averse_threshold,
    risk_budget_threshold,
    risk_prone_threshold,
)

NUM_GAMMAS = 9
NEUTRAL_GAMMA = 1.0
"""Where a uniform attention row lies on its own threshold: docs/theory.md, (31)."""

PLANE_METRICS = ("skip_rate", "tv_bias", "throughput_tok_s", "energy_j_per_token")


@dataclass(frozen=True)
class PlaneCell:
    """ui-hlm at one k and gamma, at the plane's uncertainty threshold.

    Attributes
    ----------
    k : int
    gamma : float
    predicted : dict of str to Figure
        PLANE_METRICS, intervals clustered by prompt.
    """

    k: int
    gamma: float
    predicted: dict[str, Figure]


@dataclass(frozen=True)
class ImportancePlane:
    """Predictions of ui-hlm over (k, gamma).

    Attributes
    ----------
    threshold_rule : str
        Rule of u-hlm whose threshold every cell uses.
    uncertainty_threshold : float or None
        None if the rule has no solution; then there are no cells.
    reason : str
        Why it has none, or what is degenerate.
    num_prompts, num_tokens : int
    ks, gammas : tuple
        Rising.
    cells : tuple of PlaneCell
        Every pair, gamma the faster index.
    """

    threshold_rule: str
    uncertainty_threshold: float | None
    reason: str
    num_prompts: int
    num_tokens: int
    ks: tuple[int, ...]
    gammas: tuple[float, ...]
    cells: tuple[PlaneCell, ...]


def importance_plane(
    trace: Trace,
    calibration: dict[str, Any],
    economics: Economics,
    ks: Sequence[int],
    gammas: Sequence[float],
    threshold_rule: str = "risk-averse",
    confidence: float = 0.95,
) -> ImportancePlane:
    """Predict ui-hlm with the `topk` importance at every k and gamma.

    The same predictions as `hlm derive` makes of one setting: docs/theory.md, (11), (18), (27),
    (28), (29). The threshold is u-hlm's, for all cells alike, so that only the importance differs.

    Parameters
    ----------
    trace : Trace
        The calibration trace, with attention.
    calibration : dict
        calibration.json.
    economics : Economics
    ks : sequence of int
        Of the sizes that traces record.
    gammas : sequence of float
        >= 0. gamma = 0 calls every context important: u-hlm.
    threshold_rule : str
        risk-averse, risk-prone or risk-ALPHA.
    confidence : float

    Returns
    -------
    ImportancePlane

    Raises
    ------
    ValueError
        If the rule is unknown, or a k was not recorded.
    """
    threshold = u_hlm_threshold(trace, calibration, threshold_rule)
    sizes, levels = tuple(sorted(set(ks))), tuple(sorted(set(gammas)))
    thinned = thin_prompts(trace)
    cells: list[PlaneCell] = []
    if threshold.feasible:
        for k in sizes:
            for gamma in levels:
                policy = make_policy(
                    "ui-hlm",
                    threshold.uncertainty_threshold,
                    importance=ImportanceSettings("topk", float(k), float(gamma)),
                )
                found = metrics(predicted_tokens(thinned, policy, economics.vocab_size), economics)
                predicted = {
                    name: as_figure(found[name], UNITS[name], confidence) for name in PLANE_METRICS
                }
                cells.append(PlaneCell(k, gamma, predicted))
    return ImportancePlane(
        threshold_rule,
        threshold.uncertainty_threshold if threshold.feasible else None,
        threshold.reason,
        thinned.num_prompts,
        thinned.num_tokens,
        sizes,
        levels,
        tuple(cells),
    )


def u_hlm_threshold(trace: Trace, calibration: dict[str, Any], rule: str) -> Threshold:
    """Threshold of u-hlm by the name of its rule, without an interval."""
    fit = calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    if rule == "risk-averse":
        return risk_averse_threshold(slope, intercept)
    if rule == "risk-prone":
        return risk_prone_threshold(slope, intercept, fit["delta"]["value"])
    kind, _, level = rule.partition("-")
    try:
        alpha = float(level)
    except ValueError:
        alpha = float("nan")
    if kind != "risk" or not 0 <= alpha <= 1:
        raise ValueError(
            f"threshold_rule = {rule!r}: allowed are risk-averse, risk-prone, risk-ALPHA"
        )
    return risk_budget_threshold(trace["uncertainty"], trace["rejection_prob"], alpha)


def gamma_grid(trace: Trace, num_gammas: int = NUM_GAMMAS) -> tuple[float, ...]:
    r"""Values of gamma between "every context counts" and "none does", for every recorded k.

    A context is important when :math:`q_t = I_t e^{H(A_t)} \ge \gamma`, so only the range of q
    matters: from its first percentile at the k where it is least to its last percentile at the k
    where it is largest. Evenly spaced in ln gamma, for gamma multiplies the threshold; the nearest
    value gives way to gamma = 1, where a uniform row lies on the threshold.
    """
    q = trace["topk_attention"] * np.exp(trace["attention_entropy"])[:, None]  # (N, K)
    low, high = np.quantile(q, 0.01, axis=0).min(), np.quantile(q, 0.99, axis=0).max()
    if not 0 < low < high:
        return (NEUTRAL_GAMMA,)
    grid = np.geomspace(low, high, num_gammas)
    if low < NEUTRAL_GAMMA < high:
        grid[int(np.argmin(np.abs(np.log(grid / NEUTRAL_GAMMA))))] = NEUTRAL_GAMMA
    return tuple(sorted({float(f"{gamma:.2g}") for gamma in grid}))


def derive_plane(
    trace: Trace,
    calibration: dict[str, Any],
    economics: Economics,
    importances: Sequence[ImportanceSettings],
    risks: Sequence[float],
    confidence: float,
) -> dict[str, Any] | None:
    """The plane that operating_points.json holds; None for a trace without attention.

    At the risk-averse threshold, or at the first risk budget's where that has no solution. The
    grid holds the derived settings themselves, so that their reruns have a place on it; grid values
    within a tenth of one of them give way to it.
    """
    if "topk_attention" not in trace or "skip_set_bias" not in trace:
        return None
    derived = {setting.gamma for setting in importances if setting.variant == "topk"}
    gammas = derived | {
        gamma
        for gamma in gamma_grid(trace)
        if not any(abs(gamma - own) < 0.1 * own for own in derived)
    }
    for rule in ("risk-averse", *(f"risk-{risk:g}" for risk in risks)):
        plane = importance_plane(
            trace, calibration, economics, TOPK_ATTENTION_GRID, sorted(gammas), rule, confidence
        )
        if plane.cells:
            break
    return asdict(plane)
