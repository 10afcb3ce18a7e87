"""What this process may use of its machine: a container or a job is often given only a part of it.

On Linux the parts are control groups, of version 2 or 1. A process that asks the system how much
memory is free learns of the whole machine, and is killed when it takes more than its group may.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def num_cores() -> int:
    """Processor cores that this process may keep busy, at least 1."""
    cores = [_affinity()]
    for group in _groups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (int(word) for word in (group / "cpu.max").read_text().split())
            cores.append(quota // period)
        with suppress(OSError, ValueError):
            quota, period = (
                int((group / f"cpu.cfs_{x}_us").read_text()) for x in ("quota", "period")
            )
            if quota > 0:
                cores.append(quota // period)
    return max(1, min(cores))


def available_memory() -> int:
    """Bytes that this process can still take; file pages that can be read again count as free."""
    free = [int(psutil.virtual_memory().available)]
    for group in _groups("memory"):
        for limit, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with suppress(OSError, ValueError):
                most, used = (int((group / name).read_text()) for name in (limit, usage))
                free.append(most - used + _file_pages(group, prefix))
    return max(0, min(free))


def _file_pages(group: Path, prefix: str) -> int:
    """Bytes of files that the system keeps for a group and gives up when memory is short."""
    words = (line.partition(" ") for line in (group / "memory.stat").read_text().splitlines())
    kept = {f"{prefix}inactive_file", f"{prefix}active_file"}
    return sum(int(value) for name, _, value in words if name in kept)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process, inner first; a container sees its own as root.

    A line of the membership is HIERARCHY:CONTROLLERS:PATH, without controllers in version 2.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")
        for mount in dict.fromkeys(mounts):
            inner = GROUPS / mount / path.lstrip("/")
            for group in (inner, *inner.parents):
                if group.is_relative_to(GROUPS / mount):
                    yield group
