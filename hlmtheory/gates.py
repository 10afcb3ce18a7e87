"""Gates: which drafts the device emits without asking the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from array_api_compat import array_namespace, device

from hlmtheory.domain import Array, check_unit_interval

Statistic = Literal["exact", "sampled"]

SAMPLED_SLACK = 1e-6


class Gate(Protocol):
    """A rule sigma(s, d) in [0, 1]: the probability that draft d is emitted unverified in s.

    Two views of one rule: :meth:`skip` decides on a drawn token, :meth:`skip_probability` gives
    sigma for any tokens of the vocabulary. E[skip | s, d] = sigma(s, d).
    """

    @property
    def needs_importance(self) -> bool:
        """Whether the gate looks at attention."""
        ...

    def skip(self, uncertainty: Array, sampled: Array, important: Array | None) -> Array:
        """Bool array (...): whether to skip drafts with these exact and sampled uncertainties."""
        ...

    def skip_probability(self, probabilities: Array, important: Array | None) -> Array:
        """Array (..., M): sigma of tokens with perturbed probabilities (..., M, K)."""
        ...

    def max_skip_set_size(self, vocab_size: int) -> int:
        """Largest number of tokens with sigma > 0 in one context, apart from rounding."""
        ...


@dataclass(frozen=True)
class NeverSkip:
    """sigma = 0: HLM itself, every draft is verified."""

    needs_importance: bool = False

    def skip(self, uncertainty: Array, sampled: Array, important: Array | None) -> Array:
        """No draft is skipped."""
        return uncertainty < -1

    def skip_probability(self, probabilities: Array, important: Array | None) -> Array:
        """Zeros."""
        return 0 * probabilities[..., 0]

    def max_skip_set_size(self, vocab_size: int) -> int:
        """No token."""
        return 0


@dataclass(frozen=True)
class AlwaysSkip:
    """sigma = 1: the device model alone."""

    needs_importance: bool = False

    def skip(self, uncertainty: Array, sampled: Array, important: Array | None) -> Array:
        """Every draft is skipped."""
        return uncertainty > -1

    def skip_probability(self, probabilities: Array, important: Array | None) -> Array:
        """Ones."""
        return 0 * probabilities[..., 0] + 1

    def max_skip_set_size(self, vocab_size: int) -> int:
        """Every token."""
        return vocab_size


@dataclass(frozen=True)
class UncertaintyGate:
    r"""Skip a draft whose uncertainty is at most a threshold.

    .. math:: \sigma(s, d) = 1\{u(s, d) \le u_{th}\}

    and with sampled uncertainty sigma = P(u_K <= u_th | s, d), a Poisson-binomial probability.

    With exact u the tokens of one context that would be skipped number at most
    floor(1/(1 - u_th)), because the perturbed probabilities sum to one over the vocabulary
    (docs/theory.md, (24)).

    Attributes
    ----------
    threshold : float
        u_th in [0, 1].
    statistic : {"exact", "sampled"}
        Which uncertainty decides.

    Source: U-HLM (arXiv 2412.12687); exact form docs/theory.md, (5).
    """

    threshold: float
    statistic: Statistic = "exact"
    needs_importance: bool = False

    def __post_init__(self) -> None:
        check_unit_interval(float(self.threshold), "threshold")
        if self.statistic not in ("exact", "sampled"):
            raise ValueError(f"statistic = {self.statistic!r}: allowed are 'exact', 'sampled'")

    def skip(self, uncertainty: Array, sampled: Array, important: Array | None) -> Array:
        """Compare the chosen statistic with the threshold."""
        chosen = uncertainty if self.statistic == "exact" else sampled
        # u_K is a multiple of 1/K in floating point: 3/20 must count as at most 0.15.
        return chosen <= self.threshold + (SAMPLED_SLACK if self.statistic == "sampled" else 0.0)

    def skip_probability(self, probabilities: Array, important: Array | None) -> Array:
        """Indicator for the exact statistic, Poisson-binomial probability for the sampled one."""
        xp = array_namespace(probabilities)
        if self.statistic == "exact":
            uncertainty = 1.0 - xp.mean(probabilities, axis=-1)
            return xp.astype(uncertainty <= self.threshold, probabilities.dtype)
        num = probabilities.shape[-1]
        most_misses = int((self.threshold + SAMPLED_SLACK) * num)
        return poisson_binomial_cdf(1.0 - probabilities, most_misses)

    def max_skip_set_size(self, vocab_size: int) -> int:
        """floor(1/(1 - u_th)) for exact u; the same order for sampled u, see the class notes."""
        if self.statistic == "sampled":
            # A token outside the top 256 has p_k <= 1/256 at every temperature: with K = 20 its
            # skip probability is below 1e-9 for every threshold up to 0.7.
            return min(vocab_size, max(256, 4 * skip_set_bound(self.threshold, vocab_size)))
        return skip_set_bound(self.threshold, vocab_size)


@dataclass(frozen=True)
class UncertaintyImportanceGate:
    r"""Send only tokens that are both uncertain and important.

    .. math:: \sigma(s, d) = 1 - 1\{u(s, d) > u_{th}\}\, 1\{I(s) \ge I_{th}(s)\}

    An unimportant context skips whatever is drawn, so its skip set is the whole vocabulary.

    Attributes
    ----------
    threshold : float
        u_th in [0, 1].

    Source: UI-HLM (arXiv 2508.12590) for the conjunction. Assumption: the importance itself is
    ours (hlmtheory.importance), the paper's formula is not public to us.
    """

    threshold: float
    needs_importance: bool = True

    def __post_init__(self) -> None:
        check_unit_interval(float(self.threshold), "threshold")

    def skip(self, uncertainty: Array, sampled: Array, important: Array | None) -> Array:
        """Skip unless uncertain and important."""
        if important is None:
            raise ValueError("important is None: this gate needs the importance of each context")
        return (uncertainty <= self.threshold) | ~important

    def skip_probability(self, probabilities: Array, important: Array | None) -> Array:
        """One everywhere in an unimportant context, else the uncertainty indicator."""
        if important is None:
            raise ValueError("important is None: this gate needs the importance of each context")
        xp = array_namespace(probabilities)
        uncertainty = 1.0 - xp.mean(probabilities, axis=-1)
        skipped = (uncertainty <= self.threshold) | ~important[..., None]
        return xp.astype(skipped, probabilities.dtype)

    def max_skip_set_size(self, vocab_size: int) -> int:
        """floor(1/(1 - u_th)) in an important context; an unimportant one skips everything."""
        return skip_set_bound(self.threshold, vocab_size)


AnyGate: TypeAlias = NeverSkip | AlwaysSkip | UncertaintyGate | UncertaintyImportanceGate


def skip_set_bound(threshold: float, vocab_size: int) -> int:
    r"""Largest possible number of tokens with exact uncertainty at most u_th in one context.

    .. math:: |S| \le \min(V, \lfloor 1/(1 - u_{th}) \rfloor)

    docs/theory.md, (24): each token of S has mean perturbed probability at least 1 - u_th, and
    these means sum to one.
    """
    check_unit_interval(float(threshold), "threshold")
    if threshold >= 1:
        return vocab_size
    return min(vocab_size, int(1.0 / (1.0 - threshold) + 1e-9))


def poisson_binomial_cdf(probabilities: Array, most: int) -> Array:
    r"""P(at most `most` successes) of independent Bernoulli(p_k), over the last axis.

    Parameters
    ----------
    probabilities : array (..., K)
        Success probabilities.
    most : int
        Largest number of successes counted.

    Returns
    -------
    array (...)
        By the recursion over k on the law of the running count, O(K most).
    """
    xp = array_namespace(probabilities)
    num = probabilities.shape[-1]
    shape = tuple(probabilities.shape[:-1])
    if most < 0:
        return xp.zeros(shape, dtype=probabilities.dtype, device=device(probabilities))
    if most >= num:
        return xp.ones(shape, dtype=probabilities.dtype, device=device(probabilities))
    zero = xp.zeros(shape, dtype=probabilities.dtype, device=device(probabilities))
    law = [zero + 1] + [zero] * most
    for k in range(num):
        p = probabilities[..., k]
        law = [law[0] * (1 - p)] + [law[i] * (1 - p) + law[i - 1] * p for i in range(1, most + 1)]
    total = law[0]
    for term in law[1:]:
        total = total + term
    return xp.clip(total, 0.0, 1.0)
