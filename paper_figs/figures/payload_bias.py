"""What does unbiasedness cost in bits? Every policy on one plane."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import OperatingPoint
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import percent

QUESTION = "How many uplink bits does each policy pay for its bias?"
NEEDS, LACKS = "derivation", "no feasible setting sends anything"
CAVEAT = (
    "Policies are compared at thresholds of the same risk; what sends less may pay in time on a "
    "link with a long round trip, which no payload saves."
)
METRICS = ("uplink_bits_per_token", "tv_bias")
# Rounding of float32 sums over a vocabulary reaches 1e-6; below that a bias is not told from 0.
MIN_BIAS = 1e-5


def answer(loaded: LoadedRun) -> str:
    """What sends least and most of the gated policies at the compared rule, and their biases."""
    bits, bias = METRICS
    gates = [p for p in loaded.gates if p.predicted[bits].value is not None]
    gates.sort(key=lambda point: loaded.figure_of(point, bits).value or 0.0)
    if not gates:
        return "No gated policies can be compared at one rule."

    def told(end: OperatingPoint) -> str:
        text = number_text(loaded.figure_of(end, bits))
        names = [
            f"{loaded.label(point.policy)} at a bias of {percent(loaded.figure_of(point, bias))}"
            for point in gates
            if number_text(loaded.figure_of(point, bits)) == text
        ]
        return f"{text} bit a token ({'; '.join(names)})"

    return (
        f"At {gates[0].rule} the least is {told(gates[0])}, the most {told(gates[-1])}: "
        f"{loaded.source_note}."
    )


def plane_points(loaded: LoadedRun) -> list[OperatingPoint]:
    """Points to show; those that skip every token are the device model alone and left out."""
    return [
        point
        for point in loaded.shown
        if all(point.predicted[metric].value is not None for metric in METRICS)
        and not (loaded.policies[point.policy].gated and _skips_all(point))
    ]


def _skips_all(point: OperatingPoint) -> bool:
    rate = point.predicted["skip_rate"].value
    return rate is not None and rate >= 1


def figure(loaded: LoadedRun) -> Figure | None:
    """Payload against bias: predicted and measured points, and each policy's path between."""
    points = plane_points(loaded)
    if loaded.derivation is None or not points:
        return None
    drawn, axes = style.new_figure(1, 1, 4.6)
    plane = axes[0, 0]
    cells = [cells for point in points if (cells := loaded.measured(point))]
    bits, biases = (
        style.parts([p.predicted[metric] for p in points] + [c[metric].measured for c in cells])[0]
        for metric in METRICS
    )
    min_bits = _floor(bits, 1e-2)
    style.zero_and_log(plane, "x", min_bits, 3 * max(np.nanmax(bits), 10 * min_bits))
    style.zero_and_log(plane, "y", MIN_BIAS, min(3 * max(np.nanmax(biases), 10 * MIN_BIAS), 1.0))
    shown = {point.policy for point in points}
    paths = [path for path in loaded.derivation.paths if path.policy in shown]
    lines = [
        plane.plot(
            path.uplink_bits_per_token, path.tv_bias, **loaded.style(path.policy).line(),
            linewidth=1.0, alpha=0.8,
        )[0]
        for path in paths
    ]  # fmt: skip
    as_one = [group for group in style.coinciding(lines) if len(group) > 1] if lines else []
    without_line = {paths[place].policy for group in as_one for place in group[1:]}
    for group in as_one:
        for place in group[1:]:
            lines[place].remove()
    coinciding = [[loaded.label(paths[place].policy) for place in group] for group in as_one]
    for policy in loaded.policies:
        if policy in shown:
            own = [point for point in points if point.policy == policy]
            _draw_policy(loaded, plane, own, policy not in without_line)
    plane.axvspan(-1, min_bits, color="#f1f1f1", zorder=0, linewidth=0)
    plane.axhspan(-1, MIN_BIAS, color="#f1f1f1", zorder=0, linewidth=0)
    plane.set_xlabel(
        f"uplink payload, '{loaded.derivation.accounting}' accounting (bit/token; log, grey "
        "strip: 0)"
    )
    plane.set_ylabel("TV bias of the output (probability; log, grey strip: 0)")
    style.outer_legend(plane)
    return style.finish(drawn, QUESTION, _caption(loaded, bool(cells), coinciding))


def _floor(values: np.ndarray, default: float) -> float:
    """The power of ten below the smallest positive value."""
    positive = values[values > 0]
    return float(10.0 ** np.floor(np.log10(positive.min()))) if len(positive) else default


def _draw_policy(
    loaded: LoadedRun, plane: Any, points: list[OperatingPoint], with_line: bool
) -> None:
    """Points of one policy; what an interval says below 0 is cut, for neither axis goes there."""
    policy = points[0].policy
    look = loaded.style(policy)
    combined = look.filled_marker() | ({"linestyle": look.linestyle} if with_line else {})
    plane.plot([], [], **combined, label=loaded.legend(policy))
    for point in points:
        bits, bias = style.parts(point.predicted[metric] for metric in METRICS)[0]
        plane.plot([bits], [bias], **look.open_marker(), markersize=7.5, zorder=3)
        cells = loaded.measured(point)
        if not cells:
            continue
        x, y = (np.maximum(style.parts([cells[m].measured]), 0.0) for m in METRICS)  # (3, 1) each
        plane.plot([bits, x[0, 0]], [bias, y[0, 0]], color=look.color, linewidth=0.6, zorder=2)
        style.error_bars(
            plane, x[0], y, xerr=style.error_lengths(x), **look.filled_marker(), capsize=1.5,
            zorder=4,
        )  # fmt: skip


def _caption(loaded: LoadedRun, measured: bool, coinciding: list[list[str]]) -> str:
    paths = () if loaded.derivation is None else loaded.derivation.paths
    ends = [threshold for path in paths for threshold in path.thresholds]
    reruns = (
        f" that were rerun; full: measured in reruns, {loaded.derived_note}, thin lines join the "
        f"two. {loaded.validation_sample}"
        if measured
        else "; no rerun of these points is stored."
    )
    lines = (
        " Lines: each policy's prediction as the threshold on its score goes from "
        f"{min(ends):.3g} to {max(ends):.3g}."
        if ends
        else ""
    )
    for names in coinciding:
        lines += f" Those of {' and '.join(names)} coincide: drawn as one."
    return (
        f"{loaded.sample} Hollow: predicted at the derived settings{reruns}{lines} Both axes are "
        "logarithmic above the grey strip and linear inside it; biases in the strip are rounding. "
        "Settings that skip every token coincide with the device model alone and are left out. "
        "Better is lower and further left."
    )
