"""Importance of a context from the attention behind its draft.

Assumption, all of this room: UI-HLM (arXiv 2508.12590) says publicly that importance comes from
attention, that its threshold adapts to the attention distribution of each step, and that two
parameters k and gamma set the strictness. The formulas are ours: docs/theory.md, (31), (32).

The attention row A_t is that of the query which produces the draft (the newest position of the
context), mean over heads and layers. So importance depends on the context alone: it is known before
the draft is drawn and before anything is sent.

`attention` has shape (..., n), weights >= 0, and a bool `mask` of the same shape says which
positions hold a token, so that rows of a batch may be padded anywhere. The sink is the first such
position, the query's own position the last. A `row` is :func:`normalised_attention`. Results have
shape (...) unless said otherwise; a negative or infinite weight raises ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_nonnegative, check_unit_interval
from hlmtheory.order import largest


def _rank_from_first(mask: Array) -> Array:
    """1 at the first position that holds a token, 2 at the second, and so on."""
    xp = array_namespace(mask)
    return xp.cumulative_sum(xp.astype(mask, xp.int64), axis=-1)


def _kept_sum(weights: Array, kept: Array) -> Array:
    xp = array_namespace(weights)
    return xp.sum(xp.where(kept, weights, xp.zeros_like(weights)), axis=-1)


def attention_sink(attention: Array, mask: Array | None = None) -> Array:
    """Attention mass on the sink; without a mask that is position 0."""
    check_nonnegative(attention, "attention")
    if mask is None:
        return attention[..., 0]
    return _kept_sum(attention, mask & (_rank_from_first(mask) == 1))


def normalised_attention(attention: Array, mask: Array) -> Array:
    """Rows (..., n) without the sink and without empty positions, summing to one.

    A row that attends to its sink alone becomes zero throughout.

    Assumption: the sink carries no content, so what is left is compared among itself.
    """
    check_nonnegative(attention, "attention")
    xp = array_namespace(attention)
    kept = mask & (_rank_from_first(mask) > 1)
    weights = xp.where(kept, attention, xp.zeros_like(attention))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))


def attention_entropy(row: Array) -> Array:
    r"""H(A) = -sum_j A_j ln A_j in nats.

    exp(H) is the effective number of attended tokens; a uniform row over m tokens has H = ln m.
    """
    check_nonnegative(row, "row")
    xp = array_namespace(row)
    positive = row > 0
    return -xp.sum(row * xp.log(xp.where(positive, row, xp.ones_like(row))), axis=-1)


def normalised_entropy(entropy: Array, num_positions: Array) -> Array:
    r"""H(A_t)/ln n, the entropy as a share of the largest that n positions allow.

    `num_positions` (...), integer, leaves out the sink where the row does. In [0, 1]: 0 on one
    token, 1 uniform. NaN where n < 2, for one position is both.
    """
    check_nonnegative(entropy, "entropy")
    xp = array_namespace(entropy)
    wide = num_positions >= 2
    count = xp.astype(xp.where(wide, num_positions, xp.full_like(num_positions, 2)), entropy.dtype)
    return xp.where(wide, entropy / xp.log(count), xp.full_like(entropy, float("nan")))


def context_attention(attention: Array, mask: Array) -> Array:
    r"""The `context` importance, 1 - self - sink: attention mass on other tokens.

    docs/theory.md, (32), for rows that sum to one over `mask`; 0 for a context of one or two
    tokens. Assumption: ours.
    """
    check_nonnegative(attention, "attention")
    rank = _rank_from_first(mask)
    return _kept_sum(attention, mask & (rank > 1) & (rank < rank[..., -1:]))


def topk_attention(row: Array, k: int) -> Array:
    r"""The `topk` importance: mean of the k >= 1 largest weights, in [0, 1/k].

    docs/theory.md, (31). Rows shorter than k count their missing weights as zero; a uniform row
    over n >= k tokens has 1/n. Assumption: ours.
    """
    if k < 1:
        raise ValueError(f"k = {k}: allowed is >= 1")
    check_nonnegative(row, "row")
    xp = array_namespace(row)
    values, _ = largest(row, min(k, row.shape[-1]))
    return xp.sum(values, axis=-1) / k


def topk_importance_threshold(entropy: Array, gamma: float) -> Array:
    r"""Threshold of the `topk` importance, from H(A_t) in nats and gamma >= 0.

    .. math:: I_{th} = \gamma\, e^{-H(A_t)}, \qquad \text{important when } I_t \ge I_{th}

    docs/theory.md, (31). A uniform row over at least k tokens has I_t = e^{-H}, so gamma = 1 puts
    it on the threshold. The rule compares gamma with (mean of the top k) x (effective number of
    tokens): a row focused on m < k tokens reaches only m/k, so for k > 1 it is the *too focused*
    rows that fall below, and gamma > 1 asks diffuse rows to stand out too. With k = 1 every row
    passes for gamma <= 1, since no largest weight lies below e^{-H}. Assumption: ours.
    """
    check_nonnegative(gamma, "gamma")
    xp = array_namespace(entropy)
    return gamma * xp.exp(-entropy)


@dataclass(frozen=True)
class RunningThreshold:
    r"""Running mean and variance of an importance, with exponential memory.

    .. math:: I_{th} = m_t + k s_t, \quad m_t = \gamma m_{t-1} + (1-\gamma) I_t, \quad
              s_t^2 = \gamma\big(s_{t-1}^2 + (1-\gamma)(I_t - m_{t-1})^2\big)

    docs/theory.md, (32): exactly the mean and variance of the past under weights that fall by gamma
    a step, (B,) each for a batch. The threshold of a step uses the steps before it; at the first
    step there are none, and every context is important. Assumption: ours.
    """

    mean: Array
    variance: Array

    def __post_init__(self) -> None:
        check_nonnegative(self.variance, "variance")

    @classmethod
    def start(cls, importance: Array) -> RunningThreshold:
        """State after the first step."""
        return cls(importance, 0 * importance)

    def threshold(self, k: float) -> Array:
        """I_th of the next step; k may be negative, which is more lenient than the mean."""
        return self.mean + k * self.variance**0.5

    def update(self, importance: Array, gamma: float) -> RunningThreshold:
        """State after one more step; gamma in [0, 1], 0 forgets at once and 1 never learns."""
        check_unit_interval(gamma, "gamma")
        deviation = importance - self.mean
        mean = self.mean + (1.0 - gamma) * deviation
        variance = gamma * (self.variance + (1.0 - gamma) * deviation**2)
        return RunningThreshold(mean, variance)
