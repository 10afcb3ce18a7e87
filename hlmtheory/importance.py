"""Importance of a context from the attention behind its draft, and attention collapse.

Assumption, all of this room: UI-HLM (arXiv 2508.12590) says publicly that importance comes from
attention, that its threshold adapts to the attention distribution of each step, and that two
parameters k and gamma set the strictness. The formulas are ours: docs/theory.md, (31), (32).

The attention row A_t is that of the query which produces the draft (the newest position of the
context), mean over heads and layers, so importance is known before anything is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_nonnegative
from hlmtheory.order import largest


def attention_sink(attention: Array) -> Array:
    """Attention mass on position 0, the sink, of rows (..., n)."""
    check_nonnegative(attention, "attention")
    return attention[..., 0]


def normalised_attention(attention: Array, mask: Array) -> Array:
    """Attention rows without the sink and without empty positions, summing to one.

    Parameters
    ----------
    attention : array (..., n)
        Non-negative weights.
    mask : bool array (..., n)
        Positions that hold a token.

    Returns
    -------
    array (..., n)
        Position 0 is zero. A row that attends to its sink alone becomes zero throughout.
    """
    check_nonnegative(attention, "attention")
    xp = array_namespace(attention)
    index = xp.cumulative_sum(xp.astype(mask, xp.int64), axis=-1)
    kept = mask & (index > 1)
    weights = xp.where(kept, attention, xp.zeros_like(attention))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))


def attention_entropy(row: Array) -> Array:
    r"""H(A) = -sum_j A_j ln A_j in nats, of normalised rows (..., n).

    exp(H) is the effective number of attended tokens; a uniform row over m tokens has H = ln m.
    """
    check_nonnegative(row, "row")
    xp = array_namespace(row)
    positive = row > 0
    return -xp.sum(row * xp.log(xp.where(positive, row, xp.ones_like(row))), axis=-1)


def participation_ratio(row: Array) -> Array:
    """1 / sum_j A_j^2 of normalised rows (..., n): attended tokens, less tail-heavy than exp(H)."""
    check_nonnegative(row, "row")
    xp = array_namespace(row)
    square = xp.sum(row * row, axis=-1)
    return xp.where(square > 0, 1.0 / xp.where(square > 0, square, xp.ones_like(square)), square)


def context_attention(attention: Array, mask: Array) -> Array:
    r"""Attention mass on other tokens, 1 - self - sink.

    docs/theory.md, (32). The query's own position is the last one of the row.

    Parameters
    ----------
    attention : array (..., n)
        Rows that sum to one over `mask`.
    mask : bool array (..., n)
    """
    check_nonnegative(attention, "attention")
    xp = array_namespace(attention)
    total = xp.sum(xp.where(mask, attention, xp.zeros_like(attention)), axis=-1)
    return xp.clip(total - attention[..., 0] - attention[..., -1], 0.0, None)


def topk_attention(row: Array, k: int) -> Array:
    r"""Mean of the k largest weights of a normalised row, the `topk` importance.

    docs/theory.md, (31). Rows shorter than k count their missing weights as zero. Assumption: ours.

    Parameters
    ----------
    row : array (..., n)
    k : int
        >= 1.
    """
    if k < 1:
        raise ValueError(f"k = {k}: allowed is >= 1")
    xp = array_namespace(row)
    values, _ = largest(row, min(k, row.shape[-1]))
    return xp.sum(values, axis=-1) / k


def topk_importance_threshold(entropy: Array, gamma: float) -> Array:
    r"""Threshold of the `topk` importance.

    .. math:: I_{th} = \gamma\, e^{-H(A_t)}

    docs/theory.md, (31). A uniform row has I_t = e^{-H} exactly, so gamma = 1 separates rows more
    focused than uniform over their effective number of tokens. Assumption: ours.

    Parameters
    ----------
    entropy : array (...)
        H(A_t) in nats.
    gamma : float
        >= 0; 0 calls every context important.
    """
    check_nonnegative(gamma, "gamma")
    xp = array_namespace(entropy)
    return gamma * xp.exp(-entropy)


@dataclass(frozen=True)
class RunningThreshold:
    r"""Running mean and variance of an importance, with exponential memory.

    .. math:: I_{th} = m_t + k s_t, \quad m_t = \gamma m_{t-1} + (1-\gamma) I_t

    and s_t^2 updated the same way; docs/theory.md, (32). The threshold of a step uses the steps
    before it; at the first step every context is important. Assumption: ours.

    Attributes
    ----------
    mean, variance : array (B,)
    """

    mean: Array
    variance: Array

    @classmethod
    def start(cls, importance: Array) -> RunningThreshold:
        """State after the first step."""
        return cls(importance, 0 * importance)

    def threshold(self, k: float) -> Array:
        """I_th of the next step."""
        return self.mean + k * self.variance**0.5

    def update(self, importance: Array, gamma: float) -> RunningThreshold:
        """State after one more step."""
        deviation = importance - self.mean
        mean = self.mean + (1.0 - gamma) * deviation
        variance = gamma * (self.variance + (1.0 - gamma) * deviation**2)
        return RunningThreshold(mean, variance)
