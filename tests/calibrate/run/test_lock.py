"""A run folder has one writer at a time, and nothing of a killed one stands in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import LOCK_NAME
from calibrate.run.lock import locked

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from calibrate.run.lock import locked
with locked(Path(sys.argv[1]), make=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_kept_out_and_told_who_is_in(tmp_path: Path, holder) -> None:
    began = time.perf_counter()
    told = pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+ since \d{{4}}-")
    with told, locked(tmp_path / "run"):
        pytest.fail("two processes in one folder")
    assert time.perf_counter() - began < 30  # told, not waited for
    assert (tmp_path / "run" / LOCK_NAME).exists()


def test_a_killed_holder_leaves_no_lock_and_no_half_files(tmp_path: Path, holder) -> None:
    run = tmp_path / "run"
    (run / "traces").mkdir()
    for left in (".run.json.a1b2.part", "traces/.shard-00000.parquet.x_9.part"):
        (run / left).write_text("{")
    kept = run / "traces" / "shard-00000.parquet"
    kept.write_text("whole")
    holder.kill()
    holder.wait()
    with locked(run):
        assert list(run.rglob("*.part")) == []
        assert kept.exists()
        with locked(run):  # the same process again
            pass
        assert (run / LOCK_NAME).exists()
    assert sorted(path.name for path in run.rglob("*")) == ["shard-00000.parquet", "traces"]


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), locked(run, make=True):
        raise ZeroDivisionError
    assert not run.exists()
    with pytest.raises(UsageError, match="no such folder"), locked(run):
        pass
    run.mkdir()
    with locked(run, make=True):
        pass
    assert run.is_dir()


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = pytest.raises(UserError, match="cannot be written: Not a directory")
    with told, locked(tmp_path / "file" / "run", make=True):
        pytest.fail("nothing can be written there")
