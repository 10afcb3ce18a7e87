r"""The answer cap: at most a share of an answer's drafts is skipped, whatever its length.

A gate under a cap kappa skips draft t, of which t - 1 came before, only while

.. math:: S_{t-1} + 1 \le \kappa\, t

with S the drafts skipped so far. Then S_t <= kappa t at every t, so an answer's loss is at most
kappa however it ends: docs/theory.md, (50). The comparison is one of whole numbers.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from hlmtheory.clusters import answer_rows
from hlmtheory.domain import Array

STEPS = 1000
"""A cap is a multiple of 1/STEPS."""


def cap_fraction(cap: float) -> Fraction:
    """The cap as a fraction of small numbers.

    Raises
    ------
    ValueError
        If it is not a multiple of 0.001 in (0, 1).
    """
    found = Fraction(cap).limit_denominator(STEPS) if math.isfinite(cap) else Fraction(0)
    if not 0 < found < 1 or abs(float(found) - cap) > 1e-12 or STEPS % found.denominator:
        raise ValueError(f"cap = {cap}: allowed is a multiple of {1 / STEPS:g} in (0, 1)")
    return found


def may_skip(num_skipped: Array, num_tokens: Array, cap: float) -> Array:
    """Whether one more of an answer's drafts may be skipped, bool (...).

    Parameters
    ----------
    num_skipped, num_tokens : int array (...)
        Drafts skipped, and tokens emitted, before this one.
    cap : float
        kappa.
    """
    kappa = cap_fraction(cap)
    return (num_skipped + 1) * kappa.denominator <= (num_tokens + 1) * kappa.numerator


def capped_skips(wanted: np.ndarray, prompt_index: np.ndarray, cap: float) -> np.ndarray:
    """Which of the wanted skips a cap lets happen along recorded answers.

    Parameters
    ----------
    wanted : bool array (N, G)
        What a gate would skip, at each of G thresholds.
    prompt_index : int array (N,)
        Not falling: the tokens of an answer follow one another.
    cap : float

    Returns
    -------
    bool array (N, G)
    """
    out = np.zeros_like(wanted)
    starts, lengths = answer_rows(prompt_index)
    count = np.zeros((len(starts), wanted.shape[1]), dtype=np.int64)
    for step in range(int(lengths.max(initial=0))):
        live = lengths > step
        rows = starts[live] + step
        out[rows] = wanted[rows] & may_skip(count[live], np.asarray(step), cap)
        count[live] += out[rows]
    return out


def suggested_cap(alpha: float, delta: float, num_prompts: int) -> float | None:
    r"""A cap chosen before looking: half the largest one that could certify the budget.

    .. math:: \kappa = \frac{n \alpha}{2 \ln(1/\delta)}

    rounded to tenths, at least 0.1, and none above 0.9. Without any loss the bet on n prompts grows
    to about :math:`e^{n\alpha/\kappa}`, and must reach 1/delta: at twice the cap nothing could be
    lost, at the cap about half of the growth can, but for the rounding. Where 0.1 is more than
    twice the formula, a small budget is not certified at all. A function of n, alpha and delta
    alone, it costs no confidence; a rule of thumb, not an optimum. docs/theory.md, (50).
    """
    tenths = round(10 * num_prompts * alpha / (2 * math.log(1 / delta)))
    return None if tenths > 9 else max(tenths, 1) / 10
