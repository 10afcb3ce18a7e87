r"""Whether an answer differs from the server's, where both draw with the same random numbers.

Lossless decoding and a gate with accept/resample read the same drafts and the same coins. They part
at the first draft that the gate skips and the server would have rejected, and not before: so the
share of answers that differ is a figure of the *lossless* trace alone, with no shift of contexts.
docs/theory.md, (52).
"""

from __future__ import annotations

from array_api_compat import array_namespace

from hlmtheory.domain import Array


def parting_probability(
    risk: Array, tv_distance: Array, output_prob: Array, output_target_prob: Array
) -> Array:
    r"""P(the token was resampled and its draft would have been skipped | context, token).

    .. math:: q(s, o) = \Big(1 - \frac{x_o}{y_o}\Big)_+ \frac{\rho(s)}{\mathrm{TV}(x, y)}

    Given the answer the tokens part independently of one another, so it differs with probability
    1 - prod_t (1 - q_t), which rises with the risk. docs/theory.md, (52).

    Parameters
    ----------
    risk : array (..., G)
        rho of a gate at each of G thresholds.
    tv_distance, output_prob, output_target_prob : array (...)
        TV(x, y), and x and y of the token that lossless decoding emitted.

    Returns
    -------
    array (..., G)
        In [0, 1].
    """
    xp = array_namespace(risk, tv_distance)
    above = output_target_prob > output_prob
    one = xp.ones_like(output_prob)
    resampled = xp.where(
        above, one - output_prob / xp.where(above, output_target_prob, one), 0 * one
    )
    apart = tv_distance > 0
    weight = xp.where(apart, resampled / xp.where(apart, tv_distance, one), 0 * one)
    return xp.clip(risk * weight[..., None], 0.0, 1.0)
