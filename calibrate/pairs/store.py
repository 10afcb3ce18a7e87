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
    refuse_damaged,
)
from calibrate.pairs.sources import Download, GgufFile, HubRepo, LocalFolder, ModelSpec
from calibrate.run.errors import UserError

# Room for a download: the quantised file, one part of it, and its bfloat16 copy (16 bits for
# each 4.8 or so).
_ROOM_FACTOR = 5


def source_sha256(model: ModelSpec) -> str | None:
    """Hash of the .gguf file a model is made from; None for models that are not converted."""
    return file_sha256(model.source.path) if isinstance(model.source, GgufFile) else model.sha256


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
        With what was tried and the way out; nothing half made stays. Or if a file of the folder
        is damaged.
    """
    source, label = model.source, model.label
    if (folder := cached_folder(model)) is not None:
        refuse_damaged(folder)
        return folder
    if isinstance(source, LocalFolder):
        raise UserError(f"{source.path} is not a folder: give a model folder, .gguf file or hub id")
    if isinstance(source, HubRepo):
        return fetch.fetch_repo(source, label, progress)
    if isinstance(source, Download):
        check_room(_ROOM_FACTOR * source.num_bytes, label)

    def make(scratch: Path) -> None:
        if isinstance(source, GgufFile):
            gguf = source.path
        else:
            gguf = fetch.fetch_gguf(model, scratch, progress)
        convert.convert_gguf(gguf, scratch / "model", label, progress)

    sha256 = source_sha256(model)
    assert sha256 is not None  # ModelSpec checks it; for the type checker
    return fill(sha256, make, progress, label)
