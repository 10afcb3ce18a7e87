"""Mean beta against mean TV: no false alarm beyond the level, and a wrong beta is found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hlmtheory.acceptance import rejection_probability, total_variation
from hlmtheory.agreement import disagreement_log_e_value


def drafted(rng: np.random.Generator, num: int, vocab: int = 12) -> tuple[np.ndarray, ...]:
    """x, y (num, V) and a draft of each x."""
    x, y = rng.dirichlet(np.full(vocab, 0.3), size=(2, num))
    drafts = (rng.random((num, 1)) > np.cumsum(x, axis=-1)).sum(-1).clip(0, vocab - 1)
    return x, y, drafts


def beta_of(x: np.ndarray, y: np.ndarray, drafts: np.ndarray) -> np.ndarray:
    rows = np.arange(len(drafts))
    return rejection_probability(x[rows, drafts], y[rows, drafts])


def test_its_mean_is_at_most_one_in_the_worst_case() -> None:
    """beta in {0, 1} has the largest variance; contexts that follow the past as they please."""
    rng, log_e = np.random.default_rng(0), []
    for _ in range(2000):
        tv, beta, chance = [], [], 0.5
        for _ in range(40):
            tv.append(chance)
            beta.append(float(rng.random() < chance))
            chance = 0.9 if sum(beta) > sum(tv) else 0.1  # push on where it is already extreme
        log_e.append(disagreement_log_e_value(np.array(beta), np.array(tv), 0.0))
    value = np.exp(log_e)
    assert value.mean() <= 1 + 3 * value.std() / np.sqrt(len(value))
    for level in (0.05, 0.01):
        count = int((value >= 1 / level).sum())
        assert stats.binomtest(count, len(value), level, "greater").pvalue > 1e-3


def test_right_betas_pass_and_wrong_ones_are_found() -> None:
    rng = np.random.default_rng(1)
    x, y, drafts = drafted(rng, 4000)
    tv, beta = total_variation(x, y), beta_of(x, y, drafts)
    assert disagreement_log_e_value(beta, tv) < np.log(1e3)
    wrong = {
        "greedy drafts": beta_of(x, y, x.argmax(-1)),
        "laws exchanged": beta_of(y, x, drafts),
        "0.1 too high": np.clip(beta + 0.1, 0, 1),
    }
    for name, values in wrong.items():
        assert disagreement_log_e_value(values, tv) > np.log(1e6), name


@pytest.mark.parametrize(("spread", "expected"), [(False, 0.70), (True, 0.98)])
def test_how_often_a_mean_that_is_wrong_by_three_points_is_found(spread, expected) -> None:
    """9,400 tokens, mean TV 0.27, beta of 0 and 1: docs/theory.md, (49)."""
    rng, num, found = np.random.default_rng(2), 150, 0
    for _ in range(num):
        tv = rng.beta(0.4, 1.08, 9400) if spread else np.full(9400, 0.27)
        beta = (rng.random(9400) < np.clip(tv + 0.03, 0, 1)).astype(float)
        found += disagreement_log_e_value(beta, tv) >= np.log(1e6)
    assert abs(found / num - expected) < 4 * np.sqrt(expected * (1 - expected) / num)


def test_one_rate_by_hand_and_none_of_nothing() -> None:
    assert disagreement_log_e_value(np.array([]), np.array([])) == 0.0
    rates = np.concatenate([2.0 ** -np.arange(13), -(2.0 ** -np.arange(13))])
    total, variance = 0.3 - 0.25 + 0.9 - 0.5, 0.25 * 0.75 + 0.25
    terms = np.exp(rates * total - (np.exp(abs(rates)) - 1 - abs(rates)) * variance)
    found = disagreement_log_e_value(np.array([0.3, 0.9]), np.array([0.25, 0.5]), 0.0)
    assert found == pytest.approx(np.log(terms.mean()), rel=1e-12)
