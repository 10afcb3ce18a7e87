"""Residual verification: send only what the gate would have skipped; ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from hlmtheory.domain import Array
from hlmtheory.policies.base import OUTPUT, GatedPolicy
from hlmtheory.steps import LawStep, Skip, Step
from hlmtheory.verification import FullDistribution


@dataclass(frozen=True)
class ResidualVerification(FullDistribution):
    r"""Send the probabilities of the skip set only; the server samples what is missing from y.

    .. math:: \mathrm{norm}(\max(y - \sigma x, 0))

    docs/theory.md, (24): TV(output, y) equals the lower bound of the gate, with |S| entries sent.
    The draft itself is not sent, and never accepted.
    """

    def acceptance(self, draft_prob: Array, target_prob: Array) -> Array:
        """Zero: the server always samples."""
        return 0 * draft_prob

    def resample_weights(self, reference: Array, y: Array, skipped: Array) -> Array:
        """max(y - sigma x, 0), not normalised; `skipped` is sigma x."""
        return array_namespace(y).clip(y - skipped, 0.0, None)


@dataclass(frozen=True)
class Residual(GatedPolicy):
    """The gate's least bias at one probability a token of its skip set; docs/theory.md, (24)."""

    name: ClassVar[str] = "r-hlm"
    label: ClassVar[str] = "residual verification"
    color: ClassVar[str] = "#b0588e"
    dashes: ClassVar[tuple[float, ...]] = (1, 1.4)
    marker: ClassVar[str] = "*"
    draft_sent: ClassVar[bool] = False
    in_quickstart: ClassVar[bool] = True

    @property
    def rule(self) -> FullDistribution:
        """Sample the residual."""
        return ResidualVerification()

    def entries(self, step: Step, skip: Skip) -> Array:
        """One a token of the skip set."""
        return skip.count(step)

    def sent_law(self, step: LawStep) -> Array:
        """Sigma x."""
        return self.skip_probability(step).over_vocabulary(step) * step.x

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """sigma x + c (y - sigma x)+, c = (1 - m)/(1 - m + rho_min); docs/theory.md, (46b)."""
        x, y = (step[name] for name in OUTPUT)
        xp = array_namespace(x)
        sent, taken = 1.0 - skip.mass(step), skip.of_output(step) * x
        missing = sent + skip.floor(step)
        share = sent / xp.where(missing > 0, missing, xp.ones_like(missing))
        exact = taken + share * xp.clip(y - taken, 0.0, None)
        return exact, exact

    def bias(self, step: Step, skip: Skip) -> Array:
        """The lower bound (13), also for a gate that skips at random."""
        return skip.floor(step)
