"""A run folder: where each stage writes, atomically, and how a run came to be."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import ValidationError

from calibrate.run.checksums import KEY, checksum
from calibrate.run.errors import UsageError, UserError
from calibrate.run.records import Provenance, RunRecord, RunSettings, StageRecord

PACKAGES = ("hlmtheory", "torch", "transformers", "numpy", "scipy", "statsmodels", "pyarrow")
DEFAULT_NAME = "default"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# They never change a token: a smaller batch is the way out of a full memory, and what was recorded
# may be looked at again, more of it or less.
FREE_ON_RESUME = {"batch_size", "device", "read_tokens"}

LOCK_NAME = ".lock"
_PART = ".part"

RunState: TypeAlias = Literal["new", "interrupted", "finished"]
AnyStage = TypeVar("AnyStage", bound=StageRecord)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds.

    Raises
    ------
    UserError
        If the system refuses: no space, no permission. The line names `path`.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        # mkstemp makes files private; results are as readable as the user's other files.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {system_reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def system_reason(error: OSError) -> str:
    """What the system says, and the way out."""
    reason = error.strerror or str(error)
    return f"{reason}; make room there, or mend its permissions, or name another folder"


def unfinished(run: Path) -> list[Path]:
    """What killed writers of records and shards left in the folders where these lie."""
    folders = (run, run / "traces", run / "pilot", *(run / "reruns").glob("*"))
    kinds = ("json", "parquet")
    return [left for one in folders for kind in kinds for left in one.glob(f".*.{kind}.*{_PART}")]


def clear_unfinished(run: Path) -> None:
    """Remove it; the run must be locked."""
    for left in unfinished(run):
        left.unlink(missing_ok=True)


def clear_unfinished_file(path: Path) -> None:
    """Remove what killed writers of one file left; nobody may be writing it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
        left.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the work that is to fill it.

    Raises
    ------
    UserError
    """
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder}: {system_reason(error)}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_name(name: str) -> None:
    """Refuse a name of anything but letters, digits, '.', '_' and '-'.

    Raises
    ------
    UsageError
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"--name {name!r}: allowed are letters, digits, '.', '_' and '-'")


def record_path(run: Path, kind: type[StageRecord], name: str = DEFAULT_NAME) -> Path:
    """Where a record lies: operating_points.json, or operating_points.NAME.json under a name.

    Raises
    ------
    UsageError
        If the name holds anything but letters, digits, '.', '_' and '-'.
    """
    check_name(name)
    if name == DEFAULT_NAME:
        return run / kind.file_name
    stem, suffix = os.path.splitext(kind.file_name)
    return run / f"{stem}.{name}{suffix}"


def record_names(run: Path, kind: type[StageRecord]) -> list[str]:
    """Names under which the folder holds records of a kind, the default first."""
    stem, suffix = os.path.splitext(kind.file_name)
    pattern = re.compile(rf"{re.escape(stem)}\.({NAME_PATTERN}){re.escape(suffix)}")
    found = [match[1] for path in run.glob(f"{stem}.*") if (match := pattern.fullmatch(path.name))]
    default = [DEFAULT_NAME] if (run / kind.file_name).is_file() else []
    return default + sorted(set(found) - {DEFAULT_NAME})


def write_record(run: Path, record: StageRecord, name: str = DEFAULT_NAME) -> Path:
    """Write a stage's result in one go."""
    path = record_path(run, type(record), name)
    write_record_file(path, record)
    return path


def write_record_file(path: Path, record: StageRecord) -> None:
    """Write a record where the user wants it."""
    write_text(path, record_text(record) + "\n")


def record_text(record: StageRecord) -> str:
    """A record as JSON, schema version and checksum first; NaN is refused."""
    content = {"schema_version": record.schema_version, **record.model_dump(mode="json")}
    content = {"schema_version": record.schema_version, KEY: checksum(content), **content}
    return json.dumps(content, indent=1, allow_nan=False)


