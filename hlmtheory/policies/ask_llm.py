"""Ask and sample: send nothing, the server samples its own law; the naive baseline, biased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from hlmtheory.domain import Array
from hlmtheory.policies.base import OUTPUT, GatedPolicy
from hlmtheory.steps import LawStep, Skip, Step, candidates
from hlmtheory.verification import FullDistribution


@dataclass(frozen=True)
class AskAndSample(FullDistribution):
    """Send nothing; the server samples from y: docs/theory.md, (25)."""

    def acceptance(self, draft_prob: Array, target_prob: Array) -> Array:
        """Zero: the server always samples."""
        return 0 * draft_prob

    def resample_weights(self, reference: Array, y: Array, skipped: Array) -> Array:
        """Y itself."""
        return y


@dataclass(frozen=True)
class Asking(GatedPolicy):
    r"""Output law sigma x + (1 - m) y with m the skipped mass.

    .. math:: \mathrm{TV} = \sum_v (\sigma_v x_v - m y_v)_+ \ge \rho_{min},
              \quad m = \sum_v \sigma_v x_v

    with rho_min of docs/theory.md, (13), which is rho where a gate skips for sure or not at all.
    """

    name: ClassVar[str] = "ask-llm"
    label: ClassVar[str] = "ask and sample"
    color: ClassVar[str] = "#56b4e9"
    dashes: ClassVar[tuple[float, ...]] = (4, 1, 4, 3)
    marker: ClassVar[str] = "X"
    draft_sent: ClassVar[bool] = False

    @property
    def rule(self) -> FullDistribution:
        """Sample the server's law."""
        return AskAndSample()

    def entries(self, step: Step, skip: Skip) -> Array:
        """Nothing."""
        return skip.zeros

    def sent_law(self, step: LawStep) -> Array:
        """Nothing."""
        return array_namespace(step.x).zeros_like(step.x)

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """sigma x + (1 - m) y."""
        x, y = (step[name] for name in OUTPUT)
        exact = skip.of_output(step) * x + (1.0 - skip.mass(step)) * y
        return exact, exact

    def bias(self, step: Step, skip: Skip) -> Array:
        """The sum above; from below, by rho, where the head does not decide."""
        x, y, _ = candidates(step)
        xp = array_namespace(x)
        m = skip.mass(step)[:, None]
        sigma_x = skip.candidates * x[:, : skip.width]
        excess = xp.clip(sigma_x - m * y[:, : skip.width], 0.0, None)
        return xp.where(skip.whole | skip.undecided, skip.risk(step), xp.sum(excess, axis=-1))
