"""The main table in the papers' form: every operating point, predicted and measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrate.derive.operating_points import OperatingPoint
from calibrate.derive.presets import published_numbers
from calibrate.run.folder import Figure, atomic_path
from hlmtheory.published import PublishedTable
from paper_figs.loaded import LoadedRun

TABLE_NAME = "main_table"
MAX_DECIMALS = 4
NBSP = "\N{NO-BREAK SPACE}"


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
    """

    metric: str
    title: str
    scale: float = 1.0


COLUMNS: tuple[Column, ...] = (
    Column("skip_rate", "skipped (%)", 100.0),
    Column("uplink_bits_per_token", "uplink (bit/token)"),
    Column("throughput_tok_s", "throughput, 1/mean time (token/s)"),
    Column("mean_throughput_tok_s", "throughput, mean of 1/time (token/s)"),
    Column("energy_j_per_token", "energy (J/token)"),
    Column("rejection_risk", "rejection risk (%)", 100.0),
    Column("tv_bias", "TV bias (%)", 100.0),
)

QUALITY_COLUMNS: tuple[Column, ...] = (
    Column("bertscore", "BERTScore F1"),
    Column("cosine", "cosine"),
)
"""Scores of the reruns' texts, from quality.json."""

TITLES = ("accuracy kept (% of the LLM's)", *(c.title for c in (*COLUMNS, *QUALITY_COLUMNS)))
"""Accuracy is published only: the shipped prompts have no right answers to be marked by."""

NO_NUMBER = "–"

CSV_COLUMNS = ("policy", "rule", "uncertainty_threshold", "feasible", "reason")
CSV_PARTS = ("predicted", "predicted_low", "predicted_high", "measured", "measured_low",
             "measured_high")  # fmt: skip


def figures_of(
    loaded: LoadedRun, point: OperatingPoint, column: Column
) -> tuple[Figure, Figure | None]:
    """Predicted and measured figure of a point in the table's units; None where not rerun."""
    cell = loaded.measured(point).get(column.metric)
    predicted = scaled(point.predicted[column.metric], column.scale)
    return predicted, None if cell is None else scaled(cell.measured, column.scale)


def scaled(number: Figure, scale: float) -> Figure:
    """A figure in a unit `scale` times smaller."""
    value, low, high = (
        None if part is None else part * scale for part in (number.value, number.low, number.high)
    )
    return Figure(value, low, high, number.unit)


def short_text(number: Figure | None) -> str:
    """Value and half-width of the interval, with as many digits as the half-width supports."""
    if number is None or number.value is None:
        return "–"
    if number.low is None or number.high is None:
        return _plain(number.value)
    half = (number.high - number.low) / 2
    if half < 0.5 * 10**-MAX_DECIMALS or half <= 1e-6 * abs(number.value):
        return _plain(number.value)
    digits = _decimals(half)
    return f"{number.value:,.{digits}f}{NBSP}±{NBSP}{half:,.{digits}f}"


def quality_cells(loaded: LoadedRun, point: OperatingPoint) -> list[Figure | None]:
    """Text scores of a point's rerun, in the order of QUALITY_COLUMNS."""
    return [loaded.quality_of(point, column.metric) for column in QUALITY_COLUMNS]


@dataclass(frozen=True)
class PublishedRow:
    """What a paper says of its system, in the main table's columns.

    Attributes
    ----------
    paper : str
    policies : tuple of str
        Ours that it stands below.
    cells : tuple of str
        In the order of TITLES; what is relative to HLM says so.
    """

    paper: str
    policies: tuple[str, ...]
    cells: tuple[str, ...]


