"""One look for every figure: readable in grey, safe for colour-blind readers, no global state.

Figures are built on `matplotlib.figure.Figure` alone. pyplot is never imported, so drawing neither
opens windows nor keeps figures alive, and `styled` restores whatever settings the caller had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from calibrate.run.records import Curve, PolicyInfo
from calibrate.run.records import Figure as Number

COLUMN_WIDTHS_IN = {1: 3.5, 2: 7.0}
"""Width of a figure over one column of a paper, or two."""

PNG_DPI = 160
CAPTION_SIZE_PT = 8.0
TITLE_HEIGHT_IN = 0.25
STACKED_HEIGHT = 0.78
"""Height of a panel in one column, of what it has beside others in two."""
LONG_LABEL = 28
"""Characters of a legend's entry from which on entries stand below each other in one column."""
COINCIDE = 0.01
"""Curves closer than this share of an axis are one to the eye: its line covers as much."""

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
NARROW: dict[str, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 6.5,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
}
"""What is smaller in one column."""


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

    def on_line_of(self, other: SeriesStyle) -> dict[str, Any]:
        """Arguments of these full markers on the line of another series."""
        return self.filled_marker() | other.line()

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
def styled(num_columns: int = 2) -> Iterator[None]:
    """Draw and save inside this, for so many columns; the caller's settings come back after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS | (NARROW if num_columns == 1 else {}))
        width = COLUMN_WIDTHS_IN[num_columns]
        matplotlib.rcParams["figure.figsize"] = (width, width)
        yield


def is_narrow() -> bool:
    """Whether figures are made for one column."""
    return float(matplotlib.rcParams["figure.figsize"][0]) <= COLUMN_WIDTHS_IN[1]


def new_figure(
    num_rows: int,
    num_columns: int,
    height_in: float,
    *,
    share_x: Any = False,
    share_y: Any = False,
    height_ratios: tuple[float, ...] | None = None,
    width_ratios: tuple[float, ...] | None = None,
    stacked: bool = True,
) -> tuple[Figure, np.ndarray]:
    """An empty figure on the Agg canvas, and its axes as an array (num_rows, num_columns).

    In one column the panels of a row stand below each other, unless they are not to be stacked.
    """
    grid = (num_rows, num_columns)
    stacked = stacked and is_narrow()
    if stacked:
        height_in *= STACKED_HEIGHT * num_columns
        grid = (num_rows * num_columns, 1)
        height_ratios = tuple(np.repeat(height_ratios or (1.0,) * num_rows, num_columns))
        width_ratios = None
    width_in = matplotlib.rcParams["figure.figsize"][0]
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        *grid,
        sharex=share_x,
        sharey=share_y,
        squeeze=False,
        height_ratios=height_ratios,
        width_ratios=width_ratios,
    ).reshape(num_rows, num_columns)
    if stacked and share_y == "row":
        for row in axes:
            for other in row[1:]:
                other.sharey(row[0])
    return figure, axes


def finish(figure: Figure, question: str, caption: str) -> Figure:
    """Put the question above the axes and the caption, wrapped to the width, below them.

    The caption adds its own lines to the height, so that the axes keep the size they asked for.
    Figures of one column have no room for either: see :func:`take_words`.
    """
    left = 0.012
    figure.suptitle(question, x=left, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    if is_narrow():
        _fit_labels(figure)
    width, height = figure.get_size_inches()
    # Glyphs snapped to pixels are up to a thirtieth wider than their outlines.
    wrapped = wrap(caption, (1 - 2 * left) * width * 72 / (1 + 1 / 30), CAPTION_SIZE_PT)
    # Prompt names may hold a dollar sign, which is not the start of a formula here.
    figure.supxlabel(
        wrapped, x=left, ha="left", fontsize=CAPTION_SIZE_PT, color="#303030", parse_math=False
    )
    figure.set_size_inches(width, height + _caption_height_in(wrapped))
    return figure


def _fit_labels(figure: Figure) -> None:
    """Break titles and labels that are longer than one column, and label shared axes again.

    Panels below each other do not stand beside the axis whose label they share.
    """
    figure.draw_without_rendering()
    size_pt = NARROW["axes.labelsize"]
    for axes in figure.axes:
        shared = axes.get_shared_y_axes().get_siblings(axes)
        label = axes.get_ylabel() or next((o.get_ylabel() for o in shared if o.get_ylabel()), "")
        box = axes.get_window_extent()
        width_pt, height_pt = (72 * length / figure.dpi for length in (box.width, box.height))
        axes.set_ylabel(wrap(label, height_pt, size_pt))
        axes.set_xlabel(wrap(axes.get_xlabel(), width_pt, size_pt))
        axes.set_title(wrap(axes.get_title(loc="left"), width_pt, size_pt), loc="left")


def take_words(figure: Figure) -> tuple[str, str]:
    """Remove question and caption from a finished figure and return them, to be set elsewhere."""
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


def zero_and_log(axes: Any, which: str, floor: float, limit: float) -> None:
    """A logarithmic axis with a linear strip from 0 to `floor`, so that 0 has a place."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("symlog", linthresh=floor, linscale=0.5)
    getattr(axes, f"set_{which}lim")(-0.35 * floor, limit)
    first, last = round(np.log10(floor)), int(np.floor(np.log10(limit) + 1e-9))
    every = 2 if is_narrow() else 1
    axis.set_major_locator(FixedLocator([0.0, *(10.0**n for n in range(first, last + 1, every))]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power_of_ten))


