"""The folder of converted models: found, locked, filled and checked.

A model appears in it whole, by one rename, or not at all. One process fills a place at a time;
the others wait and find it full.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from calibrate.run.checksums import KEY, checksum
from calibrate.run.errors import UserError

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Called with the stage, the bytes done, and the bytes in all where they are known."""

_RECORD_NAME = "hlm-model.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME_OF_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
# Raised when a conversion would come out differently: caches of the old number are made anew.
_LAYOUT = 1


def cache_root() -> Path:
    """`HLM_CACHE`, or else the user's cache folder for hlmtheory."""
    override = os.environ.get("HLM_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("hlmtheory"))


def converted_folder(sha256: str) -> Path:
    """Where the model made from the .gguf file of this hash lies once it is converted."""
    return cache_root() / "models" / f"{sha256[:16]}-bf16"


def _files(folder: Path) -> dict[str, Path]:
    """Files of a converted folder by their names in its record, which is none of them."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _RECORD_NAME
    }


def _write_record(folder: Path, source_sha256: str) -> None:
    """Say what a folder was made from, and the size and hash of each file."""
    files = _files(folder)
    record = {
        "source_sha256": source_sha256,
        "layout": _LAYOUT,
        "num_bytes": {name: path.stat().st_size for name, path in files.items()},
        "file_sha256": {name: file_sha256(path) for name, path in files.items()},
    }
    text = json.dumps({KEY: checksum(record), **record}, indent=1)
    (folder / _RECORD_NAME).write_text(text, encoding="utf-8")


def _read_record(folder: Path) -> dict[str, Any]:
    """The folder's record; empty where there is none that can be believed."""
    try:
        record = json.loads((folder / _RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and record.get(KEY) == checksum(record) else {}


def is_whole(sha256: str) -> bool:
    """Whether the converted model of this hash is there with every file at its recorded size.

    Quick, for it is asked often; :func:`refuse_damaged` reads the files.
    """
    folder = converted_folder(sha256)
    record = _read_record(folder)
    if record.get("source_sha256") != sha256 or record.get("layout") != _LAYOUT:
        return False
    try:
        sizes = {name: path.stat().st_size for name, path in _files(folder).items()}
    except OSError:
        return False
    return bool(record["num_bytes"].items() <= sizes.items())


def damaged_files(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Files of a folder with another hash than the known one, with both hashes.

    Known are those of converted folders, by their record, and those that the hub's cache links to
    under their hash, which for small files is that of git. About a second for 1.4 GB, once in a
    process.
    """
    known = {
        folder / name: one for name, one in _read_record(folder).get("file_sha256", {}).items()
    }
    known |= {
        path: path.resolve().name
        for path in folder.iterdir()
        if path.is_symlink() and _NAME_OF_HASH.fullmatch(path.resolve().name)
    }
    for path, expected in known.items():
        if (found := _hash_like(expected, path)) != expected:
            yield path, found, expected


def _hash_like(expected: str, path: Path) -> str:
    """A file's hash of the kind that is expected: SHA-256, or SHA-1 as git takes it."""
    if _SHA256.fullmatch(expected):
        return file_sha256(path)
    content = path.read_bytes()
    plain = hashlib.sha1(content).hexdigest()  # which a proxy of the hub may announce
    of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return plain if plain == expected else of_git


def refuse_damaged(folder: Path) -> None:
    """Hash every file whose hash is known before a model is made of it.

    Raises
    ------
    UserError
        If a file has another hash.
    """
    for path, found, expected in damaged_files(folder):
        # the hub's client takes a file that lies there for a whole one, whatever links to it
        remove = path.resolve() if path.is_symlink() else folder
        raise UserError(
            f"{path} is damaged: its hash is {found}, {expected} was recorded; remove {remove}, "
            "and the next start makes it anew"
        )


def folder_num_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; remembered within this process while size and time stay the same."""
    try:
        state = path.stat()
        return _file_sha256(path.absolute(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=32)
def _file_sha256(path: Path, num_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill(sha256: str, make: Callable[[Path], None], progress: Progress | None, label: str) -> Path:
    """Return the converted folder of this hash, made by `make` unless it is there already.

    `make` is called with an empty scratch folder on the same disk and leaves the model in its
    `model`; `progress` is told when another process is waited for.

    Raises
    ------
    UserError
        The cache cannot be written, or `make` failed. Nothing of it stays.
    """
    target = converted_folder(sha256)
    if is_whole(sha256):
        return target
    try:
        with _locked(sha256, progress, label):
            if is_whole(sha256):
                return target
            with _scratch(sha256) as scratch:
                make(scratch)
                model = scratch / "model"
                _write_record(model, sha256)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():  # damaged, or of an older layout
                    shutil.rmtree(target)
                os.replace(model, target)
    except OSError as error:
        raise UserError(
            f"cannot write {label} to the cache {cache_root()}: {error.strerror or error}; "
            "make room there, or set HLM_CACHE to a folder with room"
        ) from error
    return target


def check_room(num_bytes: int, label: str) -> None:
    """Refuse a download or a conversion that the disk has no room for."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise UserError(
            f"cannot write the cache {root}: {error.strerror or error}; "
            "set HLM_CACHE to a folder of yours"
        ) from error
    if free < num_bytes:
        raise UserError(
            f"{label} needs {num_bytes / 1e9:.1f} GB in the cache {root}, {free / 1e9:.1f} GB are "
            "free: make room there, or set HLM_CACHE to a folder with room"
        )


@contextmanager
def _locked(sha256: str, progress: Progress | None, label: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{sha256[:16]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress(f"wait for another process that fetches {label}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(sha256: str) -> Iterator[Path]:
    parent = cache_root() / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    # The lock is ours, so whatever lies here under this hash was left by a process that was killed.
    for stale in parent.glob(f"{sha256[:16]}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{sha256[:16]}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
