"""Answers that part from the server's, against enumeration of every path of drafts and coins."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from toy_models import softmax

from hlmtheory.acceptance import residual_distribution
from hlmtheory.divergence import parting_probability

VOCAB, LENGTH = 4, 4


def chain(rng):
    """x and y after each token (V, V), and a gate's sigma, sharp or not."""
    x, y = (rng.dirichlet(np.full(VOCAB, 0.7), size=VOCAB) for _ in range(2))
    sigma = rng.uniform(size=(VOCAB, VOCAB))
    return x, y, np.where(rng.uniform(size=sigma.shape) < 0.5, np.round(sigma), sigma)


@pytest.mark.parametrize("seed", range(5))
def test_share_of_answers_that_part_is_the_mean_over_the_servers_answers(seed):
    """Every path of drafts and coins of lossless decoding, with the event itself; to 1e-12."""
    x, y, sigma = chain(np.random.default_rng(seed))
    excess = np.clip(x - y, 0, None)
    tv, rho = excess.sum(-1), (sigma * excess).sum(-1)

    def kept_by_paths(context: int, left: int) -> float:
        """P(no skipped draft is rejected in the tokens left): drafts, coins and redraws."""
        if not left:
            return 1.0
        residual = residual_distribution(x[context], y[context])
        total = 0.0
        for draft in range(VOCAB):
            beta = excess[context, draft] / x[context, draft]
            total += x[context, draft] * (1 - beta) * kept_by_paths(draft, left - 1)
            asked = x[context, draft] * beta * (1 - sigma[context, draft])
            total += asked * sum(
                residual[token] * kept_by_paths(token, left - 1) for token in range(VOCAB) if asked
            )
        return total

    kept, apart = 0.0, 0.0
    for answer in product(range(VOCAB), repeat=LENGTH):
        context, weight, own, policy = 0, 1.0, 1.0, 1.0
        for token in answer:
            q = parting_probability(
                rho[context : context + 1, None], tv[context : context + 1],
                x[context, token : token + 1], y[context, token : token + 1],
            )[0, 0]  # fmt: skip
            weight *= y[context, token]
            own *= 1 - q
            emitted = sigma[context, token] * x[context, token]
            emitted += (1 - sigma[context, token]) * min(x[context, token], y[context, token])
            rest = ((1 - sigma[context]) * excess[context]).sum()
            emitted += rest * residual_distribution(x[context], y[context])[token]
            policy *= emitted
            context = token
        kept += weight * own
        apart += max(weight - policy, 0.0)
    assert kept == pytest.approx(kept_by_paths(0, LENGTH), abs=1e-12)
    assert apart <= 1 - kept + 1e-12  # it bounds the total variation of whole answers
    assert 0.05 < kept < 0.999


def test_nothing_parts_where_the_laws_agree():
    x = softmax(np.arange(4.0))
    rho = np.zeros((4, 1))
    q = parting_probability(rho, np.zeros(4), x, x)
    assert np.array_equal(q, np.zeros((4, 1)))
