"""Workers without anything around them, and what is refused before one is hired."""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_pair

from calibrate.decode.engine import DecodingSettings
from calibrate.pairs.buffers import WORKING_SET_BYTES
from calibrate.pairs.loading import default_dtype
from calibrate.pairs.models import Models
from calibrate.pairs.prepack import prepacked_bytes
from calibrate.run.errors import UsageError, UserError
from calibrate.run.machine import num_cores
from calibrate.run.prompts import read_prompts, tokenize_prompts
from calibrate.run.traces import Shard
from calibrate.work.actors import threads_that_fit
from calibrate.work.crew import Crew, OwnProcess, Staff, Told
from calibrate.work.job import Job, Output, PairSource, PolicySource
from calibrate.work.processes import Processes, device_of
from calibrate.work.worker import Worker, load_worker

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def pair(toy: Path) -> Any:
    return toy_pair.load(toy)


@pytest.fixture
def job(toy: Path, pair: Any, tmp_path: Path) -> Job:
    """Three prompts under two policies."""
    prompts = tokenize_prompts(
        read_prompts(str(toy / "prompts.txt"))[:3], pair.tokenizer, 5, pair.max_context
    )
    outputs = (
        Output(tmp_path / "hlm" / "shard-00000.parquet", PolicySource("hlm"), {"made": "here"}),
        Output(
            tmp_path / "gated" / "shard-00004.parquet", PolicySource("u-hlm", threshold=0.4), {}
        ),
    )
    return Job(tuple(prompts), outputs, DecodingSettings(max_new_tokens=5, batch_size=8))


def table(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = Shard(path).read().to_pydict()
    return found


def test_a_job_done_again_writes_the_same_rows_into_the_same_files(pair: Any, job: Job) -> None:
    steps: list[int] = []
    worker = Worker(pair)
    first = worker.run(job, lambda *two: steps.append(sum(two)))
    assert sum(steps) == job.most_tokens == 2 * 3 * 5
    assert first.paths == tuple(output.path for output in job.outputs)
    rows = [repr(table(path)) for path in first.paths]
    assert first.num_tokens == sum(len(table(path)["step"]) for path in first.paths)
    header = Shard(first.paths[0]).header
    assert (header["made"], header["wall_s"]) == ("here", first.wall_s)
    again = worker.run(pickle.loads(pickle.dumps(job)))  # as it arrives elsewhere
    assert [repr(table(path)) for path in again.paths] == rows
    assert sorted(path.name for path in first.paths[0].parent.iterdir()) == ["shard-00000.parquet"]


def test_a_worker_refuses_other_weights_than_the_run_has(toy: Path, pair: Any) -> None:
    spec = toy_pair.request(toy, toy).spec
    hashes = (pair.slm_identity.sha256, pair.llm_identity.sha256)
    source = PairSource(spec, "float32", "cpu", True, hashes)
    assert isinstance(load_worker(source, 1), Worker)
    with pytest.raises(UserError, match=r"other weights of device than the run \(hash .* instead"):
        load_worker(replace(source, hashes=("0" * 64, hashes[1])), 1)


@pytest.mark.skipif(default_dtype("cpu") != "bfloat16", reason="nothing is prepacked here")
def test_workers_hold_prepacked_layers_where_all_of_them_can(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided for all at once: one that finds the memory taken by others would round otherwise."""
    free = [2**40]
    monkeypatch.setattr("calibrate.pairs.prepack.available_memory", lambda: free[0])
    models = Models(slm=str(toy / "device"), llm=str(toy / "server"), dtype="bfloat16")
    pair = models.load(False)
    size = prepacked_bytes((pair.slm, pair.llm))
    assert size > 0
    for room, wanted in ((3 * (size + 2 * WORKING_SET_BYTES), size), (0, 0)):
        free[0] = room
        crew = Staff(num_workers=3).hire(models, pair, False)
        assert isinstance(crew, Processes)
        assert crew._source.prepacked_bytes == wanted
        free[0] = room - 1
        assert Processes(crew._source, 3, 1)._source.prepacked_bytes == 0
    for told in (size, 0):
        free[0] = 0  # others have taken it since: what was decided stands
        worker = load_worker(replace(crew._source, prepacked_bytes=told), 1)
        assert prepacked_bytes([model.model for model in worker._models]) == told


class Slow(Crew):
    """Holds several jobs and ends the last one given first."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self.busy: list[Any] = []
        self.most = 0

    @property
    def num_busy(self) -> int:
        return len(self.busy)

    def give(self, job: Any) -> None:
        self.busy.append(job)
        self.most = max(self.most, len(self.busy))

    def collect(self, told: Told) -> list[Any]:
        return [self.busy.pop()]

    def close(self) -> None:
        self.busy = []


def test_every_job_is_handed_out_once_and_no_worker_has_two() -> None:
    crew, numbers, notes = Slow(3), [], []
    told = Told(job=lambda *two: numbers.append(two), note=notes.append)
    assert sorted(crew.run(list("abcdefg"), told)) == list("abcdefg")
    assert (crew.most, numbers, notes) == (3, [(i, 7) for i in range(1, 8)], [])
    assert list(crew.run([], told)) == []
    assert sorted(crew.run(list("ab"), told)) == ["a", "b"]
    (note,) = notes
    assert note == (
        "--num-workers 3: 2 batches are left, for as many workers; a smaller --batch-size makes "
        "more"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_workers": 0}, "--num-workers 0: allowed is 1 or more"),
        ({"engine": "spark"}, "--engine spark: allowed are process, ray"),
        ({"address": "auto"}, "--address auto: only with --engine ray"),
    ],
)
def test_what_no_crew_can_be_made_of_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Staff(**given)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: Any) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else honest(name)
    )
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install 'hlmtheory\[ray\]'"):
        Staff(engine="ray")
    Staff()


def test_one_worker_is_this_process_and_several_share_its_cores(
    toy: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(slm=str(toy / "device"), llm=str(toy / "server"))
    assert isinstance(Staff().hire(models, pair, False), OwnProcess)
    crew = Staff(num_workers=2 * num_cores()).hire(models, pair, False)
    assert isinstance(crew, Processes)
    assert crew._num_threads == 1
    models.num_threads = 3
    crew = Staff(num_workers=2).hire(models, pair, False)
    assert isinstance(crew, Processes)
    assert crew._num_threads == 3
    monkeypatch.setattr("calibrate.work.processes.num_cores", lambda: 48)
    models.num_threads = None
    for told, wanted in (("5", 5), ("", 24), ("0", 24), ("100", 24)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert Staff(num_workers=2).hire(models, pair, False)._num_threads == wanted
    assert crew._members == []  # nobody is started before there is work


def test_gpus_are_taken_in_turn_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of("cuda", place) for place in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {device_of(one, 5) for one in ("cuda:1", "cpu")} == {"cuda:1", "cpu"}


def test_threads_are_as_many_as_machines_hold_workers_with() -> None:
    assert threads_that_fit([16, 16, 16, 16], 4) == 16
    assert threads_that_fit([16, 16, 16, 16], 5) == 8
    assert threads_that_fit([16, 4], 3) == 5
    assert threads_that_fit([2], 2) == 1
    assert threads_that_fit([16, 4], 3, 4) == 4
    with pytest.raises(UserError, match="--num-workers 3: Ray has machines of 2 processor cores"):
        threads_that_fit([2], 3)
    with pytest.raises(
        UserError, match="--num-workers 2 --num-threads 4: Ray has machines of 6, 2"
    ):
        threads_that_fit([6, 2], 2, 4)
