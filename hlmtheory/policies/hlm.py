"""The hybrid language model: every draft is verified with the whole of x; lossless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hlmtheory.policies.base import Policy


@dataclass(frozen=True)
class FullVerification(Policy):
    """sigma = 0 and accept/resample: the output has exactly the server's law; (2)."""

    name: ClassVar[str] = "hlm"
    label: ClassVar[str] = "HLM"
    color: ClassVar[str] = "#000000"
    dashes: ClassVar[tuple[float, ...]] = ()
    marker: ClassVar[str] = "s"
    follows_server: ClassVar[bool] = True
