r"""The law that a token is drawn from: logits after penalty, temperature, top-k and top-p.

In the order of deployed samplers (that of transformers, whose processors the tests hold against):
the repetition penalty gives z, the logits that uncertainty is of; temperature, top-k and top-p give
the law. docs/theory.md, (45).
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace, is_torch_array

from hlmtheory.domain import Array, check_finite, check_positive
from hlmtheory.head import Head
from hlmtheory.order import put_along_last_axis

COLDEST, HOTTEST = 0.01, 10.0
"""Below, z/T loses the logits' last digits, and only 0 needs no quotient; above, it is a slip."""


@dataclass(frozen=True)
class Sampling:
    """How both models' logits become the laws x and y.

    Attributes
    ----------
    temperature : float
        T, 0 or from COLDEST to HOTTEST. At 0 the law is all on the largest logit, of equal ones
        on the lowest token id.
    top_k : int
        Keep the k largest logits, and those equal to the k-th; 0 keeps all.
    top_p : float
        Keep the likeliest tokens down to the first with which their probability reaches p, and
        those as likely as it; in (0, 1], 1 keeps all.
    repetition_penalty : float
        Of every token that the context holds, prompt included: its logit is divided by it if
        positive, multiplied if not. Above 0, 1 changes nothing.

    Raises
    ------
    ValueError
        If a value is not allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST):
            raise ValueError(
                f"temperature = {self.temperature:g}: allowed is {COLDEST:g} to {HOTTEST:g}, or 0 "
                "to take the likeliest token"
            )
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: allowed is 1 and more, or 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p:g}: allowed is above 0 and at most 1")
        check_positive(float(self.repetition_penalty), "repetition_penalty")

    @property
    def filtered(self) -> bool:
        """Whether the laws are 0 outside a few tokens."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1

    def __str__(self) -> str:
        """In words: T = 1, top-p 0.95."""
        parts = [f"T = {self.temperature:g}"]
        if self.top_k > 0:
            parts.append(f"top-k {self.top_k}")
        if self.top_p < 1:
            parts.append(f"top-p {self.top_p:g}")
        if self.repetition_penalty != 1:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        return ", ".join(parts)


PLAIN = Sampling()
"""The softmax of the logits, whole."""


def penalised_logits(logits: Array, context: Array, penalty: float) -> Array:
    r"""Logits after the repetition penalty, (B, V).

    .. math:: z_v = \begin{cases} l_v/\lambda & l_v > 0 \\ \lambda\, l_v & l_v \le 0 \end{cases}
              \quad (v \text{ in the context}), \qquad z_v = l_v \text{ elsewhere}

    Once a token, however often the context holds it.

    Parameters
    ----------
    logits : array (B, V)
    context : integer array (B, L)
        Tokens so far, prompt included; fill rows up with any of their own tokens.
    penalty : float
        lambda > 0.

    Source: Keskar et al. 2019 (CTRL), in the sign-aware form of transformers.
    """
    xp = array_namespace(logits)
    own = xp.take_along_axis(logits, context, axis=-1)
    return put_along_last_axis(logits, context, xp.where(own > 0, own / penalty, own * penalty))


def sampled_law(logits: Array, sampling: Sampling) -> Array:
    r"""The law of the next token, (B, V), in the precision of the logits.

    .. math:: p = \mathrm{softmax}(z/T), \qquad
              p^{(k)} \propto p_v\, 1\{z_v \ge z_{(k)}\}, \qquad
              x \propto p^{(k)}_v\, 1\Big\{\sum_{j:\, p_j > p_v} p^{(k)}_j < p_{top}\Big\}

    with z_(k) the k-th largest; at T = 0 the point mass on the lowest id of the largest z. For
    T > 0 the law is a rising function of z: equal logits are equally likely, kept or not together.
    So top-k and top-p may keep more than k tokens, or than the least set that reaches p, exactly
    where logits tie.

    Top-p needs no sort of the vocabulary: tokens below (1 - p)/V add up to less than 1 - p, so the
    last one kept is among the others; the likeliest always is. The penalty is applied beforehand:
    `logits` are z.

    Raises
    ------
    ValueError
        If logits holds NaN or infinity.

    Source: docs/theory.md, (45); top-p: Holtzman et al. 2020.
    """
    check_finite(logits, "logits")
    xp = array_namespace(logits)
    if sampling.temperature == 0:
        best = xp.argmax(logits, axis=-1, keepdims=True)  # the first of equals
        return put_along_last_axis(xp.zeros_like(logits), best, xp.ones_like(logits[..., :1]))
    law = _softmax(logits if sampling.temperature == 1 else logits / sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        law = _down_to(law, Head.of(Head.rows(law), sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        law = _down_to(law, _nucleus_edge(Head.rows(law), sampling.top_p))
    return law


def _softmax(scores: Array) -> Array:
    """Softmax; torch's own, in single precision, sums to 1 only within 1e-5 at V = 50,000."""
    xp = array_namespace(scores)
    if is_torch_array(scores):
        law = scores.softmax(-1)
    else:
        law = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    law /= xp.sum(law, axis=-1, keepdims=True)
    return law


def _down_to(law: Array, least: Array) -> Array:
    """The law among tokens of at least this probability, (B, 1)."""
    xp = array_namespace(law)
    least = Head.restore(least, law, (*law.shape[:-1], 1))
    kept = xp.where(law >= least, law, xp.zeros_like(law))
    kept /= xp.sum(kept, axis=-1, keepdims=True)
    return kept


def _nucleus_edge(rows: Array, top_p: float) -> Array:
    """Probability of the last token that top-p keeps, (B, 1)."""
    xp = array_namespace(rows)
    floor = (1.0 - top_p) / rows.shape[-1]
    edges = []
    for row in rows:
        # Of a uniform law no token need be above the floor, once either is rounded.
        falling = xp.sort(row[(row > floor) | (row == xp.max(row))], descending=True)
        mass = xp.astype(falling, xp.float64)
        num_kept = xp.sum(xp.astype(xp.cumulative_sum(mass) - mass < top_p, xp.int64))
        edges.append(falling[num_kept - 1])
    return xp.stack(edges)[:, None]