def published_rows() -> tuple[PublishedRow, ...]:
    """The shipped published numbers in the main table's columns."""
    number = PublishedTable(published_numbers())

    def percent(paper: str, quantity: str, of: str = "") -> str:
        return f"{100 * number(paper, quantity).value:.4g}" + (f"{NBSP}%{NBSP}{of}" if of else "")

    def row(paper: str, policies: tuple[str, ...], **cells: str) -> PublishedRow:
        places = ("accuracy", *(column.metric for column in (*COLUMNS, *QUALITY_COLUMNS)))
        return PublishedRow(paper, policies, tuple(cells.get(p, NO_NUMBER) for p in places))

    def faster(paper: str) -> str:
        return f"{number(paper, 'throughput_ratio').value:g}{NBSP}×{NBSP}HLM"

    def relative_energy(quantity: str) -> str:
        return f"{percent('UI-HLM', quantity, 'below')}{NBSP}HLM"

    # No paper says publicly which mean its throughput is: the first column holds it.
    compression = 1 - number("CU-HLM", "vocabulary_compression").value
    return (
        row(
            "U-HLM", ("u-hlm",), accuracy=percent("U-HLM", "accuracy_retained"),
            skip_rate=percent("U-HLM", "skip_rate"), throughput_tok_s=faster("U-HLM"),
        ),
        row(
            "CU-HLM", ("cu-hlm-offline", "cu-hlm-online"),
            accuracy=percent("CU-HLM", "accuracy_retained"),
            skip_rate=percent("CU-HLM", "skip_rate"), throughput_tok_s=faster("CU-HLM"),
            uplink_bits_per_token=f"{100 * compression:.2g}{NBSP}%{NBSP}of{NBSP}V",
        ),
        row(
            "UI-HLM", ("ui-hlm",),
            throughput_tok_s=f"{number('UI-HLM', 'throughput_tok_s').value:g}",
            energy_j_per_token=relative_energy("energy_saved"),
            bertscore=f"{number('UI-HLM', 'bert_score').value:g}",
        ),
        *(
            row(
                name, ("ui-hlm",),
                throughput_tok_s=f"{number('UI-HLM', f'{which}_throughput_tok_s').value:g}",
                energy_j_per_token=relative_energy(f"{which}_energy_saved"),
                bertscore=f"{number('UI-HLM', f'{which}_bert_score').value:g}",
            )
            for name, which in (("UI-HLM beside U-HLM", "compared"), ("that U-HLM", "baseline"))
        ),
    )  # fmt: skip


def _plain(value: float) -> str:
    if abs(value) < 0.5 * 10**-MAX_DECIMALS:
        return "0"
    return f"{value:,.{_decimals(value / 10)}f}"


def _decimals(half: float) -> int:
    """Decimals that show two digits of `half`, at most MAX_DECIMALS."""
    if abs(half) >= 9.95:
        return 0
    decimals = 1
    while decimals < MAX_DECIMALS and abs(half) * 10**decimals < 9.95:
        decimals += 1
    return decimals


