"""The report's tables, each in the section whose question it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibrate.run.figure import NBSP, NO_VALUE, number_text
from calibrate.run.records import Cell
from paper_figs.draw import SECTIONS
from paper_figs.loaded import LoadedRun, metric_label, metric_names
from paper_figs.report import tables

FIT = (
    ("slope", "slope a", "rejection probability gained per unit of uncertainty"),
    ("intercept", "intercept b", "predicted rejection probability at u = 0"),
    ("correlation", "correlation, token by token", "how well u tells single rejections"),
    ("correlation_binned", "correlation of binned means", "how linear the average is"),
    ("curvature", "quadratic term", "coefficient of u² beside the line; 0 if it is a line"),
    ("mean_rejection", "mean rejection", "share of drafts that verification rejects"),
    ("delta", "Δ", "share of drafts that can be rejected at all, P(y_d < x_d)"),
)
KNOWS, SKIPS, COSTS, _, HOLDS = SECTIONS


@dataclass(frozen=True)
class PageCell:
    """A text, a smaller line below it, and whether it says that something failed."""

    text: str
    small: str = ""
    failed: bool = False


@dataclass(frozen=True)
class PageTable:
    """Titles and rows; columns from `num_text` on are numbers, whose interval goes below them.

    A `folded` table waits for a click; `notes` are lines below it.
    """

    title: str
    titles: tuple[str, ...]
    rows: tuple[tuple[PageCell, ...], ...]
    num_text: int
    folded: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        titles: Sequence[str],
        rows: Iterable[Sequence[str | PageCell]],
        num_text: int = 1,
        **options: bool | tuple[str, ...],
    ) -> PageTable:
        """A table of texts as :func:`calibrate.run.figure.number_text` prints them."""
        cells = tuple(tuple(map(_cell, row)) for row in rows)
        return cls(title, tuple(titles), cells, num_text, **options)  # type: ignore[arg-type]


def _cell(text: str | PageCell) -> PageCell:
    if isinstance(text, PageCell):
        return text
    value, bracket, interval = text.partition(f"{NBSP}[")
    return PageCell(value, bracket.strip(NBSP) + interval)


def section_tables(loaded: LoadedRun) -> dict[str, list[PageTable]]:
    """Tables by the title of their section; none without rows."""
    found = {
        KNOWS: [_fit(loaded), _scores(loaded)],
        SKIPS: [_thresholds(loaded), _infeasible(loaded)],
        COSTS: [_compared(loaded), _all_points(loaded)],
        HOLDS: [_measured(loaded), _covered(loaded), _cells(loaded), _quality(loaded)],
    }
    return {title: [one for one in own if one.rows] for title, own in found.items()}


def _fit(loaded: LoadedRun) -> PageTable:
    fit = loaded.calibration.fit
    rows = [(name, PageCell(why), number_text(getattr(fit, key))) for key, name, why in FIT]
    titles = ("quantity", "what it says", "value")
    return PageTable.of("The fitted line", titles, rows, num_text=2)


def _scores(loaded: LoadedRun) -> PageTable:
    scores = loaded.calibration.estimators
    levels = list(scores[0].skip_rate_at_risk) if scores else []
    titles = ("score", "correlation with β", "AUROC",
              *(f"skip rate at {100 * float(level):g} % risk" for level in levels))  # fmt: skip
    rows = [
        (one.label, number_text(one.correlation), number_text(one.auroc),
         *(number_text(one.skip_rate_at_risk[level]) for level in levels))
        for one in scores
    ]  # fmt: skip
    return PageTable.of("Scores that could gate", titles, rows)


def _thresholds(loaded: LoadedRun) -> PageTable:
    """One row a threshold: of the first gated policy, for others skip the same drafts."""
    gated = [point for point in loaded.feasible if point.score and not point.variant]
    first = gated[0].policy if gated else ""
    by_metric = {column.metric: column for column in tables.COLUMNS}
    rows = [
        (point.rule, number_text(point.uncertainty_threshold),
         *(by_metric[key].text(point.predicted[key]) for key in ("skip_rate", "rejection_risk")),
         by_metric["answer_divergence"].text(point.predicted["answer_divergence"]))
        for point in gated
        if point.policy == first
    ]  # fmt: skip
    titles = ("rule", "threshold u_th", "skipped (%)", "risk (%)", "TV of answers (%)")
    title = f"Thresholds, with the predictions of {loaded.label(first)}"
    return PageTable.of(title, titles, rows)


def _infeasible(loaded: LoadedRun) -> PageTable:
    reasons = tables.grouped_reasons(point for point in loaded.points if point.reason)
    rows = [(PageCell(reason), ", ".join(names)) for reason, names in reasons.items()]
    return PageTable.of(
        "Infeasible or degenerate, and why", ("why", "settings"), rows, num_text=2, folded=True
    )


def _compared(loaded: LoadedRun) -> PageTable:
    """One row a policy: thresholds of gates are the rule's."""
    rule = f" at {loaded.gates[0].rule}" if loaded.gates else ""
    titles = ("policy", *(column.title for column in tables.COLUMNS))
    rows = [(point.policy, *tables.predicted_texts(point)) for point in loaded.compared]
    return PageTable.of(f"Policies compared{rule}, predicted", titles, rows)


