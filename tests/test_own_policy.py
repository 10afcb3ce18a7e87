"""A policy nobody foresaw: one new file, taken through the whole product on a toy pair."""

from __future__ import annotations

import json
import sys

import pytest
from toy_pair import make_pair, write_prompts

import cli

pytestmark = pytest.mark.filterwarnings("default")

OWN = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hlmtheory.policies.base import GatedPolicy
from hlmtheory.steps import Skip


@dataclass(frozen=True)
class Stride(GatedPolicy):
    """Gate by the score, verify with the whole of x, and count as sent what `pace` says."""

    name: ClassVar[str] = "stride"
    label: ClassVar[str] = "every other thought"
    color: ClassVar[str] = "#123456"
    marker: ClassVar[str] = "D"

    pace: int = 2

    @classmethod
    def variants(cls, fitted, options):
        return [("", {"pace": 2}), ("@slow", {"pace": 3})]

    def entries(self, step, skip: Skip):
        return skip.zeros + self.pace
'''


def hlm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """One command in this process, which has imported the models' libraries already."""
    monkeypatch.setattr(sys, "argv", ["hlm", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0


def test_one_new_file_goes_all_the_way(tmp_path, monkeypatch, capsys) -> None:
    device, server = make_pair(tmp_path / "models")
    prompts = write_prompts(tmp_path / "prompts.txt")
    mine = tmp_path / "mine.py"
    mine.write_text(OWN)
    run = str(tmp_path / "run")
    hlm(
        monkeypatch, "calibrate", "--slm", str(device), "--llm", str(server), "--dtype", "float32",
        "--prompts", str(prompts), "--limit", "12", "--max-new-tokens", "8", "--output-path", run,
    )  # fmt: skip
    own = f"{mine}:Stride"
    hlm(monkeypatch, "derive", run, "--policy", own, "--policy", "hlm", "--risk", "0.05")
    capsys.readouterr()
    hlm(
        monkeypatch, "validate", run, "--policy", own, "--policy", "hlm", "--rule", "risk-0.05",
        "--rule", "risk-0.05@slow", "--limit", "8", "--json",
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    cells = {(c["policy"], c["rule"], c["metric"]): c for c in result["cells"]}
    assert {key[:2] for key in cells} == {
        ("stride", "risk-0.05"), ("stride", "risk-0.05@slow"), ("hlm", "none"),
    }  # fmt: skip
    # What the file says is what was counted: it sends its pace, and both paces skip alike.
    sizes = {r["rule"]: r["entries_per_sent_token"]["value"] for r in result["reruns"]}
    assert (sizes["risk-0.05"], sizes["risk-0.05@slow"]) == (2, 3)
    skips = [cells["stride", r, "skip_rate"]["measured"] for r in ("risk-0.05", "risk-0.05@slow")]
    assert skips[0] == skips[1]
    assert 0 < skips[0]["value"] < 1
    assert [one["policy"] for one in result["context_shift"]] == ["stride"] * 2
    hlm(monkeypatch, "figures", run)
    drawn = [path.name for path in (tmp_path / "run" / "figures").glob("*.png")]
    assert any("validation" in name for name in drawn)
    hlm(monkeypatch, "report", run)
    assert "every other thought" in (tmp_path / "run" / "report.html").read_text()
