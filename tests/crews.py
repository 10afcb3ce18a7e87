"""Calibrations of the toy pair by several workers: what they are given, and what they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import toy_pair
from fault_table import Fault
from toy_commands import hold

from calibrate.run.traces import Shard
from calibrate.work.job import PairSource


def source(toy: Path, pair: Any) -> PairSource:
    """How a worker loads the loaded pair."""
    hashes = (pair.slm_identity.sha256, pair.llm_identity.sha256)
    return PairSource(toy_pair.request(toy, toy).spec, "float32", "cpu", True, hashes)


def shards(run: Path) -> dict[str, Any]:
    """Every column of every shard, by its place in the run; NaN is equal to itself."""
    paths = sorted(run.rglob("*.parquet"))
    return {str(path.relative_to(run)): repr(Shard(path).read().to_pydict()) for path in paths}


def rows(run: Path) -> list[str]:
    """Every row of the traces, whichever shard it is in."""
    paths = sorted((run / "traces").glob("*.parquet"))
    return sorted(repr(row) for path in paths for row in Shard(path).read().to_pylist())


def hold_one(row: Fault, run: Path, right: Path, message: str) -> None:
    """Count one try of a fault against the undisturbed run."""
    row.tried += 1
    row.tracebacks += "Traceback" in message
    row.message = message.replace(str(run), "RUN")
    hold(row, run, right)
    assert row.kept_the_promise
