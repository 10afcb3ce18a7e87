"""Who does the jobs: this process, worker processes, or actors of a Ray cluster.

Jobs are planned before they are handed out, so any crew writes the same files with the same rows.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calibrate.run.errors import UsageError, UserError
from calibrate.run.options import at_least, one_of
from calibrate.run.stopping import safe_point, stop_asked

if TYPE_CHECKING:
    from types import TracebackType

    from calibrate.pairs.models import Models
    from calibrate.pairs.registry import LoadedPair
    from calibrate.work.job import Job, Written

MAX_TRIES = 3
"""Workers that a job may lose before it is given up."""


def _nobody(*_: object) -> None:
    """Told, and silent."""


@dataclass(frozen=True)
class Told:
    """Whom a crew tells what.

    Attributes
    ----------
    step : callable
        Tokens just emitted, and tokens that ended answers will never need; negative numbers take
        back what has to be done again.
    total : callable
        Most tokens that may be decoded, before decoding starts.
    job : callable
        Number of the job that is handed out, from 1, and how many there are.
    note : callable
        A line worth reading.
    """

    step: Callable[[int, int], None] = _nobody
    total: Callable[[int], None] = _nobody
    job: Callable[[int, int], None] = _nobody
    note: Callable[[str], None] = _nobody


class Crew(ABC):
    """Workers that jobs are handed out to, each one at a time.

    Attributes
    ----------
    num_workers : int
    num_beside : int
        Of them on one machine, whose memory they share.
    worker_bytes : int
        Memory that each takes before it decodes.
    """

    def __init__(self, num_workers: int, num_beside: int = 1, worker_bytes: int = 0) -> None:
        self.num_workers = num_workers
        self.num_beside = num_beside
        self.worker_bytes = worker_bytes

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, jobs: Sequence[Job], told: Told) -> Iterator[Written]:
        """Do the jobs, whichever order they end in.

        SIGTERM, where it waits (:func:`calibrate.run.stopping.finishing`), lets the jobs in work
        end; no other is begun.

        Raises
        ------
        UserError
            If a job cannot be done: its files are missing then, those of others stay.
        """
        if 0 < len(jobs) < self.num_workers:
            told.note(
                f"--num-workers {self.num_workers}: {len(jobs)} batches are left, for as many "
                "workers; a smaller --batch-size makes more"
            )
        waiting = deque(enumerate(jobs, start=1))
        while waiting or self.num_busy:
            if not self.num_busy:
                safe_point()
            while waiting and self.num_busy < self.num_workers and not stop_asked():
                number, job = waiting.popleft()
                told.job(number, len(jobs))
                self.give(job)
            if self.num_busy:
                yield from self.collect(told)

    @property
    @abstractmethod
    def num_busy(self) -> int:
        """Jobs in work."""

    @abstractmethod
    def give(self, job: Job) -> None:
        """Hand a job to a free worker."""

    @abstractmethod
    def collect(self, told: Told) -> list[Written]:
        """Wait for something to happen, and return the jobs that are done by now."""

    @abstractmethod
    def close(self) -> None:
        """Send the workers away; what is in work is given up."""


class OwnProcess(Crew):
    """The pair that is loaded already, in this process."""

    def __init__(self, pair: LoadedPair) -> None:
        from calibrate.work.worker import Worker

        super().__init__(1)
        self._worker = Worker(pair)
        self._job: Job | None = None

    @property
    def num_busy(self) -> int:
        return int(self._job is not None)

    def give(self, job: Job) -> None:
        self._job = job

    def collect(self, told: Told) -> list[Written]:
        job, self._job = self._job, None
        return [] if job is None else [self._worker.run(job, told.step, told.note)]

    def close(self) -> None:
        self._job = None


@dataclass(frozen=True)
class Staff:
    """What a user asks for, checked before any model is loaded.

    Attributes
    ----------
    num_workers : int
    engine : {"process", "ray"}
        One worker of the first is this process itself.
    address : str or None
        Of a Ray cluster; None starts one on this machine.

    Raises
    ------
    UsageError, UserError
    """

    num_workers: int = 1
    engine: Literal["process", "ray"] = "process"
    address: str | None = None

    def __post_init__(self) -> None:
        at_least("--num-workers", self.num_workers, 1)
        one_of("--engine", self.engine, "process", "ray")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs Ray: pip install 'hlmtheory[ray]'")
        if self.engine != "ray" and self.address is not None:
            raise UsageError(f"--address {self.address}: only with --engine ray")

    def hire(self, models: Models, pair: LoadedPair, attention: bool) -> Crew:
        """The crew for a pair; workers are started when there is something to do.

        Parameters
        ----------
        models : Models
            What the pair was loaded from.
        pair : LoadedPair
        attention : bool
            Whether jobs look at it.
        """
        if self.engine == "process" and self.num_workers == 1:
            return OwnProcess(pair)
        from calibrate.pairs.prepack import prepacked_bytes
        from calibrate.work.job import PairSource

        source = PairSource(
            spec=models.spec,
            dtype=pair.dtype,
            device=pair.device,
            attention=attention,
            hashes=(pair.slm_identity.sha256, pair.llm_identity.sha256),
            prepacked_bytes=prepacked_bytes((pair.slm, pair.llm)),
        )
        if self.engine == "ray":
            from calibrate.work.actors import RayActors

            return RayActors(source, self.num_workers, models.num_threads, self.address)
        from calibrate.work.processes import Processes

        return Processes(source, self.num_workers, models.num_threads)


def given_up(job: Job, reason: str) -> UserError:
    """A job that lost too many workers, in one line."""
    names = [repr(prompt.prompt_id) for prompt in job.prompts]
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(
        f"{MAX_TRIES} workers died ({reason}) over the batch of prompts {some}; if the memory is "
        "full, give fewer --num-workers or a smaller --batch-size; what is finished stays, and the "
        "run goes on from there"
    )
