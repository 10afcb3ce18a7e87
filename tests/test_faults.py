"""Faults injected: nothing lost, nothing doubled, nothing computed with that nobody wrote.

`make test` tries each a few times, `make long` often; the table at the end of a run has the counts.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_pair

from calibrate.fit.calibration import calibrate, finished, prepare
from calibrate.pairs import cache
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord
from calibrate.run.traces import read_calibration_trace, read_trace, shard_paths, shards_in
from paper_figs.loaded import load_run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("default")
FEW_OR_MANY = [8, pytest.param(200, marks=pytest.mark.long)]


@dataclass
class Fault:
    """A row of the table."""

    name: str
    tried: int = 0
    harmless: int = 0
    silent: int = 0
    tracebacks: int = 0
    lost: int = 0
    doubled: int = 0
    message: str = ""


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str], Fault]:
    def make(name: str) -> Fault:
        row = Fault(name)
        config: Any = request.config
        config.faults = [*getattr(config, "faults", []), row]  # for the summary in conftest
        return row

    return make


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model as the cache keeps it."""
    path = tmp_path_factory.mktemp("cache")
    folder = toy_pair.make_pair(path)[0]
    cache._write_record(folder, "ab" * 32)
    return folder


def derived_from(run: Path) -> Any:
    trace = read_calibration_trace(run, read_record(run, CalibrationRecord))
    return {name: values.tobytes() for name, values in trace.columns.items()}, trace.prompt_ids


def rerun_of(run: Path) -> Any:
    first = sorted((run / "reruns").iterdir())[0]
    trace = read_trace(shards_in(first))
    return {name: values.tobytes() for name, values in trace.columns.items()}, trace.prompt_ids


def weights_of(folder: Path) -> Any:
    assert cache._read_record(folder)
    cache.refuse_damaged(folder)
    return (folder / "model.safetensors").read_bytes()


FILES = {
    "traces/shard-00001.parquet": derived_from,
    "calibration.json": derived_from,
    "run.json": load_run,
    "calibration.json ": load_run,
    "operating_points.json": load_run,
    "validation.json": load_run,
    "reruns": rerun_of,
    "model.safetensors": weights_of,
}


@pytest.mark.parametrize("times", FEW_OR_MANY)
@pytest.mark.parametrize("name", list(FILES))
def test_one_changed_byte_is_told_or_changes_nothing(
    name: str, times: int, judged_run: Path, weights: Path, fault: Callable[[str], Fault], rng: Any
) -> None:
    read, folder = FILES[name], weights if name.startswith("model") else judged_run
    path = folder / name.strip()
    if path.is_dir():
        path = shards_in(sorted(path.iterdir())[0])[0]
    row = fault(f"one byte changed: {name.strip()}, read by {read.__name__}")
    whole, right = path.read_bytes(), read(folder)
    try:
        for _ in range(times):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            row.tried += 1
            try:
                same = read(folder) == right
                row.harmless += same
                row.silent += not same
            except UserError as error:
                row.message = str(error).replace(str(folder), "RUN")
                assert path.name in row.message
            except Exception:
                row.tracebacks += 1
    finally:
        path.write_bytes(whole)
    assert row.harmless < row.tried, "nothing read the file"
    assert (row.silent, row.tracebacks) == (0, 0)


# --- kills ---------------------------------------------------------------------------------------


def killed(work: Callable[[], Any], delay_s: float) -> bool:
    """Run in a fork that is killed after a while; whether it was before it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process with torch")
@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.long)])
def test_calibrations_killed_at_any_moment_are_resumed_to_the_same_rows(
    times: int, toy: Path, tmp_path: Path, fault: Callable[[str], Fault], rng: Any
) -> None:
    pair = toy_pair.load(toy)
    settings = {"batch_size": 2, "max_new_tokens": 4, "pilot": 0}
    whole = toy_pair.request(toy, tmp_path / "whole", **settings)
    begin = time.perf_counter()
    calibrate(whole, prepare(whole), pair)
    duration = time.perf_counter() - begin
    right = read_trace(shard_paths(whole.run))
    row = fault("SIGKILL of calibrate, then --resume")
    for number in range(times):
        run = tmp_path / f"run-{number}"
        first = toy_pair.request(toy, run, **settings)
        row.tried += killed(
            lambda first=first: calibrate(first, prepare(first), pair),
            float(rng.uniform(0, 1.1 * duration)),
        )
        again = toy_pair.request(toy, run, resume=True, **settings)
        prompts = prepare(again)
        if finished(again) is None:
            calibrate(again, prompts, pair)
        assert not list(run.rglob(".*"))
        trace = read_trace(shard_paths(run))
        row.lost += max(right.num_tokens - trace.num_tokens, 0)
        row.doubled += max(trace.num_tokens - right.num_tokens, 0)
        row.silent += not np.array_equal(trace["output_token"], right["output_token"])
        shutil.rmtree(run)
    row.message = "none: a resumed run goes on"
    assert (row.lost, row.doubled, row.silent) == (0, 0, 0)
    assert row.tried > 0


# --- a full disk ---------------------------------------------------------------------------------

FULL = """
mount -t tmpfs -o size=$3k none "$1" && cp -r "$2" "$1/run" && "$4" "$5" derive "$1/run"
code=$?; ls -A "$1/run"; exit $code
"""


@pytest.mark.long
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing_half_written(
    judged_run: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    """A tmpfs with room for the run and hardly more, in a namespace of its own."""
    room = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
    )
    if room.returncode:
        pytest.skip("no namespace to mount a small tmpfs in")
    source = tmp_path / "source"
    shutil.copytree(judged_run, source)
    for path in source.glob("*_points.json"):
        path.unlink()
    (source / "validation.json").unlink()
    shutil.rmtree(source / "reruns")
    num_pages = sum(-(-path.stat().st_size // 4096) + 1 for path in source.rglob("*"))
    row = fault("disk full at derive")
    for spare in (4, 16, 40):
        folder = tmp_path / f"full-{spare}"
        folder.mkdir()
        size = str(4 * num_pages + spare)
        result = subprocess.run(
            ["unshare", "-rm", "sh", "-c", FULL, "sh", str(folder), str(source), size,
             sys.executable, str(ROOT / "cli.py")],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        row.tried += 1
        row.message = result.stderr.strip().splitlines()[-1].replace(str(folder), "")
        row.tracebacks += "Traceback" in result.stderr
        assert result.returncode == 1, result.stderr
        assert "No space left on device" in row.message
        assert "/run/" in row.message
        assert sorted(result.stdout.split()) == ["calibration.json", "run.json", "traces"]
