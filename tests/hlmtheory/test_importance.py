"""Attention statistics under padding, the two importances, and the collapse report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hlmtheory.importance import (
    RunningThreshold,
    attention_entropy,
    attention_sink,
    context_attention,
    normalised_attention,
    normalised_entropy,
    topk_attention,
    topk_importance_threshold,
)

LENGTH = 12
rows = st.lists(st.floats(0.01, 10), min_size=3, max_size=30).map(
    lambda weights: np.array(weights) / np.sum(weights)
)


def padded(row: np.ndarray, positions: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The row spread over some positions of a wider one, and the mask of those positions."""
    wide, mask = np.zeros(width), np.zeros(width, dtype=bool)
    wide[positions], mask[positions] = row, True
    return wide, mask


# --- rows ----------------------------------------------------------------------------------------


def test_uniform_row():
    row = np.full(8, 1 / 8)
    assert attention_entropy(row) == pytest.approx(np.log(8))
    assert normalised_entropy(attention_entropy(row), np.array(8)) == pytest.approx(1)


def test_row_on_one_token():
    row = np.array([0.0, 0.0, 1.0, 0.0])
    assert attention_entropy(row) == 0
    assert normalised_entropy(np.array(0.0), np.array(4)) == 0


def test_normalised_entropy_of_one_position_is_undefined():
    found = normalised_entropy(np.array([0.0, 0.0, 0.3]), np.array([0, 1, 2]))
    np.testing.assert_array_equal(np.isnan(found), [True, True, False])


@given(rows)
def test_effective_numbers_are_in_order(row):
    # Renyi numbers fall with their order: support, exp(Shannon), 1/sum of squares, 1/largest.
    shannon, second = np.exp(attention_entropy(row)), 1 / np.sum(row**2)
    assert len(row) * (1 + 1e-12) >= shannon
    assert shannon * (1 + 1e-12) >= second
    assert second * (1 + 1e-12) >= 1 / row.max()


@given(rows, st.integers(0, 5), st.randoms(use_true_random=False))
def test_padding_changes_nothing(row, extra, random):
    width = len(row) + extra
    positions = np.array(sorted(random.sample(range(width), len(row))))
    wide, mask = padded(row, positions, width)
    everywhere = np.ones(len(row), dtype=bool)
    # Sums over the same numbers with zeros between them: the last bits may differ.
    assert attention_sink(wide, mask) == pytest.approx(row[0], rel=1e-14)
    assert context_attention(wide, mask) == pytest.approx(
        float(context_attention(row, everywhere)), rel=1e-13
    )
    np.testing.assert_allclose(
        normalised_attention(wide, mask)[positions],
        normalised_attention(row, everywhere),
        rtol=1e-13,
    )


@given(rows)
def test_self_sink_and_context_share_the_row(row):
    mask = np.ones(len(row), dtype=bool)
    total = attention_sink(row) + context_attention(row, mask) + row[-1]
    assert total == pytest.approx(1, abs=1e-12)
    kept = normalised_attention(row, mask)
    assert kept[0] == 0
    assert kept.sum() == pytest.approx(1)
    np.testing.assert_allclose(kept[1:] / kept[1], row[1:] / row[1])


def test_what_lies_outside_the_mask_is_not_seen():
    mask = np.array([False, True, True, True, False])
    attention = np.array([0.5, 0.2, 0.2, 0.1, 0.9])
    assert attention_sink(attention, mask) == pytest.approx(0.2)
    assert context_attention(attention, mask) == pytest.approx(0.2)
    np.testing.assert_allclose(normalised_attention(attention, mask), [0, 0, 2 / 3, 1 / 3, 0])


def test_short_contexts():
    one, two = np.array([True, False, False]), np.array([True, True, False])
    attention = np.array([0.4, 0.6, 0.0])
    assert context_attention(attention, one) == 0
    assert context_attention(attention, two) == 0
    np.testing.assert_array_equal(normalised_attention(attention, one), np.zeros(3))
    # A row that is zero throughout has no entropy and attends to nothing.
    assert attention_entropy(np.zeros(3)) == 0
    assert topk_attention(np.zeros(3), 2) == 0


def test_refusals():
    with pytest.raises(ValueError, match="attention"):
        attention_sink(np.array([-0.1, 1.1]))
    with pytest.raises(ValueError, match=r"k = 0"):
        topk_attention(np.array([0.5, 0.5]), 0)
    with pytest.raises(ValueError, match="gamma"):
        topk_importance_threshold(np.array(1.0), -0.1)
    with pytest.raises(ValueError, match="gamma"):
        RunningThreshold.start(np.zeros(2)).update(np.ones(2), 1.5)
    with pytest.raises(ValueError, match="variance"):
        RunningThreshold(np.zeros(1), -np.ones(1))


