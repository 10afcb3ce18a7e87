"""Scores: what a gate compares with its threshold. A draft is skipped when score <= threshold.

Every score is larger where rejection is likelier. Some belong to the draft (u, u_K, the learned
one), some to the context alone (entropy, margin and the like): these skip a context whole or not at
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.domain import Array
from hlmtheory.steps import (
    HEAD_SIZE,
    Skip,
    Step,
    candidates,
    no_skip,
    of_candidates,
    used_width,
    whole_skip,
)

Atoms = tuple[Array, Array, Array]
"""(score, mass, rejection), (B, J) each: pieces of a draft's probability, and mass x beta."""

SAMPLED_SLACK = 1e-6
GRID = 200
"""Steps of a grid of thresholds that is fixed beforehand."""


@dataclass(frozen=True)
class Score:
    """A named score of a draft.

    Attributes
    ----------
    name, label : str
    formula : str
        Of z, the device's logits before any temperature, and x, its law as it is sampled.
    low, high : float
        Bounds of the score; a threshold at `high` skips everything.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    formula: ClassVar[str]
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def of_draft(self, step: Step) -> Array:
        """The score of each drawn draft, (B,)."""
        raise NotImplementedError

    def skips(self, step: Step, threshold: float) -> Array:
        """Bool (B,): whether the drawn draft is skipped."""
        return self.of_draft(step) <= threshold

    def skip_probability(self, step: Step, threshold: float) -> Skip:
        """Sigma of every draft; E[skips | context] = its mass."""
        raise NotImplementedError

    def atoms(self, step: Step) -> Atoms:
        """Pieces of the draft's probability with their score, and mass x beta of each, (B, J).

        Masses of a context sum to one and rejections to at most TV(x, y), so losses made of them
        lie in [0, 1]. What lies beyond the head enters with the least score it can have: where the
        head does not decide, risk and skip rate are bounded from above.
        """
        raise NotImplementedError

    def num_candidates(self, threshold: float, vocab_size: int) -> int:
        """How many of the likeliest tokens a live step must look at."""
        return HEAD_SIZE

    def upper(self, vocab_size: int) -> float:
        """A bound of the score that no trace is needed for."""
        return self.high

    def fixed_grid(self, vocab_size: int) -> np.ndarray:
        """Thresholds that no trace was looked at for, rising from `low` to the upper bound.

        Squares of evenly spaced numbers: closer where less is skipped. docs/theory.md, (50).

        Raises
        ------
        ValueError
            If the score has no bounds.
        """
        high = self.upper(vocab_size)
        if not (np.isfinite(self.low) and np.isfinite(high)):
            raise ValueError(
                f"score {self.name} has no bounds, so its thresholds cannot be fixed beforehand: "
                "give another --score"
            )
        return np.asarray(self.low + (high - self.low) * (np.arange(GRID + 1) / GRID) ** 2)


def with_beyond(step: Step) -> tuple[Array, Array]:
    """Mass x and rejection (x - y)+ of the head's tokens, and of all beyond: (B, M + 1) each."""
    x, y, _ = candidates(step)
    xp = array_namespace(x)
    excess = xp.clip(x - y, 0.0, None)
    mass = xp.concat([x, xp.clip(1.0 - xp.sum(x, axis=-1, keepdims=True), 0.0, None)], axis=-1)
    rest = step["tv_distance"][:, None] - xp.sum(excess, axis=-1, keepdims=True)
    rejection = xp.concat([excess, xp.clip(rest, 0.0, None)], axis=-1)
    return mass, xp.minimum(rejection, mass)


