"""What does a risk a token make of whole answers?"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import AnswerCurve, OperatingPoint
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import percent

QUESTION = "How far are whole answers from the server's, by length and by budget?"
NEEDS, LACKS = "derivation", "no gated policy's answers are known at two budgets"
CAVEAT = (
    "Total variation is what a score of answers could lose at most in expectation, not what it "
    "loses: most answers that differ are no worse."
)
METRIC = "answer_divergence"
BUDGETS = ("risk", "answer")


def answer(loaded: LoadedRun) -> str:
    """What the least and the greatest budget of the drawn policy make of answers."""
    curves = length_curves(loaded)
    (first, _), (last, one) = curves[0], curves[-1]
    length = one.divergence.grid[-1]
    return (
        f"A little a token is much an answer: {loaded.label(first.policy)}'s answers of up to "
        f"{length:g} tokens are {number_text(first.predicted[METRIC])} from the server's at a risk "
        f"of {percent(first.predicted['rejection_risk'])} a token, and "
        f"{number_text(last.predicted[METRIC])} at {percent(last.predicted['rejection_risk'])}."
    )


def length_curves(loaded: LoadedRun) -> list[tuple[OperatingPoint, AnswerCurve]]:
    """Curves of the gated policy with most of them, the first of equals, by rising risk."""
    found: dict[str, list[tuple[OperatingPoint, AnswerCurve]]] = {}
    points = {(point.policy, point.rule): point for point in loaded.feasible}
    for one in loaded.derivation.answers if loaded.derivation else ():
        point = points.get((one.policy, one.rule))
        if point is not None and point.score:
            found.setdefault(one.policy, []).append((point, one))
    chosen = max(found.values(), key=len, default=[])
    return sorted(chosen, key=lambda pair: pair[0].predicted["rejection_risk"].value or 0.0)


def budget_points(loaded: LoadedRun) -> dict[str, list[OperatingPoint]]:
    """Points of each gated policy at its budgets whose answers are known, by rising bias."""
    found: dict[str, list[OperatingPoint]] = {}
    for point in loaded.feasible:
        known = METRIC in point.predicted and point.predicted[METRIC].value is not None
        if known and point.family in BUDGETS and not point.variant:
            found.setdefault(point.policy, []).append(point)
    return {
        policy: sorted(points, key=lambda point: point.predicted["tv_bias"].value or 0.0)
        for policy, points in found.items()
    }


def figure(loaded: LoadedRun) -> Figure | None:
    """Distance along the length at each budget, and at full length along the bias a token."""
    curves, points = length_curves(loaded), budget_points(loaded)
    if loaded.derivation is None or len(curves) < 2 or not points:
        return None
    drawn, axes = style.new_figure(1, 2, 3.6, share_y=True)
    left, right = axes[0]
    for number, (point, one) in enumerate(curves):
        look = style.SERIES[number % len(style.SERIES)]
        style.band(left, one.divergence, look.color, linestyle=look.linestyle)
        _name_line(left, one, point, look.color)
    policy = curves[0][0].policy
    longest = curves[0][1].divergence.grid[-1]
    left.set_xlim(0, 1.2 * longest)
    left.set_xticks([longest * quarter / 4 for quarter in range(5)])
    left.set_ylim(-0.02, 1.02)
    left.set_xlabel("length that answers are cut after (tokens)")
    left.set_ylabel("TV between answers (probability)")
    style.panel_letter(left, "a", f"by length, {loaded.label(policy)}")
    right.set_xscale("log")
    draw_along(loaded, points, "tv_bias", right)
    right.set_xlabel("TV bias of a token (probability; log)")
    style.panel_letter(right, "b", f"at {longest:g} tokens, by budget")
    style.outer_legend(right, loc="best", bbox_to_anchor=None, fontsize=7)
    return style.finish(drawn, QUESTION, _caption(loaded, curves, points))


def _name_line(axes: Any, one: AnswerCurve, point: OperatingPoint, color: str) -> None:
    """The risk a token of a curve, behind its end."""
    end = one.divergence.value[-1]
    if end is not None:
        risk = number_text(100 * (point.predicted["rejection_risk"].value or 0.0), 2)
        axes.text(
            1.02 * one.divergence.grid[-1], end, f"{risk} %", color=color, fontsize=7, va="center"
        )


def draw_along(
    loaded: LoadedRun, points: dict[str, list[OperatingPoint]], metric: str, axes: Any
) -> None:
    """Distance of answers along another metric at each policy's points, predicted and measured.

    Policies whose lines coincide are drawn as one, with all their names; reruns keep their markers.
    """
    lines = []
    for name, members in points.items():
        at = style.parts(point.predicted[metric] for point in members)[0]
        found = style.parts(point.predicted[METRIC] for point in members)[0]
        lines += axes.plot(at, found, **loaded.style(name).line(), linewidth=1.0)
    names = list(points)
    for group in style.coinciding(lines):
        own = [names[place] for place in group]
        for place in group[1:]:
            lines[place].remove()
        rerun = any(METRIC in loaded.measured(p) for name in own for p in points[name])
        for name in own:
            look = loaded.style(name if rerun else own[0])
            _draw_points(loaded, points[name], look, metric, axes)
        loaded.label_lines(axes, own, rerun)


def _draw_points(
    loaded: LoadedRun, members: list[OperatingPoint], look: style.SeriesStyle, metric: str,
    axes: Any,
) -> None:  # fmt: skip
    at = style.parts(point.predicted[metric] for point in members)[0]
    found = style.parts(point.predicted[METRIC] for point in members)
    style.error_bars(axes, at, found, **look.open_marker())
    for point in members:
        cells = loaded.measured(point)
        if METRIC in cells and cells[METRIC].measured.value is not None:
            place, values = [cells[metric].measured.value], style.parts([cells[METRIC].measured])
            style.error_bars(axes, place, values, **look.filled_marker(), capsize=1.5, zorder=4)


def _caption(
    loaded: LoadedRun,
    curves: list[tuple[OperatingPoint, AnswerCurve]],
    points: dict[str, list[OperatingPoint]],
) -> str:
    reached = any(loaded.measured(point) for members in points.values() for point in members)
    reruns = "; full: measured in reruns" if reached else ""
    bounded = [
        loaded.label(name)
        for name, members in points.items()
        if any(METRIC in point.at_most for point in members)
    ]
    at_most = f" Upper bounds: {', '.join(bounded)}." if bounded else ""
    return (
        f"{loaded.sample} One answer a prompt. (a) Predicted total variation between the answers "
        f"of {loaded.label(curves[0][0].policy)} and the server's, cut after so many tokens; at "
        "each line's end the rejection risk of a token there. (b) The same of whole answers; "
        f"hollow: predicted at the derived budgets{reruns}.{at_most} No score of an answer in "
        f"[0, 1] differs by more in expectation. Bands and bars: {loaded.derived_note}. Policies "
        "whose answers recorded steps do not tell are left out."
    )
