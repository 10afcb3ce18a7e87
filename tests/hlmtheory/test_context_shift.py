"""The shift of contexts, on chains whose truth is known: exact, to first order, and its error."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hlmtheory.clusters import RatioEstimate, mean_over_tokens
from hlmtheory.context_shift import along_answers, on_own_road, parted_before

V, STEPS = 4, 24


class Chain:
    """Next-token laws that depend on the last token; a policy draws from x in a share of steps."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.y = rng.dirichlet(np.full(V, 0.6), size=V)
        self.x = rng.dirichlet(np.full(V, 0.6), size=V)
        self.weight = rng.uniform(0.2, 1.0, size=V)
        self.loss = rng.uniform(size=V)

    def law(self, share: float) -> np.ndarray:
        skip = (share * self.weight)[:, None]
        return (1 - skip) * self.y + skip * self.x

    def bias(self, share: float) -> np.ndarray:
        return np.abs(self.law(share) - self.y).sum(-1) / 2

    def mean_loss(self, share: float) -> float:
        """Mean of the loss over STEPS contexts of the policy's own."""
        state, total = np.eye(V)[0], 0.0
        for _ in range(STEPS):
            total += state @ self.loss
            state = state @ self.law(share)
        return total / STEPS

    def parted(self, share: float) -> float:
        """Share of tokens after the parting, by summing over all of the server's answers."""
        together, total = np.eye(V)[0], 0.0
        for _ in range(STEPS):
            total += 1 - together.sum()
            together = (together * (1 - self.bias(share))) @ self.y
        return total / STEPS

    def answers(self, rng: np.random.Generator, num: int, share: float) -> np.ndarray:
        """Contexts (P, STEPS) of `num` answers; the same generator state, the same numbers."""
        uniforms = rng.random((STEPS, 2, num))
        state, out = np.zeros(num, dtype=int), []
        for skip, draw in uniforms:
            out.append(state)
            laws = np.where(
                (skip < share * self.weight[state])[:, None], self.x[state], self.y[state]
            )
            state = np.minimum((draw[:, None] > np.cumsum(laws, axis=1)).sum(1), V - 1)
        return np.stack(out, axis=1)


def number(value: float) -> RatioEstimate:
    return RatioEstimate(value, 0.0, 2, np.zeros(2))


def predicted(chain: Chain, share: float, pilot: float) -> float:
    means = [chain.mean_loss(0.0), chain.mean_loss(pilot), chain.mean_loss(0.0)]
    parted = [chain.parted(share), chain.parted(pilot)]
    return on_own_road(*map(number, (*means, *parted)), np.arange(2)).value


def test_parted_before_is_the_sum_over_all_answers() -> None:
    """Against the definition, answer by answer; lengths differ."""
    rng = np.random.default_rng(1)
    lengths = [5, 1, 3, 7]
    index = np.repeat(np.arange(4), lengths)
    bias = rng.uniform(size=len(index))
    found = parted_before(bias, index)
    for i in range(4):
        mine = bias[index == i]
        expected = [1 - np.prod(1 - mine[:t]) for t in range(len(mine))]
        assert found[index == i] == pytest.approx(expected, abs=1e-15)
    assert parted_before(np.zeros(6), np.zeros(6, dtype=int)).max() == 0
    rows = np.concatenate(list(along_answers(index)))
    assert sorted(rows) == [i for i in range(len(index)) if i and index[i] == index[i - 1]]


@pytest.mark.parametrize("seed", range(6))
def test_the_pilots_own_mean_is_exact(seed: int) -> None:
    chain = Chain(seed)
    assert predicted(chain, 0.3, 0.3) == pytest.approx(chain.mean_loss(0.3), abs=1e-14)
    assert predicted(chain, 0.0, 0.3) == pytest.approx(chain.mean_loss(0.0), abs=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_out_is_of_second_order(seed: int) -> None:
    """Policy and pilot shrink together: the error, as a part of the shift, shrinks with them."""
    chain, relative = Chain(seed), []
    for pilot in (0.08, 0.04, 0.02, 0.01):
        share = pilot / 2
        shift = chain.mean_loss(share) - chain.mean_loss(0.0)
        relative.append(abs(predicted(chain, share, pilot) - chain.mean_loss(share)) / abs(shift))
    assert relative[0] < 0.5
    assert relative[-2] / relative[-1] == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize("few", [2, 4, 16])
def test_a_small_pilot_counts_with_its_own_spread(few: int) -> None:
    """Of N prompts the variance of the moved mean is unbiased; without its factor it is not."""
    rng, num, repeats = np.random.default_rng(2), 40, 4000
    variances, values = [], []
    for _ in range(repeats):
        change = rng.normal(size=few)
        zero = RatioEstimate(0.0, 0.0, num, np.zeros(num))
        own = RatioEstimate(float(change.mean()), 0.0, few, (change - change.mean()) / few)
        flat = RatioEstimate(0.0, 0.0, few, np.zeros(few))
        share = RatioEstimate(0.5, 0.0, num, np.zeros(num))
        of_pilot = RatioEstimate(0.5, 0.0, few, np.zeros(few))
        found = on_own_road(zero, own, flat, share, of_pilot, np.arange(few))
        variances.append(found.standard_error**2)
        values.append(found.value)
    error = np.std(variances) / repeats**0.5 + np.var(values) * (2 / repeats) ** 0.5
    assert np.mean(variances) == pytest.approx(np.var(values), abs=4 * error)
    assert np.mean(variances) == pytest.approx(1 / few, abs=4 * error)


def test_intervals_hold_the_policys_own_mean_where_the_servers_do_not() -> None:
    """200 calibrations of 300 prompts, 100 of them in the pilot, judged by the exact mean."""
    chain, num, of_pilot = Chain(11), 300, 100
    share, pilot = 0.15, 0.2
    truth, rng = chain.mean_loss(share), np.random.default_rng(0)
    held = {"server": 0, "own": 0}
    repeats = 200
    index = np.repeat(np.arange(num), STEPS)
    few = index < of_pilot
    for _ in range(repeats):
        seed = int(rng.integers(2**31))
        roads = [chain.answers(np.random.default_rng(seed), num, one) for one in (0.0, pilot)]
        losses = [chain.loss[road].ravel() for road in roads]
        parts = [parted_before(chain.bias(one)[roads[0]].ravel(), index) for one in (share, pilot)]
        server = mean_over_tokens(losses[0], index, num)
        found = on_own_road(
            server,
            mean_over_tokens(losses[1][few], index[few], of_pilot),
            mean_over_tokens(losses[0][few], index[few], of_pilot),
            mean_over_tokens(parts[0], index, num),
            mean_over_tokens(parts[1][few], index[few], of_pilot),
            np.arange(of_pilot),
        )
        for name, one in (("server", server), ("own", found)):
            low, high = one.interval(0.95)
            held[name] += low <= truth <= high
    low, high = stats.binom.interval(0.9999, repeats, 0.95)
    assert low <= held["own"] <= high
    assert held["server"] < low