@dataclass(frozen=True)
class ExactUncertainty(Score):
    r"""Exact temperature-perturbation uncertainty; docs/theory.md, (5).

    The tokens of one context with u at most u_th number at most floor(1/(1 - u_th)), because the
    perturbed probabilities sum to one over the vocabulary: docs/theory.md, (24).
    """

    name: ClassVar[str] = "uncertainty"
    label: ClassVar[str] = "uncertainty u, exact"
    formula: ClassVar[str] = (
        "1 - mean over k of softmax(z / theta_k)[draft]; at theta_k = 0 the uniform law on the "
        "largest z"
    )

    def of_draft(self, step: Step) -> Array:
        """U of the draft."""
        return step["uncertainty"]

    def skip_probability(self, step: Step, threshold: float) -> Skip:
        """Indicator of u <= u_th."""
        if threshold >= self.high:
            return whole_skip(step)
        x, u = of_candidates(step, "prob"), of_candidates(step, "uncertainty")
        xp = array_namespace(x)
        sigma = xp.astype(u <= threshold, x.dtype)
        all_of_it = x.shape[-1] == step.axes.vocab_size
        # Logits and x fall together: where x is 0 at the head's end nothing is drawn beyond it.
        undecided = (u[:, -1] <= threshold) & (x[:, -1] > 0) & (not all_of_it)
        of_draft = xp.astype(step["uncertainty"] <= threshold, x.dtype)
        return Skip(sigma[:, : used_width(sigma)], x[:, 0] < 0, undecided, of_draft)

    def atoms(self, step: Step) -> Atoms:
        """One piece a candidate; all beyond the head at the u of its last."""
        u = of_candidates(step, "uncertainty")
        xp = array_namespace(u)
        return xp.concat([u, u[:, -1:]], axis=-1), *with_beyond(step)

    def num_candidates(self, threshold: float, vocab_size: int) -> int:
        """floor(1/(1 - u_th)) and one more; no more than a head where everything is skipped."""
        if threshold >= self.high:
            return HEAD_SIZE
        return max(HEAD_SIZE, min(vocab_size, skip_set_bound(threshold, vocab_size) + 1))


def skip_set_bound(threshold: float, vocab_size: int) -> int:
    r"""Largest possible number of tokens with exact uncertainty at most u_th in one context.

    .. math:: |S| \le \min(V, \lfloor 1/(1 - u_{th}) \rfloor)

    docs/theory.md, (24): each token of S has mean perturbed probability at least 1 - u_th, and
    these means sum to one.
    """
    if threshold >= 1:
        return vocab_size
    return min(vocab_size, int(1.0 / (1.0 - max(threshold, 0.0)) + 1e-9))


@dataclass(frozen=True)
class SampledUncertainty(Score):
    r"""Uncertainty of K drawn tokens, U-HLM's own; docs/theory.md, (4).

    sigma(s, d) = P(u_K <= u_th | s, d), a Poisson-binomial probability. A draft beyond the head
    counts as u_K = 1: it is sent unless everything is skipped.
    """

    name: ClassVar[str] = "uncertainty_sampled"
    label: ClassVar[str] = "uncertainty u_K, of K draws"
    formula: ClassVar[str] = (
        "share of K tokens that are not the draft, the k-th drawn from softmax(z / theta_k)"
    )

    def of_draft(self, step: Step) -> Array:
        """u_K as drawn; 1 beyond the head."""
        return _one_beyond(step, step["uncertainty_sampled"])

    def skips(self, step: Step, threshold: float) -> Array:
        """u_K <= u_th; u_K is a multiple of 1/K in floating point: 3/20 counts as 0.15."""
        return self.of_draft(step) <= threshold + SAMPLED_SLACK

    def skip_probability(self, step: Step, threshold: float) -> Skip:
        """P(u_K <= u_th) of every token of the head, from its K perturbed probabilities."""
        if threshold >= self.high:
            return whole_skip(step)
        p, none = _perturbed(step), no_skip(step)
        most = int((threshold + SAMPLED_SLACK) * p.shape[-1])
        sigma = poisson_binomial_cdf(1.0 - p, most)
        return replace(none, candidates=array_namespace(p).astype(sigma, none.of_draft.dtype))

    def atoms(self, step: Step) -> Atoms:
        """K + 1 pieces, one for each value of u_K; all beyond the head at 1."""
        mass, rejection = with_beyond(step)
        xp = array_namespace(mass)
        p = _perturbed(step)
        p = xp.concat([p, 0 * p[:, -1:]], axis=1)  # (B, M + 1, K)
        law = xp.stack(poisson_binomial_law(1.0 - p), axis=-1)  # (B, M + 1, K + 1)
        num = p.shape[-1]
        values = xp.arange(num + 1, dtype=mass.dtype, device=device(mass)) / num
        score = xp.broadcast_to(values, (mass.shape[0], num + 1))
        return score, *(xp.sum(law * piece[..., None], axis=1) for piece in (mass, rejection))


