"""The main table in the papers' form: every operating point, predicted and measured."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from calibrate.operating_points import OperatingPoint
from calibrate.runs import Figure, atomic_path
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
    titles = ["policy", "rule", "u_th", "", *(column.title for column in COLUMNS)]
    lines = [_row(titles), _row(["---"] * 4 + ["---:"] * len(COLUMNS))]
    for point in loaded.feasible:
        numbers = [figures_of(loaded, point, column) for column in COLUMNS]
        threshold = point.uncertainty_threshold.value
        head = [point.policy, point.rule, "" if threshold is None else f"{threshold:.3f}"]
        lines.append(_row([*head, "predicted", *(short_text(p) for p, _ in numbers)]))
        if any(measured is not None for _, measured in numbers):
            lines.append(_row(["", "", "", "measured", *(short_text(m) for _, m in numbers)]))
    derived = loaded.derived or {}

    def named(key: str) -> str:
        return str(derived.get(key, {}).get("name", "–"))

    text = [
        f"# Predicted and measured, {loaded.pair_name}",
        "",
        f"{loaded.sample} {loaded.validation_sample}".strip(),
        f"± is the half-width of {loaded.interval_note}. Link: {named('link')}; device profile: "
        f"{named('profile')}; '{derived.get('accounting', '–')}' accounting of payload.",
        "",
        *lines,
    ]
    infeasible = [point for point in loaded.points if not point.feasible]
    if infeasible:
        text += ["", "Infeasible:", ""]
        text += [f"- {_escape(line)}" for line in reasons(infeasible)]
    return "\n".join(text) + "\n"


def reasons(points: list[OperatingPoint]) -> list[str]:
    """One line a reason, with every point that it holds for."""
    grouped: dict[str, list[str]] = {}
    for point in points:
        grouped.setdefault(point.reason, []).append(f"{point.policy}/{point.rule}")
    return [f"{', '.join(names)}: {reason}" for reason, names in grouped.items()]


def _row(entries: list[str]) -> str:
    return "| " + " | ".join(_escape(entry) for entry in entries) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv_text(loaded: LoadedRun) -> str:
    """The same for programs: unrounded, infeasible points too, units as in the JSON files."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metrics = [column.metric for column in COLUMNS]
    writer.writerow([*CSV_COLUMNS, *(f"{m}_{part}" for m in metrics for part in CSV_PARTS)])
    for point in loaded.points:
        row: list[object] = [
            point.policy, point.rule, point.uncertainty_threshold.value, point.feasible,
            point.reason,
        ]  # fmt: skip
        cells = loaded.measured(point)
        for metric in metrics:
            cell = cells.get(metric)
            for number in (point.predicted[metric], None if cell is None else cell.measured):
                parts = (None,) * 3 if number is None else (number.value, number.low, number.high)
                row += ["" if part is None else repr(float(part)) for part in parts]
        writer.writerow(["" if entry is None else entry for entry in row])
    return buffer.getvalue()


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
