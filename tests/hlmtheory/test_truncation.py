"""Truncation: deviations, bounds, exact bias and sizes, each beside its definition.

Float64 sums of at most 2,000 terms of total 1 carry a few eps = 2.2e-16 per prefix; 1e-12 is a
thousandfold margin over that and far below any error of a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory import truncation
from hlmtheory.acceptance import rejection_probability, residual_distribution, total_variation
from hlmtheory.head import Head
from hlmtheory.truncation import (
    OfflineTruncation,
    offline_truncation,
    online_bound_denominator,
    online_truncation_size,
    tail_deviation,
    tail_deviation_at,
    truncated_distribution,
    truncation_bias,
    truncation_bias_bound,
    truncation_bound_soft,
)
from hlmtheory.verification import DraftFromSent, TruncatedDistribution, output_bias, output_law

WORST = 1e-12


def truncated_by_definition(x: np.ndarray, k: int) -> np.ndarray:
    """(17) word by word, for one distribution."""
    kept = set(np.argsort(-x, kind="stable")[:k].tolist())
    tail = [i for i in range(len(x)) if i not in kept]
    out = x.copy()
    for i in tail:
        out[i] = sum(x[j] for j in tail) / len(tail)
    return out


def deviation_by_definition(x: np.ndarray) -> np.ndarray:
    """N(1..V), O(V^2): build each truncation and sum the differences."""
    return np.array([np.abs(x - truncated_by_definition(x, k)).sum() for k in range(1, len(x) + 1)])


def random_rows(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Distributions from nearly uniform to nearly certain."""
    logits = rng.uniform(0.1, 8, size=(rows, 1)) * rng.standard_normal((rows, vocab))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def random_pairs(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """1,000 (x, y, size), V from 2 to 2,000, eight rows a batch."""
    for index, vocab in enumerate(np.geomspace(2, 2_000, 125).round().astype(int)):
        x, y = random_rows(rng, 8, vocab), random_rows(rng, 8, vocab)
        if index % 2:  # a server that agrees with the device up to noise
            y = x * np.exp(0.5 * rng.standard_normal(x.shape))
            y /= y.sum(axis=-1, keepdims=True)
        yield x, y, rng.integers(1, vocab + 1, size=8)


# Few distinct values make ties; zeros are allowed.
distributions = (
    st.integers(2, 14)
    .flatmap(lambda v: arrays(float, v, elements=st.integers(0, 5).map(float)))
    .filter(lambda w: w.sum() > 0)
    .map(lambda w: w / w.sum())
)


def test_truncated_distribution_is_its_definition():
    rng = np.random.default_rng(0)
    x = random_rows(rng, 5, 17)
    for k in range(1, 18):
        expected = np.stack([truncated_by_definition(row, k) for row in x])
        np.testing.assert_allclose(truncated_distribution(x, k), expected, atol=WORST)
    sizes = np.array([1, 5, 17, 16, 2])
    by_row = truncated_distribution(x, sizes)
    for row, k, law in zip(x, sizes, by_row, strict=True):
        np.testing.assert_allclose(law, truncated_by_definition(row, k), atol=WORST)
    np.testing.assert_array_equal(truncated_distribution(x, 17), x)


@settings(max_examples=200, deadline=None)
@given(distributions)
def test_tail_deviation_is_its_definition(x):
    expected = deviation_by_definition(x)
    np.testing.assert_allclose(tail_deviation(x), expected, atol=WORST)
    sizes = range(1, len(x) + 1)
    np.testing.assert_allclose(tail_deviation_at(x, sizes), expected, atol=WORST)


@settings(max_examples=200, deadline=None)
@given(distributions)
def test_tail_deviation_never_rises(x):
    assert np.all(np.diff(tail_deviation(x)) <= WORST)


def test_tail_deviation_closed_forms():
    uniform, certain = np.full(9, 1 / 9), np.eye(9)[3]
    np.testing.assert_allclose(tail_deviation(np.stack([uniform, certain])), 0, atol=WORST)
    # V = 2: a tail of one token is its own mean.
    np.testing.assert_allclose(tail_deviation(np.array([0.3, 0.7])), 0, atol=WORST)
    # V = 3, k = 1: |b - c|.
    np.testing.assert_allclose(tail_deviation(np.array([0.1, 0.6, 0.3])), [0.2, 0, 0], atol=WORST)
    # Zipf's tail with half its entries at a and half at 0, k = 1: sum |x - a/2| = m a.
    x = np.concatenate([[0.6], np.full(4, 0.1), np.zeros(4)])
    assert tail_deviation(x)[0] == pytest.approx(0.4, abs=WORST)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_short_heads_are_redone_whole(monkeypatch, make):
    """With a head of four entries nearly every row needs the second pass."""
    rng = np.random.default_rng(1)
    x = np.concatenate([random_rows(rng, 40, 200), np.full((1, 200), 1 / 200), np.eye(200)[:1]])
    full, sizes = tail_deviation(x), (1, 3, 199, 200, 7)
    limit = 0.1 * online_bound_denominator(np.full(42, 0.4), np.full(42, 0.3))
    expected = 1 + np.argmax(full <= limit[:, None], axis=-1)
    for head in (1, 4, 64, 200):
        monkeypatch.setattr(truncation, "HEAD_SIZE", head)
        at = np.asarray(tail_deviation_at(make(x), sizes))
        np.testing.assert_allclose(at, full[:, [k - 1 for k in sizes]], atol=WORST)
        found = online_truncation_size(make(x), make(np.full(42, 0.4)), make(np.full(42, 0.3)))
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_online_size_is_its_definition():
    """min{k : N(k)/D <= theta}, found by building every truncation."""
    rng = np.random.default_rng(2)
    seen = set()
    for vocab in (2, 3, 10, 60):
        x = random_rows(rng, 20, vocab)
        draft, beta = rng.uniform(size=(2, 20))
        for theta in (0.01, 0.1, 0.7):
            found = online_truncation_size(x, draft, beta, theta, eta=1.3)
            limit = theta * online_bound_denominator(draft, beta, 1.3)
            for row, bound, k in zip(x, limit, found, strict=True):
                fits = deviation_by_definition(row) <= bound
                assert k == 1 + int(np.argmax(fits))
                seen.add(int(k))
    assert len(seen) > 20


def test_online_size_limits():
    x = random_rows(np.random.default_rng(3), 6, 50)
    half = np.full(6, 0.5)
    np.testing.assert_array_equal(online_truncation_size(x, half, half, theta=1e3), 1)
    # N(V - 1) = 0: a tail of one token is exact, so V itself is never needed.
    np.testing.assert_array_equal(online_truncation_size(x, half, half, theta=1e-13), 49)
    certain = np.eye(50)[:6]
    np.testing.assert_array_equal(online_truncation_size(certain, half, half), 1)


def test_half_precision_is_read():
    x = torch.from_numpy(random_rows(np.random.default_rng(4), 3, 64)).to(torch.float16)
    x32 = x.to(torch.float32)
    deviation = tail_deviation_at(x, (1, 8))
    assert deviation.dtype == torch.float16
    # float16 keeps 11 bits of a deviation below 2.
    np.testing.assert_allclose(
        deviation.to(torch.float32), tail_deviation_at(x32, (1, 8)), atol=2**-10
    )


def test_bounds_hold_and_nest():
    """Exact bias <= (22) <= (19) on 1,000 random pairs; (22)/(19) stays in its analytic range."""
    rng = np.random.default_rng(5)
    over_sharp = over_soft = 0.0
    ratios = []
    for x, y, size in random_pairs(rng):
        exact = truncation_bias(x, y, size)
        deviation = np.take_along_axis(tail_deviation(x), size[:, None] - 1, axis=-1)[:, 0]
        draft, beta = rng.uniform(size=(2, len(x)))
        sharp, soft = (
            truncation_bias_bound(deviation),
            truncation_bound_soft(deviation, draft, beta),
        )
        np.testing.assert_allclose(
            sharp, total_variation(x, truncated_distribution(x, size)), atol=WORST
        )
        over_sharp = max(over_sharp, float(np.max(exact - sharp)))
        over_soft = max(over_soft, float(np.max(sharp - soft)))
        ratios.extend(2 / online_bound_denominator(draft, beta))
    assert over_sharp < WORST
    assert over_soft < WORST
    assert min(ratios) >= 2 / math.log(2) - WORST
    assert max(ratios) <= 2 / math.log1p(math.exp(-1)) + WORST


def test_ratio_of_bounds_attains_its_ends():
    """2/D = 2/ln 2 = 2.885 at x_d = 1, beta_d = 0; 6.384 where x_d = 0."""
    one, zero = np.ones(1), np.zeros(1)
    assert 2 / online_bound_denominator(one, zero)[0] == pytest.approx(2.8854, abs=1e-4)
    assert 2 / online_bound_denominator(zero, zero)[0] == pytest.approx(6.3844, abs=1e-4)
    assert 2 / online_bound_denominator(one, one)[0] == pytest.approx(6.3844, abs=1e-4)


def test_sharper_bound_is_attained():
    """y = xhat: every draft is accepted, so the bias is TV(x, xhat); no smaller bound can hold."""
    x = random_rows(np.random.default_rng(6), 9, 120)
    for k in (1, 7, 119):
        y = truncated_distribution(x, k)
        np.testing.assert_allclose(
            truncation_bias(x, y, k), tail_deviation(x)[:, k - 1] / 2, atol=WORST
        )


def test_soft_bound_needs_a_sharp_maximum():
    """Negative control: with eta below ln(2)/2 the published form is no bound at all."""
    x = np.array([[0.9, 0.07, 0.02, 0.01]])
    y = truncated_distribution(x, 1)
    exact = truncation_bias(x, y, 1)[0]
    draft, beta = x[:, 0], np.zeros(1)
    deviation = tail_deviation(x)[:, 0]
    assert truncation_bound_soft(deviation, draft, beta, eta=0.2)[0] < exact - 1e-3
    assert truncation_bound_soft(deviation, draft, beta, eta=math.log(2) / 2)[0] >= exact - WORST


def test_truncation_bias_is_the_bias_of_the_rule():
    rng = np.random.default_rng(7)
    for x, y, size in random_pairs(rng):
        never = np.zeros_like(x)
        expected = output_bias(TruncatedDistribution(), x, y, never, size)
        np.testing.assert_allclose(truncation_bias(x, y, size), expected, atol=WORST)
    np.testing.assert_allclose(truncation_bias(x, y, x.shape[-1]), 0, atol=WORST)


def test_truncation_bias_monte_carlo():
    """Draft, verify and resample 200,000 times; compare on the set where the law exceeds y."""
    rng = np.random.default_rng(8)
    x = np.array([0.3, 0.05, 0.25, 0.1, 0.0, 0.08, 0.02, 0.12, 0.01, 0.03, 0.04, 0.0])
    y = np.array([0.1, 0.15, 0.2, 0.0, 0.1, 0.1, 0.0, 0.1, 0.05, 0.05, 0.05, 0.1])
    reference = truncated_distribution(x, 2)
    num = 200_000
    draft = rng.choice(12, size=num, p=x)
    accepted = rng.uniform(size=num) >= rejection_probability(reference, y)[draft]
    resampled = rng.choice(12, size=num, p=residual_distribution(reference, y))
    output = np.where(accepted, draft, resampled)
    exact = float(truncation_bias(x, y, 2))
    law = output_law(TruncatedDistribution(), x, y, np.zeros(12), 2)
    larger = law > y
    share = float(np.mean(larger[output]))
    error = math.sqrt(share * (1 - share) / num)
    assert exact > 0.02
    assert abs(share - y[larger].sum() - exact) < 4 * error


def test_gate_and_truncation_add_at_most():
    """TV of gate and truncation together <= risk of the gate against xhat + bias of truncation.

    P - y = (sigma x - K sigma x) + (K x - y) with K the accept/resample kernel against xhat.
    """
    rng = np.random.default_rng(11)
    slack = []
    for x, y, size in random_pairs(rng):
        sigma = (rng.uniform(size=x.shape) < 0.3).astype(float)
        reference = truncated_distribution(x, size)
        risk = np.sum(sigma * x * rejection_probability(reference, y), axis=-1)
        total = output_bias(TruncatedDistribution(), x, y, sigma, size)
        slack.append(risk + truncation_bias(x, y, size) - total)
    assert np.min(np.concatenate(slack)) > -WORST


def test_draft_from_sent_is_unbiased_and_rejects_more_by_at_most_the_bound():
    rng = np.random.default_rng(12)
    for x, y, size in random_pairs(rng):
        bias = output_bias(DraftFromSent(), x, y, np.zeros_like(x), size)
        np.testing.assert_allclose(bias, 0, atol=WORST)
        deviation = np.take_along_axis(tail_deviation(x), size[:, None] - 1, axis=-1)[:, 0]
        extra = total_variation(truncated_distribution(x, size), y) - total_variation(x, y)
        assert np.max(np.abs(extra) - deviation / 2) < WORST


def test_offline_size_is_its_definition():
    rng = np.random.default_rng(13)
    x = random_rows(rng, 200, 40)
    draft, beta = rng.uniform(size=(2, 200))
    denominator = online_bound_denominator(draft, beta)
    curves = tail_deviation(x) / denominator[:, None]
    theta = 0.1
    exact = next(k for k in range(1, 41) if np.mean(curves[:, k - 1]) <= theta)
    assert offline_truncation(curves, range(1, 41), theta).num_entries == exact
    grid = (1, 2, 4, 8, 16, 32, 40)
    on_grid = offline_truncation(tail_deviation_at(x, grid) / denominator[:, None], grid, theta)
    assert on_grid.num_entries == min(k for k in grid if k >= exact)
    assert on_grid.feasible
    assert on_grid.num_tokens == 200
    averaged = offline_truncation(curves.mean(axis=0), range(1, 41), theta)
    assert averaged.num_entries == exact


def test_offline_size_where_the_grid_ends_too_early():
    bounds = np.array([[0.9, 0.4], [0.7, 0.2], [np.nan, np.nan]])
    assert offline_truncation(bounds, (1, 8), 0.1) == OfflineTruncation(
        8, pytest.approx(0.3), False, 2
    )


def test_head_reaches_what_it_says():
    """Where a head claims to reach, its N(k) is that of the whole row."""
    x = random_rows(np.random.default_rng(14), 30, 300)
    head, whole = Head.of(x, 40), Head.of(x, 300)
    sizes = np.broadcast_to(np.arange(1, 41), (30, 40))
    reaches = head.reaches(sizes)
    assert 0.05 < reaches.mean() < 1
    error = np.abs(head.deviation(sizes) - whole.deviation(sizes))
    assert np.max(error[reaches]) < WORST
    assert np.all(np.diff(reaches.astype(int), axis=-1) <= 0), "reach must end once and for all"


X = np.array([[0.5, 0.3, 0.2]])
HALF = np.array([0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_distribution(X, 0), "size = 0: allowed is 1 to V = 3"),
        (lambda: truncated_distribution(X, np.array([4])), "size = 4: allowed is 1 to V = 3"),
        (lambda: truncated_distribution(X * 2, 1), "x sums to 1 only within 1"),
        (lambda: tail_deviation(np.log(X)), "x has an entry"),
        (lambda: tail_deviation_at(X, (1, 4)), "size = 4"),
        (lambda: truncation_bias(X, X[:, :2] / 0.8, 1), r"y has .*\(vocabulary\) must agree"),
        (lambda: online_truncation_size(X, HALF, HALF, theta=0.0), "theta = 0: allowed is"),
        (lambda: online_truncation_size(X, HALF, HALF, eta=-1.0), "eta = -1: allowed is"),
        (lambda: online_truncation_size(X, HALF * 3, HALF), "draft_prob = 1.5: allowed is"),
        (lambda: online_truncation_size(X, HALF, HALF * np.nan), "rejection_prob holds NaN"),
        (lambda: offline_truncation(np.array([[np.nan]]), (1,)), "no complete row"),
        (lambda: offline_truncation(np.ones((2, 2)), (4, 1)), "give rising sizes"),
        (lambda: offline_truncation(np.ones((2, 2)), (1,)), "one for each column"),
    ],
)
def test_refusals_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tail_deviation_beyond_the_head_whatever_the_memory_order(rng) -> None:
    """float32 with the batch axis innermost, where numpy adds up without pairing."""
    logits = rng.normal(scale=2.0, size=(3, 120_000))
    x = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    exact = tail_deviation_at(x, [30, 832, 8192])
    narrow = x.astype(np.float32)
    for array in (narrow, np.asfortranarray(narrow)):
        # float32 rounds each entry by 6e-8 of itself, and all of them together are one.
        np.testing.assert_allclose(tail_deviation_at(array, [30, 832, 8192]), exact, atol=1e-6)
    half = torch.from_numpy(narrow).to(torch.bfloat16)
    assert tail_deviation_at(half, [30, 832]).dtype == torch.bfloat16
