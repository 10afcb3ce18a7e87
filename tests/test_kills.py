"""Commands killed or stopped at any moment: started again, they end in the rows of a quiet run.

`make test` tries a few moments, `make long` many; the table at the end of a run has the counts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import Fault
from forked import Ended, hlm
from toy_commands import calibration, hold, validation

from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, ValidationRecord

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process with torch"),
]
FEW_OR_MANY = [8, pytest.param(60, marks=pytest.mark.long)]


# --- moments -------------------------------------------------------------------------------------


def killed_after(delay_s: float) -> Callable[[int], None]:
    return sent_after(signal.SIGKILL, delay_s)


def sent_after(number: int, delay_s: float) -> Callable[[int], None]:
    """A signal to a process after a while, if it is still there."""

    def send(process: int) -> None:
        time.sleep(delay_s)
        os.kill(process, number)

    return send


def at_file(wanted: int, after: bool, act: Callable[[], None]) -> Callable[[], None]:
    """Act just before or after a process gives its file of this number its final name."""

    def watch() -> None:
        replace, numbers = os.replace, itertools.count()

        def watched(*names: Any, **options: Any) -> None:
            here = next(numbers) == wanted
            if here and not after:
                act()
            replace(*names, **options)
            if here and after:
                act()

        os.replace = watched  # type: ignore[assignment]

    return watch


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_files(log: Path) -> Callable[[], None]:
    """Note in a file each name that a process gives."""

    def watch() -> None:
        replace = os.replace

        def watched(source: Any, target: Any, **options: Any) -> None:
            replace(source, target, **options)
            with log.open("a") as file:
                file.write(f"{target}\n")

        os.replace = watched  # type: ignore[assignment]

    return watch


def moments(num_files: int, duration_s: float, rng: Any) -> Iterator[dict[str, Any]]:
    """How to kill a command: around each file that it writes, then at random moments."""
    for number in range(num_files):
        yield {"first": at_file(number, False, kill_myself)}
    yield {"first": at_file(num_files - 1, True, kill_myself)}
    for _ in range(1000):
        yield {"meanwhile": killed_after(float(rng.uniform(0, duration_s)))}


# --- SIGKILL -------------------------------------------------------------------------------------


def undisturbed(words: tuple[str, ...], log: Path) -> tuple[int, float]:
    """How many files a command writes, and how long it takes."""
    begin = time.perf_counter()
    files = log.with_name("files")
    files.unlink(missing_ok=True)
    assert hlm(*words, log=log, first=count_files(files)).code == 0, log.read_text()
    return len(files.read_text().splitlines()), time.perf_counter() - begin


@pytest.mark.parametrize("times", FEW_OR_MANY)
def test_a_calibration_killed_at_any_moment_is_resumed_to_the_same_rows(
    times: int, toy: Path, toy_run: Path, tmp_path: Path, fault: Callable[[str], Fault], rng: Any
) -> None:
    row = fault("SIGKILL of `hlm calibrate`, then the same with --resume")
    row.message = "none: it goes on"
    run, log = tmp_path / "run", tmp_path / "log"
    num_files, duration_s = undisturbed(calibration(toy, run), log)
    fit = read_record(toy_run, CalibrationRecord).fit
    for moment in moments(num_files if times > 8 else 2, duration_s, rng):
        if row.tried == times:
            break
        shutil.rmtree(run)
        killed = hlm(*calibration(toy, run), log=log, **moment)
        again = hlm(*calibration(toy, run, "--resume"), log=log)
        assert again.code == 0, again.text
        if killed.code == 0:  # it was quicker
            continue
        assert killed.code == -signal.SIGKILL, killed.text
        row.tried += 1
        hold(row, run, toy_run)
        assert not list(run.rglob(".*"))
        assert read_record(run, CalibrationRecord).fit == fit
    assert row.kept_the_promise
    assert row.harmless == row.tried == times


@pytest.mark.parametrize("times", FEW_OR_MANY)
def test_a_validation_killed_at_any_moment_goes_on_to_the_same_rows(
    times: int, toy_run: Path, toy_validated: Path, tmp_path: Path, fault: Callable[[str], Fault],
    rng: Any,
) -> None:  # fmt: skip
    row = fault("SIGKILL of `hlm validate`, then the same again")
    row.message = "none: it goes on"
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(toy_run, run)
    num_files, duration_s = undisturbed(validation(run), log)
    cells = read_record(toy_validated, ValidationRecord).cells
    for moment in moments(num_files if times > 8 else 2, duration_s, rng):
        if row.tried == times:
            break
        shutil.rmtree(run)
        shutil.copytree(toy_run, run)
        killed = hlm(*validation(run), log=log, **moment)
        again = hlm(*validation(run), log=log)
        assert again.code == 0, again.text
        if killed.code == 0:
            continue
        assert killed.code == -signal.SIGKILL, killed.text
        row.tried += 1
        hold(row, run, toy_validated)
        assert not list(run.rglob(".*"))
        assert read_record(run, ValidationRecord).cells == cells
    assert row.kept_the_promise
    assert row.harmless == row.tried == times


# --- signals that ask ----------------------------------------------------------------------------


def told_in_one_line(row: Fault, ended: Ended) -> None:
    """Count a command that was stopped: one line, or not."""
    row.tried += 1
    if "Traceback" in ended.text or len(ended.said) != 1:
        row.tracebacks += 1
    else:
        row.message = ended.said[0]


@pytest.mark.parametrize("times", [4, pytest.param(12, marks=pytest.mark.long)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_validation_that_is_stopped_says_what_stays_and_goes_on(
    number: signal.Signals, code: int, times: int, toy_run: Path, toy_validated: Path,
    tmp_path: Path, fault: Callable[[str], Fault], rng: Any,
) -> None:  # fmt: skip
    row = fault(f"{number.name} to `hlm validate`, exit {code}, then the same again")
    ends = Fault("of the rest")
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(toy_run, run)
    num_files, duration_s = undisturbed(validation(run), log)

    def send_myself() -> None:
        os.kill(os.getpid(), number)

    stops: list[dict[str, Any]] = [
        {"meanwhile": sent_after(number, float(rng.uniform(0, duration_s)))} for _ in range(times)
    ]
    stops += [
        {"first": at_file(place, after, send_myself)}
        for place in ((0, num_files // 2) if times > 4 else (0,))
        for after in (False, True)
    ]
    for stop in stops:
        shutil.rmtree(run)
        shutil.copytree(toy_run, run)
        ended = hlm(*validation(run), log=log, **stop)
        if ended.code == 0:
            continue
        assert ended.code == code, ended.text
        told_in_one_line(row, ended)
        row.message = row.message.replace(str(run), "RUN")
        kept = {path: path.read_bytes() for path in run.rglob("reruns/*/*.parquet")}
        assert not list(run.rglob(".*"))
        if "first" in stop:  # while it decodes
            assert f"the finished batches stay in {run}/reruns" in ended.said[0]
        assert hlm(*validation(run), log=log).code == 0, log.read_text()
        assert all(path.read_bytes() == content for path, content in kept.items())
        hold(ends, run, toy_validated)
    row.lost, row.doubled, row.silent = ends.lost, ends.doubled, ends.silent
    assert row.kept_the_promise
    assert row.told == row.tried
