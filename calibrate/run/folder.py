"""A run folder: where each stage writes, atomically, and how a run came to be."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calibrate.run.errors import UsageError, UserError

SCHEMA_VERSION = 1
PACKAGES = ("hlmtheory", "torch", "transformers", "numpy", "scipy", "statsmodels", "pyarrow")
# They never change a token, and a smaller batch is the way out of a full memory.
FREE_ON_RESUME = {"batch_size", "device"}
REQUIRED = {
    "run.json": {"pair", "settings"},
    "calibration.json": {"pair", "settings", "fit", "timings", "num_prompts", "num_tokens"},
    "operating_points.json": {"operating_points", "link", "profile", "accounting", "confidence"},
    "validation.json": {"cells", "coverage"},
    "splits.json": {"rows", "num_splits", "num_prompts", "num_tokens", "confidence"},
    "attenuation.json": {"rows"},
    "quality.json": {"rows"},
}
STAGES = {
    "run.json": "hlm calibrate",
    "calibration.json": "hlm calibrate",
    "operating_points.json": "hlm derive",
    "validation.json": "hlm validate",
    "splits.json": "calibrate.validate.guarantees.write_splits",
    "attenuation.json": "calibrate.validate.attenuation.write_attenuation",
    "quality.json": "hlm quality",
}


@dataclass(frozen=True)
class Figure:
    """A number with its interval and unit, the shape of every figure in JSON.

    `low` and `high` are None only where no interval is defined.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        body = f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            body += f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{body} {self.unit}".strip()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results are as readable as the user's other files.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one go; NaN is refused, for it is not JSON."""
    text = json.dumps(content, indent=1, allow_nan=False, default=_encode)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _encode(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} to JSON")


def read_json(run: Path, name: str) -> dict[str, Any]:
    """Read one stage's result from a run folder.

    Raises
    ------
    UserError
        If it is missing or broken, naming the command that writes it.
    """
    path = run / name
    if not run.is_dir():
        raise UsageError(f"RUN {run}: no such folder; `hlm calibrate` makes one")
    if not path.is_file():
        raise UserError(f"RUN {run}: {name} is missing; run `{STAGES[name]}` first")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not even text
        raise UserError(f"{path} is not valid JSON; run `{STAGES[name]}` again") from None
    missing = REQUIRED[name] - content.keys() if isinstance(content, dict) else REQUIRED[name]
    if missing:
        raise UserError(
            f"{path} is not what `{STAGES[name]}` writes ({min(missing)} is missing); run it again"
        )
    return content


def provenance(command: Sequence[str], *packages: str) -> dict[str, Any]:
    """What a result says of its making: versions, revision of the checkout, command line.

    `packages` have a say in it beside those that always do.
    """
    return {
        "versions": package_versions(*packages),
        "revision": git_revision(),
        "command": list(command),
    }


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


def open_run(run: Path, settings: dict[str, Any], resume: bool) -> bool:
    """Prepare a run folder for calibration.

    Parameters
    ----------
    run : Path
        The folder; made if need be, only ever filled by one set of settings.
    settings : dict
        What decides the tokens; compared on resume.
    resume : bool
        Go on with an interrupted calibration.

    Returns
    -------
    bool
        Whether shards of an interrupted run are there to be used.

    Raises
    ------
    UsageError
        If the folder holds something else.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"--output-path {run}: is a file; name a folder")
    parent = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--output-path {run}: cannot be made there; name another folder")
    marker = run / "run.json"
    if not marker.is_file():
        if run.is_dir() and any(run.iterdir()):
            raise UsageError(f"--output-path {run}: not empty, and not a run; name another folder")
        return False
    try:
        earlier = read_json(run, "run.json")
    except UserError:
        raise UsageError(
            f"--output-path {run}: its run.json is broken; name another folder"
        ) from None
    if earlier.get("complete", False):
        raise UsageError(f"--output-path {run}: holds another run; name another folder")
    if not resume:
        raise UsageError(
            f"--output-path {run}: holds an interrupted run; add --resume to go on with it, "
            "or name another folder"
        )
    different = sorted(
        key
        for key in (settings.keys() | earlier["settings"].keys()) - FREE_ON_RESUME
        if settings.get(key) != earlier["settings"].get(key)
    )
    if different:
        raise UsageError(
            f"--resume: {different[0]} was {earlier['settings'].get(different[0])!r} in {run}, "
            f"now {settings.get(different[0])!r}; a run keeps its settings"
        )
    return True
