"""CU-HLM (arXiv 2505.11788), a size for each token: the least whose bound meets the tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_positive
from hlmtheory.policies.base import DeriveOptions, Fitted, Outcome, TruncatingPolicy
from hlmtheory.relation import linear_rejection
from hlmtheory.steps import LawStep, Skip, Step, support_size
from hlmtheory.truncation import online_bound_denominator, online_truncation_size
from hlmtheory.verification import FullDistribution, TruncatedDistribution


@dataclass(frozen=True)
class OnlineTruncation(TruncatingPolicy):
    """Send k* probabilities, chosen for each draft; docs/theory.md, (19).

    The size depends on the draft, so what it does is read off the draft that was drawn, and its
    bias is that of the law at that draft's size: an estimate of the policy's, not a bound.

    Attributes
    ----------
    theta : float
        Tolerated bound, > 0.
    eta : float
        Sharpness of the soft maximum, > 0.
    slope, intercept : float
        The fitted line that predicts the rejection probability.
    """

    name: ClassVar[str] = "cu-hlm-online"
    label: ClassVar[str] = "CU-HLM, online k"
    color: ClassVar[str] = "#d55e00"
    dashes: ClassVar[tuple[float, ...]] = (3, 1.5)
    marker: ClassVar[str] = "<"
    paper: ClassVar[str | None] = "CU-HLM"
    entries_vary: ClassVar[bool] = True

    theta: float
    eta: float
    slope: float
    intercept: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.theta, "theta")
        check_positive(self.eta, "eta")

    @property
    def rule(self) -> FullDistribution:
        """Verify against the truncation."""
        return TruncatedDistribution()

    @classmethod
    def variants(cls, fitted: Fitted, options: DeriveOptions) -> list[tuple[str, dict[str, Any]]]:
        """One of each tolerance."""
        line = {"eta": options.eta, "slope": fitted.slope, "intercept": fitted.intercept}
        if not cls.recorded(fitted.step):
            return []
        return [
            (f"@theta-{theta:g}" if number else "", {"theta": theta, **line})
            for number, theta in enumerate(options.thetas)
        ]

    def size(self, step: Step) -> Array:
        """k* of each draft, (B,): exact live; log-linear between recorded sizes."""
        beta = linear_rejection(step["uncertainty"], self.slope, self.intercept)
        if isinstance(step, LawStep):
            return online_truncation_size(step.x, step["draft_prob"], beta, self.theta, self.eta)
        limit = self.theta * online_bound_denominator(step["draft_prob"], beta, self.eta)
        sizes = np.array(step.axes.truncation_sizes, dtype=float)
        deviation = step["tail_deviation"]  # (B, G), falling
        fits = deviation <= limit[:, None]
        first = np.where(fits.any(1), fits.argmax(1), len(sizes) - 1)
        previous = np.maximum(first - 1, 0)
        rows = np.arange(len(first))
        high, low = deviation[rows, previous], deviation[rows, first]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(high > low, (high - limit) / (high - low), 0.0)
        share = np.clip(np.where(first == 0, 1.0, share), 0.0, 1.0)
        logs = np.log(sizes)
        exact = np.exp(logs[previous] + share * (logs[first] - logs[previous]))
        found = np.ceil(np.where(fits.any(1), exact, sizes[-1]) - 1e-9)
        return np.minimum(found, support_size(step))

    def entries(self, step: Step, skip: Skip) -> Array:
        """k* of the draft."""
        return skip.zeros + self.size(step)

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """Unknown: every draft has a size of its own, and a step knows that of one."""
        unknown = skip.zeros + float("nan")
        return unknown, unknown

    def outcome(self, step: Step) -> Outcome:
        """Averaged over the draft but for the entries, which go with it."""
        found = super().outcome(step)
        whole = array_namespace(found.skip).clip(found.skip, None, 1.0)
        return Outcome(whole, found.risk, found.bias, self.drawn_entries(step), found.rho)
