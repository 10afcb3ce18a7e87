"""The project's own files agree with each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq

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
