"""The device model alone: nothing is sent, every draft stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hlmtheory.domain import Array
from hlmtheory.policies.base import Policy
from hlmtheory.steps import Skip, Step, whole_skip


@dataclass(frozen=True)
class DeviceAlone(Policy):
    """sigma = 1: the output has the device's law, and its bias is TV(x, y)."""

    name: ClassVar[str] = "slm"
    label: ClassVar[str] = "device alone"
    color: ClassVar[str] = "#6b6b6b"
    dashes: ClassVar[tuple[float, ...]] = (1, 3)
    marker: ClassVar[str] = "v"
    role: ClassVar[Literal["both", "device", "server"]] = "device"

    def skip_probability(self, step: Step) -> Skip:
        """One."""
        return whole_skip(step)

    def skips(self, step: Step) -> Array:
        """Always."""
        return whole_skip(step).whole

    def entries(self, step: Step, skip: Skip) -> Array:
        """Nothing."""
        return skip.zeros
