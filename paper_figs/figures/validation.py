"""Do reruns fall where the theory says they will?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.records import Cell
from paper_figs import style
from paper_figs.loaded import LoadedRun, metric_label, metric_names

QUESTION = "Do fresh reruns fall inside their prediction intervals?"
NEEDS, LACKS = "validation", "no figure was judged"
NUM_COLUMNS = 4
LIMIT = 2.5


@dataclass(frozen=True)
class PlacedCell:
    """A cell with its place in its panel.

    Attributes
    ----------
    cell : Cell
    error : float
        (measured - predicted) in half-widths of the prediction interval: inside if in [-1, 1].
    row : float
        Height: the policy's row, moved a little so that its rules do not hide each other.
    """

    cell: Cell
    error: float
    row: float


def normalised_error(cell: Cell) -> float:
    """(measured - predicted) / half-width, of the interval's side that the measurement is on."""
    measured, predicted = float(cell.measured.value or 0.0), float(cell.predicted.value or 0.0)
    bound = cell.predicted.high if measured >= predicted else cell.predicted.low
    width = abs(float(predicted if bound is None else bound) - predicted)
    if width == 0:
        return 0.0 if measured == predicted else float(np.copysign(np.inf, measured - predicted))
    return (measured - predicted) / width


def placed_cells(cells: tuple[Cell, ...]) -> dict[str, list[PlacedCell]]:
    """Every cell by metric."""
    policies = policies_of(cells)
    rules = {
        policy: list(dict.fromkeys(cell.rule for cell in cells if cell.policy == policy))
        for policy in policies
    }
    out: dict[str, list[PlacedCell]] = {metric: [] for metric in metric_names(cells)}
    for cell in cells:
        own = rules[cell.policy]
        share = (own.index(cell.rule) + 0.5) / len(own) - 0.5
        row = policies.index(cell.policy) + 0.7 * share
        out[cell.metric].append(PlacedCell(cell, normalised_error(cell), row))
    return out


def policies_of(cells: tuple[Cell, ...]) -> list[str]:
    """Policies in the order they were validated."""
    return list(dict.fromkeys(cell.policy for cell in cells))


def figure(loaded: LoadedRun) -> Figure | None:
    """One panel a metric, one row a policy, one marker a cell."""
    judged = tuple(cell for cell in loaded.cells if cell.covered is not None)
    if not judged:
        return None
    placed = placed_cells(judged)
    policies = policies_of(judged)
    num_rows = -(-len(placed) // NUM_COLUMNS)
    height = num_rows * (0.75 + 0.19 * len(policies))
    drawn, axes = style.new_figure(num_rows, NUM_COLUMNS, height, share_x=True, share_y=True)
    for number, axis in enumerate(axes.flat):
        if number >= len(placed):
            axis.set_visible(False)
            continue
        metric = list(placed)[number]
        outside = [p for p in placed[metric] if not p.cell.covered]
        fixed = [p for p in placed[metric] if p.cell.covered and p.cell.fixed]
        inside = [p for p in placed[metric] if p.cell.covered and not p.cell.fixed]
        axis.axvspan(-1, 1, color="#e9e9e9", zorder=0, linewidth=0)
        axis.axvline(0, color="#9a9a9a", linewidth=0.8)
        _scatter(axis, fixed, "o", 3.4, style.BLUE, "white")
        _scatter(axis, inside, "o", 4.0, style.BLUE, style.BLUE)
        _scatter(axis, outside, "X", 6.0, style.VERMILLION, style.VERMILLION)
        for point in outside:
            if abs(point.error) > LIMIT:
                side = np.sign(point.error)
                text = "∞" if np.isinf(point.error) else f"{abs(point.error):.2g}"
                axis.annotate(
                    text, (side * LIMIT, point.row), (side * -6, 0), textcoords="offset points",
                    ha="right" if side > 0 else "left", va="center", fontsize=6.5,
                )  # fmt: skip
        axis.set_title(_two_lines(metric_label(metric)), fontsize=8, loc="left")
        axis.set_yticks(range(len(policies)), [loaded.label(policy) for policy in policies])
        axis.grid(visible=False, axis="x")
    axes[0, 0].set_ylim(len(policies) - 0.5, -0.5)
    axes[0, 0].set_xlim(-LIMIT - 0.25, LIMIT + 0.25)
    axes[0, 0].set_xticks([-2, -1, 0, 1, 2])
    for axis in axes[-1]:
        axis.set_xlabel("error (half-widths)")
    for axis in axes[:, 0]:
        axis.set_ylabel("policy")
    return style.finish(drawn, QUESTION, _caption(loaded))


def _two_lines(label: str) -> str:
    head, comma, tail = label.partition(", ")
    return f"{head},\n{tail}" if comma else label.replace(" (", "\n(")


def _scatter(
    axis: Any, points: list[PlacedCell], marker: str, size: float, edge: str, face: str
) -> None:
    if points:
        errors = np.clip([point.error for point in points], -LIMIT, LIMIT)
        axis.plot(
            errors, [point.row for point in points], linestyle="none", marker=marker,
            markersize=size, markeredgecolor=edge, markerfacecolor=face, markeredgewidth=0.7,
        )  # fmt: skip


def _caption(loaded: LoadedRun) -> str:
    if loaded.validation is None:
        raise ValueError("validation is None: this figure needs validation.json")
    return (
        f"{loaded.sample} {loaded.validation_sample} Error: measured minus predicted, divided by "
        f"the half-width of that cell's own {loaded.validation.confidence:.0%} prediction "
        "interval, which counts calibration and rerun sampling, clustered by prompt; grey: inside. "
        "Dots: covered; crosses: not; hollow dots: fixed by their policy, so that they cannot "
        f"miss. {loaded.coverage_note} Errors beyond ±{LIMIT:g} stand at the edge with their size. "
        "Within a policy's row, its rules lie one below the other."
    )