def _perturbed(step: Step) -> Array:
    """p_k of the head, (B, M, K): live, or from x and the recorded partitions."""
    if step.has_laws:
        return step["candidate_and_draft_perturbed"][:, :-1][:, :HEAD_SIZE]
    x = step["head_prob"]
    gap = np.full_like(x, -np.inf)  # z - max z; what is never drawn counts as -inf
    drawn = x > 0
    gap[drawn] = step.axes.sampling.temperature * np.log((x / x[:, :1])[drawn])
    log_z = step["log_partitions"]
    columns = [
        (gap == 0) * np.exp(-log_z[:, k, None])
        if theta == 0
        else np.exp(gap / theta - log_z[:, k, None])
        for k, theta in enumerate(step.axes.thetas)
    ]
    return np.clip(np.stack(columns, axis=-1), 0.0, 1.0)


@dataclass(frozen=True)
class ContextScore(Score):
    """A score of the context: all of its drafts are skipped, or none."""

    def skip_probability(self, step: Step, threshold: float) -> Skip:
        """The whole vocabulary where score <= threshold."""
        return whole_skip(step, self.skips(step, threshold))

    def atoms(self, step: Step) -> Atoms:
        """One piece: the context."""
        score = self.of_draft(step)[:, None]
        return score, 0 * score + 1.0, step["tv_distance"][:, None]


@dataclass(frozen=True)
class Entropy(ContextScore):
    """Entropy of x, in nats."""

    name: ClassVar[str] = "entropy"
    label: ClassVar[str] = "entropy"
    formula: ClassVar[str] = "-sum over v of x_v ln x_v"
    high: ClassVar[float] = float("inf")

    def of_draft(self, step: Step) -> Array:
        """H(x)."""
        return step["entropy"]

    def upper(self, vocab_size: int) -> float:
        """ln V."""
        return float(np.log(vocab_size))


@dataclass(frozen=True)
class OneMinusMaxProb(ContextScore):
    """1 - max x."""

    name: ClassVar[str] = "one_minus_max_prob"
    label: ClassVar[str] = "1 − max probability"
    formula: ClassVar[str] = "1 - max x"

    def of_draft(self, step: Step) -> Array:
        """1 - x_(1)."""
        return 1.0 - step["max_prob"]


@dataclass(frozen=True)
class OneMinusMargin(ContextScore):
    """1 - (x_(1) - x_(2))."""

    name: ClassVar[str] = "one_minus_margin"
    label: ClassVar[str] = "1 − margin of the top two"
    formula: ClassVar[str] = "1 - (largest x - second largest x)"

    def of_draft(self, step: Step) -> Array:
        """One less the margin."""
        return 1.0 - step["margin"]


@dataclass(frozen=True)
class MaxLogit(ContextScore):
    """Minus the logit of the likeliest token, before any temperature."""

    name: ClassVar[str] = "max_logit"
    label: ClassVar[str] = "− largest logit"
    formula: ClassVar[str] = "-max z"
    low: ClassVar[float] = -float("inf")
    high: ClassVar[float] = float("inf")

    def of_draft(self, step: Step) -> Array:
        """-max z."""
        return -step["max_logit"]


