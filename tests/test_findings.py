"""README says what the shipped results say."""

from __future__ import annotations

import json
from pathlib import Path

from calibrate.resources import data_path
from paper_figs.findings import REAL, findings, replaced

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_in_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert replaced(readme, findings(data_path("results"))) == readme


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
