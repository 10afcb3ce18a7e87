"""What do the two parameters of importance trade against each other?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calibrate.run.figure import number_text
from calibrate.run.records import Cell, ImportancePlane
from paper_figs import style
from paper_figs.loaded import LoadedRun, metric_label
from paper_figs.words import percent

NEEDS, LACKS = "derivation", "no policy with importance was derived, or its rule is infeasible"
CAVEAT = (
    "Importance is our assumption. One threshold for all cells: what more strictness skips, it "
    "skips whatever the uncertainty."
)
# Even the darkest cell stays light enough for black numbers.
COLORS = LinearSegmentedColormap.from_list("plane", ["#ffffff", "#7fb2d8"])
DARK = "#8a3300"  # vermillion is too pale for small figures on blue

Measured = dict[tuple[int, int], dict[str, Cell]]


def answer(loaded: LoadedRun) -> str:
    """Skip rate and bias in the plane's least and most skipping cells."""
    plane = None if loaded.derivation is None else loaded.derivation.importance_plane
    if plane is None:
        return ""
    cells = sorted(plane.cells, key=lambda cell: cell.predicted["skip_rate"].value or 0.0)
    least, most = (
        f"{percent(cell.predicted['skip_rate'])} of the tokens are skipped at a bias of "
        f"{percent(cell.predicted['tv_bias'])} with k = {cell.k} and γ = {cell.gamma:g}"
        for cell in (cells[0], cells[-1])
    )
    return f"Skips, for bias: {least}, and {most}."


def measured_cells(loaded: LoadedRun, plane: ImportancePlane) -> Measured:
    """Reruns at the plane's threshold and one of its settings, by row and column."""
    found: Measured = {}
    for point in loaded.feasible:
        setting = point.settings.get("importance")
        threshold = point.uncertainty_threshold.value
        if point.policy != plane.policy or not setting or threshold is None:
            continue
        on_grid = setting["k"] in plane.ks and setting["gamma"] in plane.gammas
        cells = loaded.measured(point)
        if (
            setting["variant"] == "topk"
            and math.isclose(threshold, plane.uncertainty_threshold or 0.0)
            and on_grid
            and cells
        ):
            found[plane.ks.index(setting["k"]), plane.gammas.index(setting["gamma"])] = cells
    return found


def figure(loaded: LoadedRun) -> Figure | None:
    """Heat maps of the predicted metrics over (k, gamma), with reruns where there are any."""
    plane = None if loaded.derivation is None else loaded.derivation.importance_plane
    if plane is None or not plane.cells:
        return None
    measured = measured_cells(loaded, plane)
    metrics = list(plane.cells[0].predicted)
    num_rows = -(-len(metrics) // 2)
    drawn, axes = style.new_figure(num_rows, 2, 2.45 * num_rows)
    for number, axis in enumerate(axes.flat):
        if number >= len(metrics):
            axis.set_visible(False)
            continue
        _draw_metric(axis, plane, metrics[number], measured)
        style.panel_letter(axis, "abcdefgh"[number], metric_label(metrics[number]))
    question = (
        f"What do the importance parameters k and γ of {loaded.label(plane.policy)} buy, and at "
        "what bias?"
    )
    return style.finish(drawn, question, _caption(loaded, plane, metrics, measured))


def _draw_metric(axes: Any, plane: ImportancePlane, metric: str, measured: Measured) -> None:
    values = np.nan_to_num(style.parts(cell.predicted[metric] for cell in plane.cells)[0])
    values = values.reshape(len(plane.ks), len(plane.gammas))
    low, high = values.min(), values.max()
    axes.imshow(
        values, cmap=COLORS, vmin=low, vmax=high if high > low else low + 1.0, aspect="auto",
        origin="lower",
    )  # fmt: skip
    size = 6.2 if len(plane.gammas) <= 11 else 5.2
    decimals = int(np.clip(2 - np.floor(np.log10(max(high, 1e-3))), 0, 3))
    for (row, column), value in np.ndenumerate(values):
        cell = measured.get((row, column), {}).get(metric)
        text = number_text(value, decimals=decimals)
        axes.text(
            column, row + (0.2 if cell else 0.0), text, ha="center", va="center", fontsize=size,
            color=style.BLACK,
        )  # fmt: skip
        if cell is None:
            continue
        axes.add_patch(
            Rectangle(
                (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=style.VERMILLION,
                linewidth=1.5, zorder=3,
            )
        )  # fmt: skip
        axes.text(
            column, row - 0.22, number_text(cell.measured, decimals=decimals, interval=False),
            ha="center", va="center", fontsize=size, color=DARK, fontweight="bold",
        )  # fmt: skip
    axes.set_xticks(range(len(plane.gammas)), [f"{gamma:g}" for gamma in plane.gammas])
    axes.set_yticks(range(len(plane.ks)), [f"{k:g}" for k in plane.ks])
    axes.tick_params(labelsize=7, length=0)
    axes.grid(visible=False)
    axes.set_xlabel("strictness γ (dimensionless)")
    axes.set_ylabel("k (weights averaged)")


def _caption(
    loaded: LoadedRun, plane: ImportancePlane, metrics: list[str], measured: Measured
) -> str:
    widths = []
    for metric in metrics:
        _, low, high = style.parts(cell.predicted[metric] for cell in plane.cells)
        halves = (high - low)[np.isfinite(high - low)] / 2
        widths.append(number_text(float(halves.max()), 2) if len(halves) else "undefined")
    thinned = ""
    if plane.num_tokens != loaded.calibration.num_tokens:
        thinned = f", from n = {plane.num_prompts:,} of the prompts, {plane.num_tokens:,} tokens"
    text = (
        f"{loaded.sample} Predicted for {loaded.label(plane.policy)} at the threshold u_th = "
        f"{number_text(plane.uncertainty_threshold)} of the rule {plane.threshold_rule}{thinned}. "
        f"The number in a cell is its value; half-widths of the {loaded.derived_note}, are at most "
        f"{', '.join(widths)} from (a) on. A context is important when the mean of its k largest "
        "attention weights is at least γ\N{NO-BREAK SPACE}exp(−H); at the left every context "
        "counts and the threshold alone decides, at the right none does and all is skipped. This "
        "importance is our assumption."
    )
    if not measured:
        return f"{text} No rerun at this threshold and grid is stored."
    return (
        f"{text} Framed: measured in a rerun at that setting, in bold below the prediction. "
        f"{loaded.validation_sample}"
    )
