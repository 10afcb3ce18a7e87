"""Workers in a Ray cluster of this machine: the rows of one process, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_pair
from crews import hold_one, rows, shards, source
from fault_table import Fault

from calibrate.fit.calibration import calibrate, prepare
from calibrate.run.errors import UserError
from calibrate.work.actors import RayActors
from calibrate.work.crew import Told

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
]
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"limit": 20, "batch_size": 2, "max_new_tokens": 60, "pilot": 16}


@pytest.fixture(scope="module")
def pair(toy: Path) -> Any:
    return toy_pair.load(toy)


@pytest.fixture(scope="module")
def alone(toy: Path, pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    request = toy_pair.request(toy, run, **SETTINGS)
    calibrate(request, prepare(request), pair)
    return run


def crew_of(toy: Path, pair: Any) -> RayActors:
    return RayActors(source(toy, pair), 2, 1, None)


def actors_of(process: psutil.Process) -> list[psutil.Process]:
    """Ray renames the process of an actor after its class and what it does."""
    found = []
    for one in process.children(recursive=True):
        try:
            if "ray::" in " ".join(one.cmdline()) and "Actor" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def test_one_of_two_actors_killed_and_the_rows_are_those_of_one_process(
    toy: Path, pair: Any, alone: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    steps: list[int] = []
    killed: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def kill_one(emitted: int, spared: int) -> None:
        steps.append(emitted + spared)
        if not killed:
            one = actors_of(psutil.Process())[0]
            killed.append(one.pid)
            one.kill()

    with crew_of(toy, pair) as crew:
        assert signal.getsignal(signal.SIGTERM) == before
        calibrate(request, prepare(request), pair, Told(kill_one), crew=crew)
        left = actors_of(psutil.Process())
        assert len(left) == 2
        assert killed[0] not in [one.pid for one in left]
    assert shards(request.run) == shards(alone)
    assert sum(steps) == (20 + 16) * 60
    hold_one(fault("one of 2 Ray actors killed"), request.run, alone, "none: Ray starts another")


def test_what_an_actor_refuses_is_told_in_its_own_line(
    toy: Path, pair: Any, tmp_path: Path
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    with (
        RayActors(replace(source(toy, pair), hashes=("0" * 64, "1" * 64)), 2, 1, None) as crew,
        pytest.raises(UserError, match=r"^a worker has other weights of device"),
    ):
        calibrate(request, prepare(request), pair, crew=crew)


def test_a_killed_driver_leaves_nobody_and_its_run_goes_on(
    toy: Path, pair: Any, alone: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    command = [
        sys.executable, str(ROOT / "cli.py"), "calibrate", "--slm", str(toy / "device"), "--llm",
        str(toy / "server"), "--prompts", str(toy / "prompts.txt"), "--dtype", "float32",
        "--limit", "20", "--batch-size", "2", "--max-new-tokens", "60", "--pilot", "16",
        "--engine", "ray", "--num-workers", "2", "--output-path", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    driver = subprocess.Popen(command, env=environment)
    end = time.monotonic() + 180
    while not any((tmp_path / "run" / "traces").glob("*.parquet")):
        assert time.monotonic() < end
        assert driver.poll() is None
        time.sleep(0.02)
    workers = actors_of(psutil.Process(driver.pid))
    assert len(workers) == 2
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left
    assert len(list((tmp_path / "run" / "traces").glob("*.parquet"))) < 10
    again = toy_pair.request(toy, tmp_path / "run", resume=True, **SETTINGS)
    with crew_of(toy, pair) as crew:
        calibrate(again, prepare(again), pair, crew=crew)
    assert rows(again.run) == rows(alone)
    row = fault("SIGKILL of the process that hands out to 2 Ray actors, then --resume")
    hold_one(row, again.run, alone, "none: it goes on")


def test_a_cluster_that_is_not_there_is_told(toy: Path, pair: Any) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster --address 127\.0\.0\.1:1: .*ray status"):
        RayActors(source(toy, pair), 2, 1, "127.0.0.1:1")
