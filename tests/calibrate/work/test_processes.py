"""Worker processes: the files and rows of one process, whoever is killed and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_pair
from crews import hold_one, rows, shards, source
from fault_table import Fault

from calibrate.derive.derivation import derive_run
from calibrate.fit.calibration import calibrate, prepare
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import DeriveRequest, RunRecord
from calibrate.run.traces import Shard
from calibrate.validate.validation import decode_missing, prepare_validation
from calibrate.work.crew import MAX_TRIES, Told
from calibrate.work.job import PairSource
from calibrate.work.processes import HANDED_OUT, Processes, _signals_held

pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"limit": 20, "batch_size": 4, "max_new_tokens": 6, "pilot": 16}


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


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_any_number_of_workers_writes_the_files_of_one_process(
    num_workers: int, toy: Path, pair: Any, alone: Path, tmp_path: Path
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    steps: list[tuple[int, int]] = []
    total: list[int] = []
    told = Told(lambda *two: steps.append(two), total.append)
    with Processes(source(toy, pair), num_workers, 1) as crew:
        calibrate(request, prepare(request), pair, told, crew)
        members = [member.process for member in crew._members]
        assert len(members) == num_workers
    assert not [one for one in members if one.is_alive()]
    assert shards(request.run) == shards(alone)
    assert len(shards(alone)) == 5 + 4
    assert [sum(map(sum, steps))] == total
    info = read_record(request.run, RunRecord)
    assert info.pilot is not None
    assert sum(emitted for emitted, _ in steps) == info.num_tokens + info.pilot.num_tokens


@pytest.mark.long
def test_workers_that_are_killed_are_replaced_and_nothing_is_lost(
    toy: Path, pair: Any, alone: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    steps: list[tuple[int, int]] = []
    notes: list[str] = []
    with Processes(source(toy, pair), 3, 1) as crew:

        def kill_all_once(*two: int) -> None:
            if not steps:
                for member in crew._members:
                    member.process.kill()
            steps.append(two)

        calibrate(
            request, prepare(request), pair, Told(kill_all_once, note=notes.append), crew=crew
        )
    assert shards(request.run) == shards(alone)
    assert sum(map(sum, steps)) == (20 + 16) * 6  # what was decoded twice counts once
    says = "a worker died (SIGKILL): its batch is decoded again by another"
    assert says in notes
    hold_one(fault("all 3 worker processes killed at the first step"), request.run, alone, says)


class Hunted(Processes):
    """Whoever works on one of the prompts is killed."""

    victim = ""

    def collect(self, told: Told) -> Any:
        for member in self._members:
            prompts = () if member.job is None else member.job.prompts
            if self.victim in [prompt.prompt_id for prompt in prompts]:
                member.process.kill()
        return super().collect(told)


def test_a_job_that_kills_every_worker_is_given_up_and_the_rest_stays(
    toy: Path, pair: Any, alone: Path, tmp_path: Path
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    prompts = prepare(request)
    last = Shard(sorted((alone / "traces").iterdir())[-1]).read(["prompt_id"])
    victim = last["prompt_id"].to_pylist()[0]
    with Hunted(source(toy, pair), 1, 1) as crew:
        crew.victim = victim
        with pytest.raises(UserError) as caught:
            calibrate(request, prompts, pair, crew=crew)
    assert str(caught.value).startswith(
        f"{MAX_TRIES} workers died (SIGKILL) over the batch of prompts '{victim}', "
    )
    assert "and 1 more" in str(caught.value)
    assert caught.value.exit_code == 1
    whole = shards(alone)
    assert shards(request.run) == {f"traces/shard-0000{i}.parquet": whole[
        f"traces/shard-0000{i}.parquet"] for i in range(4)}  # fmt: skip
    again = toy_pair.request(toy, request.run, resume=True, **SETTINGS)
    with Processes(source(toy, pair), 2, 1) as crew:
        calibrate(again, prepare(again), pair, crew=crew)
    assert shards(request.run) == whole


DEADLY = '''
import multiprocessing
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hlmtheory.policies import GatedPolicy

MARK = Path(__file__).with_suffix(".mark")


@dataclass(frozen=True)
class Deadly(GatedPolicy):
    """Gate by the score; the first worker that runs it is killed at its first step."""

    name: ClassVar[str] = "deadly"
    label: ClassVar[str] = "deadly once"
    color: ClassVar[str] = "#123456"
    marker: ClassVar[str] = "D"

    def gate_of_draft(self, step):
        if multiprocessing.parent_process() is not None:
            with suppress(FileExistsError):
                MARK.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().gate_of_draft(step)
'''


def test_a_policy_of_ones_own_is_rerun_by_workers_one_of_which_dies_within_a_batch(
    toy: Path, pair: Any, alone: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(DEADLY)
    own = f"{mine}:Deadly"
    derive_run(alone, DeriveRequest(policies=("hlm", own), risks=(0.05,)), "default", True, ())
    plan = prepare_validation(alone, policies=(own, "hlm"), limit=8, batch_size=3)
    found = {}
    for crew, num_batches in ((Processes(source(toy, pair), 2, 1), 3), (None, 3)):
        notes: list[str] = []
        if crew is None:
            decode_missing(plan, pair)
        else:
            with crew:
                decode_missing(plan, pair, Told(note=notes.append), crew=crew)
            assert notes == ["a worker died (SIGKILL): its batch is decoded again by another"]
        reruns = alone / "reruns"
        found[crew is None] = shards(reruns)
        assert len(found[crew is None]) == num_batches * len({*plan.paths.values()})
        for path in sorted(reruns.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        reruns.rmdir()
    assert found[True] == found[False]


def test_a_pair_that_cannot_be_loaded_by_a_worker_is_told_in_one_line(
    toy: Path, pair: Any, tmp_path: Path
) -> None:
    request = toy_pair.request(toy, tmp_path / "run", **SETTINGS)
    other = PairSource(source(toy, pair).spec, "float32", "cpu", True, ("0" * 64, "1" * 64))
    with (
        Processes(other, 1, 1) as crew,
        pytest.raises(UserError, match="a worker has other weights of device"),
    ):
        calibrate(request, prepare(request), pair, crew=crew)


@pytest.fixture
def running(toy: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`hlm calibrate` with two workers and many batches, after its first shard."""
    command = [
        sys.executable, str(ROOT / "cli.py"), "calibrate", "--slm", str(toy / "device"), "--llm",
        str(toy / "server"), "--prompts", str(toy / "prompts.txt"), "--limit", "40", "--dtype",
        "float32", "--max-new-tokens", "60", "--batch-size", "1", "--pilot", "0", "--num-workers",
        "2", "--output-path", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: any((tmp_path / "run" / "traces").glob("*.parquet")), driver)
        yield driver, command
    finally:
        driver.kill()
        driver.wait()
        assert driver.stderr is not None
        driver.stderr.close()


