"""The tables say what the records say, and name what is infeasible or was not rerun."""

from __future__ import annotations

import csv
import tomllib
from dataclasses import replace
from pathlib import Path

import paper_records
import pytest

from calibrate.derive.presets import published_audit, published_numbers
from calibrate.run.figure import NO_VALUE, number_text
from calibrate.run.records import Figure
from hlmtheory.published import PublishedTable
from paper_figs.loaded import LoadedRun
from paper_figs.report import audit_table, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loaded() -> LoadedRun:
    return paper_records.full_run()


def rows_of(text: str) -> list[list[str]]:
    """Cells of a Markdown table below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_csv_holds_every_point_unrounded(loaded: LoadedRun) -> None:
    rows = list(csv.DictReader(tables.csv_text(loaded).splitlines()))
    assert len(rows) == len(loaded.points)
    for row, point in zip(rows, loaded.points, strict=True):
        assert (row["policy"], row["rule"]) == (point.policy, point.rule)
        assert (row["feasible"] == "True") == point.feasible
        value = point.predicted["tv_bias"].value
        assert row["tv_bias_predicted"] == ("" if value is None else repr(value))
        cells = loaded.measured(point)
        assert row["tv_bias_measured_high"] == (
            repr(cells["tv_bias"].measured.high) if cells else ""
        )
        scored = point.policy in ("u-hlm", "slm") and bool(cells)
        assert row["bertscore_measured"] == ("0.9" if scored else "")
        assert row["cosine_measured_low"] == ("0.6" if scored else "")


def test_markdown_has_one_width_and_names_what_it_leaves_out(loaded: LoadedRun) -> None:
    text = tables.markdown(loaded)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert sum("| predicted |" in line for line in lines) == len(loaded.shown)
    assert sum("| measured |" in line for line in lines) == len(loaded.shown)
    num_others = len(loaded.feasible) - len(loaded.shown)
    assert f"Derived but not rerun: {num_others} settings" in text
    for point in loaded.points:
        assert (point.key in text) == (not point.feasible)
    assert "95% intervals, clustered" in text
    assert "Derivation: default; link: wifi; device profile: measured" in text


def test_quality_stands_beside_its_rerun_and_nowhere_else(loaded: LoadedRun) -> None:
    policy = ""
    for line in rows_of(tables.markdown(loaded)):
        policy = line[0] or policy
        if line[3] == "measured":
            scored = policy in ("u-hlm", "slm")
            assert (line[-2] != NO_VALUE) == (line[-1] != NO_VALUE) == scored
        elif line[3] == "predicted":
            assert line[-2:] == [NO_VALUE] * 2
    text = tables.markdown(replace(loaded, quality=None))
    assert "no texts were scored" in text
    assert all(line[-2:] == [NO_VALUE] * 2 for line in rows_of(text) if line[3] == "measured")


def test_a_column_scales_and_rounds() -> None:
    share = Figure(value=0.12345, low=0.1, high=0.2)
    assert tables.COLUMNS[0].text(share) == number_text(
        Figure(value=12.345, low=10.0, high=20.0), decimals=1
    )
    assert tables.COLUMNS[0].text(None) == NO_VALUE


def test_published_rows_stand_below_the_policies_of_their_system(loaded: LoadedRun) -> None:
    number = PublishedTable(published_numbers())
    rows = {
        row.name: dict(zip(tables.TITLES, row.cells, strict=True))
        for row in tables.published_rows()
    }
    assert rows["U-HLM"]["skipped (%)"] == f"{100 * number('U-HLM', 'skip_rate').value:g}"
    assert rows["UI-HLM"]["BERTScore F1"] == f"{number('UI-HLM', 'bert_score').value:g}"
    for row in rows.values():
        for title, cell in row.items():
            if "throughput" in title and "HLM" not in cell and cell != NO_VALUE:
                assert float(cell) < 1, "UI-HLM's are token/s; the others say what they divide by"
    policy, above = "", {}
    for line in rows_of(tables.markdown(loaded)):
        if line[3] == "*published*"[0:] and line[0] not in above:
            above[line[0].strip("*")] = policy
        elif line[0]:
            policy = line[0]
    systems = {info.paper: info.name for info in loaded.policies.values() if info.paper}
    for row in tables.published_rows():
        assert above[row.name] == systems[row.system]


def test_published_rows_without_a_policy_of_their_system_come_last(loaded: LoadedRun) -> None:
    assert loaded.derivation is not None
    unknown = tuple(info.model_copy(update={"paper": None}) for info in loaded.derivation.policies)
    other = replace(loaded, derivation=loaded.derivation.model_copy(update={"policies": unknown}))
    kinds = [line[3] for line in rows_of(tables.markdown(other))]
    assert kinds[-5:] == ["*published*"] * 5
    assert "*published*" not in kinds[:-5]


def test_markdown_table_escapes_and_aligns() -> None:
    lines = tables.markdown_table(["a", "n"], [["x|y", "1\n2"]], num_text=1)
    assert lines == ["| a | n |", "| --- | ---: |", "| x\\|y | 1 2 |"]


def test_without_points_outdated_tables_go(loaded: LoadedRun, tmp_path: Path) -> None:
    written = tables.write_tables(loaded, tmp_path)
    assert [path.name for path in written] == ["main_table.md", "main_table.csv"]
    assert tables.write_tables(replace(loaded, derivation=None), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_audit_table_holds_every_comparison(tmp_path: Path) -> None:
    text = audit_table.write_audit(tmp_path).read_text(encoding="utf-8")
    rows, times = published_audit()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + len(times) + 4
    assert f"{sum(row.consistent for row in rows)} of {len(rows)} comparisons" in text
    assert all(row.explanation in text for row in rows)
    second_hand = [line for line in lines if "†" in line]
    assert len(second_hand) == sum(row.mark == "second-hand" for row in rows)


def test_the_page_travels_with_the_package() -> None:
    """A template that is not package data is missing from an installation."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.html" in settings["package-data"]["*"]
