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
    (run / "run.json").write_text("{}")
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
    left = sorted(path.name for path in run.rglob("*"))
    assert left == ["run.json", "shard-00000.parquet", "traces"]


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


@pytest.mark.parametrize("make", [False, True])
@pytest.mark.parametrize("there", ["data.txt", ".lock", "deep/.a.json.b.part", ".mine.part"])
def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path: Path, there: str, make: bool) -> None:
    """A parent of runs, say, in one of which somebody is at work."""
    folder = tmp_path / "folder"
    files = [folder / there, folder / "run" / "traces" / ".shard-00000.parquet.x.part"]
    for path in files[: 1 if there == ".lock" else 2]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious: 42")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match="not empty, and not a run"), locked(folder, make=make):
        pytest.fail("somebody else's folder")
    assert sorted(folder.rglob("*")) == before
    assert (folder / there).read_text() == "precious: 42"


def test_what_is_left_behind_a_link_is_cleared_and_only_ours(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    for path in (run / "reruns" / "u-hlm-0", run / "mine", disk):
        path.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "traces").symlink_to(disk, target_is_directory=True)
    kept = run / "mine" / ".table.json.x.part"
    left = [disk / ".shard-00003.parquet.a.part", run / "reruns" / "u-hlm-0" / ".a.parquet.b.part"]
    for path in (kept, *left):
        path.write_text("")
    with locked(run):
        pass
    assert kept.exists()
    assert not any(path.exists() for path in left)
