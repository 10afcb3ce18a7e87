"""Do reruns fall where the theory says they will?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.records import Cell, ValidationRecord
from paper_figs import style
from paper_figs.loaded import LoadedRun, PointKey, metric_label, metric_names

QUESTION = "Do fresh reruns fall inside their prediction intervals?"
NEEDS, LACKS = "validation", "no figure was judged"
CAVEAT = (
    "Cells of one validation share their prompts and many say nearly the same, so their count is a "
    "weak witness. Times and energies follow from counts and the profile: no clock was read."
)
NUM_COLUMNS = 4
PANEL_PT, TITLE_PT = 100.0, 8.0
"""Width of a panel, and size of its title."""
LIMIT = 2.5


def answer(loaded: LoadedRun) -> str:
    """How many predictions hold, and of which policies some do not."""
    if loaded.validation is None:
        return ""
    outside = Counter(cell.policy for cell in loaded.cells if cell.covered is False)
    missed = ", ".join(f"{policy} {count}" for policy, count in outside.items())
    return loaded.coverage_note + (f" Outside, by policy: {missed}." if missed else "")


def normalised_error(cell: Cell) -> float:
    """(measured - predicted) / half-width, of the interval's side that the measurement is on."""
    measured, predicted = float(cell.measured.value or 0.0), float(cell.predicted.value or 0.0)
    bound = cell.predicted.high if measured >= predicted else cell.predicted.low
    width = abs(float(predicted if bound is None else bound) - predicted)
    if width == 0:
        return 0.0 if measured == predicted else float(np.copysign(np.inf, measured - predicted))
    return (measured - predicted) / width


def heights(cells: Sequence[Cell]) -> dict[PointKey, float]:
    """Height of every point: its policy's row, with the rules of a policy below each other."""
    rules: dict[str, list[str]] = {}
    for policy, rule in dict.fromkeys((cell.policy, cell.rule) for cell in cells):
        rules.setdefault(policy, []).append(rule)
    return {
        (policy, rule): row + 0.7 * ((place + 0.5) / len(own) - 0.5)
        for row, (policy, own) in enumerate(rules.items())
        for place, rule in enumerate(own)
    }


def figure(loaded: LoadedRun) -> Figure | None:
    """One panel a metric, one row a policy, one marker a cell."""
    judged = tuple(cell for cell in loaded.cells if cell.covered is not None)
    if loaded.validation is None or not judged:
        return None
    rows, metrics = heights(judged), metric_names(judged)
    policies = list(dict.fromkeys(cell.policy for cell in judged))
    # Panels of one metric are narrow enough for two of them in one column.
    num_columns = NUM_COLUMNS // 2 if style.is_narrow() else NUM_COLUMNS
    num_rows = -(-len(metrics) // num_columns)
    height = num_rows * max(1.6, 0.75 + 0.19 * len(policies))
    drawn, axes = style.new_figure(
        num_rows, num_columns, height, share_x=True, share_y=True, stacked=False
    )
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        axis.axvspan(-1, 1, color="#e9e9e9", zorder=0, linewidth=0)
        axis.axvline(0, color="#9a9a9a", linewidth=0.8)
        for cell in judged:
            if cell.metric == metric:
                _draw_cell(axis, cell, rows[cell.policy, cell.rule])
        title = style.wrap(metric_label(metric), PANEL_PT, TITLE_PT)
        axis.set_title(title, fontsize=TITLE_PT, loc="left")
        axis.set_yticks(range(len(policies)), policies)
        axis.grid(visible=False, axis="x")
    axes[0, 0].set_ylim(len(policies) - 0.5, -0.5)
    axes[0, 0].set_xlim(-LIMIT - 0.25, LIMIT + 0.25)
    axes[0, 0].set_xticks([-2, -1, 0, 1, 2])
    for axis in axes[-1]:
        axis.set_xlabel("error (half-widths)")
    for axis in axes[:, 0]:
        axis.set_ylabel("policy")
    return style.finish(drawn, QUESTION, _caption(loaded, loaded.validation))


def _draw_cell(axes: Any, cell: Cell, row: float) -> None:
    """A dot inside, hollow where the policy fixes it, a cross outside; far ones at the edge."""
    error = normalised_error(cell)
    color = style.BLUE if cell.covered else style.VERMILLION
    axes.plot(
        [np.clip(error, -LIMIT, LIMIT)], [row], linestyle="none", markeredgewidth=0.7,
        marker="o" if cell.covered else "X", markersize=4.0 if cell.covered else 6.0,
        markeredgecolor=color, markerfacecolor="white" if cell.covered and cell.fixed else color,
    )  # fmt: skip
    if not cell.covered and abs(error) > LIMIT:
        side = np.sign(error)
        axes.annotate(
            "∞" if np.isinf(error) else f"{abs(error):.2g}", (side * LIMIT, row), (side * -6, 0),
            textcoords="offset points", ha="right" if side > 0 else "left", va="center",
            fontsize=6.5,
        )  # fmt: skip


def _caption(loaded: LoadedRun, validation: ValidationRecord) -> str:
    return (
        f"{loaded.sample} {loaded.validation_sample} Error: measured minus predicted, divided by "
        f"the half-width of that cell's own {validation.confidence:.0%} prediction "
        "interval, which counts calibration and rerun sampling, clustered by prompt; grey: inside. "
        "Dots: covered; crosses: not; hollow dots: fixed by their policy, so that they cannot "
        f"miss. Errors beyond ±{LIMIT:g} stand at the edge with their size. "
        "Within a policy's row, its rules lie one below the other."
    )
