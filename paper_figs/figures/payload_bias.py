"""What does unbiasedness cost in bits? Every policy on one plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from calibrate.decode.recording import THRESHOLD_GRID
from calibrate.derive.operating_points import OperatingPoint
from calibrate.derive.policy_tokens import metrics, predicted_tokens
from calibrate.run.folder import Figure as Number
from hlmtheory.policies import GATED_POLICIES, POLICY_NAMES
from paper_figs.figures.curves import error_lengths
from paper_figs.loaded import LoadedRun
from paper_figs.style import direct_legend, finish, new_figure, policy_style

QUESTION = "How many uplink bits does each policy pay for its bias?"
BITS, BIAS = "uplink_bits_per_token", "tv_bias"
# Rounding of float32 sums over a vocabulary reaches 1e-6; below that a bias is not told from 0.
MIN_BIAS = 1e-5


@dataclass(frozen=True)
class PlanePoint:
    """One operating point on the plane.

    Attributes
    ----------
    policy, rule : str
    predicted, measured : (bits, bias) as Figures
        `measured` is None where the point was not rerun.
    """

    policy: str
    rule: str
    predicted: tuple[Number, Number]
    measured: tuple[Number, Number] | None


def plane_points(loaded: LoadedRun) -> list[PlanePoint]:
    """Points to show; those that skip every token are the device model alone and left out."""
    points = []
    for point in loaded.shown:
        if point.policy in GATED_POLICIES and _skips_all(point):
            continue
        cells = loaded.measured(point)
        measured = (cells[BITS].measured, cells[BIAS].measured) if BITS in cells else None
        predicted = (point.predicted[BITS], point.predicted[BIAS])
        points.append(PlanePoint(point.policy, point.rule, predicted, measured))
    return points


def _skips_all(point: OperatingPoint) -> bool:
    rate = point.predicted["skip_rate"].value
    return rate is not None and rate >= 1


def threshold_path(loaded: LoadedRun, policy: str) -> np.ndarray:
    """Predicted (bits, bias) of a gated policy along the stored thresholds, (G, 2)."""
    economics = loaded.economics()
    path = []
    for threshold in THRESHOLD_GRID:
        moved = loaded.policy_at(policy, threshold)
        if moved is None:
            break
        estimates = metrics(predicted_tokens(loaded.trace, moved, loaded.vocab_size), economics)
        path.append((estimates[BITS].value, estimates[BIAS].value))
    return np.array(path).reshape(-1, 2)


def figure(loaded: LoadedRun) -> Figure | None:
    """Payload against bias: predicted and measured points, and each policy's path between."""
    points = plane_points(loaded)
    if not points or "skip_set_bias" not in loaded.trace:
        return None
    drawn, axes = new_figure(1, 1, 4.6)
    plane = axes[0, 0]
    pairs = [pair for point in points for pair in (point.predicted, point.measured) if pair]
    bits, biases = ([float(pair[i].value or 0.0) for pair in pairs] for i in (0, 1))
    min_bits = _floor(bits, 1e-2)
    _zero_and_log(plane, "x", min_bits, 3 * max([*bits, 10 * min_bits]))
    _zero_and_log(plane, "y", MIN_BIAS, min(3 * max([*biases, 10 * MIN_BIAS]), 1.0))
    for policy in POLICY_NAMES:
        if policy in GATED_POLICIES and any(point.policy == policy for point in points):
            path = threshold_path(loaded, policy)
            plane.plot(
                path[:, 0], path[:, 1], **policy_style(policy).line(), linewidth=1.0, alpha=0.8
            )
    for policy in dict.fromkeys(point.policy for point in points):
        _draw_policy(plane, policy, [point for point in points if point.policy == policy])
    plane.axvspan(-1, min_bits, color="#f1f1f1", zorder=0, linewidth=0)
    plane.axhspan(-1, MIN_BIAS, color="#f1f1f1", zorder=0, linewidth=0)
    accounting = loaded.economics().accounting
    plane.set_xlabel(f"uplink payload, '{accounting}' accounting (bit/token; log, grey strip: 0)")
    plane.set_ylabel("TV bias of the output (probability; log, grey strip: 0)")
    direct_legend(plane, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return finish(drawn, QUESTION, _caption(loaded, points))


def _floor(values: list[float], default: float) -> float:
    """The power of ten below the smallest positive value."""
    positive = [value for value in values if value > 0]
    return 10.0 ** np.floor(np.log10(min(positive))) if positive else default


def _zero_and_log(axes: Any, which: str, floor: float, limit: float) -> None:
    """A logarithmic axis with a linear strip from 0 to `floor`, so that 0 has a place."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("symlog", linthresh=floor, linscale=0.5)
    getattr(axes, f"set_{which}lim")(-0.35 * floor, limit)
    first, last = round(np.log10(floor)), int(np.floor(np.log10(limit) + 1e-9))
    axis.set_major_locator(FixedLocator([0.0, *(10.0**n for n in range(first, last + 1))]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power_of_ten))


def _power_of_ten(value: float, _: int) -> str:
    if value == 0:
        return "0"
    power = round(np.log10(value))
    return f"{value:g}" if -2 <= power <= 2 else f"$10^{{{power}}}$"


def _draw_policy(plane: Any, policy: str, points: list[PlanePoint]) -> None:
    style = policy_style(policy)
    plane.plot([], [], **(style.filled_marker() | {"linestyle": style.linestyle}), label=policy)
    for point in points:
        bits, bias = (float(number.value or 0.0) for number in point.predicted)
        plane.plot([bits], [bias], **style.open_marker(), markersize=7.5, zorder=3)
        if point.measured is None:
            continue
        x, y = (_interval(number) for number in point.measured)
        plane.plot([bits, x[0]], [bias, y[0]], color=style.color, linewidth=0.6, zorder=2)
        plane.errorbar(
            [x[0]], [y[0]], xerr=error_lengths(*(np.array([v]) for v in x)),
            yerr=error_lengths(*(np.array([v]) for v in y)), **style.filled_marker(),
            markersize=4.5, elinewidth=0.9, capsize=1.5, zorder=4,
        )  # fmt: skip


def _interval(number: Number) -> tuple[float, float, float]:
    """Value, low and high; what lies below 0 is cut, for neither bits nor bias can."""
    value = float(number.value or 0.0)
    low = value if number.low is None else max(number.low, 0.0)
    high = value if number.high is None else number.high
    return value, low, high


def _caption(loaded: LoadedRun, points: list[PlanePoint]) -> str:
    measured = any(point.measured for point in points)
    return (
        f"{loaded.sample} Hollow: predicted at the derived settings"
        + (
            f" that were rerun; full: measured in reruns, {loaded.derived_note}, thin lines join "
            f"the two. {loaded.validation_sample}"
            if measured
            else "; no rerun of these points is stored."
        )
        + " Lines: each policy's prediction as its uncertainty threshold goes from 0 to "
        f"{THRESHOLD_GRID[-1]:g}. Both axes are logarithmic above the grey strip and linear "
        "inside it; biases in the strip are rounding. Settings that skip every token coincide "
        "with slm and are left out. Better is lower and further left."
    )
