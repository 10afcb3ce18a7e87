"""One look for every figure: readable in grey, safe for colour-blind readers, no global state.

Figures are built on `matplotlib.figure.Figure` alone. pyplot is never imported, so drawing neither
opens windows nor keeps figures alive, and `styled` restores whatever settings the caller had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from calibrate.run.records import Curve, PolicyInfo
from calibrate.run.records import Figure as Number

WIDTH_IN = 7.0
"""Width of every figure: two columns of a paper."""

PNG_DPI = 160
CAPTION_SIZE_PT = 8.0
TITLE_HEIGHT_IN = 0.25

BLACK, GREY, LIGHT = "#000000", "#6b6b6b", "#d0d0d0"
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
ORANGE, SKY, PURPLE = "#e69f00", "#56b4e9", "#b0588e"

SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#404040",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "path.simplify": True,
}


@dataclass(frozen=True)
class SeriesStyle:
    """How one series looks. No two of a family share a line style or a marker.

    Attributes
    ----------
    color : str
    linestyle : str or tuple
        Any dash pattern Matplotlib knows.
    marker : str
    """

    color: str
    linestyle: Any
    marker: str

    def line(self) -> dict[str, Any]:
        """Arguments of a line without markers."""
        return {"color": self.color, "linestyle": self.linestyle}

    def open_marker(self) -> dict[str, Any]:
        """Arguments of a hollow marker: predictions."""
        return self._marker("white")

    def filled_marker(self) -> dict[str, Any]:
        """Arguments of a full marker: measurements."""
        return self._marker(self.color)

    def _marker(self, face: str) -> dict[str, Any]:
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": "none",
            "markerfacecolor": face,
            "markeredgecolor": self.color,
            "markeredgewidth": 1.1,
        }


SERIES: tuple[SeriesStyle, ...] = tuple(
    SeriesStyle(color, (0, dashes) if dashes else "solid", marker)
    for color, dashes, marker in (
        (BLUE, (), "o"), (VERMILLION, (6, 2), "s"), (GREEN, (1, 1.4), "^"),
        (PURPLE, (6, 2, 1, 2), "D"), (ORANGE, (3, 1.5), "v"), (SKY, (8, 2, 1, 2, 1, 2), "P"),
        (BLACK, (10, 3), "X"), (GREY, (2, 3), "*"), ("#7a4b00", (4, 1, 4, 3), "<"),
        ("#3b3b98", (1, 3), ">"),
    )
)  # fmt: skip


def policy_style(info: PolicyInfo) -> SeriesStyle:
    """Look of a policy, as its own class gives it."""
    return SeriesStyle(info.color, (0, info.dashes) if info.dashes else "solid", info.marker)


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside this; the caller's Matplotlib settings are restored after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_figure(
    num_rows: int,
    num_columns: int,
    height_in: float,
    *,
    share_x: Any = False,
    share_y: Any = False,
    height_ratios: tuple[float, ...] | None = None,
    width_ratios: tuple[float, ...] | None = None,
) -> tuple[Figure, np.ndarray]:
    """An empty figure on the Agg canvas, and its axes as an array (num_rows, num_columns)."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        num_rows,
        num_columns,
        sharex=share_x,
        sharey=share_y,
        squeeze=False,
        height_ratios=height_ratios,
        width_ratios=width_ratios,
    )
    return figure, axes


def finish(figure: Figure, question: str, caption: str) -> Figure:
    """Put the question above the axes and the caption, wrapped to the width, below them.

    The caption adds its own lines to the height, so that the axes keep the size they asked for.
    """
    left = 0.012
    figure.suptitle(question, x=left, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    # Glyphs snapped to pixels are up to a thirtieth wider than their outlines.
    wrapped = wrap(caption, (1 - 2 * left) * WIDTH_IN * 72 / (1 + 1 / 30), CAPTION_SIZE_PT)
    # Prompt names may hold a dollar sign, which is not the start of a formula here.
    figure.supxlabel(
        wrapped, x=left, ha="left", fontsize=CAPTION_SIZE_PT, color="#303030", parse_math=False
    )
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _caption_height_in(wrapped))
    return figure


def take_words(figure: Figure) -> tuple[str, str]:
    """Remove question and caption from a finished figure and return them, for HTML to set."""
    words = question_of(figure), caption_of(figure)
    width, height = figure.get_size_inches()
    removed = _caption_height_in(str(figure.get_supxlabel())) + TITLE_HEIGHT_IN
    figure.suptitle("")
    figure.supxlabel("")
    figure.set_size_inches(width, height - removed)
    return words


def _caption_height_in(wrapped: str) -> float:
    return (wrapped.count("\n") + 1) * 1.25 * CAPTION_SIZE_PT / 72 + 0.08


def wrap(text: str, width_pt: float, size_pt: float) -> str:
    """Break text at spaces so that no line is wider than `width_pt` in the figure's font."""
    font = FontProperties(family="DejaVu Sans", size=size_pt)
    lines: list[str] = []
    line = ""
    for word in text.replace("\n", " ").split(" "):  # a no-break space does not break
        longer = f"{line} {word}".strip()
        if line and _text_width_pt(longer, font) > width_pt:
            lines.append(line)
            line = word
        else:
            line = longer
    return "\n".join([*lines, line])


def _text_width_pt(text: str, font: FontProperties) -> float:
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)


def question_of(figure: Figure) -> str:
    """The title that :func:`finish` set."""
    return str(figure.get_suptitle())


def caption_of(figure: Figure) -> str:
    """The caption that :func:`finish` set, in one line."""
    return str(figure.get_supxlabel()).replace("\n", " ")


def parts(numbers: Iterable[Number] | Curve, scale: float = 1.0) -> np.ndarray:
    """Value, low and high of figures or along a curve, (3, G); NaN where one is not defined."""
    if isinstance(numbers, Curve):
        columns = [numbers.value, numbers.low, numbers.high]
    else:
        columns = list(zip(*((n.value, n.low, n.high) for n in numbers), strict=True))
    return scale * np.array(columns, dtype=np.float64).reshape(3, -1)


def error_lengths(found: np.ndarray) -> np.ndarray:
    """Distances below and above, (2, G), as Matplotlib's error bars want them; 0 where unknown."""
    value, low, high = found
    return np.nan_to_num(np.maximum([value - low, high - value], 0.0))


def error_bars(axes: Any, x: Any, found: np.ndarray, **options: Any) -> None:
    """Values with their intervals, as :func:`parts` gives them, at x (G,)."""
    options = {"elinewidth": 0.9, "capsize": 2, "markersize": 4.5} | options
    axes.errorbar(x, found[0], error_lengths(found), **options)


def band(axes: Any, means: Curve, color: str, high: float = 1.0, **line: Any) -> None:
    """A curve over the band of its intervals, which is cut where no mean can lie."""
    value, lower, upper = parts(means)
    lower, upper = np.clip([lower, upper], 0.0, high)
    axes.fill_between(means.grid, lower, upper, color=color, alpha=0.18, linewidth=0)
    axes.plot(means.grid, value, color=color, **line)


def panel_letter(axes: Any, letter: str, text: str) -> None:
    """Name a panel, for the caption to refer to."""
    axes.set_title(f"({letter}) {text}", loc="left")


def direct_legend(axes: Any, **options: Any) -> None:
    """A legend of what was labelled, if anything was."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, **options)