def _power_of_ten(value: float, _: int) -> str:
    if value == 0:
        return "0"
    power = round(np.log10(value))
    return f"{value:g}" if -2 <= power <= 2 else f"$10^{{{power}}}$"


def panel_letter(axes: Any, letter: str, text: str) -> None:
    """Name a panel, for the caption to refer to."""
    axes.set_title(f"({letter}) {text}", loc="left")


def direct_legend(axes: Any, **options: Any) -> None:
    """A legend of what was labelled, if anything was."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, **options)


def outer_legend(axes: Any, labelled: Any = None, **options: Any) -> None:
    """A legend beside the axes unless told where, or below the panels of one column.

    Of other axes, if they are `labelled`.
    """
    handles, labels = (labelled or axes).get_legend_handles_labels()
    if not handles:
        return
    if is_narrow():
        lines = [label.split("\n") for label in labels]
        ncols = 1 + (max(len(line) for entry in lines for line in entry) < LONG_LABEL)
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        num_lines = sum(map(len, lines)) / ncols + 1
        width, height = axes.figure.get_size_inches()
        height += 1.5 * num_lines * NARROW["legend.fontsize"] / 72
        axes.figure.set_size_inches(width, height)
    else:
        axes.legend(
            handles, labels, **{"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} | options
        )


def coinciding(*panels: Sequence[Any]) -> list[list[int]]:
    """Which drawn lines lie on each other, as lists of their places, in order.

    Parameters
    ----------
    *panels : sequence of Line2D
        The same series in each panel, whose axes have their limits. Series are one where every
        point of either line is within COINCIDE of the axes' height and width of the other line, in
        every panel.
    """
    groups: list[list[int]] = []
    paths = [[_in_axes(line) for line in panel] for panel in panels]
    for place in range(len(panels[0])):
        for group in groups:
            if all(_far(path[place], path[group[0]]) <= COINCIDE for path in paths):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _in_axes(line: Any) -> np.ndarray:
    """Points of a line (G, 2) as shares of its axes, those that the axes can show."""
    to = line.axes.transScale + line.axes.transLimits
    points = np.array(to.transform(np.column_stack(line.get_data())))
    shown: np.ndarray = points[np.isfinite(points).all(axis=1)]
    return shown


def _far(one: np.ndarray, other: np.ndarray) -> float:
    """Greatest distance of a point of either line from the other line."""
    return max(_farthest(one, other), _farthest(other, one))


def _farthest(points: np.ndarray, line: np.ndarray) -> float:
    """Greatest distance of points (N, 2) from a line of segments, (M, 2)."""
    if not len(points) or not len(line):
        return np.inf
    begin, end = line[:-1], line[1:]
    if len(line) == 1:
        begin = end = line
    along = end - begin
    length = np.maximum((along**2).sum(-1), 1e-300)
    share = ((points[:, None] - begin) * along).sum(-1) / length
    nearest = begin + np.clip(share, 0, 1)[..., None] * along
    return float(np.sqrt(((points[:, None] - nearest) ** 2).sum(-1)).min(axis=1).max())
