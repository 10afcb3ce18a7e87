"""The project's own files agree with each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
from fault_table import COLUMNS

import hlmtheory

ROOT = Path(__file__).parent.parent
PINNED = {
    line.partition("==")[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
}


def test_there_is_one_version() -> None:
    assert version("hlmtheory") == hlmtheory.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hlmtheory.__version__}\n" in citation


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    named = {name.partition(">=")[0] for name in (*project["dependencies"], *extras)}
    assert named - PINNED == {"hlmtheory[docs,quality,ray]"}


def test_packages_say_that_they_are_typed() -> None:
    for package in ("hlmtheory", "calibrate", "paper_figs"):
        assert (ROOT / package / "py.typed").is_file()


def test_shipped_results_name_no_folder_of_the_machine_that_made_them() -> None:
    files = sorted((ROOT / "data" / "results").rglob("*.json"))
    said = {path: path.read_text(encoding="utf-8") for path in files}
    for shard in (ROOT / "data" / "results").rglob("*.parquet"):
        said[shard] = pq.read_schema(shard).metadata[b"hlmtheory"].decode()
    assert {path.suffix for path in said} == {".json", ".parquet"}
    for path, text in said.items():
        assert re.search(r'"/[^"]*"', text) is None, path


def tables_of(page: str) -> list[list[list[str]]]:
    """Cells of the tables of a page of docs, headings first, the line below them left out."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    tables: list[list[list[str]]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"\|(?= |$)", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [[rows[0], *rows[2:]] for rows in tables if rows]


def test_every_promise_names_tests_that_exist() -> None:
    promises = tables_of("reliability.md")[0]
    assert promises[0] == ["promise", "how", "test"]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for promise, _, tests in promises[1:]:
        named = re.findall(r"`(test_\w+\.py)`", tests)
        assert named, promise
        assert not set(named) - there, promise


def test_the_table_of_faults_shows_kept_promises() -> None:
    """It is pasted from what `make long` prints, which no test can see."""
    faults = tables_of("reliability.md")[1]
    assert faults[0] == list(COLUMNS)
    for row in faults[1:]:
        cells = dict(zip(COLUMNS, row, strict=True))
        assert int(cells["tried"]) > 0, row
        assert int(cells["told"]) + int(cells["harmless"]) == int(cells["tried"]), row
        assert {cells[name] for name in ("silent", "tracebacks", "lost", "doubled")} == {"0"}, row
