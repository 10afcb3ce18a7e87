"""What do the two parameters of importance trade against each other?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from calibrate.derive.importance_plane import PLANE_METRICS
from calibrate.validate.comparison import Cell
from paper_figs.loaded import LoadedRun, metric_label
from paper_figs.style import BLACK, VERMILLION, finish, new_figure, panel_letter

QUESTION = "What do the importance parameters k and γ of ui-hlm buy, and at what bias?"
# Even the darkest cell stays light enough for black numbers.
COLORS = LinearSegmentedColormap.from_list("plane", ["#ffffff", "#7fb2d8"])

DARK = "#8a3300"  # vermillion is too pale for small figures on blue


def plane_of(loaded: LoadedRun) -> dict[str, Any] | None:
    """The derived plane; None where there is none or it has no cells."""
    plane: dict[str, Any] | None = (loaded.derived or {}).get("importance_plane")
    return plane if plane and plane["cells"] else None


def plane_values(plane: dict[str, Any], metric: str) -> np.ndarray:
    """Predicted values (len(ks), len(gammas))."""
    values = [cell["predicted"][metric]["value"] for cell in plane["cells"]]
    return np.array(values, dtype=float).reshape(len(plane["ks"]), len(plane["gammas"]))


def measured_cells(
    loaded: LoadedRun, plane: dict[str, Any]
) -> dict[tuple[int, int], dict[str, Cell]]:
    """Reruns of ui-hlm at the plane's threshold and one of its cells, by row and column."""
    found: dict[tuple[int, int], dict[str, Cell]] = {}
    for point in loaded.feasible:
        if point.policy != "ui-hlm" or point.uncertainty_threshold.value is None:
            continue
        setting = point.settings["importance"]
        same_threshold = np.isclose(
            point.uncertainty_threshold.value, plane["uncertainty_threshold"], rtol=1e-9
        )
        on_grid = setting["k"] in plane["ks"] and setting["gamma"] in plane["gammas"]
        cells = loaded.measured(point)
        if setting["variant"] == "topk" and same_threshold and on_grid and cells:
            place = plane["ks"].index(setting["k"]), plane["gammas"].index(setting["gamma"])
            found[place] = cells
    return found


def figure(loaded: LoadedRun) -> Figure | None:
    """Heat maps of the predicted metrics over (k, gamma), with reruns where there are any."""
    plane = plane_of(loaded)
    if plane is None:
        return None
    measured = measured_cells(loaded, plane)
    drawn, axes = new_figure(2, 2, 4.9)
    for axis, letter, metric in zip(axes.flat, "abcd", PLANE_METRICS, strict=True):
        _draw_metric(axis, plane, metric, measured)
        panel_letter(axis, letter, metric_label(metric))
    return finish(drawn, QUESTION, _caption(loaded, plane, measured))


def _draw_metric(
    axis: Any,
    plane: dict[str, Any],
    metric: str,
    measured: dict[tuple[int, int], dict[str, Cell]],
) -> None:
    values = plane_values(plane, metric)
    low, high = values.min(), values.max()
    axis.imshow(
        values, cmap=COLORS, vmin=low, vmax=high if high > low else low + 1.0, aspect="auto",
        origin="lower",
    )  # fmt: skip
    size = 6.2 if len(plane["gammas"]) <= 11 else 5.2
    for (row, column), value in np.ndenumerate(values):
        cells = measured.get((row, column), {})
        lift = 0.2 if metric in cells else 0.0
        axis.text(
            column, row + lift, _short(value), ha="center", va="center", fontsize=size, color=BLACK
        )
        if metric in cells:
            axis.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILLION,
                    linewidth=1.5, zorder=3,
                )
            )  # fmt: skip
            axis.text(
                column, row - 0.22, _short(cells[metric].measured.value or 0.0), ha="center",
                va="center", fontsize=size, color=DARK, fontweight="bold",
            )  # fmt: skip
    axis.set_xticks(range(len(plane["gammas"])), [f"{gamma:g}" for gamma in plane["gammas"]])
    axis.set_yticks(range(len(plane["ks"])), [f"{k:g}" for k in plane["ks"]])
    axis.tick_params(labelsize=7, length=0)
    axis.grid(visible=False)
    axis.set_xlabel("strictness γ (dimensionless)")
    axis.set_ylabel("k (weights averaged)")


def _short(value: float) -> str:
    """Three digits at most, so that a cell can hold them."""
    if value == 0 or abs(value) < 5e-4:
        return "0"
    if abs(value) >= 99.5:
        return f"{value:.0f}" if abs(value) < 9999.5 else f"{value:.0e}".replace("e+0", "e")
    if abs(value) >= 9.95:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.0095 else f"{value:.3f}"


def _caption(
    loaded: LoadedRun,
    plane: dict[str, Any],
    measured: dict[tuple[int, int], dict[str, Cell]],
) -> str:
    widths = []
    for metric in PLANE_METRICS:
        predicted = [cell["predicted"][metric] for cell in plane["cells"]]
        halves = [(n["high"] - n["low"]) / 2 for n in predicted if n["low"] is not None]
        widths.append(_short(max(halves)) if halves else "undefined")
    threshold = f"{plane['uncertainty_threshold']:.3g}"
    thinned = ""
    if plane["num_tokens"] != loaded.trace.num_tokens:
        thinned = (
            f", from n = {plane['num_prompts']:,} of the prompts, {plane['num_tokens']:,} tokens"
        )
    text = (
        f"{loaded.sample} Predicted for ui-hlm at the threshold u_th = {threshold} of u-hlm "
        f"({plane['threshold_rule']}){thinned}. The number in a cell is its value; half-widths of "
        f"the {loaded.derived_note}, are at most {', '.join(widths)} in (a) to (d). A context is "
        "important when the mean of its k largest attention weights is at least γ exp(−H); at the "
        "left every context counts, as in u-hlm, at the right none does and all is skipped, as in "
        "slm. This importance is our assumption."
    )
    if measured:
        text += (
            " Framed: measured in a rerun at that setting, in bold below the prediction. "
            f"{loaded.validation_sample}"
        )
    else:
        text += " No rerun at this threshold and grid is stored."
    return text