def _all_points(loaded: LoadedRun) -> PageTable:
    titles = ("policy", "rule", "u_th", *(column.title for column in tables.COLUMNS))
    rows = [
        (point.policy, point.rule, number_text(point.uncertainty_threshold),
         *tables.predicted_texts(point))
        for point in loaded.feasible
    ]  # fmt: skip
    title = f"All {len(rows)} feasible settings, predicted"
    return PageTable.of(title, titles, rows, num_text=2, folded=True)


def _measured(loaded: LoadedRun) -> PageTable:
    metrics = metric_names(loaded.cells)

    def cell(found: dict[str, Cell], metric: str) -> PageCell:
        one = found.get(metric)
        if one is None:
            return PageCell(NO_VALUE)
        missed = one.covered is False
        return PageCell(
            ("✗ " if missed else "") + number_text(one.measured, 4, interval=False),
            number_text(one.predicted, 4, interval=False),
            missed,
        )

    rows: list[tuple[str | PageCell, ...]] = [
        (policy, rule, *(cell(found, metric) for metric in metrics))
        for (policy, rule), found in loaded.cells_of.items()
    ]
    return PageTable.of(
        "Measured in reruns, and in small what was predicted; ✗: outside its interval",
        ("policy", "rule", *map(metric_label, metrics)),
        rows,
        num_text=2,
    )


def _covered(loaded: LoadedRun) -> PageTable:
    rows = []
    for metric in metric_names(loaded.cells):
        judged = [c.covered for c in loaded.cells if c.metric == metric and c.covered is not None]
        rows.append((metric_label(metric), str(sum(judged)), str(len(judged))))
    return PageTable.of("Cells inside their intervals", ("metric", "inside", "cells"), rows)


def _cells(loaded: LoadedRun) -> PageTable:
    holds = {True: "yes", False: "no", None: NO_VALUE}
    rows = [
        (cell.policy, cell.rule, metric_label(cell.metric), number_text(cell.predicted, 4),
         number_text(cell.measured, 4),
         PageCell(holds[cell.covered], failed=cell.covered is False))
        for cell in loaded.cells
    ]  # fmt: skip
    titles = ("policy", "rule", "metric", "predicted", "measured", "inside")
    title = f"Every cell with its intervals ({len(rows)})"
    return PageTable.of(title, titles, rows, num_text=3, folded=True)


def _quality(loaded: LoadedRun) -> PageTable:
    rows = []
    for point in loaded.feasible:
        texts = tables.quality_texts(loaded, point)
        if set(texts) != {NO_VALUE}:
            rows.append((point.policy, point.rule, *texts))
    return PageTable.of(
        "How close the texts are to the server model's own",
        ("policy", "rule", *(column.title for column in tables.QUALITY_COLUMNS)),
        rows,
        num_text=2,
        notes=(
            "Means over prompts. The backbone is not the papers': compare these figures with each "
            "other, not with published ones.",
        ),
    )
