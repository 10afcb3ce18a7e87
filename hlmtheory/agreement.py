"""Two measurements of one quantity: rejection of drafts, and total variation of the laws."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

ROUNDING = 1e-5
"""What single precision may add to the mean of beta - TV, times ten."""

_RATES = np.outer((1.0, -1.0), 2.0 ** -np.arange(13)).ravel()


def disagreement_log_e_value(
    rejection_prob: np.ndarray, tv_distance: np.ndarray, rounding: float = ROUNDING
) -> float:
    r"""Evidence that drafts were not drawn from the law that was recorded, or beta is not theirs.

    A draft d drawn from x has :math:`E[\beta_d] = TV(x, y)` in every context, (3), so the
    differences :math:`D_t = \beta_t - TV_t` are a martingale's, whatever depends on what within an
    answer and however few prompts there are. They are at most 1, and their conditional variance is
    at most :math:`v_t = TV_t (1 - TV_t)`, so by Bennett each term of

    .. math:: E = \frac{1}{26} \sum_{\lambda = \pm 2^{-j},\, j \le 12}
        \exp\Big(\lambda S - |\lambda| \epsilon N - (e^{|\lambda|} - 1 - |\lambda|)
        \sum_t v_t\Big), \qquad S = \sum_t D_t,

    has mean at most 1: P(E >= 1/p) <= p exactly, not in the limit. docs/theory.md, (49).

    Parameters
    ----------
    rejection_prob, tv_distance : array (N,)
        beta of each draft, and the total variation of the two laws of its context, in [0, 1].
    rounding : float
        epsilon: how far rounding may move the mean of D.

    Returns
    -------
    float
        log E; minus infinity is never reached, 0 with no tokens.
    """
    tv = np.asarray(tv_distance, dtype=float)
    total = float(np.sum(np.asarray(rejection_prob, dtype=float) - tv))
    variance = float(np.sum(tv * (1.0 - tv)))
    size = np.abs(_RATES)
    growth = np.expm1(size) - size
    exponents = _RATES * total - size * rounding * tv.size - growth * variance
    return float(logsumexp(exponents) - np.log(len(_RATES)))
