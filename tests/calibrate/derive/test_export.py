"""An exported point decides as the project does, by the docs' own reader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run

from calibrate.derive.export import export_point
from calibrate.run.errors import UsageError
from calibrate.run.folder import read_record, read_record_file, write_record_file
from calibrate.run.records import DerivationRecord, ExportRecord
from hlmtheory.policies import policy_from_settings
from hlmtheory.scores import SCORE_NAMES, score_named
from hlmtheory.uncertainty import Temperatures, exact_uncertainty

ROOT = Path(__file__).resolve().parents[3]
POINT = "r-hlm/risk-0.05"


def docs_reader() -> str:
    """The one Python block of docs/how-to/export.md."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "export.md").read_text(), re.S
    )
    return str(code)


@pytest.fixture
def reader(judged_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the docs' reader defines, run beside an exported point."""
    write_record_file(tmp_path / "point.json", export_point(judged_run, POINT))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(docs_reader(), names)
    return names


def test_the_docs_reader_is_short_and_needs_numpy_alone() -> None:
    lines = docs_reader().splitlines()
    assert len([line for line in lines if line.strip() and '"""' not in line]) <= 20
    assert [line for line in lines if line.startswith("import")] == [
        "import json",
        "import numpy as np",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_docs_reader_works_out_the_projects_uncertainty(
    reader: dict[str, Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=300) * 10 ** rng.uniform(-1, 1.5)
    logits[:2] = logits.max()  # a tie at the top
    drafts = np.arange(300)
    thetas = Temperatures(tuple(reader["point"]["score"]["temperatures"]))
    expected = exact_uncertainty(logits, drafts, thetas)
    found = [reader["uncertainty"](logits, draft) for draft in drafts]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_docs_reader_keeps_what_the_policy_skips(
    reader: dict[str, Any], judged_run: Path
) -> None:
    step, _, _ = synthetic_run.synthetic_step(7)
    derivation = read_record(judged_run, DerivationRecord)
    point = next(one for one in derivation.operating_points if one.key == POINT)
    policy = policy_from_settings("r-hlm", point.settings, point.uncertainty_threshold.value)
    skipped = policy.skips(step)
    kept = [
        reader["keep"](logits, draft)
        for logits, draft in zip(step.logits, step["draft_token"], strict=True)
    ]
    assert kept == skipped.tolist()
    assert 0 < np.mean(kept) < 1


def test_an_exported_point_goes_both_ways_and_says_all(judged_run: Path, tmp_path: Path) -> None:
    record = export_point(judged_run, POINT, command=("hlm", "export"))
    write_record_file(tmp_path / "point.json", record)
    assert read_record_file(tmp_path / "point.json", ExportRecord, "hlm export") == record
    assert record.score is not None
    assert record.score.temperatures == synthetic_run.AXES.thetas
    assert not record.certified
    text = "\n".join(record.valid_while)
    for words in ("ab" * 32, "T = 1", "float32", "12 that were calibrated on", "at most 16 tokens",
                  "nobody takes its budget for a guarantee", "hlm monitor"):  # fmt: skip
        assert words in text
    assert (tmp_path / "point.json").stat().st_size < 10_000


def test_a_policy_without_a_gate_has_no_threshold(judged_run: Path) -> None:
    record = export_point(judged_run, "hlm/none")
    assert (record.threshold, record.score, record.budget) == (None, None, None)
    assert not any("budget" in condition for condition in record.valid_while)


def test_points_that_are_not_there_or_infeasible_are_refused(judged_run: Path) -> None:
    with pytest.raises(UsageError, match="--point x/y: not derived; feasible are slm/none"):
        export_point(judged_run, "x/y")
    with pytest.raises(UsageError, match="is infeasible: 12 prompts certify no threshold"):
        export_point(judged_run, "u-hlm/ltt-0.02")


def test_every_score_says_its_formula() -> None:
    for name in SCORE_NAMES:
        if name == "learned":
            continue
        assert score_named(name).formula


def test_the_command_writes_a_file_or_standard_output(judged_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "export", str(judged_run), "--point", POINT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["point"] == POINT
    path = tmp_path / "point.json"
    done = subprocess.run(
        [*command, "--output-path", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith(f"{path}: {POINT}, valid while")
    assert json.loads(path.read_text())["threshold"] == pytest.approx(
        export_point(judged_run, POINT).threshold
    )
