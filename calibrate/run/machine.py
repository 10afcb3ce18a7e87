"""What this process may use of its machine: a container or a job is often given only a part of it.

On Linux the parts are control groups, of version 2 or 1. A process that asks the system how much
memory is free learns of the whole machine, and is killed when it takes more than its group may.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


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


def threads_told() -> int | None:
    """Processor threads that the system was told (OMP_NUM_THREADS), if it was."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) or None if told.isdecimal() else None


def available_memory() -> int:
    """Bytes that this process can still take; file pages that can be read again count as free."""
    free = [int(psutil.virtual_memory().available)]
    for group in _groups("memory"):
        stat = _stat(group)
        for limits, usage, prefix in (
            (("memory.max", "memory.high"), "memory.current", ""),
            (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
        ):
            # Of groups around this one a container may know the limit alone.
            most = [stat.get("hierarchical_memory_limit")] if prefix else []
            most += [_number(group / name) for name in limits]
            used = _number(group / usage)
            least = min((one for one in most if one is not None), default=None)
            if least is not None and used is not None:
                pages = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
                free.append(least - used + pages)
    return max(0, min(free))


def _number(path: Path) -> int | None:
    """What a file of a group says; None if there is none, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(group: Path) -> dict[str, int]:
    out = {}
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            out[name] = int(value)
    return out


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process, as far as it sees them, inner first.

    A line of the membership is HIERARCHY:CONTROLLERS:PATH, without controllers in version 2; a
    mount shows the hierarchy from some group on, in a container mostly from its own.
    """
    paths = {}
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in _lines(MOUNTS):
        shown, _, kind = line.partition(" - ")
        root, point = (os.fsdecode(_unescaped(word)) for word in shown.split(" ")[3:5])
        system, _, options = kind.split(" ", 2)
        if system not in paths or (system == "cgroup" and controller not in options.split(",")):
            continue
        inside = os.path.relpath(paths[system], root)
        names = [] if inside == "." or inside.startswith("..") else inside.split("/")
        for depth in range(len(names), -1, -1):
            yield Path(point, *names[:depth])


def _lines(path: Path) -> list[str]:
    """Of a file that the kernel writes, whose names may be any bytes."""
    try:
        return os.fsdecode(path.read_bytes()).rstrip("\n").split("\n")
    except OSError:  # not Linux
        return []


def _unescaped(word: str) -> bytes:
    """A name in a table of mounts: blanks are written as three octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(word))
