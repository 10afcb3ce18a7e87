"""What does each derived threshold do, and did it do so when rerun?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import OperatingPoint, ThresholdCurves
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import budget_text, percent

QUESTION = "What does each threshold skip, what does it risk, and did the rerun agree?"
NEEDS, LACKS = "derivation", "no policy whose score alone decides has a feasible threshold"
CAVEAT = (
    "A threshold that meets its budget on the calibration prompts promises nothing for others; "
    "only certified ones do. Risk counts over all tokens: of the skipped ones alone a larger share "
    "would be rejected."
)
TICKS = (0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def answer(loaded: LoadedRun) -> str:
    """What the compared rule's gate skips, and at what risk."""
    if not loaded.gates:
        return "No budget leaves a threshold that skips some of the tokens and not all."
    point = loaded.gates[0]
    text = (
        f"{budget_text(point)[:1].upper()}{budget_text(point)[1:]}, the threshold of "
        f"{loaded.label(point.policy)} is {number_text(point.uncertainty_threshold)}: it skips "
        f"{percent(point.predicted['skip_rate'])} of the tokens at a predicted risk of "
        f"{percent(point.predicted['rejection_risk'])}."
    )
    cells = loaded.measured(point)
    if not cells:
        return text
    return (
        f"{text} The rerun skipped {percent(cells['skip_rate'].measured)} at a risk of "
        f"{percent(cells['rejection_risk'].measured)}."
    )


def drawn_points(loaded: LoadedRun) -> list[OperatingPoint]:
    """Feasible points of a policy whose score alone decides: that of the answer, if it is one."""
    found: dict[str, list[OperatingPoint]] = {}
    for point in loaded.feasible:
        if not point.variant and loaded.on_curve(point):
            found.setdefault(point.policy, []).append(point)
    headline = [found[one.policy] for one in loaded.gates[:1] if one.policy in found]
    return headline[0] if headline else max(found.values(), key=len, default=[])


def figure(loaded: LoadedRun) -> Figure | None:
    """Skip rate and risk along the threshold, with every derived point on them."""
    points = drawn_points(loaded)
    curves = None if loaded.derivation is None else loaded.derivation.thresholds
    if curves is None or not points:
        return None
    drawn, axes = style.new_figure(2, 1, 5.6, share_x=True, height_ratios=(1.0, 1.2))
    top, bottom = axes[:, 0]
    style.band(top, curves.skip_rate, style.BLACK)
    style.band(bottom, curves.risk, style.BLACK)
    families: dict[str, list[OperatingPoint]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    end = curves.skip_rate.grid[-1]
    for number, (family, members) in enumerate(families.items()):
        look = style.SERIES[number % len(style.SERIES)]
        for point in members:
            _draw_point(loaded, point, look, curves, top, bottom)
        label = f"{family}: u_th = {_members_text(members, end)}"
        top.plot([], [], **look.open_marker(), markersize=7, label=label)
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("skip rate (share of tokens)")
    style.panel_letter(top, "a", "skip rate")
    bottom.set_yscale("function", functions=(_root, np.square))
    cells = [cell for point in points if (cell := loaded.measured(point).get("rejection_risk"))]
    risks = [style.parts(curves.risk), style.parts(cell.measured for cell in cells)]
    # A pair that never rejects has no risk at all: its axis still needs a length.
    highest = max(float(np.nanmax(np.hstack(risks))), 0.01)
    bottom.set_ylim(0.0, min(1.0, highest) * 1.05)
    ticks = [tick for tick in TICKS if tick <= highest]
    bottom.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bottom.set_ylabel("rejection risk R\n(probability per token; square-root scale)")
    start = curves.skip_rate.grid[0]
    bottom.set_xlim(start - 0.015 * (end - start), end + 0.03 * (end - start))
    unit = points[0].uncertainty_threshold.unit or "dimensionless"
    score = loaded.score_label(curves.score)
    bottom.set_xlabel(f"threshold u_th on the score: {score} ({unit})")
    style.panel_letter(bottom, "b", "rejection risk, which is the bias of the output")
    # The curve passes the middle above the legend's height or below it: the other corner is free.
    middle = float(curves.skip_rate.value[len(curves.skip_rate.grid) // 2] or 0.0)
    style.outer_legend(
        top, loc="lower right" if middle > 0.45 else "upper left", bbox_to_anchor=None, fontsize=7
    )
    return style.finish(drawn, QUESTION, _caption(loaded, points))


def _members_text(members: list[OperatingPoint], end: float) -> str:
    """Thresholds of one rule at its budgets: the first and the last of many."""
    if len(members) > 2:
        first, *_, last = sorted(members, key=lambda point: point.budget or 0.0)
        low, high = (number_text(p.uncertainty_threshold, interval=False) for p in (first, last))
        return f"{low} to {high} at α = {first.budget:g} to {last.budget:g}"
    texts = []
    for point in members:
        value = float(point.uncertainty_threshold.value or 0.0)
        text = number_text(value) + (f" (beyond {end:g}: skips all)" if value > end else "")
        texts.append(text if point.budget is None else f"{text} at α = {point.budget:g}")
    return ", ".join(texts)


def _root(value: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.maximum(value, 0.0)))


def _draw_point(
    loaded: LoadedRun,
    point: OperatingPoint,
    look: style.SeriesStyle,
    curves: ThresholdCurves,
    top: Any,
    bottom: Any,
) -> None:
    start, end = curves.skip_rate.grid[0], curves.skip_rate.grid[-1]
    shown, low, high = np.clip(style.parts([point.uncertainty_threshold])[:, 0], start, end)
    measured = loaded.measured(point)
    for axis, metric in ((top, "skip_rate"), (bottom, "rejection_risk")):
        axis.axvline(shown, color=look.color, linestyle=look.linestyle, linewidth=0.8)
        predicted = point.predicted[metric].value
        if predicted is None:
            continue
        axis.plot(  # nothing where the threshold has no interval
            [low, high], [predicted, predicted], color=look.color, linewidth=0.9,
            solid_capstyle="butt",
        )  # fmt: skip
        axis.plot([shown], [predicted], **look.open_marker(), markersize=7, zorder=4)
        if metric in measured:
            # A little to the right, or its bar would hide the prediction's.
            style.error_bars(
                axis, [shown + 0.016 * (end - start)], style.parts([measured[metric].measured]),
                **look.filled_marker(), zorder=5,
            )  # fmt: skip


def _caption(loaded: LoadedRun, points: list[OperatingPoint]) -> str:
    policy = points[0].policy
    infeasible = [p.rule for p in loaded.points if p.policy == policy and not p.feasible]
    text = (
        f"{loaded.sample} Curve and grey band: predicted at every threshold with "
        f"{loaded.derived_note}. Hollow: derived thresholds of {loaded.label(policy)}; the "
        "horizontal bar is the threshold's own interval, where its rule has one. "
    )
    if loaded.derivation is not None and loaded.derivation.pilot is not None:
        text += "They stand beside the curve by what a pilot learned of the policy's contexts. "
    if any(loaded.measured(point) for point in points):
        text += (
            "Full, beside it: measured when rerun at that threshold, with its interval. "
            f"{loaded.validation_sample}"
        )
    else:
        text += "No rerun of these points is stored."
    if infeasible:
        text += f" Infeasible, so not drawn: {', '.join(infeasible)}."
    return text
