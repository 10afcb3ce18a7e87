"""Worker processes on this machine: jobs go out over pipes, manifests and progress come back.

A worker that dies is replaced and its job done again. Workers leave Ctrl-C and SIGTERM to the
process that hands out the jobs, and end when their pipe does: with that process, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from calibrate.run.errors import UserError
from calibrate.run.folder import clear_unfinished_file
from calibrate.run.machine import num_cores, threads_told
from calibrate.work.crew import MAX_TRIES, Crew, Told, given_up
from calibrate.work.job import Job, PairSource, Written
from calibrate.work.worker import load_worker

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

TELL_EVERY_S = 0.25
HANDED_OUT = (signal.SIGINT, signal.SIGTERM)
"""Signals that the process answers which hands out the jobs."""
GRACE_S = 5.0
"""For a process whose pipe has ended to end too."""


@dataclass(frozen=True)
class Steps:
    """Progress of a job since the last one."""

    emitted: int
    spared: int


@dataclass(frozen=True)
class Failure:
    """A fault of the program, as its traceback tells it."""

    traceback: str


Message = Steps | str | Written | UserError | Failure
"""What a worker sends: progress, a note, the end of a job, or why it stops."""


class _Member:
    """One worker process, seen from outside.

    Attributes
    ----------
    place : int
        Which of the crew it is.
    job : Job or None
        In work.
    tries : int
        Workers that had this job, this one included.
    """

    def __init__(self, place: int, source: PairSource, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, source, num_threads), daemon=True
        )
        with _signals_held():  # from its first moment: later it would die in its imports
            self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.job: Job | None = None
        self.tries = 0
        self.emitted = self.spared = 0

    def take(self, job: Job, tries: int = 1) -> None:
        """Begin a job."""
        self.job, self.tries = job, tries
        self.emitted = self.spared = 0
        with suppress(OSError):  # it has died: the end of the pipe tells
            self.connection.send(job)

    def end(self) -> str:
        """Bury a process that ended or was killed, with what it left half-written; says how."""
        self.process.join(GRACE_S)
        self.process.kill()
        self.process.join()
        self.connection.close()
        for output in self.job.outputs if self.job is not None else ():
            clear_unfinished_file(output.path)
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit {code}"


class Processes(Crew):
    """Processes of this machine, each with the pair loaded for itself.

    Parameters
    ----------
    source : PairSource
        Where its device is "cuda", workers take one GPU after the other in turn.
    num_workers : int
    num_threads : int or None
        Processor threads of each; if None the cores divided among them, or fewer if the system was
        told so (OMP_NUM_THREADS).
    """

    def __init__(self, source: PairSource, num_workers: int, num_threads: int | None) -> None:
        self._source = source.for_workers(num_workers)
        super().__init__(num_workers, num_workers, self._source.worker_bytes)
        share = max(1, num_cores() // num_workers)
        self._num_threads = num_threads or min(share, threads_told() or share)
        self._members: list[_Member] = []

    @property
    def num_busy(self) -> int:
        return sum(member.job is not None for member in self._members)

    def give(self, job: Job) -> None:
        free = [member for member in self._members if member.job is None]
        (free[0] if free else self._start(len(self._members))).take(job)

    def collect(self, told: Told) -> list[Written]:
        done = []
        busy = {member.connection: member for member in self._members if member.job is not None}
        for connection in wait(list(busy)):
            member = busy[connection]  # type: ignore[index]
            try:
                message: Message = member.connection.recv()
            except (EOFError, OSError):
                self._replace(member, told)
                continue
            if isinstance(message, Steps):
                member.emitted += message.emitted
                member.spared += message.spared
                told.step(message.emitted, message.spared)
            elif isinstance(message, str):
                told.note(message)
            elif isinstance(message, Written):
                member.job = None
                done.append(message)
            elif isinstance(message, UserError):
                raise message
            else:
                raise RuntimeError(f"a worker failed:\n{message.traceback}")
        return done

    def close(self) -> None:
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.end()
        self._members = []

    def _start(self, place: int) -> _Member:
        source = replace(self._source, device=device_of(self._source.device, place))
        member = _Member(place, source, self._num_threads)
        self._members.append(member)
        return member

    def _replace(self, member: _Member, told: Told) -> None:
        """Give the job of a dead worker to a new one."""
        job, tries = member.job, member.tries
        assert job is not None
        told.step(-member.emitted, -member.spared)
        self._members.remove(member)
        reason = member.end()
        if tries == MAX_TRIES:
            raise given_up(job, reason)
        told.note(f"a worker died ({reason}): its batch is decoded again by another")
        self._start(member.place).take(job, tries + 1)


def device_of(device: str, place: int) -> str:
    """The device of one worker: GPUs in turn where none is named, else as it is."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{place % torch.cuda.device_count()}"


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process started inside never gets them; this one does, at the end of the block at last."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # else the first start starts it, and lets signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_OUT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, source: PairSource, num_threads: int) -> None:
    """A worker process, from its start to its end."""
    for number in HANDED_OUT:
        signal.signal(number, signal.SIG_IGN)
    jobs: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    try:
        worker = load_worker(source, num_threads)
        while True:
            job: Job = pickle.loads(jobs.get())
            progress = _Progress(connection)
            written = worker.run(job, progress.step, connection.send)
            progress.flush()
            connection.send(written)
    except UserError as error:
        connection.send(UserError(*error.args))
    except Exception:
        with suppress(OSError):  # nobody is there to hear it
            connection.send(Failure(traceback.format_exc()))


def _listen(connection: Connection, jobs: SimpleQueue[bytes]) -> None:
    """Take in jobs, and end the process at once when nobody is there any more to send one.

    Its shard in work stays under a temporary name, which whoever locks the run next clears.
    """
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


class _Progress:
    """Steps, added up and sent now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._emitted = self._spared = 0
        self._sent = time.monotonic()

    def step(self, emitted: int, spared: int) -> None:
        """Count one."""
        self._emitted += emitted
        self._spared += spared
        if time.monotonic() - self._sent > TELL_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send what is counted."""
        self._connection.send(Steps(self._emitted, self._spared))
        self._emitted = self._spared = 0
        self._sent = time.monotonic()