def until(
    happens: Any, driver: subprocess.Popen[str] | None = None, patience_s: float = 120
) -> None:
    end = time.monotonic() + patience_s
    while not happens():
        assert time.monotonic() < end
        assert driver is None or driver.poll() is None, driver.stderr and driver.stderr.read()
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_driver_and_the_run_goes_on(
    number: signal.Signals,
    running: Any,
    toy: Path,
    pair: Any,
    tmp_path: Path,
    fault: Callable[[str], Fault],
) -> None:
    driver, _ = running
    workers = psutil.Process(driver.pid).children(recursive=True)
    assert len(workers) >= 2
    for one in workers:  # as a scheduler does it, to all of a job
        if number == signal.SIGTERM:
            one.send_signal(number)
    driver.send_signal(number)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == (143 if number == signal.SIGTERM else -number), said
    until(lambda: not any(one.is_running() for one in workers), patience_s=10)
    num = len(list((tmp_path / "run" / "traces").glob("*.parquet")))
    assert 0 < num < 40
    if number == signal.SIGTERM:
        assert f"{num} finished shards stay" in said
        assert "SIGTERM: stops when every shard in work is finished" in said
        assert not list((tmp_path / "run").rglob("*.part"))
    settings = {"limit": 40, "max_new_tokens": 60, "batch_size": 1, "pilot": 0}
    again = toy_pair.request(toy, tmp_path / "run", resume=True, device="auto", **settings)
    calibrate(again, prepare(again), pair)
    whole = toy_pair.request(toy, tmp_path / "whole", **settings)
    calibrate(whole, prepare(whole), pair)
    assert rows(again.run) == rows(whole.run)
    row = fault(f"{number.name} of the process that hands out to 2 workers, then --resume")
    last = said.strip().rpartition("\n")[-1] if number == signal.SIGTERM else "none: it goes on"
    hold_one(row, again.run, whole.run, last)


def test_a_worker_never_gets_the_signals_of_its_terminal_and_none_is_lost() -> None:
    """From its first moment: before, it died of Ctrl-C within its imports, with a traceback."""
    got: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    say = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    try:
        with _signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            started = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True)
        assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(repr(one) in started.stdout for one in HANDED_OUT)
    after = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True)
    assert after.stdout == "[]\n"
