"""What a container allows, read from control groups made up in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from calibrate.pairs.models import use_threads
from calibrate.run import machine
from calibrate.run.machine import available_memory, num_cores

GIB = 2**30
FREE, CORES = 64 * GIB, 48


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 free GiB and 48 cores, without groups as yet."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    return tmp_path / "groups"


def write(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(text + "\n")


def member(groups: Path, *lines: str) -> None:
    (groups.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def stat(prefix: str = "", **pages: int) -> str:
    return "\n".join(f"{prefix}{name} {size}" for name, size in pages.items())


def test_without_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert (available_memory(), num_cores()) == (FREE, CORES)
    member(groups, "0::/")
    assert (available_memory(), num_cores()) == (FREE, CORES)
    write(groups, memory__max="max", memory__current="5", memory__stat="", cpu__max="max 100000")
    assert (available_memory(), num_cores()) == (FREE, CORES)


def test_the_narrowest_of_nested_groups_counts(groups: Path) -> None:
    """Version 2: a job's step inside a job; pages of files count as free, those of tmpfs do not."""
    member(groups, "0::/job/step")
    write(
        groups / "job", memory__max=str(8 * GIB), memory__current=str(6 * GIB),
        memory__stat=stat(file=3 * GIB, shmem=GIB, inactive_file=GIB, active_file=GIB),
        cpu__max="650000 100000",
    )  # fmt: skip
    write(
        groups / "job" / "step", memory__max=str(6 * GIB), memory__current=str(GIB),
        memory__stat=stat(inactive_file=0, active_file=0), cpu__max="max 100000",
    )  # fmt: skip
    assert (available_memory(), num_cores()) == (4 * GIB, 6)
    write(groups / "job" / "step", cpu__max="50000 100000")
    assert num_cores() == 1


def test_version_1_with_the_path_of_the_host(groups: Path) -> None:
    """A container without a namespace of its own is told a path that it cannot see."""
    member(groups, "4:memory:/docker/abc", "3:cpu,cpuacct:/docker/abc", "2:pids:/x", "0::/")
    write(
        groups / "memory", memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(2 * GIB),
        memory__stat=stat(inactive_file=9, total_inactive_file=GIB // 2, total_active_file=0),
    )  # fmt: skip
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(groups / "pids", memory__max="1", memory__current="1", memory__stat="")
    assert (available_memory(), num_cores()) == (3 * GIB // 2, 3)
    write(groups / "cpu,cpuacct", cpu__cfs_quota_us="-1")
    write(groups / "memory", memory__limit_in_bytes="9223372036854771712")
    assert (available_memory(), num_cores()) == (FREE, CORES)


def test_a_group_that_is_overdrawn_has_nothing_left(groups: Path) -> None:
    member(groups, "0::/")
    write(groups, memory__max=str(GIB), memory__current=str(2 * GIB), memory__stat="")
    assert available_memory() == 0


def test_groups_beside_the_own_one_do_not_count(groups: Path) -> None:
    member(groups, "0::/mine")
    for name in ("other", "mine/inner"):
        write(groups / name, memory__max="1", memory__current="1", memory__stat="")
    assert available_memory() == FREE


def test_threads_are_no_more_than_the_cores_unless_they_are_asked_for(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    member(groups, "0::/")
    write(groups, cpu__max="200000 100000")
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for asked, wanted in ((5, 5), (None, 2)):
            use_threads(asked)
            assert torch.get_num_threads() == wanted
        use_threads(1)
        use_threads(None)  # fewer stay fewer
        assert torch.get_num_threads() == 1
        torch.set_num_threads(5)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        use_threads(None)
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