# --- topk importance -----------------------------------------------------------------------------


@given(rows, st.integers(1, 40))
def test_topk_is_the_mean_of_the_largest(row, k):
    expected = sum(sorted(row, reverse=True)[:k]) / k
    assert topk_attention(row, k) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_uniform_row_lies_on_the_threshold_at_gamma_one(k):
    row = np.full(16, 1 / 16)
    threshold = topk_importance_threshold(attention_entropy(row), 1.0)
    assert topk_attention(row, k) == pytest.approx(float(threshold), rel=1e-13)


@given(rows)
def test_largest_weight_always_passes(row):
    threshold = topk_importance_threshold(attention_entropy(row), 1.0)
    assert topk_attention(row, 1) >= threshold * (1 - 1e-12)


@given(rows, st.floats(0, 3), st.floats(0, 3))
def test_a_larger_gamma_is_stricter(row, gamma, other):
    low, high = sorted((gamma, other))
    entropy = attention_entropy(row)
    assert topk_importance_threshold(entropy, low) <= topk_importance_threshold(entropy, high)


def test_rows_focused_on_fewer_than_k_tokens_fall_below():
    for num_tokens, important in ((4, False), (15, False), (17, True), (60, True)):
        row = np.concatenate([np.full(num_tokens, 1.0), np.full(60, 1e-9)])
        row /= row.sum()
        threshold = topk_importance_threshold(attention_entropy(row), 0.99)
        assert (topk_attention(row, 16) >= threshold) == important


# --- context importance --------------------------------------------------------------------------


def running_reference(values: np.ndarray, gamma: float) -> tuple[float, float]:
    """Mean and variance of the past under weights that fall by gamma a step."""
    steps = len(values)
    weights = np.array([(1 - gamma) * gamma ** (steps - 1 - i) for i in range(steps)])
    weights[0] = gamma ** (steps - 1)
    mean = float(weights @ values)
    return mean, float(weights @ (values - mean) ** 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=25), st.floats(0, 1))
def test_running_threshold_weighs_the_past(values, gamma):
    state = RunningThreshold.start(np.array([values[0]]))
    for value in values[1:]:
        state = state.update(np.array([value]), gamma)
    mean, variance = running_reference(np.array(values), gamma)
    # Both are convex combinations of numbers in [0, 1].
    assert state.mean[0] == pytest.approx(mean, abs=1e-12)
    assert state.variance[0] == pytest.approx(variance, abs=1e-12)
    expected = state.mean[0] + 2 * np.sqrt(state.variance[0])
    assert state.threshold(2.0)[0] == pytest.approx(expected)


def test_running_threshold_forgets_at_zero_and_never_learns_at_one():
    state = RunningThreshold.start(np.array([0.2]))
    assert state.update(np.array([0.9]), 0.0).threshold(5.0)[0] == pytest.approx(0.9)
    assert state.update(np.array([0.9]), 1.0).threshold(5.0)[0] == pytest.approx(0.2)


def test_rows_of_a_batch_run_apart(rng):
    values = rng.uniform(size=(10, 3))
    together = RunningThreshold.start(values[0])
    for step in values[1:]:
        together = together.update(step, 0.8)
    for b in range(3):
        mean, variance = running_reference(values[:, b], 0.8)
        assert together.mean[b] == pytest.approx(mean)
        assert together.variance[b] == pytest.approx(variance)


def test_numpy_and_torch_agree(rng):
    attention = rng.dirichlet(np.full(LENGTH, 0.4), size=6)
    mask = np.arange(LENGTH) >= rng.integers(0, 6, size=(6, 1))
    results = []
    for build in (np.asarray, torch.from_numpy):
        a, m = build(attention), build(mask)
        row = normalised_attention(a, m)
        entropy = attention_entropy(row)
        counts = m.sum(-1) - 1
        results.append(
            (
                attention_sink(a, m),
                context_attention(a, m),
                entropy,
                normalised_entropy(entropy, counts),
                topk_attention(row, 3),
                topk_importance_threshold(entropy, 0.9),
                RunningThreshold.start(entropy).update(2 * entropy, 0.7).threshold(-0.5),
            )
        )
    for ours, theirs in zip(*results, strict=True):
        assert isinstance(theirs, torch.Tensor)
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-12, atol=1e-12)