def markdown(loaded: LoadedRun) -> str:
    """The table for a README or a paper's draft."""
    titles = ["policy", "rule", "u_th", "", *TITLES]
    lines = [markdown_row(titles), markdown_row(["---"] * 4 + ["---:"] * len(TITLES))]
    left = list(published_rows())
    last_of = {point.policy: number for number, point in enumerate(loaded.shown)}
    for number, point in enumerate(loaded.shown):
        numbers = [figures_of(loaded, point, column) for column in COLUMNS]
        threshold = point.uncertainty_threshold.value
        head = [point.policy, point.rule, "" if threshold is None else f"{threshold:.3f}"]
        unknown = [NO_NUMBER] * len(QUALITY_COLUMNS)
        predicted = [NO_NUMBER, *(short_text(p) for p, _ in numbers), *unknown]
        lines.append(markdown_row([*head, "predicted", *predicted]))
        if any(measured is not None for _, measured in numbers):
            scores = quality_cells(loaded, point)
            found = [NO_NUMBER, *(short_text(m) for m in [m for _, m in numbers] + scores)]
            lines.append(markdown_row(["", "", "", "measured", *found]))
        for row in list(left):
            if number == max(last_of.get(policy, -1) for policy in row.policies):
                left.remove(row)
                lines.append(_published_line(row))
    lines += [_published_line(row) for row in left]
    derived = loaded.derived or {}

    def named(key: str) -> str:
        return str(derived.get(key, {}).get("name", "–"))

    text = [
        f"# Predicted and measured, {loaded.pair_name}",
        "",
        f"{loaded.sample} {loaded.validation_sample}".strip(),
        f"± is the half-width of {loaded.derived_note}. Link: {named('link')}; device profile: "
        f"{named('profile')}; '{derived.get('accounting', '–')}' accounting of payload.",
        f"*Published*: what the papers' abstracts say of their own pairs, channels and devices; "
        f"to be read beside our rows, not against them. {_quality_note(loaded)}",
        "",
        *lines,
    ]
    num_others = len(loaded.feasible) - len(loaded.shown)
    if num_others:
        text += ["", f"Derived but not rerun: {num_others} settings, in {TABLE_NAME}.csv."]
    infeasible = [point for point in loaded.points if not point.feasible]
    if infeasible:
        text += ["", "Infeasible:", ""]
        text += [f"- {_escape(line)}" for line in reasons(infeasible)]
    return "\n".join(text) + "\n"


def _published_line(row: PublishedRow) -> str:
    return markdown_row([f"*{row.paper}*", "", "", "*published*", *row.cells])


def _quality_note(loaded: LoadedRun) -> str:
    if loaded.quality is None:
        return "BERTScore and cosine: no texts were scored."
    num = loaded.quality.get("num_prompts")
    texts = "" if num is None else f", n = {num:,} prompts"
    return (
        f"BERTScore and cosine: the reruns' texts against the server model's own{texts}; another "
        "backbone than the papers', so not comparable with theirs."
    )


def reasons(points: list[OperatingPoint]) -> list[str]:
    """One line a reason, with every point that it holds for."""
    grouped: dict[str, list[str]] = {}
    for point in points:
        grouped.setdefault(point.reason, []).append(f"{point.policy}/{point.rule}")
    return [f"{', '.join(names)}: {reason}" for reason, names in grouped.items()]


def markdown_row(entries: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(_escape(entry) for entry in entries) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv_text(loaded: LoadedRun) -> str:
    """The same for programs: unrounded, infeasible points too, units as in the JSON files."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metrics = [column.metric for column in COLUMNS]
    scores = [f"{c.metric}_{part}" for c in QUALITY_COLUMNS for part in CSV_PARTS[3:]]
    titles = [f"{m}_{part}" for m in metrics for part in CSV_PARTS]
    writer.writerow([*CSV_COLUMNS, *titles, *scores])
    for point in loaded.points:
        row: list[object] = [
            point.policy, point.rule, point.uncertainty_threshold.value, point.feasible,
            point.reason,
        ]  # fmt: skip
        cells = loaded.measured(point)
        for metric in metrics:
            cell = cells.get(metric)
            row += _csv_parts(point.predicted[metric])
            row += _csv_parts(None if cell is None else cell.measured)
        for score in quality_cells(loaded, point):
            row += _csv_parts(score)
        writer.writerow(["" if entry is None else entry for entry in row])
    return buffer.getvalue()


def _csv_parts(number: Figure | None) -> list[str]:
    parts = (None,) * 3 if number is None else (number.value, number.low, number.high)
    return ["" if part is None else repr(float(part)) for part in parts]


def write_tables(loaded: LoadedRun, output: Path) -> list[Path]:
    """Write the main table into a folder as Markdown and CSV; nothing if nothing was derived."""
    paths = [output / f"{TABLE_NAME}.md", output / f"{TABLE_NAME}.csv"]
    if not loaded.points:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    for path, text in zip(paths, (markdown(loaded), csv_text(loaded)), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths
