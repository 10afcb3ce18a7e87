r"""Whole answers: how far a policy's law of answers lies from the server's.

Both laws are products of next-token laws, P of the policy and y of the server, so along an answer
o the ratio of the two is

.. math:: W_t = \prod_{s \le t} \frac{P(o_s \mid o_{<s})}{y(o_s \mid o_{<s})}, \qquad
          \mathrm{TV}(P_t, Y_t) = E_Y[(1 - W_t)_+] = E_P[(1 - 1/W_t)_+]

with P_t, Y_t the laws of the first t tokens, and an answer that ends before t as it is:
docs/theory.md, (46). The integrand is bounded, whatever the tails of W. One answer a prompt is one
draw, so means over prompts are of independent terms.
"""

from __future__ import annotations

import numpy as np

from hlmtheory.clusters import answer_rows


def log_weights(
    log_ratio: np.ndarray, prompt_index: np.ndarray, num_prompts: int, num_steps: int | None = None
) -> np.ndarray:
    """ln W_t of every answer after each of its tokens, (P, T); from its end on it stays.

    Parameters
    ----------
    log_ratio : float array (N,)
        ln of the policy's law over y at each output; of y over the policy's, where the answers are
        the policy's own. Minus infinity where the other law never emits it; NaN where unknown.
    prompt_index : int array (N,)
        Tokens of one answer stand together, in their order.
    num_prompts : int
        P.
    num_steps : int, optional
        T, the longest answer unless given; longer ones are cut.

    Raises
    ------
    ValueError
        If the tokens of an answer do not stand together.
    """
    starts, lengths = answer_rows(prompt_index)
    if len(np.unique(prompt_index[starts])) < len(starts):
        raise ValueError("prompt_index returns to a prompt: tokens of one answer stand together")
    step = np.arange(len(prompt_index)) - np.repeat(starts, lengths)
    longest = int(lengths.max(initial=0))
    num_steps = longest if num_steps is None else num_steps
    steps = np.zeros((num_prompts, max(num_steps, longest)))
    steps[prompt_index, step] = log_ratio
    with np.errstate(invalid="ignore"):  # of opposite infinities, as no answer of y's or P's has
        return np.asarray(np.cumsum(steps, axis=1)[:, :num_steps])


def answer_divergence(log_weight: np.ndarray) -> np.ndarray:
    r"""(1 - W)+ of each answer, in [0, 1]: its mean over answers is TV; docs/theory.md, (46)."""
    return np.asarray(-np.expm1(np.minimum(log_weight, 0.0)))


def tokens_in_agreement(
    log_ratio: np.ndarray, prompt_index: np.ndarray, num_prompts: int
) -> np.ndarray:
    r"""Expected tokens before policy and server first differ, of each answer (P,).

    .. math:: \sum_t \prod_{s \le t} \min\Big(1, \frac{P(o_s)}{y(o_s)}\Big)

    over the answer's own tokens. Its mean over answers of either law is the expected length of the
    common beginning of two answers, drawn so that at each step they agree as often as two draws of
    these laws can, as `hlm` and a policy with full verification do under common random numbers.
    docs/theory.md, (47).
    """
    kept = log_weights(np.minimum(log_ratio, 0.0), prompt_index, num_prompts)
    step = np.arange(kept.shape[1])
    lengths = np.bincount(prompt_index, minlength=num_prompts)
    return np.asarray(np.where(step < lengths[:, None], np.exp(kept), 0.0).sum(axis=1))
