"""The main table in the papers' form: every operating point, predicted and measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrate.derive.presets import published_numbers
from calibrate.run.figure import NBSP, NO_VALUE, number_text, scaled
from calibrate.run.folder import write_text
from calibrate.run.records import Figure, OperatingPoint, flat
from hlmtheory.published import PublishedTable
from paper_figs.loaded import LoadedRun

TABLE_NAME = "main_table"


@dataclass(frozen=True)
class Column:
    """One metric as the papers show it.

    Attributes
    ----------
    metric : str
    title : str
        With the unit.
    scale : float
        From the metric's unit to the title's.
    decimals : int or None
        None for three significant digits.
    """

    metric: str
    title: str
    scale: float = 1.0
    decimals: int | None = None

    def text(self, number: Figure | None) -> str:
        """A figure in the title's unit, with its interval."""
        if number is None:
            return NO_VALUE
        return number_text(scaled(number, self.scale), decimals=self.decimals)


COLUMNS: tuple[Column, ...] = (
    Column("skip_rate", "skipped (%)", 100.0, 1),
    Column("uplink_bits_per_token", "uplink (bit/token)"),
    Column("downlink_bits_per_token", "downlink (bit/token)"),
    Column("throughput_tok_s", "throughput, 1/mean time (token/s)"),
    Column("mean_throughput_tok_s", "throughput, mean of 1/time (token/s)"),
    Column("energy_j_per_token", "energy (J/token)"),
    Column("devices_per_server", "load (devices per server)"),
    Column("rejection_risk", "rejection risk (%)", 100.0, 2),
    Column("tv_bias", "TV bias (%)", 100.0, 2),
    Column("answer_divergence", "TV of answers (%)", 100.0, 1),
)

QUALITY_COLUMNS: tuple[Column, ...] = (
    Column("bertscore", "BERTScore F1"),
    Column("cosine", "cosine"),
)
"""Scores of the reruns' texts, from quality.json."""

TITLES = ("accuracy kept (% of the LLM's)", *(c.title for c in (*COLUMNS, *QUALITY_COLUMNS)))
"""Accuracy is published only: the shipped prompts have no right answers to be marked by."""


def predicted_texts(point: OperatingPoint) -> list[str]:
    """Predictions of a point, in the order of COLUMNS."""
    return [column.text(point.predicted.get(column.metric)) for column in COLUMNS]


def measured_texts(loaded: LoadedRun, point: OperatingPoint) -> list[str]:
    """Its rerun's figures and text scores, in the order of COLUMNS and QUALITY_COLUMNS."""
    cells = loaded.measured(point)
    figures = {metric: cell.measured for metric, cell in cells.items()}
    return [column.text(figures.get(column.metric)) for column in COLUMNS] + quality_texts(
        loaded, point
    )


def quality_texts(loaded: LoadedRun, point: OperatingPoint) -> list[str]:
    """Text scores of a point's rerun, in the order of QUALITY_COLUMNS."""
    return [column.text(loaded.quality_of(point, column.metric)) for column in QUALITY_COLUMNS]


@dataclass(frozen=True)
class PublishedRow:
    """What a paper says of its system, in the main table's columns.

    Attributes
    ----------
    name : str
    system : str
        The published system: our policies of that system stand above it.
    cells : tuple of str
        In the order of TITLES; what is relative to HLM says so.
    """

    name: str
    system: str
    cells: tuple[str, ...]

    @property
    def line(self) -> list[str]:
        """As the main table shows it."""
        return [f"*{self.name}*", "", "", "*published*", *self.cells]


def published_rows() -> tuple[PublishedRow, ...]:
    """The shipped published numbers in the main table's columns."""
    number = PublishedTable(published_numbers())

    def percent(paper: str, quantity: str, of: str = "") -> str:
        return f"{100 * number(paper, quantity).value:.4g}" + (f"{NBSP}%{NBSP}{of}" if of else "")

    def row(name: str, system: str, **cells: str) -> PublishedRow:
        places = ("accuracy", *(column.metric for column in (*COLUMNS, *QUALITY_COLUMNS)))
        return PublishedRow(name, system, tuple(cells.get(p, NO_VALUE) for p in places))

    def skipping(paper: str, **cells: str) -> PublishedRow:
        return row(
            paper, paper, accuracy=percent(paper, "accuracy_retained"),
            skip_rate=percent(paper, "skip_rate"),
            throughput_tok_s=f"{number(paper, 'throughput_ratio').value:g}{NBSP}×{NBSP}HLM",
            **cells,
        )  # fmt: skip

    def important(name: str, prefix: str, energy: str) -> PublishedRow:
        return row(
            name, "UI-HLM",
            throughput_tok_s=f"{number('UI-HLM', f'{prefix}throughput_tok_s').value:g}",
            energy_j_per_token=f"{percent('UI-HLM', energy, 'below')}{NBSP}HLM",
            bertscore=f"{number('UI-HLM', f'{prefix}bert_score').value:g}",
        )  # fmt: skip

    # No paper says publicly which mean its throughput is: the first column holds it.
    compression = 1 - number("CU-HLM", "vocabulary_compression").value
    return (
        skipping("U-HLM"),
        skipping("CU-HLM", uplink_bits_per_token=f"{100 * compression:.2g}{NBSP}%{NBSP}of{NBSP}V"),
        important("UI-HLM", "", "energy_saved"),
        important("UI-HLM beside U-HLM", "compared_", "compared_energy_saved"),
        important("that U-HLM", "baseline_", "baseline_energy_saved"),
    )


