"""The papers' published numbers against the theory, as a table: it needs no run."""

from __future__ import annotations

from pathlib import Path

from calibrate.derive.presets import published_audit
from calibrate.run.folder import atomic_path
from hlmtheory.audit import AuditRow
from hlmtheory.reconcile import Reconciliation
from paper_figs.report.tables import markdown_row

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
    published = _number(row.published) + ("†" if row.mark == "second-hand" else "")
    implied = _number(row.implied)
    if row.implied_low is not None and row.implied_high is not None:
        if row.implied_low != row.implied_high:
            implied += f" [{_number(row.implied_low)}, {_number(row.implied_high)}]"
    elif row.implied_low is not None:
        implied += f" [{_number(row.implied_low)}, ∞)"
    if row.unit:
        implied += f" {row.unit}"
    return (
        row.system, row.quantity, published, implied, "yes" if row.consistent else "no",
        row.explanation,
    )  # fmt: skip


def reconciliation_cells(entry: Reconciliation) -> tuple[str, ...]:
    """One reconciling set of times as text, in the order of TIME_COLUMNS."""
    ratio = entry.ratio_of_means
    return (
        entry.system, entry.averaging, _number(entry.t_slm), _number(entry.t_llm),
        "none" if entry.t_up is None else _number(entry.t_up), entry.unit,
        "–" if ratio is None else f"{ratio:.3g}×", entry.reason,
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
        markdown_row(COLUMNS),
        markdown_row(["---"] * len(COLUMNS)),
        *(markdown_row(audit_cells(row)) for row in rows),
        "",
        TIMES_INTRODUCTION,
        "",
        markdown_row(TIME_COLUMNS),
        markdown_row(["---"] * len(TIME_COLUMNS)),
        *(markdown_row(reconciliation_cells(entry)) for entry in times),
    ]
    return "\n".join(lines) + "\n"


def write_audit(output: Path) -> Path:
    """Write the table into a folder and return its path."""
    path = output / AUDIT_NAME
    text = markdown()
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}".replace("-", "−")
