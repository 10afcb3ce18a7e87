"""What commands print in a real terminal of 80, 100 and 120 columns; verdicts come first."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = (80, 100, 120)
LINE = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
PAGES = """
import sys
from pathlib import Path
import paper_records
from calibrate.run.folder import read_record
from calibrate.run import records
from calibrate.terminal import derived, tables
run = Path(sys.argv[1])
verbose = sys.argv[2] == "verbose"
tables.print_calibration(read_record(run, records.CalibrationRecord), run, verbose)
derived.print_operating_points(read_record(run, records.DerivationRecord), verbose)
tables.print_validation(read_record(run, records.ValidationRecord), verbose)
tables.print_guarantees(paper_records.guarantees_record())
tables.print_attenuation(paper_records.attenuation_record())
from calibrate.derive.presets import published_audit
tables.print_audit(*published_audit(), False)
from calibrate.pairs.registry import REGISTRY, describe
tables.print_pairs([describe(spec) for spec in REGISTRY.values()], False)
tables.print_pair(describe(REGISTRY["qwen2.5-coder"]), False)
from calibrate.terminal.doctor import Check, HealthReport
check = Check("pair of models", "not fetched", None, "fetched when first used, or: hlm pairs pull")
tables.print_doctor(HealthReport((check,)), False)
"""


def in_terminal(width: int, *arguments: str) -> str:
    """Standard output of Python with these arguments, in a pseudo-terminal of that width."""
    terminal, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    child = subprocess.Popen(
        [sys.executable, *arguments], stdin=program, stdout=program, stderr=subprocess.PIPE,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    os.close(program)
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(terminal)
    _, errors = child.communicate()
    assert child.returncode == 0, errors.decode()
    return b"".join(parts).decode().replace("\r\n", "\n")


def numbers(text: str) -> set[str]:
    """Words with a digit in them; an interval is held together by spaces that do not break."""
    return {word for word in re.split(r"[ \n]+", text) if re.search(r"\d", word)}


@pytest.fixture(scope="module")
def wide(judged_run: Path) -> str:
    return in_terminal(1000, "-c", PAGES, str(judged_run), "verbose")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_table_is_cut_and_no_number_is_broken(width: int, judged_run: Path, wide: str) -> None:
    for much in ("short", "verbose"):
        text = in_terminal(width, "-c", PAGES, str(judged_run), much)
        longest = max(len(word) for word in text.split() if not word.startswith(LINE))
        name = len("layers left out  ")  # of a row whose one word, a path or a hash, is not broken
        assert max(map(len, text.split("\n"))) <= max(width, name + longest)
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert numbers(wide) <= numbers(text)


@pytest.mark.parametrize("width", WIDTHS)
def test_derive_answers_first_and_in_one_table(width: int, judged_run: Path) -> None:
    command = [str(ROOT / "cli.py"), "derive", str(judged_run), "--name", f"w{width}"]
    asked = ["--risk", "0.02", "--policy", "llm", "--policy", "u-hlm"]
    lines = in_terminal(width, *command, *asked).split("\n")
    text = " ".join(" ".join(lines).split())
    assert text.startswith("for risk 2 % on wifi: u-hlm/risk-0.02 keeps a draft where uncertainty")
    assert "certified? no: 12 prompts certify no threshold at risk 0.02" in text
    assert "worth it? for one user llm alone is faster" in text
    assert sum(line.startswith("policy ") for line in lines) == 1
    assert f"next: hlm validate {judged_run} --name w{width}" in text
    assert text.endswith(f"hlm export {judged_run} --name w{width} --point u-hlm/risk-0.02")
    assert any(line.startswith("risk-0.02: ") and "certifies nothing" in line for line in lines)
    assert all(len(line) <= width for line in lines)
    assert ("[" in next(line for line in lines if line.startswith("u-hlm*"))) == (width >= 100)


def test_cut_and_broken_tables_would_be_found(wide: str) -> None:
    cut = "\n".join(line[:80] for line in wide.split("\n"))
    assert not numbers(wide) <= numbers(cut)


def test_a_pipe_has_no_width_and_texts_are_not_folded(judged_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PAGES, str(judged_run), "short"],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.split("\n"))) > 120


def test_many_budgets_are_a_line_each(judged_run: Path) -> None:
    command = [str(ROOT / "cli.py"), "derive", str(judged_run), "--name", "many"]
    asked = [word for risk in ("0.02", "0.05", "0.3") for word in ("--risk", risk)]
    lines = in_terminal(80, *command, *asked, "--policy", "llm", "--policy", "r-hlm").split("\n")
    table = [line for line in lines if line.startswith("r-hlm/risk-")]
    assert [line.split()[0] for line in table] == [f"r-hlm/risk-{risk}" for risk in asked[1::2]]
    assert all(len(line) <= 80 for line in lines)
    assert sum("certified up to" in line for line in lines) == 1


def test_an_encoding_without_the_signs_gets_others(judged_run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PAGES, str(judged_run), "verbose"],
        capture_output=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "?" not in text.replace("certified? ", "").replace("worth it? ", "")
    assert "--------" in text