@dataclass(frozen=True)
class LearnedScore(Score):
    r"""A fitted estimate of E[beta | what the device knows]; docs/theory.md, (15).

    .. math:: \mathrm{logistic}\Big(b + \sum_f w_f \frac{v_f - m_f}{s_f}\Big)

    of features that the device has before it sends anything. A draft beyond the head scores 1: it
    is sent unless everything is skipped.

    Attributes
    ----------
    features : tuple of str
        Columns; `uncertainty` and `draft_prob` are the draft's, the others the context's.
    mean, scale, coefficients : tuple of float
        m, s > 0 and w of each feature.
    intercept : float
    """

    name: ClassVar[str] = "learned"
    label: ClassVar[str] = "learned, logistic"
    formula: ClassVar[str] = (
        "1 / (1 + exp(-(intercept + sum over f of coefficient_f (feature_f - mean_f) / scale_f))); "
        "1 for a draft that is not among the likeliest 32 tokens"
    )

    features: tuple[str, ...] = field(default=())
    mean: tuple[float, ...] = field(default=())
    scale: tuple[float, ...] = field(default=())
    coefficients: tuple[float, ...] = field(default=())
    intercept: float = 0.0

    def __post_init__(self) -> None:
        if not self.features or not (
            len(self.features) == len(self.mean) == len(self.scale) == len(self.coefficients)
        ):
            raise ValueError("a learned score needs mean, scale and coefficient of each feature")

    def _of(self, values: Mapping[str, Array], like: Array) -> Array:
        xp = array_namespace(like)
        total = 0 * like + self.intercept
        for name, m, s, w in zip(
            self.features, self.mean, self.scale, self.coefficients, strict=True
        ):
            total = total + w * (values[name] - m) / s
        return 1.0 / (1.0 + xp.exp(-total))

    def of_draft(self, step: Step) -> Array:
        """The score of the draft; 1 beyond the head."""
        values = {name: _floating(step[name], step["draft_prob"]) for name in self.features}
        return _one_beyond(step, self._of(values, step["draft_prob"]))

    def of_head(self, step: Step) -> Array:
        """The score of every token of the head, (B, HEAD_SIZE)."""
        x, u = (of_candidates(step, name)[:, :HEAD_SIZE] for name in ("prob", "uncertainty"))
        own = {"uncertainty": u, "draft_prob": x}
        values = {
            name: own[name] if name in own else _floating(step[name], x)[:, None]
            for name in self.features
        }
        return self._of(values, x)

    def skip_probability(self, step: Step, threshold: float) -> Skip:
        """Indicator over the head; the whole vocabulary at 1."""
        if threshold >= self.high:
            return whole_skip(step)
        score = self.of_head(step)
        sigma = array_namespace(score).astype(score <= threshold, score.dtype)
        return replace(no_skip(step), candidates=sigma[:, : used_width(sigma)])

    def atoms(self, step: Step) -> Atoms:
        """One piece a token of the head; all beyond it at 1."""
        score = self.of_head(step)
        xp = array_namespace(score)
        return xp.concat([score, 0 * score[:, :1] + 1.0], axis=-1), *with_beyond(step)


def _one_beyond(step: Step, score: Array) -> Array:
    xp = array_namespace(score)
    return xp.where(step["draft_rank"] < 0, xp.ones_like(score), score)


def _floating(values: Array, like: Array) -> Array:
    return array_namespace(like).astype(values, like.dtype)


PLAIN_SCORES: tuple[Score, ...] = (
    ExactUncertainty(),
    SampledUncertainty(),
    Entropy(),
    OneMinusMaxProb(),
    OneMinusMargin(),
    MaxLogit(),
)
"""Scores that need no fit."""

SCORE_NAMES = (*(score.name for score in PLAIN_SCORES), LearnedScore.name)


def score_named(name: str, learned: Mapping[str, Any] | None = None) -> Score:
    """A score by its name.

    Parameters
    ----------
    name : str
        One of SCORE_NAMES.
    learned : mapping, optional
        Fields of :class:`LearnedScore`, for its name.

    Raises
    ------
    ValueError
        For an unknown name, or a learned score that was never fitted.
    """
    for score in PLAIN_SCORES:
        if score.name == name:
            return score
    if name != LearnedScore.name:
        raise ValueError(f"score = {name!r}: known are {', '.join(SCORE_NAMES)}")
    if learned is None:
        raise ValueError("score = 'learned': none was fitted; calibrate on at least 10 prompts")
    return LearnedScore(
        tuple(learned["features"]),
        tuple(learned["mean"]),
        tuple(learned["scale"]),
        tuple(learned["coefficients"]),
        float(learned["intercept"]),
    )


def poisson_binomial_law(probabilities: Array, most: int | None = None) -> list[Array]:
    """P(number of successes = j) for j = 0..most, (...) each.

    Parameters
    ----------
    probabilities : array (..., K)
        Success probabilities of independent trials.
    most : int, optional
        Largest count wanted; K unless given.
    """
    num = probabilities.shape[-1]
    most = num if most is None else most
    zero = 0 * probabilities[..., 0]
    law = [zero + 1.0] + [zero] * most
    for k in range(num):
        p = probabilities[..., k]
        law = [law[0] * (1 - p)] + [law[j] * (1 - p) + law[j - 1] * p for j in range(1, most + 1)]
    return law


def poisson_binomial_cdf(probabilities: Array, most: int) -> Array:
    """P(number of successes <= most) of independent trials (..., K), (...)."""
    xp = array_namespace(probabilities)
    if most >= probabilities.shape[-1]:
        return 0 * probabilities[..., 0] + 1.0
    if most < 0:
        return 0 * probabilities[..., 0]
    return xp.clip(sum(poisson_binomial_law(probabilities, most)), 0.0, 1.0)
