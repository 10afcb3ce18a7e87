"""UI-HLM (arXiv 2508.12590): send only tokens that are both uncertain and important.

Assumption: the conjunction is the paper's; the importance is ours (hlmtheory.importance), for its
formulas are not public to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.domain import Array
from hlmtheory.importance import RunningThreshold, topk_importance_threshold
from hlmtheory.policies.base import DeriveOptions, Fitted, GatedPolicy, Memory
from hlmtheory.scores import Atoms
from hlmtheory.steps import Skip, Step

LEAST = -1e9
"""Below every score that has no bound of its own."""


@dataclass(frozen=True)
class ImportanceSettings:
    """Which importance and its two strictness parameters; docs/theory.md, (31), (32)."""

    variant: Literal["topk", "context"] = "topk"
    k: float = 16.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in ("topk", "context"):
            raise ValueError(f"variant = {self.variant!r}: allowed are 'topk', 'context'")
        if not np.isfinite(self.k) or (self.variant == "topk" and self.k < 1):
            raise ValueError(f"k = {self.k}: allowed is >= 1 for topk, finite for context")
        if not 0 <= self.gamma <= (1 if self.variant == "context" else np.finfo(float).max):
            raise ValueError(
                f"gamma = {self.gamma}: allowed is [0, inf) for topk, [0, 1] for context"
            )

    @property
    def label(self) -> str:
        """Name of these settings, as rules carry it: variant-k-gamma."""
        return f"{self.variant}-{self.k:g}-{self.gamma:g}"


class ImportanceMemory(Memory):
    """Importance of each step and its threshold, row by row, as the tokens come."""

    def __init__(self, settings: ImportanceSettings) -> None:
        self.settings = settings
        self._running: RunningThreshold | None = None

    def update(self, step: Step) -> dict[str, Array]:
        """Columns `importance`, `importance_threshold` and `important`, (B,) each.

        The running threshold has none at the first step, where every context is important.
        """
        settings = self.settings
        if settings.variant == "topk":
            sizes = step.axes.attention_sizes
            if settings.k not in sizes:
                raise ValueError(
                    f"k = {settings.k:g}: allowed for topk are {', '.join(map(str, sizes))}, the "
                    "sizes that traces record"
                )
            values = step["topk_attention"][..., sizes.index(int(settings.k))]
            least = topk_importance_threshold(step["attention_entropy"], settings.gamma)
        else:
            values = step["context_attention"]
            if self._running is None:
                self._running = RunningThreshold.start(values)
                least = values - float("inf")
            else:
                least = self._running.threshold(settings.k)
                self._running = self._running.update(values, settings.gamma)
        return {
            "importance": values, "importance_threshold": least, "important": values >= least,
        }  # fmt: skip

    def keep(self, rows: Any) -> None:
        """Keep only these rows."""
        if self._running is not None:
            self._running = RunningThreshold(self._running.mean[rows], self._running.variance[rows])


@dataclass(frozen=True)
class ImportanceGated(GatedPolicy):
    r"""Skip unless uncertain and important; an unimportant context skips whatever is drawn.

    .. math:: \sigma(s, d) = 1 - 1\{u(s, d) > u_{th}\}\, 1\{I(s) \ge I_{th}(s)\}
    """

    name: ClassVar[str] = "ui-hlm"
    label: ClassVar[str] = "UI-HLM"
    color: ClassVar[str] = "#009e73"
    dashes: ClassVar[tuple[float, ...]] = (8, 2, 1, 2, 1, 2)
    marker: ClassVar[str] = "P"
    paper: ClassVar[str | None] = "UI-HLM"
    needs_attention: ClassVar[bool] = True
    also_skips: ClassVar[str] = "the context is not important"

    importance: ImportanceSettings = field(default_factory=ImportanceSettings)

    @classmethod
    def variants(cls, fitted: Fitted, options: DeriveOptions) -> list[tuple[str, dict[str, Any]]]:
        """One of each importance asked for."""
        if "topk_attention" not in fitted.step:
            return []
        chosen: list[Mapping[str, Any]] = list(options.importances) or [{}]
        named = [(ImportanceSettings(**one), dict(one)) for one in chosen]
        return [
            (f"@{settings.label}" if number else "", {"importance": one})
            for number, (settings, one) in enumerate(named)
        ]

    @property
    def importance_settings(self) -> ImportanceSettings:
        """Its importance."""
        return self.importance

    def with_importance(self, k: float, gamma: float) -> ImportanceGated:
        """The same with another `topk` importance."""
        return replace(self, importance=ImportanceSettings("topk", float(k), float(gamma)))

    def gate_memory(self) -> Memory:
        """Of the importance."""
        return ImportanceMemory(self.importance)

    def gate(self, step: Step) -> Skip:
        """The score's in an important context, the whole vocabulary in another."""
        skip = super().gate(step)
        return replace(skip, whole=skip.whole | ~step["important"])

    def gate_of_draft(self, step: Step) -> Array:
        """Unless uncertain and important."""
        return super().gate_of_draft(step) | ~step["important"]

    def atoms(self, step: Step) -> Atoms:
        """The score's; an unimportant context lies whole at the least score."""
        score, mass, rejection = super().atoms(step)
        xp = array_namespace(score)
        least = max(self.score.low, LEAST)
        return xp.where(step["important"][:, None], score, 0 * score + least), mass, rejection
