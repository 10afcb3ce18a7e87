"""What does each derived threshold do, and did it do so when rerun?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.derive.operating_points import OperatingPoint
from paper_figs.figures.curves import Curve, error_lengths, threshold_means
from paper_figs.loaded import LoadedRun
from paper_figs.style import (
    BLACK,
    SERIES,
    SeriesStyle,
    direct_legend,
    finish,
    new_figure,
    panel_letter,
)

QUESTION = "What does each threshold skip, what does it risk, and did the rerun agree?"
NUM_THRESHOLDS = 161
LIGHT_BAND = "#dcdcdc"
# The plain gate u <= u_th first; where it was not derived, any policy with the same gate serves.
GATES_ON_UNCERTAINTY = ("u-hlm", "r-hlm", "cu-hlm-offline", "cu-hlm-online", "ask-llm")


def drawn_points(loaded: LoadedRun) -> list[OperatingPoint]:
    """Feasible points of the first policy that gates on uncertainty alone."""
    for policy in GATES_ON_UNCERTAINTY:
        points = [point for point in loaded.feasible if point.policy == policy]
        if points:
            return points
    return []


def predicted_curves(loaded: LoadedRun) -> tuple[Curve, Curve]:
    """Skip rate and rejection risk at every threshold, from the calibration trace."""
    trace = loaded.trace
    beta = trace["rejection_prob"]
    grid = np.linspace(0.0, 1.0, NUM_THRESHOLDS)
    rates, risks = (
        threshold_means(
            trace["uncertainty"], weight, grid, trace.prompt_index, trace.num_prompts,
            loaded.derived_confidence,
        )
        for weight in (np.ones_like(beta), beta)
    )  # fmt: skip
    return rates, risks


def figure(loaded: LoadedRun) -> Figure | None:
    """Skip rate and risk along the threshold, with every derived point on them."""
    points = drawn_points(loaded)
    if not points:
        return None
    drawn, axes = new_figure(2, 1, 5.6, share_x=True, height_ratios=(1.0, 1.2))
    top, bottom = axes[:, 0]
    rates, risks = predicted_curves(loaded)
    for axis, means in ((top, rates), (bottom, risks)):
        # What an interval of a probability says below 0 or above 1 is not a probability.
        low, high = np.clip(means.low, 0, 1), np.clip(means.high, 0, 1)
        axis.fill_between(means.grid, low, high, color=LIGHT_BAND, linewidth=0)
        axis.plot(means.grid, means.value, color=BLACK)
    families: dict[str, list[OperatingPoint]] = {}
    for point in points:
        families.setdefault(rule_family(point.rule)[0], []).append(point)
    for number, (family, members) in enumerate(families.items()):
        style = SERIES[number % len(SERIES)]
        for point in members:
            _draw_point(loaded, point, style, top, bottom)
        top.plot([], [], **style.open_marker(), markersize=7, label=_legend_text(family, members))
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("skip rate (share of tokens)")
    panel_letter(top, "a", "skip rate")
    bottom.set_yscale("function", functions=(_root, np.square))
    # A pair that never rejects has no risk at all: its axis still needs a length.
    highest = max(float(np.nanmax(np.append(risks.high, risks.value.max()))), 0.01)
    bottom.set_ylim(0.0, min(1.0, highest) * 1.05)
    ticks = [t for t in (0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if t <= highest]
    bottom.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bottom.set_ylabel("rejection risk R\n(probability per token; square-root scale)")
    bottom.set_xlim(-0.015, 1.03)
    bottom.set_xlabel("uncertainty threshold u_th (dimensionless, 0 to 1)")
    panel_letter(bottom, "b", "rejection risk, which is the bias of the output")
    # The curve passes the middle above the legend's height or below it: the other corner is free.
    middle = float(rates.value[len(rates.grid) // 2])
    direct_legend(top, loc="lower right" if middle > 0.45 else "upper left", fontsize=7)
    return finish(drawn, QUESTION, _caption(loaded, points))


def rule_family(rule: str) -> tuple[str, str]:
    """Name and level of a rule: ("risk", "0.01") of risk-0.01, ("risk-averse", "") of that."""
    found = re.fullmatch(r"(.+)-(\d[\d.e-]*)", rule)
    return (found[1], found[2]) if found else (rule, "")


def _legend_text(family: str, members: list[OperatingPoint]) -> str:
    thresholds = []
    levels = [rule_family(point.rule)[1] for point in members]
    if len(members) > 2:
        order = np.argsort([float(level) for level in levels])
        first, last = members[order[0]], members[order[-1]]
        low, high = (float(p.uncertainty_threshold.value or 0.0) for p in (first, last))
        return (
            f"{family}: u_th = {low:.3f} to {high:.3f} at α = {levels[order[0]]} to "
            f"{levels[order[-1]]}"
        )
    for point, level in zip(members, levels, strict=True):
        value = float(point.uncertainty_threshold.value or 0.0)
        text = f"{value:.3f}" + (" (beyond 1: skips all)" if value > 1 else "")
        thresholds.append(f"{text} at α = {level}" if level else text)
    return f"{family}: u_th = {', '.join(thresholds)}"


def _root(value: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(value, 0.0))


def _draw_point(
    loaded: LoadedRun, point: OperatingPoint, style: SeriesStyle, top: Any, bottom: Any
) -> None:
    threshold = point.uncertainty_threshold
    value = float(threshold.value or 0.0)
    shown = min(value, 1.0)
    measured = loaded.measured(point)
    for axis, metric in ((top, "skip_rate"), (bottom, "rejection_risk")):
        axis.axvline(shown, color=style.color, linestyle=style.linestyle, linewidth=0.8)
        predicted = point.predicted[metric].value
        if predicted is None:
            continue
        if threshold.low is not None and threshold.high is not None:
            low, high = np.clip([threshold.low, threshold.high], 0.0, 1.0)
            axis.plot(
                [low, high], [predicted, predicted], color=style.color, linewidth=0.9,
                solid_capstyle="butt",
            )  # fmt: skip
        axis.plot(
            [shown], [predicted], **style.open_marker(), markersize=7, zorder=4,
        )  # fmt: skip
        if metric in measured:
            cell = measured[metric].measured
            found = np.array([cell.value], dtype=float)
            bounds = (np.array([part], dtype=float) for part in (cell.low, cell.high))
            # A little to the right, or its bar would hide the prediction's.
            axis.errorbar(
                [shown + 0.016], found, error_lengths(found, *bounds), **style.filled_marker(),
                markersize=4.5, elinewidth=1.0, capsize=2, zorder=5,
            )  # fmt: skip


def _caption(loaded: LoadedRun, points: list[OperatingPoint]) -> str:
    policy = points[0].policy
    infeasible = [p.rule for p in loaded.points if p.policy == policy and not p.feasible]
    reran = [point for point in points if loaded.measured(point)]
    parts = [
        f"{loaded.sample} Curve and grey band: predicted at every threshold with "
        f"{loaded.derived_note}. Hollow: derived thresholds of {policy}; the horizontal bar is "
        "the threshold's own interval, where its rule has one."
    ]
    if reran:
        parts.append(
            "Full, beside it: measured when rerun at that threshold, with its interval. "
            + loaded.validation_sample
        )
    else:
        parts.append("No rerun of these points is stored.")
    if infeasible:
        parts.append(f"Infeasible, so not drawn: {', '.join(infeasible)}.")
    return " ".join(parts)
