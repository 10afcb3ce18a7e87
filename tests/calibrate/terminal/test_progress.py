"""Bars for what a verb tells: one a stage, lines between them, and from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from calibrate.run.watch import Progress, TokenCount, Watch
from calibrate.terminal.progress import Bars


def test_stages_and_lines_come_in_the_order_they_were_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Bars() as bars:
        bars(Progress("download tiny", "byte", 5, 10))
        bars(Progress("download tiny", "byte", 10, 10))
        bars.say("loading tiny")
        count = TokenCount("validating", Watch(progress=bars))
        count.set_total(12)
        count.at_batch(2, 3)
        count.advance(5, 7)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["download", "loading", "validating,"]
    assert "10/10 bytes" in lines[0]
    assert "validating, batch 2/3" in lines[2]
    assert "5 tokens" in lines[2], "what was decoded, not what was spared"


def test_bars_are_told_from_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    """One live display at a time is all that a terminal has."""
    with Bars() as bars, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(bars, Progress(f"file {number % 4}", "byte", number, 100))
            for number in range(100)
        ]
        for job in jobs:
            job.result()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert sorted(line.split()[1] for line in lines) == ["0", "1", "2", "3"]


def test_nothing_told_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars():
        pass
    assert capsys.readouterr().err == ""
