"""Quantised truncation and the best message within a budget, beside their definitions.

The bias bounds are sums of at most 200 terms of total 1 or 2 in float64: 1e-12 as elsewhere.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hlmtheory.cost import index_bits, payload_bits
from hlmtheory.quantisation import (
    optimal_payload,
    probability_codes,
    quantised_deviation_at,
    quantised_distribution,
)
from hlmtheory.truncation import reference_law_bias, tail_deviation, truncated_distribution

WORST = 1e-12


def random_rows(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    logits = rng.uniform(0.1, 6, size=(rows, 1)) * rng.standard_normal((rows, vocab))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def quantised_by_definition(x: np.ndarray, k: int, b: int) -> np.ndarray:
    """Round one token after the other, never beyond mass one; the rest shares what is left."""
    steps, left = 2**b - 1, 2**b - 1
    out = np.full(len(x), np.nan)
    for v in np.argsort(-x, kind="stable")[:k]:
        code = min(math.floor(steps * x[v] + 0.5), left)
        left -= code
        if code:
            out[v] = code / steps
    tail = np.isnan(out)
    if tail.any():
        out[tail] = left / steps / tail.sum()
        return out
    return out / out.sum()


distributions = arrays(float, st.integers(2, 12), elements=st.floats(1e-6, 1)).map(
    lambda w: w / w.sum()
)


@settings(max_examples=200, deadline=None)
@given(distributions, st.integers(1, 12), st.data())
def test_quantised_law_is_its_definition(x, prob_bits, data):
    k = data.draw(st.integers(1, len(x)))
    law = quantised_distribution(x, k, prob_bits)
    expected = quantised_by_definition(x, k, prob_bits)
    # Equal probabilities may be coded in either order: compare in order of size.
    order = np.lexsort((law, x)), np.lexsort((expected, x))
    np.testing.assert_allclose(law[order[0]], expected[order[1]], atol=WORST)
    assert law.sum() == pytest.approx(1, abs=WORST)
    assert law.min() >= 0
    deviation = quantised_deviation_at(x, range(1, len(x) + 1), prob_bits)
    assert deviation[k - 1] == pytest.approx(np.abs(x - expected).sum(), abs=WORST)


def test_deviations_of_batches_and_both_libraries():
    x = random_rows(np.random.default_rng(0), 12, 150)
    sizes = (1, 2, 9, 40, 149, 150)
    for prob_bits in (1, 3, 8, 16):
        found = quantised_deviation_at(x, sizes, prob_bits)
        laws = [quantised_distribution(x, k, prob_bits) for k in sizes]
        expected = np.stack([np.abs(x - law).sum(axis=-1) for law in laws], axis=-1)
        np.testing.assert_allclose(found, expected, atol=WORST)
        tensor = quantised_deviation_at(torch.from_numpy(x), sizes, prob_bits)
        np.testing.assert_allclose(tensor, found, atol=WORST)
    by_row = quantised_distribution(x, np.array([1, 2, 9, 40, 149, 150] * 2), 6)
    np.testing.assert_allclose(by_row[3], quantised_distribution(x[3], 40, 6), atol=WORST)


def test_codes_never_exceed_the_mass_and_start_alike():
    rng = np.random.default_rng(1)
    ordered = np.sort(random_rows(rng, 50, 30), axis=-1)[:, ::-1]
    for prob_bits in (1, 2, 5, 10):
        codes = probability_codes(ordered, prob_bits)
        assert codes.min() >= 0
        assert codes.sum(axis=-1).max() <= 2**prob_bits - 1
        np.testing.assert_array_equal(probability_codes(ordered[:, :9], prob_bits), codes[:, :9])
        assert np.all(np.diff((codes > 0).astype(int), axis=-1) <= 0)


def test_many_bits_recover_the_truncation():
    """Each probability is off by at most half a step of 2^-24, and there are 80."""
    x = random_rows(np.random.default_rng(2), 8, 80)
    for k in (1, 10, 80):
        np.testing.assert_allclose(
            quantised_distribution(x, k, 24), truncated_distribution(x, k), atol=2**-23
        )
    deviation = quantised_deviation_at(x, range(1, 81), 24)
    np.testing.assert_allclose(deviation, tail_deviation(x), atol=80 * 2**-23)


def test_one_bit_of_one_token():
    """b = 1 knows 0 and 1: a likely token is taken for certain, an unlikely one for any other."""
    np.testing.assert_allclose(quantised_distribution(np.array([0.7, 0.2, 0.1]), 1, 1), [1, 0, 0])
    np.testing.assert_allclose(
        quantised_distribution(np.array([0.4, 0.3, 0.3]), 1, 1), np.full(3, 1 / 3)
    )


def test_bias_of_a_quantised_reference_stays_within_its_bound():
    rng = np.random.default_rng(3)
    for vocab in (2, 5, 40, 200):
        x, y = random_rows(rng, 40, vocab), random_rows(rng, 40, vocab)
        for prob_bits in (1, 4, 8):
            k = int(rng.integers(1, vocab + 1))
            bias = reference_law_bias(x, y, quantised_distribution(x, k, prob_bits))
            bound = quantised_deviation_at(x, (k,), prob_bits)[:, 0] / 2
            assert np.max(bias - bound) < WORST


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_optimal_payload_is_the_best_of_all(make):
    """Every (k, b) within the budget, built and measured one by one."""
    x = random_rows(np.random.default_rng(4), 6, 23)
    for budget in (6, 30, 77, 200):
        choice = optimal_payload(make(x), budget, prob_bits=range(1, 9))
        together = optimal_payload(make(x), budget, prob_bits=range(1, 9), fixed=True)
        table = {
            (k, b): np.array([np.abs(r - quantised_by_definition(r, k, b)).sum() / 2 for r in x])
            for b in range(1, 9)
            for k in range(1, 24)
            if payload_bits(k, 23, b) <= budget
        }
        every = np.stack(list(table.values()))
        np.testing.assert_allclose(choice.bias_bound, every.min(axis=0), atol=WORST)
        assert float(together.bias_bound) == pytest.approx(every.mean(axis=1).min(), abs=WORST)
        for i, (k, b) in enumerate(zip(choice.num_entries, choice.prob_bits, strict=True)):
            assert table[k, b][i] == pytest.approx(choice.bias_bound[i], abs=WORST)
            assert choice.payload_bits[i] == k * (b + index_bits(23)) <= budget
        best = table[int(together.num_entries), int(together.prob_bits)]
        assert best.mean() == pytest.approx(float(together.bias_bound), abs=WORST)
        assert np.all(choice.bias_bound.mean() <= together.bias_bound + WORST)


def test_more_budget_never_hurts():
    x = random_rows(np.random.default_rng(5), 20, 60)
    bounds = np.stack([optimal_payload(x, budget).bias_bound for budget in range(7, 200, 12)])
    assert np.all(np.diff(bounds, axis=0) <= WORST)


X = np.array([[0.5, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantised_distribution(X, 1, 0), "prob_bits = 0: allowed is 1 to 24"),
        (lambda: quantised_distribution(X, 4, 8), "size = 4: allowed is 1 to V = 3"),
        (lambda: quantised_deviation_at(X, (1,), 25), "prob_bits = 25"),
        (lambda: quantised_deviation_at(-X, (1,), 5), "x has an entry"),
        (lambda: optimal_payload(X, 2), "budget_bits = 2: allowed is >= 3"),
        (lambda: optimal_payload(X, 100, prob_bits=(30,)), "prob_bits = 30"),
    ],
)
def test_refusals_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
