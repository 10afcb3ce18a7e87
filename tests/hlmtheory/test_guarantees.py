"""Certified thresholds, by coverage: simulated calibrations whose true risk is known.

A guarantee that fails with probability at most delta may fail in up to binom.ppf(1 - 1e-4) of 1,000
simulations: a correct rule breaks this limit once in 10,000 tests. The plug-in rule, which promises
nothing, must break it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hlmtheory.guarantees import (
    GridLosses,
    conformal_on_grid,
    conformal_threshold,
    fixed_sequence_threshold,
    learn_then_test_threshold,
)
from hlmtheory.risk import SkipAtoms, SkipRiskSums, skip_risk_sums
from hlmtheory.risk_tests import (
    betting_p_value,
    conformal_bound,
    hoeffding_bentkus_p_value,
    p_value,
    p_value_of_counts,
    prompts_needed,
    risk_upper_bound,
)
from hlmtheory.thresholds import Threshold, risk_budget_threshold

NUM_SIMULATIONS = 1_000
DELTA = 0.1
LIMIT = stats.binom.ppf(1 - 1e-4, NUM_SIMULATIONS, DELTA)
GRID = np.linspace(0, 1, 1025)
"""Thresholds of the simulations; GRID[0] = 0 skips no token, for scores are above 0."""


@dataclass(frozen=True)
class Population:
    """Prompts whose risk R(u) is known.

    Attributes
    ----------
    draw : callable
        (generator, shape) to (score, beta), both (*shape, T).
    risk : callable
        R(u).
    """

    draw: Callable[[np.random.Generator, tuple[int, ...]], tuple[np.ndarray, np.ndarray]]
    risk: Callable[[np.ndarray], np.ndarray]


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Five tokens, u uniform; beta = w with probability u, and w = 1 in 30 % of prompts, else 0.1.

    E[w] = 0.37, so R(u) = 0.37 u^2/2.
    """
    score = rng.uniform(size=(*shape, 5))
    weight = np.where(rng.uniform(size=(*shape, 1)) < 0.3, 1.0, 0.1)
    return score, weight * (rng.uniform(size=score.shape) < score)


