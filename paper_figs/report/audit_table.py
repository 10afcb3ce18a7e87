"""The papers' published numbers against the theory, as a table: it needs no run."""

from __future__ import annotations

from pathlib import Path

from calibrate.derive.presets import published_audit
from calibrate.run.figure import NO_VALUE, number_text
from calibrate.run.folder import write_text
from hlmtheory.audit import AuditRow
from hlmtheory.reconcile import Reconciliation
from paper_figs.report.tables import markdown_table

AUDIT_NAME = "audit_table.md"
COLUMNS = ("system", "quantity", "published", "implied", "consistent", "why")
TIME_COLUMNS = ("system", "averaging", "t_slm", "t_llm", "t_up", "unit", "speed-up", "why")
INTRODUCTION = (
    "Each published number stands for the interval of its rounding, and so does what the theory "
    "works out from it (in brackets: from the rounding of everything that it uses). Not consistent "
    "does not mean wrong: not from one setting under that reading. † quoted second-hand, not "
    "checked against the paper; the others are stated by the papers' abstracts. There is no "
    "sample, so no n."
)
TIMES_INTRODUCTION = (
    "Times that make each throughput figure come out: the server model's time is given, the "
    "uplink's solved for. The last figure is the speed-up in mean token time that would go with it."
)


def audit_cells(row: AuditRow) -> tuple[str, ...]:
    """One row as text, in the order of COLUMNS."""
    published = number_text(row.published, 4) + ("†" if row.mark == "second-hand" else "")
    implied = number_text(row.implied, 4)
    if row.implied_low is not None and row.implied_low != row.implied_high:
        high = f"{number_text(row.implied_high, 4)}]" if row.implied_high is not None else "∞)"
        implied += f" [{number_text(row.implied_low, 4)}, {high}"
    return (
        row.system, row.quantity, published, f"{implied} {row.unit}".strip(),
        "yes" if row.consistent else "no", row.explanation,
    )  # fmt: skip


def reconciliation_cells(entry: Reconciliation) -> tuple[str, ...]:
    """One reconciling set of times as text, in the order of TIME_COLUMNS."""
    ratio = entry.ratio_of_means
    return (
        entry.system, entry.averaging, number_text(entry.t_slm, 4), number_text(entry.t_llm, 4),
        "none" if entry.t_up is None else number_text(entry.t_up, 4), entry.unit,
        NO_VALUE if ratio is None else f"{number_text(ratio)}×", entry.reason,
    )  # fmt: skip


def markdown() -> str:
    """The audit of the shipped published numbers as Markdown."""
    rows, times = published_audit()
    num_consistent = sum(row.consistent for row in rows)
    lines = [
        "# Can the published numbers come from one setting?",
        "",
        f"{num_consistent} of {len(rows)} comparisons are consistent. {INTRODUCTION}",
        "",
        *markdown_table(COLUMNS, map(audit_cells, rows)),
        "",
        TIMES_INTRODUCTION,
        "",
        *markdown_table(TIME_COLUMNS, map(reconciliation_cells, times)),
    ]
    return "\n".join(lines) + "\n"


def write_audit(output: Path) -> Path:
    """Write the table into a folder and return its path."""
    path = output / AUDIT_NAME
    write_text(path, markdown())
    return path
