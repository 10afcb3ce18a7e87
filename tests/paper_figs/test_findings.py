"""README says what the shipped results say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calibrate.fit.calibration import summarise
from calibrate.run.folder import read_json
from calibrate.run.resources import data_path
from calibrate.run.traces import read_trace, shard_paths
from paper_figs.report.findings import REAL, findings, replaced

ROOT = Path(__file__).resolve().parents[2]


def test_numbers_in_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert replaced(readme, findings(data_path("results"))) == readme


def test_calibration_is_what_the_shipped_trace_gives() -> None:
    """Point values and bootstrap intervals alike; numpy's sums may differ in the last digits."""
    run = data_path("results") / REAL
    made = summarise(read_trace(shard_paths(run)), read_json(run, "run.json"))
    shipped = read_json(run, "calibration.json")
    for found, kept in zip(numbers(made), numbers(shipped), strict=True):
        assert found == pytest.approx(kept, rel=1e-9, abs=1e-12)


def numbers(content: dict[str, Any]) -> list[float]:
    """Every number of the fit, the estimators and the attention, in order."""
    parts = json.loads(json.dumps([content[key] for key in ("fit", "estimators", "attention")]))

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from walk(inner)
        elif isinstance(value, int | float):
            yield value

    return list(walk(parts))


def test_a_changed_result_is_a_changed_finding(tmp_path: Path) -> None:
    """Negative control: the comparison above can fail."""
    results = data_path("results")
    for source in results.rglob("*.json"):
        copy = tmp_path / source.relative_to(results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    assert findings(tmp_path) == findings(results)
    path = tmp_path / REAL / "calibration.json"
    content = json.loads(path.read_text())
    content["fit"]["slope"]["value"] *= 1.1
    path.write_text(json.dumps(content))
    assert findings(tmp_path) != findings(results)


def test_figures_of_the_findings_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for part in readme.split("](docs/")[1:]:
        assert (ROOT / "docs" / part.partition(")")[0]).is_file()