def all_or_nothing(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """One token, u uniform, beta = 1 with probability 0.2: losses of 0 and 1. R(u) = 0.2 u."""
    score = rng.uniform(size=(*shape, 1))
    return score, (rng.uniform(size=score.shape) < 0.2).astype(float)


POPULATIONS = {
    "spread": Population(spread, lambda u: 0.37 * u**2 / 2),
    "all-or-nothing": Population(all_or_nothing, lambda u: 0.2 * u),
}


def certified(
    score: np.ndarray, beta: np.ndarray, passes: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The last threshold of GRID that passes, for each simulation (S, n, T); 0 if none does."""
    low = np.zeros(len(score), dtype=int)
    high = np.full(len(score), len(GRID))
    while np.any(high - low > 1):
        middle = (low + high) // 2
        skipped = score <= GRID[middle][:, None, None]
        ok = passes((beta * skipped).mean(axis=-1))
        low, high = np.where(ok, middle, low), np.where(ok, high, middle)
    return GRID[low]


def rules(alpha: float) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Which losses (S, n) pass, by rule."""
    return {
        "plug-in": lambda losses: losses.mean(axis=-1) <= alpha,
        "conformal": lambda losses: conformal_bound(losses.mean(-1), losses.shape[-1]) <= alpha,
        "hoeffding-bentkus": lambda losses: (
            hoeffding_bentkus_p_value(losses.mean(axis=-1), losses.shape[-1], alpha) <= DELTA
        ),
        "betting": lambda losses: betting_p_value(losses, alpha) <= DELTA,
    }


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("num_prompts", [30, 100, 300])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_coverage(population, num_prompts, alpha):
    rng = np.random.default_rng([num_prompts, int(1000 * alpha)])
    world = POPULATIONS[population]
    score, beta = world.draw(rng, (NUM_SIMULATIONS, num_prompts))
    risk = {
        name: world.risk(certified(score, beta, passes)) for name, passes in rules(alpha).items()
    }
    for method in ("hoeffding-bentkus", "betting"):
        assert np.count_nonzero(risk[method] > alpha) <= LIMIT, method
    error = risk["conformal"].std() / np.sqrt(NUM_SIMULATIONS)
    assert risk["conformal"].mean() <= alpha + 4 * error
    if num_prompts >= 1 / alpha - 1:
        # It is not slack either: the loss of one token at most, 2/(n + 1), and the grid.
        assert risk["conformal"].mean() >= alpha - 2 / (num_prompts + 1) - 4 * error - 1e-3
    # Negative controls: neither rule promises anything for the single calibration.
    assert np.count_nonzero(risk["plug-in"] > alpha) > 2 * LIMIT


@pytest.mark.parametrize("method", ["betting", "hoeffding-bentkus"])
def test_p_values_are_valid_where_they_are_hardest(method):
    """Risk exactly alpha: P(p <= delta) <= delta, for losses of 0 and 1 and for spread ones."""
    rng = np.random.default_rng(0)
    draws = {
        "0 or 1": (rng.uniform(size=(20_000, 100)) < 0.05).astype(float),
        "beta": rng.beta(0.5, 9.5, size=(20_000, 100)),
        "constant": np.full((20_000, 100), 0.05),
    }
    for name, losses in draws.items():
        for delta in (0.01, 0.1):
            if method == "betting":
                p_value = betting_p_value(losses, 0.05)
            else:
                p_value = hoeffding_bentkus_p_value(losses.mean(axis=-1), 100, 0.05)
            limit = stats.binom.ppf(1 - 1e-4, 20_000, delta)
            assert np.count_nonzero(p_value <= delta) <= limit, name


def test_a_false_p_value_is_found_out():
    """Negative control of the test above: Hoeffding-Bentkus without Bentkus' factor e."""
    rng = np.random.default_rng(1)
    mean = (rng.uniform(size=(20_000, 100)) < 0.05).mean(axis=-1)
    wrong = stats.binom.cdf(np.ceil(100 * mean) - 1, 100, 0.05)
    assert np.count_nonzero(wrong <= 0.1) > stats.binom.ppf(1 - 1e-4, 20_000, 0.1)


def test_hoeffding_bentkus_closed_forms():
    """No loss at all: (1 - alpha)^n. At or above alpha: nothing against the hypothesis."""
    zero = np.zeros(1)
    assert hoeffding_bentkus_p_value(zero, 59, 0.05)[0] == pytest.approx(0.95**59)
    assert hoeffding_bentkus_p_value(zero + 0.05, 100, 0.05)[0] == 1
    assert hoeffding_bentkus_p_value(zero + 0.9, 100, 0.05)[0] == 1
    # Few losses in many prompts: Bentkus' tail is the smaller one.
    bentkus = np.e * stats.binom.cdf(1, 100, 0.05)
    assert hoeffding_bentkus_p_value(zero + 0.01, 100, 0.05)[0] == pytest.approx(
        min(bentkus, np.exp(-100 * (0.01 * np.log(0.2) + 0.99 * np.log(0.99 / 0.95))))
    )


def test_betting_is_its_definition():
    """The product of bets, factor by factor, for every stake."""
    rng = np.random.default_rng(2)
    losses = rng.beta(0.4, 4, size=(6, 40))
    losses[0, 3] = 1.0  # the largest stake is lost whole
    for alpha in (0.05, 0.3):
        for row, found in zip(losses, betting_p_value(losses, alpha), strict=True):
            capital = 0.0
            for j in range(1, 17):
                money = 0.75 if j == 16 else 0.25 / 15
                for loss in row:
                    money *= 1 + j / 16 * (alpha - loss) / (1 - alpha)
                capital += money
            assert found == pytest.approx(min(1, 1 / capital), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.floats(0.01, 0.5),
    st.integers(0, 29),
    st.floats(0, 1),
)
def test_p_values_rise_with_every_loss(losses, alpha, position, larger):
    """What bisection and data-dependent candidates rest on."""
    before = np.array(losses)
    after = before.copy()
    place = position % len(losses)
    after[place] = max(after[place], larger)
    assert betting_p_value(after, alpha) >= betting_p_value(before, alpha) * (1 - 1e-9)
    num = len(losses)
    p_before, p_after = (
        hoeffding_bentkus_p_value(np.asarray(v.mean()), num, alpha) for v in (before, after)
    )
    assert p_after >= p_before * (1 - 1e-9)


@pytest.mark.parametrize("method", ["betting", "hoeffding-bentkus"])
def test_upper_bound_inverts_the_test(method):
    rng = np.random.default_rng(3)
    losses = rng.beta(0.5, 6, size=(5, 80))
    for row in losses:
        value = risk_upper_bound(row, 0.05, method)

        def p_value(alpha: float, row: np.ndarray = row) -> float:
            if method == "betting":
                return float(betting_p_value(row, alpha))
            return float(hoeffding_bentkus_p_value(np.asarray(row.mean()), 80, alpha))

        assert row.mean() < value < 1
        assert p_value(value + 1e-6) <= 0.05 <= p_value(value - 1e-6) * (1 + 1e-6)


def test_betting_is_the_stronger_for_means_over_tokens():
    losses = np.random.default_rng(4).uniform(0, 0.04, size=200)
    assert risk_upper_bound(losses, 0.05, "betting") < risk_upper_bound(
        losses, 0.05, "hoeffding-bentkus"
    )


def long_trace(
    rng: np.random.Generator, num_prompts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, beta, prompt of prompts from one to twenty tokens."""
    lengths = rng.integers(1, 21, size=num_prompts)
    index = np.repeat(np.arange(num_prompts), lengths)
    score = rng.uniform(0.001, 1, size=len(index))
    weight = rng.beta(1, 3, size=num_prompts)[index]
    return score, weight * (rng.uniform(size=len(index)) < score), index


@pytest.mark.parametrize("name", ["conformal", "hoeffding-bentkus", "betting"])
def test_bisection_finds_what_testing_in_order_finds(name):
    """Every candidate in rising order until the first failure, against bisection."""
    rng = np.random.default_rng(6)
    for num_prompts in (40, 150):
        score, beta, index = long_trace(rng, num_prompts)
        distinct = np.unique(score)
        grid = np.append((distinct[1:] + distinct[:-1]) / 2, 1.0)
        atoms = SkipAtoms.of_drafts(score, beta, index, num_prompts)
        losses = skip_risk_sums(atoms, grid).rates()[1]
        for alpha in (0.02, 0.05, 0.1):
            passed = np.array([bool(rules(alpha)[name](column)) for column in losses.T])
            num = int(np.argmin(np.append(passed, False)))
            if name == "conformal":
                found = conformal_threshold(atoms, alpha)
            else:
                found = learn_then_test_threshold(atoms, alpha, DELTA, method=name)
            assert found.feasible == (num > 0)
            if num:
                assert found.value == grid[num - 1]
                assert found.bound <= alpha + 1e-9
            else:
                assert np.isnan(found.value)
                assert found.reason


def test_given_thresholds_are_the_only_answers():
    atoms = SkipAtoms.of_drafts(*long_trace(np.random.default_rng(7), 100), 100)
    grid = np.array([0.1, 0.25, 0.4, 0.9])
    free = conformal_threshold(atoms, 0.05).value
    bound = conformal_threshold(atoms, 0.05, thresholds=grid)
    assert bound.value == grid[grid <= free][-1]


def test_rules_are_ordered_by_what_they_promise():
    """With one length for all prompts, so that both weightings are one."""
    score, beta, _ = long_trace(np.random.default_rng(8), 420)
    atoms = SkipAtoms.of_drafts(score[:4000], beta[:4000], np.repeat(np.arange(400), 10), 400)
    found: list[Threshold] = [
        learn_then_test_threshold(atoms, 0.05),
        conformal_threshold(atoms, 0.05),
        risk_budget_threshold(atoms, 0.05),
    ]
    thresholds = [f.value for f in found]
    assert thresholds == sorted(thresholds)
    assert len(set(thresholds)) == 3
    assert [f.family for f in found] == ["ltt", "conformal", "risk"]
    assert [f.confidence for f in found] == [0.95, None, None]
    assert [f.weighting for f in found] == ["prompts", "prompts", "tokens"]
    assert found[2].bound is None


def averaged(rng: np.random.Generator, num_prompts: int, num_tokens: int) -> SkipAtoms:
    """Two candidates a token, x = (w, 1 - w) with w uniform: the first has score w/2 and beta 0.4
    times its prompt's weight, the second score 1 and beta 0. w's mean square is 1/3."""
    w = rng.uniform(size=num_prompts * num_tokens)
    index = np.repeat(np.arange(num_prompts), num_tokens)
    weight = 0.8 * rng.uniform(size=num_prompts)[index]
    return SkipAtoms(
        np.concatenate([w / 2, np.ones_like(w)]),
        np.concatenate([w, 1 - w]),
        np.concatenate([w * weight, 0 * w]),
        np.concatenate([index, index]),
        np.full(num_prompts, num_tokens),
    )


def test_guarantee_holds_where_losses_are_averaged_over_the_draft():
    """R(u) = 0.4 (2u)^2/2, exact; Learn-then-Test keeps it, the plug-in breaks it by half."""
    rng = np.random.default_rng(11)
    alpha, num = 0.05, 300
    broken = {"ltt": 0, "risk": 0}
    for _ in range(num):
        atoms = averaged(rng, 60, 5)
        for found in (
            learn_then_test_threshold(atoms, alpha, DELTA),
            risk_budget_threshold(atoms, alpha),
        ):
            broken[found.family] += int(0.4 * (2 * found.value) ** 2 / 2 > alpha)
    assert broken["ltt"] <= stats.binom.ppf(1 - 1e-4, num, DELTA)
    assert broken["risk"] > stats.binom.ppf(1 - 1e-4, num, DELTA)


@pytest.mark.parametrize("max_tokens", [None, 20])
def test_weighting_of_the_guarantee(max_tokens):
    """Long prompts are the hard ones: the mean over tokens is the larger risk.

    T = 20 and beta = 0.6 in half the prompts, T = 2 and beta = 0.05 in the others; all scores
    uniform. Mean over tokens: R(u) = (0.6 x 20 + 0.05 x 2)/22 u = 0.55 u; over prompts: 0.325 u.
    Certifying over prompts says nothing of tokens: that is the negative control.
    """
    rng = np.random.default_rng(9)
    alpha, broken = 0.1, 0
    for _ in range(200):
        hard = rng.uniform(size=150) < 0.5
        index = np.repeat(np.arange(150), np.where(hard, 20, 2))
        beta = np.where(hard, 0.6, 0.05)[index]
        score = rng.uniform(size=len(index))
        atoms = SkipAtoms.of_drafts(score, beta, index, 150)
        found = learn_then_test_threshold(atoms, alpha, DELTA, max_tokens=max_tokens)
        assert found.weighting == ("tokens" if max_tokens else "prompts")
        assert found.feasible
        broken += int(0.55 * found.value > alpha)
    limit = stats.binom.ppf(1 - 1e-4, 200, DELTA)
    assert broken <= limit if max_tokens else broken > 2 * limit


def test_too_few_prompts_is_a_result():
    few, more = (
        SkipAtoms.of_drafts(np.full(n, 0.5), np.zeros(n), np.arange(n), n) for n in (29, 59)
    )
    conformal = conformal_threshold(few, 0.01)
    assert not conformal.feasible
    assert "needs at least 99 prompts" in conformal.reason
    assert conformal.bound == pytest.approx(1 / 30)
    tested = learn_then_test_threshold(few, 0.05, method="hoeffding-bentkus")
    assert not tested.feasible
    assert "takes 59 prompts" in tested.reason
    assert tested.bound > 0.05
    enough = learn_then_test_threshold(more, 0.05, method="hoeffding-bentkus")
    assert enough.feasible
    assert enough.value == 1
    assert "every token is skipped" in enough.reason


def test_prompts_needed():
    for alpha, delta in ((0.01, 0.05), (0.05, 0.1), (0.3, 0.4)):
        for method in ("betting", "hoeffding-bentkus"):
            num = prompts_needed(alpha, delta, method)
            for count, enough in ((num, True), (num - 1, False)):
                losses = np.zeros(count)
                if method == "betting":
                    p_value = betting_p_value(losses, alpha)
                else:
                    p_value = hoeffding_bentkus_p_value(np.zeros(()), count, alpha)
                assert bool(p_value <= delta) == enough
    assert prompts_needed(0.01, 0.05, "hoeffding-bentkus") == 299


@pytest.mark.parametrize("filler", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05])
def test_what_a_filled_share_costs_each_test(alpha: float, filler: float) -> None:
    """The bet 1/(1 - f); Hoeffding-Bentkus more than its square, near twice it; theory, (53)."""
    share = 1 / (1 - filler)
    bets = [prompts_needed(alpha, 0.05, "betting", f) for f in (0.0, filler)]
    assert bets[1] == pytest.approx(share * bets[0], rel=0.05)
    least, most = (prompts_needed(alpha, 0.05, "hoeffding-bentkus", f) for f in (0.0, filler))
    factor = 1 / (1 - filler + filler * np.log(filler))
    assert share**2 * least < most <= np.ceil(factor * least)
    assert most > 0.74 * factor * least
    if filler <= 0.25:  # Hoeffding's alone
        assert most == pytest.approx(factor * least, rel=0.03)


@pytest.mark.parametrize(("length", "least"), [(40, 1), (10, 4)])
def test_a_prompt_without_loss_gains_what_it_is_not_filled_with(length: int, least: int) -> None:
    """About tokens a loss-free prompt gains alpha T/T_max: too few is told as what does pass."""
    alpha, most = 0.05, 40

    def atoms(num: int) -> SkipAtoms:
        index = np.repeat(np.arange(num), length)
        return SkipAtoms.of_drafts(np.full(len(index), 0.5), np.zeros(len(index)), index, num)

    def grid(num: int) -> GridLosses:
        return GridLosses(skip_risk_sums(atoms(num), np.array([1.0])), "tokens", most)

    rules = (
        lambda num: conformal_threshold(atoms(num), alpha, max_tokens=most),
        lambda num: learn_then_test_threshold(atoms(num), alpha, max_tokens=most),
        lambda num: conformal_on_grid(grid(num), alpha),
        lambda num: fixed_sequence_threshold(grid(num), alpha),
        lambda num: fixed_sequence_threshold(grid(num), alpha, method="hoeffding-bentkus"),
    )
    for rule in rules:
        told = int(re.findall(r"(\d+) prompts$", rule(5).reason)[0])
        assert rule(told).feasible
        assert not rule(told - 1).feasible
    assert told > 58 * least
    rejected = np.array([[1.0, 4.0], [0.0, 2.0]])
    sums = SkipRiskSums(np.array([0.1, 0.2]), rejected, rejected, np.array([10.0, 40.0]))
    for certified, risks in (("tokens", [0.02, 0.12]), ("prompts", [0.05, 0.225])):
        assert GridLosses(sums, certified, most).risks() == pytest.approx(risks)
    assert GridLosses(sums, "tokens", most).filler == pytest.approx(1 - 25 / 40)
    assert GridLosses(sums, "prompts", most).filler == 0


ONE = SkipAtoms.of_drafts(np.full(3, 0.5), np.full(3, 0.5), np.arange(3), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_threshold(ONE, 0.0), "alpha = 0.0: allowed is above 0 and below 1"),
        (lambda: learn_then_test_threshold(ONE, 0.1, 1.0), "delta = 1.0: allowed is above 0"),
        (lambda: learn_then_test_threshold(ONE, 0.1, method="hope"), "method = 'hope': allowed"),
        (lambda: conformal_threshold(ONE, 0.1, 1.0, np.array([1.0, 0.0])), "must be rising"),
        (lambda: conformal_threshold(ONE, 0.1, max_tokens=0), "max_tokens = 0: a prompt has 1"),
        (lambda: betting_p_value(np.array([1.5]), 0.1), "losses = 1.5"),
        (lambda: risk_upper_bound(np.array([0.5]), 0.0), "delta = 0.0"),
    ],
)
def test_refusals_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", ["betting", "hoeffding-bentkus", "t"])
@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_counts_of_prompts_are_as_good_as_the_prompts(rng: np.random.Generator, method, alpha):
    """Draws by count against draws written out, with a whole loss and a column without spread."""
    losses = rng.beta(0.3, 3, size=(20, 6))
    losses[3, 2] = 1.0
    losses[:, 4], losses[:, 5] = 0.0, alpha / 2
    drawn = rng.integers(20, size=(30, 12))
    counts = np.stack([np.bincount(one, minlength=20) for one in drawn])
    found = p_value_of_counts(losses, counts, alpha, method)
    expected = [p_value(losses[one].T, alpha, DELTA, method) for one in drawn]
    known = slice(0, 5) if method == "t" else slice(0, 6)  # of t, without spread but for rounding
    assert found[:, known] == pytest.approx(np.array(expected)[:, known], rel=1e-6, abs=1e-12)
    if method == "t":  # a mean below alpha is taken for certain
        assert not found[:, 5].any()


def test_a_test_of_the_order_has_no_counts() -> None:
    with pytest.raises(ValueError, match="do not look at the order"):
        p_value_of_counts(np.zeros((3, 1)), np.ones((1, 3)), 0.1, "wsr")
