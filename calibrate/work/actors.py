"""Workers as actors of a Ray cluster, of one machine or of many.

Ray restarts an actor that died and runs its job again, here or on another machine. Nothing but jobs
and manifests goes through Ray: shards are written by the workers, into a folder that all see.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from calibrate.run.errors import UserError
from calibrate.run.folder import clear_unfinished_file
from calibrate.run.machine import num_cores
from calibrate.work.crew import MAX_TRIES, Crew, Told, given_up
from calibrate.work.job import Job, PairSource, Written
from calibrate.work.worker import Worker, load_worker

KNOCK_S = 10.0
POLL_S = 0.5
"""Between looks for a signal."""


class Actor:
    """A worker that is loaded with its first job, so that a failed start is a failed job."""

    def __init__(self, source: PairSource, num_threads: int) -> None:
        self._source = source
        self._num_threads = num_threads
        self._worker: Worker | None = None

    def run(self, job: Job) -> tuple[Written, list[str]]:
        """Do a job; returns what was noted too."""
        notes: list[str] = []
        self._worker = self._worker or load_worker(self._source, self._num_threads)
        return self._worker.run(job, on_note=notes.append), notes


class RayActors(Crew):
    """Actors with the pair loaded for themselves, one GPU each where the pair is on GPUs.

    Parameters
    ----------
    source : PairSource
    num_workers : int
    num_threads : int or None
        Processor threads of each; as many as the machines have for so many workers if None.
    address : str or None
        Of a cluster that runs, or "auto"; None starts one on this machine for as long as it takes.

    Raises
    ------
    UserError
        If there is no such cluster, or it is too small.
    """

    def __init__(
        self,
        source: PairSource,
        num_workers: int,
        num_threads: int | None,
        address: str | None,
    ) -> None:
        import ray

        super().__init__(num_workers)
        self._ray = ray
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, Job]] = {}
        self._began = not ray.is_initialized()
        if self._began:
            _connect(ray, address, max(num_cores(), num_workers * (num_threads or 1)))
        # Which GPU is Ray's to say: an actor sees its own alone.
        self._source = replace(source, device=source.device.partition(":")[0])
        try:
            self._num_threads = self._threads(num_threads)
        except UserError:
            self.close()
            raise
        most = max(one // self._num_threads for one in self._there("CPU"))
        self.num_beside = min(num_workers, most)
        self._source = self._source.for_workers(self.num_beside)
        self.worker_bytes = self._source.worker_bytes
        self._actor = ray.remote(
            num_cpus=self._num_threads,
            num_gpus=int(self._source.device == "cuda"),
            max_restarts=-1,
            max_task_retries=MAX_TRIES - 1,
        )(Actor)

    def _threads(self, num_threads: int | None) -> int:
        """Threads of each worker, on a cluster that has room for all of them."""
        gpus = sum(self._there("GPU"))
        if self._source.device == "cuda" and gpus < self.num_workers:
            raise UserError(
                f"--num-workers {self.num_workers}: Ray has {gpus} GPUs, and each worker takes one"
            )
        return threads_that_fit(self._there("CPU"), self.num_workers, num_threads)

    def _there(self, what: str) -> list[int]:
        """So many of it each living machine has."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [int(node.get(what, 0)) for node in nodes]

    @property
    def num_busy(self) -> int:
        return len(self._busy)

    def give(self, job: Job) -> None:
        actor = self._free.pop() if self._free else self._start()
        self._busy[actor.run.remote(job)] = (actor, job)

    def collect(self, told: Told) -> list[Written]:
        ready, _ = self._ray.wait(list(self._busy), timeout=POLL_S)
        done = []
        for reference in ready:
            actor, job = self._busy.pop(reference)
            try:
                written, notes = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(*error.cause.args) from None
                raise
            except self._ray.exceptions.RayActorError as error:
                raise given_up(job, type(error).__name__) from None
            self._free.append(actor)
            for note in notes:
                told.note(note)
            told.step(written.num_tokens, job.most_tokens - written.num_tokens)
            done.append(written)
        return done

    def close(self) -> None:
        for actor in (*self._free, *(actor for actor, _ in self._busy.values())):
            self._ray.kill(actor)
        if self._began:
            self._ray.shutdown()
        for _, job in self._busy.values():
            for output in job.outputs:
                clear_unfinished_file(output.path)
        self._free, self._busy = [], {}

    def _start(self) -> Any:
        return self._actor.remote(self._source, self._num_threads)


def _connect(ray: Any, address: str | None, num_cpus: int) -> None:
    """Start or join a cluster; signals stay whose they are, which Ray would take over."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    local = {"num_cpus": num_cpus, "include_dashboard": False} if address is None else {}
    try:
        _knock(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    except (OSError, ValueError, RuntimeError) as error:
        where = "on this machine" if address is None else f"--address {address}"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"no Ray cluster {where}: {reason}; see `ray status`") from None
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)


def _knock(address: str | None) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), KNOCK_S):
            pass


def threads_that_fit(cores: Sequence[int], num_workers: int, num_threads: int | None = None) -> int:
    """Most threads a worker with which machines of so many cores hold all workers.

    Parameters
    ----------
    cores : sequence of int
        Of each machine.
    num_workers : int
    num_threads : int, optional
        So many, no more and no fewer.

    Raises
    ------
    UserError
        If there are too few cores: Ray would wait for more.
    """
    wanted = range(max(cores, default=0), 0, -1) if num_threads is None else (num_threads,)
    for threads in wanted:
        if sum(one // threads for one in cores) >= num_workers:
            return threads
    each = "" if num_threads is None else f" --num-threads {num_threads}"
    raise UserError(
        f"--num-workers {num_workers}{each}: Ray has machines of {', '.join(map(str, cores))} "
        "processor cores, too few; give fewer"
    )
