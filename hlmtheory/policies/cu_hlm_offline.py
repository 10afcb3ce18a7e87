"""CU-HLM (arXiv 2505.11788), one size for all tokens: the k likeliest of x, a uniform tail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from array_api_compat import array_namespace

from hlmtheory.acceptance import rejection_probability, total_variation
from hlmtheory.domain import Array
from hlmtheory.head import tail_level
from hlmtheory.policies.base import DeriveOptions, Fitted, TruncatingPolicy
from hlmtheory.relation import linear_rejection
from hlmtheory.sampling import sample_inverse_cdf
from hlmtheory.steps import LawStep, Skip, Step, support_size
from hlmtheory.truncation import offline_truncation, online_bound_denominator
from hlmtheory.verification import DraftFromSent, FullDistribution, TruncatedDistribution


@dataclass(frozen=True)
class FixedTruncation(TruncatingPolicy):
    """Send k probabilities with every draft; docs/theory.md, (17), (20).

    Attributes
    ----------
    num_entries : int
        k >= 1.
    tolerance : float or None
        That the mean of bound (19) was to meet, and
    tolerance_met : bool
        whether any recorded size meets it.
    draft_from_sent : bool
        Draw the drafts from the sent law too: no bias from truncation; (23).
    """

    name: ClassVar[str] = "cu-hlm-offline"
    label: ClassVar[str] = "CU-HLM, offline k"
    color: ClassVar[str] = "#e69f00"
    dashes: ClassVar[tuple[float, ...]] = (6, 2, 1, 2)
    marker: ClassVar[str] = "D"
    paper: ClassVar[str | None] = "CU-HLM"
    in_quickstart: ClassVar[bool] = True

    num_entries: int
    tolerance: float | None = None
    tolerance_met: bool = True
    draft_from_sent: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_entries < 1:
            raise ValueError(f"num_entries = {self.num_entries}: allowed is >= 1")

    @property
    def rule(self) -> FullDistribution:
        """Verify against the truncation."""
        return DraftFromSent() if self.draft_from_sent else TruncatedDistribution()

    @property
    def fixed_size(self) -> int:
        """k."""
        return self.num_entries

    def with_size(self, num_entries: int) -> FixedTruncation:
        """The same at another k."""
        return replace(self, num_entries=num_entries)

    @property
    def remark(self) -> str:
        """Whether the tolerance was met."""
        if self.tolerance_met or self.tolerance is None:
            return ""
        return (
            f"no stored size meets theta = {self.tolerance:g}: k = {self.num_entries}, the largest"
        )

    @classmethod
    def variants(cls, fitted: Fitted, options: DeriveOptions) -> list[tuple[str, dict[str, Any]]]:
        """The smallest size of each tolerance; drafts from the sent law for the first of them."""
        step = fitted.step
        if not cls.recorded(step):
            return []
        beta = linear_rejection(step["uncertainty"], fitted.slope, fitted.intercept)
        bound = online_bound_denominator(step["draft_prob"], beta, options.eta)
        out: list[tuple[str, dict[str, Any]]] = []
        for number, theta in enumerate(options.thetas):
            chosen = offline_truncation(
                step["tail_deviation"] / bound[:, None], step.axes.truncation_sizes, theta
            )
            settings = {
                "num_entries": chosen.num_entries,
                "tolerance": theta,
                "tolerance_met": chosen.feasible,
            }
            out.append((f"@theta-{theta:g}" if number else "", settings))
        if options.draft_from_sent:
            out.append(("@draft-from-sent", out[0][1] | {"draft_from_sent": True}))
        return out

    def size(self, step: Step) -> int:
        """k, at most V."""
        return min(self.num_entries, step.axes.vocab_size)

    def entries(self, step: Step, skip: Skip) -> Array:
        """k, or fewer where x has fewer."""
        return array_namespace(skip.zeros).clip(
            skip.zeros + support_size(step), None, float(self.size(step))
        )

    def draft(self, step: LawStep) -> Array:
        """From x, or from what is sent."""
        law = self.rule.reference_law(step.x, self.size(step)) if self.draft_from_sent else step.x
        return sample_inverse_cdf(law, step.noise.draft)

    def as_drafted(self, step: Step) -> Step:
        """The sent law in the place of x; recorded, only if its k largest lie in the head.

        Beyond a recorded head all of its tail counts as rejected: the risk of skipping everything
        is bounded from above.
        """
        kind = "candidate_prob" if step.has_laws else "head_prob"
        x, k, vocab_size = step[kind], self.size(step), step.axes.vocab_size
        num = x.shape[-1]
        if not self.draft_from_sent or (k >= num and not step.has_laws):
            return step
        xp = array_namespace(x)
        if isinstance(step, LawStep):
            law = self.rule.reference_law(step.x, k)
            sent = xp.take_along_axis(law, step["candidate_token"], axis=-1)
            draft_prob = step.at(law, step["draft_token"])
            distance = total_variation(law, step.y)
        else:
            level = tail_level(xp.sum(x[:, :k], axis=-1), k, vocab_size)
            sent = xp.where(xp.arange(num) < k, x, level[:, None])
            rank = step["draft_rank"]
            draft_prob = xp.where((rank >= 0) & (rank < k), step["draft_prob"], level)
            excess = xp.clip(sent - step["head_target_prob"], 0.0, None)
            distance = xp.sum(excess, axis=-1) + (vocab_size - num) * level
        return step.with_columns(
            {
                kind: sent,
                "draft_prob": draft_prob,
                "rejection_prob": rejection_probability(draft_prob, step["target_prob"]),
                "tv_distance": distance,
            }
        )
