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
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    mounts(tmp_path / "groups", "/ {} cgroup2 rw")
    return tmp_path / "groups"


def mounts(groups: Path, *lines: str) -> None:
    """ROOT FOLDER TYPE OPTIONS each, as the kernel lists them."""
    text = "22 1 0:20 / /proc rw - proc proc rw\n"
    for line in lines:
        root, folder, kind, options = line.format(groups).split(" ")
        text += f"31 23 0:28 {root} {folder} rw,relatime shared:9 - {kind} {kind} {options}\n"
    (groups.parent / "mounts").write_text(text)


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


V1 = ("{} {{}}/memory cgroup rw,memory", "{} {{}}/cpu cgroup rw,cpuacct,cpu")


@pytest.mark.parametrize(
    ("root", "path"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/"), ("/a/b", "/c")],
)
def test_a_container_sees_its_own_group_as_root(groups: Path, root: str, path: str) -> None:
    """Version 1, with a namespace of its own or the path of the host."""
    member(groups, f"4:memory:{path}", f"3:cpuacct,cpu:{path}", "2:pids,cpuset:/x", "0::/")
    mounts(groups, *(line.format(root) for line in V1), "/ {}/cpuset cgroup rw,cpuset")
    write(
        groups / "memory", memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(2 * GIB),
        memory__stat=stat(inactive_file=9, total_inactive_file=GIB // 2, total_active_file=0),
    )  # fmt: skip
    write(groups / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(groups / "cpuset", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    assert (available_memory(), num_cores()) == (3 * GIB // 2, 3)
    write(groups / "cpu", cpu__cfs_quota_us="-1")
    write(groups / "memory", memory__limit_in_bytes="9223372036854771712")
    assert (available_memory(), num_cores()) == (FREE, CORES)
    # Of a group around the container it is told the limit alone.
    write(groups / "memory", memory__stat=stat(hierarchical_memory_limit=3 * GIB))
    assert available_memory() == GIB


def test_a_group_inside_a_container_is_found_below_its_root(groups: Path) -> None:
    member(groups, "4:memory:/pod/one/inner")
    mounts(groups, "/pod/one {}/memory cgroup rw,memory")
    write(
        groups / "memory" / "inner", memory__limit_in_bytes=str(GIB), memory__usage_in_bytes="0",
    )  # fmt: skip
    assert available_memory() == GIB


def test_both_versions_beside_each_other(groups: Path) -> None:
    member(groups, "4:cpu:/", "0::/user")
    mounts(groups, "/ {}/unified cgroup2 rw", "/ {}/cpu cgroup rw,cpu")
    write(groups / "unified" / "user", memory__high=str(2 * GIB), memory__max="max",
          memory__current=str(GIB))  # fmt: skip
    assert available_memory() == GIB  # and without memory.stat


def test_names_may_be_any_bytes(groups: Path) -> None:
    name = b"/job \xff\x0b:1"
    (groups.parent / "membership").write_bytes(b"0::" + name + b"\n")
    group = Path(os.fsdecode(os.fsencode(groups) + name))
    write(group, memory__max=str(GIB), memory__current="0")
    assert available_memory() == GIB
    mounts(groups, "/ {}/a\\040b cgroup2 rw")
    write(groups / "a b", memory__max=str(GIB // 2), memory__current="0")
    assert available_memory() == GIB // 2


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
