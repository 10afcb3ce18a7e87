"""Damaged files: told by name, or read as what was written; never computed with.

`make test` tries each a few times, `make long` often; the table at the end of a run has the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_pair
from fault_table import Fault

from calibrate.pairs import cache
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord
from calibrate.run.traces import read_calibration_trace, read_trace, shards_in
from paper_figs.loaded import load_run

pytestmark = pytest.mark.filterwarnings("default")
FEW_OR_MANY = [8, pytest.param(100, marks=pytest.mark.long)]


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


def one_byte_changed(whole: bytes, rng: Any) -> bytes:
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def cut_short(whole: bytes, rng: Any) -> bytes:
    return whole[: rng.integers(len(whole))]


@pytest.mark.parametrize("times", FEW_OR_MANY)
@pytest.mark.parametrize("damage", [one_byte_changed, cut_short])
@pytest.mark.parametrize("name", list(FILES))
def test_damage_is_told_or_changes_nothing(
    name: str,
    damage: Callable[[bytes, Any], bytes],
    times: int,
    judged_run: Path,
    weights: Path,
    fault: Callable[[str], Fault],
    rng: Any,
) -> None:
    read, folder = FILES[name], weights if name.startswith("model") else judged_run
    path = folder / name.strip()
    if path.is_dir():
        path = shards_in(sorted(path.iterdir())[0])[0]
    row = fault(f"{damage.__name__.replace('_', ' ')}: {name.strip()}, read by {read.__name__}")
    whole, right = path.read_bytes(), read(folder)
    try:
        for _ in range(times):
            path.write_bytes(damage(whole, rng))
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
    assert row.kept_the_promise
