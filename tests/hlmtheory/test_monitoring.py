"""The watch on a risk: no false alarm beyond its level, whatever the dependence; and it does ring.

Counts of alarms are held to the exact binomial limit at 1 in 1,000.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from hlmtheory import monitoring
from hlmtheory.monitoring import STAKES, Tally, audited_losses, window_level

DELTA, BUDGET = 0.05, 0.01


def stream(rng: np.random.Generator, risk: np.ndarray, rate: float) -> np.ndarray:
    """Losses X (N,) whose means given the past are `risk` (N,): three tokens of ten are skipped."""
    skipped = rng.random(len(risk)) < 0.3
    rejection = np.where(rng.random(len(risk)) < 0.5, 1.5, 0.5) * risk / 0.3
    rejection[rng.random(len(risk)) >= rate] = np.nan
    return audited_losses(skipped, rejection, rate)


def alarms(losses: np.ndarray, bound: float, budget: float = BUDGET) -> np.ndarray:
    """Whether the e-value has reached its level by the end, for streams (S, N)."""
    level = -np.log(DELTA)
    return np.array([np.any(Tally(bound).log_e_values(x, budget) >= level) for x in losses])


def limit(num: int) -> int:
    return int(stats.binom.ppf(0.999, num, DELTA))


def test_an_e_value_is_the_mixture_of_the_products_that_it_is_said_to_be() -> None:
    rng = np.random.default_rng(0)
    x = stream(rng, np.full(400, 0.05), 0.25)
    first = Tally(4.0).appended(x[:150])
    got = np.append(Tally(4.0).log_e_values(x[:150], BUDGET), first.log_e_values(x[150:], BUDGET))
    weights = 1 / (1 + np.abs(np.log2(STAKES)))
    weights /= weights.sum()
    for n in (1, 149, 150, 151, 400):
        stakes = STAKES / 4 / (1 + STAKES / 4 * BUDGET)  # lambda
        products = np.prod(1 + stakes[:, None] * (x[:n] - BUDGET), axis=1)
        assert got[n - 1] == pytest.approx(np.log(weights @ products), abs=1e-10)
    whole = first.appended(x[150:])
    assert whole.log_e_value(BUDGET) == pytest.approx(got[-1], abs=1e-10)
    assert (whole.num, whole.mean) == (400, pytest.approx(x.mean()))


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_2000_streams_at_the_budget_ring_no_more_often_than_promised(rate: float) -> None:
    """The mean at the budget, exactly; the same with the risk half as large rings never or rarer.

    Negative control: a t-test that is looked at every ten tokens.
    """
    rng = np.random.default_rng(1)
    at = np.array([stream(rng, np.full(2000, BUDGET), rate) for _ in range(2000)])
    assert np.sum(alarms(at, 1 / rate)) <= limit(2000)
    num = np.arange(1, 2001)
    mean, square = np.cumsum(at, 1) / num, np.cumsum(at**2, 1) / num
    t = (mean - BUDGET) / np.sqrt(np.maximum(square - mean**2, 1e-30) / num)
    naive = np.any(t[:, 199::10] >= stats.norm.ppf(1 - DELTA), axis=1)
    assert np.sum(naive) > 1.5 * limit(2000)
    below = np.array([stream(rng, np.full(2000, BUDGET / 2), rate) for _ in range(500)])
    assert np.mean(alarms(below, 1 / rate)) <= np.mean(alarms(at, 1 / rate))


def test_a_mean_that_only_never_exceeds_the_budget_is_enough() -> None:
    """Risks 0 and 2 alpha in turn: single tokens are above the budget, their mean never is.

    Negative control: stakes that follow the past, here placed on every other token, are bets too,
    but not against this null hypothesis.
    """
    rng = np.random.default_rng(2)
    risk = np.tile([0.0, 2 * BUDGET], 1500)
    losses = np.array([stream(rng, risk, 0.5) for _ in range(2000)])
    assert np.sum(alarms(losses, 2.0)) <= limit(2000)
    stakes = np.tile([0.0, 20.0], 1500)
    wealth = np.cumsum(np.log1p(stakes * (losses - BUDGET)), axis=1)
    assert np.mean(np.any(wealth >= -np.log(DELTA), axis=1)) > 0.5


def test_answers_that_cluster_ring_as_promised_only_where_answers_are_the_unit() -> None:
    """One answer in ten has ten times the budget, the others none: the population is at it.

    Tokens as the unit ring oftener: the tokens seen did exceed it, the population does not.
    """
    rng = np.random.default_rng(3)
    num, length, levels = 500, 50, 10 * BUDGET
    hit = rng.random((num, 60)) < 1 / 10
    tokens = np.array([
        np.concatenate([stream(rng, np.full(length, levels * one), 1.0) for one in row])
        for row in hit
    ])  # fmt: skip
    answers = tokens.reshape(num, 60, length).mean(-1)
    assert np.sum(alarms(answers, 1.0)) <= limit(num)
    assert np.sum(alarms(tokens, 1.0)) > 2 * limit(num)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_doubled_risk_rings_within_twice_the_time_of_who_knew_it(rate: float) -> None:
    """Betting log(1/delta)/growth, at the one best stake, is what is fastest to first order."""
    rng = np.random.default_rng(4)
    num = round(4000 / rate)
    losses = np.array([stream(rng, np.full(num, 2 * BUDGET), rate) for _ in range(100)])
    level = -np.log(DELTA)
    reached = [Tally(1 / rate).log_e_values(x, BUDGET) >= level for x in losses]
    delays = [np.argmax(one) + 1 if one.any() else np.inf for one in reached]
    eta = rate * 2.0 ** np.arange(-4, 12, 0.25)[:, None]
    sample = losses[:10].ravel()
    sample = sample[sample > 0]
    gain = np.log1p(eta * sample).sum(1) / losses[:10].size - np.log1p(eta[:, 0] * BUDGET)
    assert np.median(delays) <= 2 * level / gain.max()


def test_the_confidence_sequence_holds_the_running_mean_at_all_times() -> None:
    rng = np.random.default_rng(5)
    risk = np.where(np.arange(1500) < 300, 0.002, 0.04)
    mean = np.cumsum(risk) / np.arange(1, 1501)
    looks = np.unique(np.geomspace(20, 1500, 12).astype(int))
    misses = 0
    for _ in range(200):
        x = stream(rng, risk, 0.5)
        tally, missed, before = Tally(2.0), False, 0
        for n in looks:
            tally, before = tally.appended(x[before:n]), n
            low, high = tally.interval(1 - DELTA)
            missed |= not low <= mean[n - 1] <= high
        misses += missed
        assert 0 < low < tally.mean < high < 0.2
    assert misses <= stats.binom.ppf(0.999, 200, DELTA)


def test_the_lower_end_is_the_budget_at_which_the_e_value_is_at_its_level() -> None:
    rng = np.random.default_rng(6)
    tally = Tally(5.0).appended(stream(rng, np.full(3000, 0.05), 0.2))
    low, high = tally.interval(0.9)
    assert tally.log_e_value(low) == pytest.approx(np.log(2 / 0.1), abs=1e-6)
    eta = monitoring.FALLING_STAKES / 5
    weights = 1 / (1 + np.abs(np.log2(monitoring.FALLING_STAKES)))
    capital = np.log(weights / weights.sum()) + tally.falling - 3000 * np.log1p(-eta * high)
    assert logsumexp(capital) == pytest.approx(np.log(2 / 0.1), abs=1e-6)
    assert Tally(5.0).interval(0.9) == (0.0, 1.0)
    clean = Tally(1.0).appended(np.zeros(1000)).interval(0.95)
    assert clean[0] == 0
    assert 0.004 < clean[1] < 0.01  # ln(40)/(0.9 n), and the share of that stake


def test_only_checked_skips_count_and_by_one_over_their_rate() -> None:
    skipped = np.array([True, True, False, True])
    rejection = np.array([0.5, np.nan, 1.0, 1.0])
    assert audited_losses(skipped, rejection, np.array([0.5, 0.5, 0.5, 0.25])).tolist() == [
        1.0, 0.0, 0.0, 4.0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="rejection"):
        audited_losses(skipped, 2 * rejection, 0.5)
    with pytest.raises(ValueError, match="audit_rate"):
        audited_losses(skipped, rejection, 0.0)
    with pytest.raises(ValueError, match="0 to 2"):
        Tally(2.0).appended(np.array([2.5]))


def test_levels_of_windows_add_up_to_delta() -> None:
    total = sum(window_level(DELTA, window) for window in range(1, 2001))
    assert total == pytest.approx(DELTA * (1 - 1 / 2001))
