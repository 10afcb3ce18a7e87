"""What handing out work costs as prompts and workers grow: planning, jobs, manifests, idle workers.

    python -m benchmarks.workers [--tokens 1e7,1e8] [--workers 10,100,1000]

No model runs. Prompts are planned into jobs as `hlm calibrate` does, and the crew's own loop hands
them out to workers that exist in simulated time only, each job pickled as it would travel, each
manifest unpickled. What a process spends on that is measured; when the last worker ends, simulated.
A batch takes as long as its steps take, 35 ms each (one GPU with full traces), and as many as the
length limit allows; a worker starts within a minute.
"""

from __future__ import annotations

import argparse
import heapq
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from calibrate.decode.engine import DecodingSettings, batches_by_length
from calibrate.run.prompts import TokenizedPrompt
from calibrate.work.crew import Crew, Told
from calibrate.work.job import Job, Output, PolicySource, Written
from hlmtheory.policies import calibration_policy

BATCH, TOKENS, STEP_S, START_S, VOCABULARY = 64, 64, 0.035, 60.0, 151_936


@dataclass(frozen=True)
class Row:
    """One size.

    Attributes
    ----------
    tokens : float
    workers : int
    jobs : int
    plan_s : float
        Planning all jobs.
    hand_out_us : float
        A job, both of its pickles and both of its manifest's included.
    job_bytes : float
        That travel with a job, there and back.
    makespan_s : float
        Until the last job ends, simulated.
    idle : float
        Share of the workers' time in which they wait: for their start, for a job, for the end.
    peak_gib : float
        Of the process that hands out.
    """

    tokens: float
    workers: int
    jobs: int
    plan_s: float
    hand_out_us: float
    job_bytes: float
    makespan_s: float
    idle: float
    peak_gib: float


class SimulatedCrew(Crew):
    """Workers in simulated time; what is done to jobs and manifests is done in earnest."""

    def __init__(self, num_workers: int, seed: int = 0) -> None:
        super().__init__(num_workers)
        rng = np.random.default_rng(seed)
        # (time at which it is free, its number); busy ones with their job's manifest
        self._free = [(float(t), i) for i, t in enumerate(rng.uniform(0, START_S, num_workers))]
        heapq.heapify(self._free)
        self._busy: list[tuple[float, int, bytes]] = []
        self._rng = rng
        self.now = self.worked = 0.0
        self.bytes = 0

    @property
    def num_busy(self) -> int:
        return len(self._busy)

    def give(self, job: Job) -> None:
        free, place = heapq.heappop(self._free)
        sent = pickle.dumps(job)
        job = pickle.loads(sent)
        took = STEP_S * job.settings.max_new_tokens * float(self._rng.uniform(0.95, 1.05))
        written = Written(tuple(one.path for one in job.outputs), job.most_tokens, took, 0.5 * took)
        back = pickle.dumps(written)
        self.bytes += len(sent) + len(back)
        self.worked += took
        heapq.heappush(self._busy, (max(free, self.now) + took, place, back))

    def collect(self, told: Told) -> list[Written]:
        del told
        self.now, place, back = heapq.heappop(self._busy)
        heapq.heappush(self._free, (self.now, place))
        written: Written = pickle.loads(back)
        return [written]

    def close(self) -> None:
        self._busy = []


def planned(prompts: Sequence[TokenizedPrompt], folder: Path) -> list[Job]:
    """Jobs of all prompts, as a calibration plans them."""
    settings = DecodingSettings(max_new_tokens=TOKENS, batch_size=BATCH)
    header = {"settings": {"pair": "made-up", "seed": 0}, "provenance": {"version": "0"}}
    policy = PolicySource(calibration_policy().name)
    return [
        Job(tuple(batch), (Output(folder / f"shard-{i:07d}.parquet", policy, header),), settings)
        for i, batch in enumerate(batches_by_length(prompts, settings.batch_size))
    ]


def measure(num_tokens: float, num_workers: int) -> Row:
    """One size in this process."""
    num = max(1, round(num_tokens / TOKENS))
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 120, num)
    prompts = [
        TokenizedPrompt(f"p{i:08d}", tuple(rng.integers(VOCABULARY, size=lengths[i]).tolist()))
        for i in range(num)
    ]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        jobs = planned(prompts, Path(folder))
        plan_s = time.perf_counter() - begin
    crew = SimulatedCrew(num_workers)
    begin = time.perf_counter()
    done = sum(written.num_tokens for written in crew.run(jobs, Told()))
    seconds = time.perf_counter() - begin
    assert done == num * TOKENS
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return Row(
        num_tokens,
        num_workers,
        len(jobs),
        plan_s,
        1e6 * seconds / len(jobs),
        crew.bytes / len(jobs),
        crew.now,
        1.0 - crew.worked / (crew.now * num_workers),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    )


def main() -> None:
    """Measure every size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1e7,1e8")
    parser.add_argument("--workers", default="10,100,1000")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    tokens = [float(one) for one in given.tokens.split(",")]
    workers = [int(one) for one in given.workers.split(",")]
    if given.one:
        print(json.dumps(asdict(measure(tokens[0], workers[0]))))
        return
    print("| tokens | workers | jobs | plan, s | a job, us | bytes | makespan | idle | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_tokens in tokens:
        for num_workers in workers:
            command = [sys.executable, "-m", "benchmarks.workers", "--one"]
            command += ["--tokens", str(num_tokens), "--workers", str(num_workers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = Row(**json.loads(done.stdout))
            print(
                f"| {row.tokens:.0e} | {row.workers:,} | {row.jobs:,} | {row.plan_s:.1f} | "
                f"{row.hand_out_us:.0f} | {row.job_bytes:,.0f} | {row.makespan_s / 3600:.2f} h | "
                f"{row.idle:.1%} | {row.peak_gib:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