def markdown(loaded: LoadedRun) -> str:
    """The table for a README or a paper's draft."""
    rows: list[list[str]] = []
    published = list(published_rows())
    unknown = [NO_VALUE] * len(QUALITY_COLUMNS)
    systems = [loaded.policies[point.policy].paper for point in loaded.shown]
    for number, point in enumerate(loaded.shown):
        threshold = number_text(point.uncertainty_threshold, interval=False)
        head = [point.policy, point.rule, threshold, "predicted", NO_VALUE]
        rows.append([*head, *predicted_texts(point), *unknown])
        if loaded.measured(point):
            rows.append(["", "", "", "measured", NO_VALUE, *measured_texts(loaded, point)])
        if systems[number] not in systems[number + 1 :]:  # the last of its system
            rows += [row.line for row in published if row.system == systems[number]]
            published = [row for row in published if row.system != systems[number]]
    rows += [row.line for row in published]
    derivation = loaded.derivation
    setting = "" if derivation is None else (
        f"Derivation: {derivation.name}; link: {derivation.link.get('name', NO_VALUE)}; device "
        f"profile: {derivation.profile.get('name', NO_VALUE)}; '{derivation.accounting}' "
        "accounting of payload."
    )  # fmt: skip
    text = [
        f"# Predicted and measured, {loaded.pair_name}",
        "",
        f"{loaded.sample} {loaded.validation_sample}".strip(),
        f"In brackets: {loaded.derived_note}. {setting}",
        "*Published*: what the papers' abstracts say of their own pairs, channels and devices; to "
        f"be read beside our rows, not against them. {_quality_note(loaded)}",
        "",
        *markdown_table(["policy", "rule", "u_th", "", *TITLES], rows, num_text=4),
    ]
    num_others = len(loaded.feasible) - len(loaded.shown)
    if num_others:
        text += ["", f"Derived but not rerun: {num_others} settings, in {TABLE_NAME}.csv."]
    infeasible = [point for point in loaded.points if not point.feasible]
    if infeasible:
        text += ["", "Infeasible:", ""]
        for reason, names in grouped_reasons(infeasible).items():
            text.append(f"- {_escape(', '.join(names))}: {_escape(reason)}")
    return "\n".join(text) + "\n"


def _quality_note(loaded: LoadedRun) -> str:
    if loaded.quality is None:
        return "BERTScore and cosine: no texts were scored."
    return (
        "BERTScore and cosine: the reruns' texts against the server model's own, "
        f"n = {loaded.quality.num_prompts:,} prompts; another backbone than the papers', so not "
        "comparable with theirs."
    )


def grouped_reasons(points: Iterable[OperatingPoint]) -> dict[str, list[str]]:
    """Why points are infeasible or degenerate, and the names of those it holds for."""
    grouped: dict[str, list[str]] = {}
    for point in points:
        grouped.setdefault(point.reason, []).append(point.key)
    return grouped


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], num_text: int | None = None
) -> list[str]:
    """Lines of a Markdown table; columns from `num_text` on are numbers, on the right."""
    num_text = len(titles) if num_text is None else num_text
    rule = ["---" if place < num_text else "---:" for place in range(len(titles))]
    return [f"| {' | '.join(map(_escape, line))} |" for line in (titles, rule, *rows)]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv_text(loaded: LoadedRun) -> str:
    """The same for programs: unrounded, infeasible points too, units as in the JSON files."""
    buffer = io.StringIO()
    lines = [_csv_row(loaded, point) for point in loaded.points]
    writer = csv.DictWriter(buffer, lines[0] if lines else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_row(loaded: LoadedRun, point: OperatingPoint) -> dict[str, object]:
    """A cell without a number is empty; csv writes floats so that they read back the same."""
    cells = loaded.measured(point)
    figures: dict[str, Figure | None] = {}
    for column in COLUMNS:
        cell = cells.get(column.metric)
        figures[f"{column.metric}_predicted"] = point.predicted.get(column.metric)
        figures[f"{column.metric}_measured"] = None if cell is None else cell.measured
    for column in QUALITY_COLUMNS:
        figures[f"{column.metric}_measured"] = loaded.quality_of(point, column.metric)
    row: dict[str, object] = {
        "policy": point.policy,
        "rule": point.rule,
        "score": point.score,
        "uncertainty_threshold": point.uncertainty_threshold.value,
        "feasible": point.feasible,
        "reason": point.reason,
    }
    for name, figure in figures.items():
        row |= flat(name, figure or Figure(value=None))
    return row


def write_tables(loaded: LoadedRun, output: Path) -> list[Path]:
    """Write the main table into a folder as Markdown and CSV; nothing if nothing was derived."""
    paths = [output / f"{TABLE_NAME}.md", output / f"{TABLE_NAME}.csv"]
    if not loaded.points:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    for path, text in zip(paths, (markdown(loaded), csv_text(loaded)), strict=True):
        write_text(path, text)
    return paths
