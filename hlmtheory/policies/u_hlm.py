"""U-HLM (arXiv 2412.12687): skip where uncertainty is low, verify the rest with the whole of x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hlmtheory.policies.base import GatedPolicy


@dataclass(frozen=True)
class UncertaintyGated(GatedPolicy):
    """The papers' gate with full verification: its bias is rho; docs/theory.md, (12)."""

    name: ClassVar[str] = "u-hlm"
    label: ClassVar[str] = "U-HLM"
    color: ClassVar[str] = "#0072b2"
    dashes: ClassVar[tuple[float, ...]] = (6, 2)
    marker: ClassVar[str] = "o"
    paper: ClassVar[str | None] = "U-HLM"
    in_quickstart: ClassVar[bool] = True
