"""docs/papers.md against the published numbers and the figures it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibrate.derive.presets import published_numbers
from hlmtheory.published import PublishedNumber
from paper_figs.draw import figure_names
from paper_figs.report.tables import TABLE_NAME

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "papers.md").read_text(encoding="utf-8")
PAGE = TEXT.replace("−", "-")
SHARES = ("skip_rate", "accuracy_retained", "vocabulary_compression", "energy_saved")


def rows_of(paper: str) -> str:
    """The published column of a paper's table."""
    _, _, rest = PAGE.partition(f"## {paper} (")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return "\n".join(line.split("|")[3] for line in lines[2:])


def as_printed(number: PublishedNumber) -> str:
    share = any(number.quantity.endswith(one) for one in SHARES)
    text = f"{100 * number.value:.4g} %" if share else f"{number.value:,.10g}"
    unit = f" {number.unit}" if number.unit in ("B", "token/s") else ""
    return f"{text}{unit}{'†' if number.mark == 'second-hand' else ''}"


@pytest.mark.parametrize("number", published_numbers(), ids=lambda n: f"{n.paper} {n.quantity}")
def test_every_published_number_stands_in_its_papers_table(number: PublishedNumber) -> None:
    """With its mark: a number quoted second-hand carries a dagger, one of an abstract none."""
    found = re.search(
        rf"(?<![\d.,-]){re.escape(as_printed(number))}(?![\d†])", rows_of(number.paper)
    )
    assert found, f"{as_printed(number)} in\n{rows_of(number.paper)}"


def test_no_number_is_invented() -> None:
    known = {
        re.sub(r"[^\d.,-]", "", as_printed(number)).strip(",") for number in published_numbers()
    }
    for paper in ("U-HLM", "CU-HLM", "UI-HLM"):
        for text in re.findall(r"(?<![\w.-])-?\d[\d.,]*\d|(?<![\w.-])\d+", rows_of(paper)):
            assert text.strip(",") in known, text


def test_every_figure_is_named_and_no_other() -> None:
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert set(figure_names()) <= named
    assert TABLE_NAME in named
