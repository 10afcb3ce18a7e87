"""Verification rules: what a sent draft carries, and what the server does with it.

Every rule is three array functions: the law it verifies against (`reference_law`), the acceptance
probability of a draft, and the weights it resamples from. The engine draws from them; the exact
output law of a whole policy at one step (`output_law`) is built from the very same three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from hlmtheory.acceptance import rejection_probability, total_variation
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_same_shape,
    check_unit_interval,
)
from hlmtheory.head import tail_level
from hlmtheory.truncation import truncated_distribution


@dataclass(frozen=True)
class FullDistribution:
    """Accept/resample against the whole of x: HLM's and U-HLM's rule, lossless when nothing skips.

    docs/theory.md, (1), (2), (12).
    """

    drafts_from_sent: ClassVar[bool] = False

    def reference_law(self, x: Array, size: Array | int | None) -> Array:
        """The law the server verifies against: x itself."""
        return x

    def reference_of(self, sent: Array) -> Array:
        """The same law from the probabilities that were sent, (..., V), 0 where none was."""
        return sent

    def acceptance(self, draft_prob: Array, target_prob: Array) -> Array:
        """min(1, y_d / x_d)."""
        return 1.0 - rejection_probability(draft_prob, target_prob)

    def resample_weights(self, reference: Array, y: Array, skipped: Array) -> Array:
        """max(y - x, 0), not normalised; `skipped` is sigma x."""
        return array_namespace(y).clip(y - reference, 0.0, None)


@dataclass(frozen=True)
class TruncatedDistribution(FullDistribution):
    """Draft from x, verify against the top-k truncation of x with uniform tail.

    docs/theory.md, (17), (21); CU-HLM (arXiv 2505.11788). k = V recovers the full rule.
    """

    def reference_law(self, x: Array, size: Array | int | None) -> Array:
        """The truncated law, `size` entries of each row."""
        if size is None:
            raise ValueError("size is None: a truncating rule needs the number of entries sent")
        return truncated_distribution(x, size)

    def reference_of(self, sent: Array) -> Array:
        """What is sent, and its uniform tail."""
        xp = array_namespace(sent)
        inside = sent > 0
        num = xp.sum(xp.astype(inside, sent.dtype), axis=-1)
        level = tail_level(xp.sum(sent, axis=-1), num, sent.shape[-1])
        return xp.where(inside, sent, level[..., None])


@dataclass(frozen=True)
class DraftFromSent(TruncatedDistribution):
    """Draft from the truncated law too: no bias for any k, more rejections.

    docs/theory.md, (23).
    """

    drafts_from_sent: ClassVar[bool] = True


def output_law(
    rule: FullDistribution, x: Array, y: Array, skip_probability: Array, size: Array | None = None
) -> Array:
    r"""Exact law of the emitted token at one step, for any gate and rule.

    .. math:: P_v = \sigma_v q_v + (1-\sigma_v) q_v A_v
              + \Big(\sum_j (1-\sigma_j) q_j (1 - A_j)\Big) r_v

    with q the law drafts come from (x, or the sent law), A the acceptance probability of each
    draft and r the normalised resampling law. docs/theory.md, (12), (21), (23), (24), (25).

    Parameters
    ----------
    rule : verification rule
    x, y : array (..., V)
        Device and server distributions.
    skip_probability : array (..., V)
        sigma of every token, in [0, 1].
    size : int or integer array (...), optional
        k of a truncating rule.

    Returns
    -------
    array (..., V)
        The output distribution.

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or sigma leaves [0, 1].
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_same_shape(x, skip_probability, "x", "skip_probability")
    check_unit_interval(skip_probability, "skip_probability")
    xp = array_namespace(x, y)
    reference = rule.reference_law(x, size)
    draft = reference if rule.drafts_from_sent else x
    skipped = skip_probability * draft
    sent = draft - skipped
    accepted = sent * rule.acceptance(reference, y)
    resampled = xp.sum(sent, axis=-1, keepdims=True) - xp.sum(accepted, axis=-1, keepdims=True)
    weights = rule.resample_weights(reference, y, skipped)
    mass = xp.sum(weights, axis=-1, keepdims=True)
    empty = mass <= 0
    # An empty residual is only ever reached with probability zero; y is its limit.
    law = xp.where(empty, y, weights / xp.where(empty, xp.ones_like(mass), mass))
    return skipped + accepted + resampled * law


def output_bias(
    rule: FullDistribution, x: Array, y: Array, skip_probability: Array, size: Array | None = None
) -> Array:
    """TV(output law, y) of one step: the exact price of a policy; see :func:`output_law`."""
    return total_variation(output_law(rule, x, y, skip_probability, size), y)


def bias_lower_bound(x: Array, y: Array, skip_probability: Array) -> Array:
    r"""Least TV to y of any scheme with this gate.

    .. math:: \rho_{min}(s) = \sum_v \max(\sigma_v x_v - y_v, 0)

    docs/theory.md, (13): every scheme that draws its drafts from x emits v with probability at
    least sigma_v x_v. For a gate
    with sigma in {0, 1} it equals the rejection risk (11), sum_v sigma_v max(x_v - y_v, 0).

    Parameters
    ----------
    x, y : array (..., V)
    skip_probability : array (..., V)

    Returns
    -------
    array (...)
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_same_shape(x, skip_probability, "x", "skip_probability")
    check_unit_interval(skip_probability, "skip_probability")
    xp = array_namespace(x, y)
    return xp.sum(xp.clip(skip_probability * x - y, 0.0, None), axis=-1)
