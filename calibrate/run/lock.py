"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import LOCK_NAME, clear_unfinished, system_reason, unfinished
from calibrate.run.records import RunRecord


@contextlib.contextmanager
def locked(run: Path, make: bool = False) -> Iterator[None]:
    """Hold a run folder against other processes, and clear what a killed one left half-written.

    The lock is the operating system's and ends with its process, however that ends: none is ever
    stale. Where a file system has no such locks, filelock judges by the process's number instead.
    The same process may hold it twice.

    Parameters
    ----------
    run : Path
    make : bool
        Make the folder if need be; if it is still empty in the end, it goes again.

    Raises
    ------
    UsageError
        If there is no such folder and none is to be made.
        If another process holds it, it cannot be written, or it is no run's: found before any work
        is done, and without touching what is there.
    """
    from filelock import FileLock, Timeout

    made = not run.is_dir()
    if made and not make:
        raise UsageError(f"RUN {run}: no such folder; `hlm calibrate` makes one")
    if not made and not _is_ours(run):
        way_out = "name another folder" if make else "name the folder of one"
        raise UsageError(f"RUN {run}: not empty, and not a run; {way_out}")
    path = run / LOCK_NAME
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"RUN {run}: in use by {_holder(path)}; wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(f"RUN {run}: cannot be written: {system_reason(error)}") from None
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            clear_unfinished(run)
            _sign(path)
        yield
    finally:
        if outermost:
            path.unlink(missing_ok=True)  # while it is held, so that nobody else's is taken
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # not empty: something was made
                run.rmdir()


def _is_ours(run: Path) -> bool:
    """Whether a folder is a run, or holds no more than one that was killed at its start."""
    if (run / RunRecord.file_name).is_file():
        return True
    lock = run / LOCK_NAME
    if lock.exists() and lock.stat().st_size > 0 and _signature(lock) is None:
        return False
    return set(run.iterdir()) <= {lock, *unfinished(run)}


def _sign(path: Path) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    try:
        path.write_text(json.dumps(who), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {system_reason(error)}") from None


def _holder(path: Path) -> str:
    return _signature(path) or "another process"


def _signature(path: Path) -> str | None:
    """Who signed a lock; None if nobody did as :func:`_sign` does."""
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