def read_record(run: Path, kind: type[AnyStage], name: str = DEFAULT_NAME) -> AnyStage:
    """Read one stage's result from a run folder.

    Raises
    ------
    UserError
        If it is missing, broken, of another version, changed since it was written, or not what its
        stage writes; the line names the file and the command that writes it.
    """
    path = record_path(run, kind, name)
    command = kind.made_by + ("" if name == DEFAULT_NAME else f" --name {name}")
    if not run.is_dir():
        raise UsageError(f"RUN {run}: no such folder; `hlm calibrate` makes one")
    if not path.is_file():
        raise UserError(f"RUN {run}: {path.name} is missing; run `{command}` first")
    return read_record_file(path, kind, command)


def read_record_file(path: Path, kind: type[AnyStage], command: str) -> AnyStage:
    """Read a record from the file that `command` wrote.

    Raises
    ------
    UserError
        If it is broken, of another version, or not what the command writes.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, or not even text
        raise UserError(f"{path} is not valid JSON; run `{command}` again") from None
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != kind.schema_version:
        raise UserError(
            f"{path}: schema version {found}, this is {kind.schema_version}; run `{command}` again"
        )
    if content.get(KEY) != checksum(content):
        raise UserError(
            f"{path} is not as `{command}` wrote it: its checksum does not match, so it was edited "
            "or damaged; restore it, or run the command again"
        )
    del content["schema_version"], content[KEY]
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path} is not what `{command}` writes ({place}: {first['msg']}); run it again"
        ) from None


def provenance(command: Sequence[str], *packages: str) -> Provenance:
    """What a result says of its making: versions, revision of the checkout, command line.

    `packages` have a say in it beside those that always do.
    """
    return Provenance(
        versions=package_versions(*packages), revision=git_revision(), command=tuple(command)
    )


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of everything that can change a number: PACKAGES and these."""
    found = {"python": sys.version.split()[0]}
    for name in (*PACKAGES, *packages):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_revision() -> str | None:
    """Revision of the checkout that is running, with '+' if it has local changes."""
    folder = Path(__file__).resolve().parent.parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return revision + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def open_run(run: Path, settings: RunSettings, resume: bool) -> RunState:
    """Look at a folder that is to hold a calibration; writes nothing.

    Parameters
    ----------
    run : Path
        The folder; only ever filled by one set of settings.
    settings : RunSettings
        What decides the tokens; compared on resume.
    resume : bool
        Go on with an interrupted calibration.

    Returns
    -------
    RunState
        What it holds; with `resume`, of these settings.

    Raises
    ------
    UsageError
        If the folder holds something else, or cannot be written.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"--output-path {run}: is a file; name a folder")
    try:
        check_writable(run)
    except UserError as error:
        raise UsageError(f"--output-path {run}: {error}") from None
    marker = record_path(run, RunRecord)
    if not marker.is_file():
        if run.is_dir() and any(path.name != LOCK_NAME for path in run.iterdir()):
            raise UsageError(f"--output-path {run}: not empty, and not a run; name another folder")
        return "new"
    try:
        earlier = read_record(run, RunRecord)
    except UserError as error:
        raise UsageError(f"--output-path {run}: {error}, or name another folder") from None
    if not resume and earlier.complete:
        raise UsageError(
            f"--output-path {run}: holds a finished run; go on with `hlm derive {run}`, or name "
            "another folder"
        )
    if not resume:
        raise UsageError(
            f"--output-path {run}: holds an interrupted run; add --resume to go on with it, "
            "or name another folder"
        )
    before, now = earlier.settings.model_dump(), settings.model_dump()
    for key in sorted(before.keys() - FREE_ON_RESUME):
        if before[key] != now[key]:
            raise UsageError(
                f"--resume: {key} was {before[key]!r} in {run}, now {now[key]!r}; "
                "a run keeps its settings"
            )
    return "finished" if earlier.complete else "interrupted"
