"""Inverse CDF and races: their laws, zero weights, edges, and tests that can fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hlmtheory.coupling import joint_law
from hlmtheory.sampling import race_argmin, sample_inverse_cdf

# Chance of a false alarm of one chi-square test; the seed is fixed, so it is spent once.
SIGNIFICANCE = 1e-3


def chi_square_p_value(tokens: np.ndarray, law: np.ndarray) -> float:
    """P-value of drawn tokens under a law; cells expecting fewer than 5 draws are pooled."""
    counts = np.bincount(tokens, minlength=len(law)).astype(float)
    expected = law * len(tokens)
    if counts[expected == 0].any():
        return 0.0
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    if wanted[-1] < 5:
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return float(stats.chi2.sf(statistic, len(wanted) - 1))


def sample_inverse_cdf_reference(weights: np.ndarray, uniforms: np.ndarray) -> int:
    """The obvious loop over one row: a block by its mass, then a token inside it."""
    vocab = len(weights)
    width = max(1, int(vocab**0.5))
    starts = list(range(0, vocab, width))

    def walk(masses: list[float], uniform: float) -> int:
        total, level = sum(masses), 0.0
        for index, mass in enumerate(masses):
            level += mass
            if level > uniform * total:
                return index
        return max(index for index, mass in enumerate(masses) if mass > 0)

    masses = [float(sum(weights[start : start + width])) for start in starts]
    start = starts[walk(masses, uniforms[0])]
    return start + walk([float(w) for w in weights[start : start + width]], uniforms[1])


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 16, 50, 1_000])
def test_law_is_that_of_the_weights(rng, vocab):
    num = 10_000 if vocab > 100 else 40_000
    weights = rng.gamma(0.5, size=vocab) * 3.0
    weights[rng.uniform(size=vocab) < 0.3] = 0.0
    weights[vocab // 2] = 1.0
    tokens = sample_inverse_cdf(np.broadcast_to(weights, (num, vocab)), rng.uniform(size=(num, 2)))
    assert (weights[tokens] > 0).all()
    if (weights > 0).sum() > 1:
        assert chi_square_p_value(tokens, weights / weights.sum()) > SIGNIFICANCE


def test_the_same_test_rejects_a_wrong_law(rng):
    """Negative control: one token's weight off by a tenth, and one uniform used twice."""
    num, vocab = 200_000, 30
    weights = rng.uniform(0.5, 1.5, size=vocab)
    rows = np.broadcast_to(weights, (num, vocab))
    uniforms = rng.uniform(size=(num, 2))
    law = weights / weights.sum()
    assert chi_square_p_value(sample_inverse_cdf(rows, uniforms), law) > SIGNIFICANCE
    wrong = weights.copy()
    wrong[4] *= 1.1
    assert (
        chi_square_p_value(sample_inverse_cdf(rows, uniforms), wrong / wrong.sum()) < SIGNIFICANCE
    )
    dependent = np.repeat(uniforms[:, :1], 2, axis=1)
    assert chi_square_p_value(sample_inverse_cdf(rows, dependent), law) < SIGNIFICANCE


def test_law_is_exact_on_a_lattice_of_uniforms():
    """Without randomness: with weights in sixteenths every cell of the lattice is hit by design."""
    weights = np.array([1.0, 0.0, 3.0, 4.0, 0.0, 0.0, 2.0, 6.0, 0.0])
    # Blocks of three have masses 4, 4 and 8 of 16; inside, quarters and eighths.
    steps = (np.arange(16) + 0.5) / 16
    uniforms = np.array(list(itertools.product(steps, steps)))
    tokens = sample_inverse_cdf(np.broadcast_to(weights, (256, 9)), uniforms)
    np.testing.assert_array_equal(np.bincount(tokens, minlength=9), weights * 16)


def test_rows_are_drawn_each_from_its_own_weights(rng):
    batch, vocab = 300, 40
    weights = np.zeros((batch, vocab))
    wanted = rng.integers(vocab, size=batch)
    weights[np.arange(batch), wanted] = rng.uniform(1e-3, 10, size=batch)
    tokens = sample_inverse_cdf(weights, rng.uniform(size=(batch, 2)))
    np.testing.assert_array_equal(tokens, wanted)


def test_agrees_with_the_obvious_loop(rng):
    """Token for token: the same two walks, so only a uniform on a boundary could differ."""
    for vocab in (1, 2, 5, 9, 10, 63, 64, 65, 400):
        weights = rng.dirichlet(np.full(vocab, 0.4), size=40)
        weights[weights < 0.1 / vocab] = 0.0
        uniforms = rng.uniform(size=(40, 2))
        expected = [
            sample_inverse_cdf_reference(row, pair)
            for row, pair in zip(weights, uniforms, strict=True)
        ]
        np.testing.assert_array_equal(sample_inverse_cdf(weights, uniforms), expected)


@settings(max_examples=200, deadline=None)
@given(
    arrays(
        np.float64,
        st.integers(1, 30),
        elements=st.one_of(st.just(0.0), st.floats(1e-12, 1e3)),
    ).filter(lambda weights: weights.sum() > 0),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
def test_a_token_of_weight_zero_is_never_drawn(weights, pair):
    token = sample_inverse_cdf(weights[None], np.array([pair]))
    assert weights[token[0]] > 0


@pytest.mark.parametrize("edge", [0.0, float(np.nextafter(1.0, 0.0)), 1 - 2.0**-24])
def test_uniforms_at_the_edges_hit_the_first_and_last_token_with_mass(edge):
    weights = np.array([[0.0, 0.0, 0.1, 0.7, 0.2, 0.0, 0.0]])
    token = sample_inverse_cdf(weights, np.full((1, 2), edge))
    assert token[0] == (2 if edge == 0 else 4)


def test_scale_of_the_weights_does_not_matter(rng):
    weights = rng.uniform(size=(500, 37))
    uniforms = rng.uniform(size=(500, 2))
    # Powers of two leave every rounding as it is.
    np.testing.assert_array_equal(
        sample_inverse_cdf(weights, uniforms), sample_inverse_cdf(weights * 2.0**-30, uniforms)
    )


def test_far_away_rounding_leaves_the_outcome_alone(rng):
    """Noise of relative size 1e-13 moves no boundary across any of 2,000 uniforms here."""
    weights = rng.dirichlet(np.full(2_000, 0.2), size=2_000)
    noisy = weights * (1 + 1e-13 * rng.standard_normal(weights.shape))
    uniforms = rng.uniform(size=(2_000, 2))
    same = sample_inverse_cdf(weights, uniforms) == sample_inverse_cdf(noisy, uniforms)
    assert same.all()


def test_float32_weights_keep_their_law(rng):
    num, vocab = 40_000, 100
    weights = rng.dirichlet(np.full(vocab, 0.5)).astype(np.float32)
    tokens = sample_inverse_cdf(
        np.broadcast_to(weights, (num, vocab)), rng.uniform(size=(num, 2)).astype(np.float32)
    )
    law = weights.astype(np.float64)
    assert chi_square_p_value(tokens, law / law.sum()) > SIGNIFICANCE


def test_refuses_rows_without_mass():
    weights = np.array([[0.5, 0.5], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r"^weights .*without positive weight"):
        sample_inverse_cdf(weights, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"^weights "):
        sample_inverse_cdf(np.array([[0.5, np.nan]]), np.full((1, 2), 0.5))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2)])
def test_refuses_uniforms_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"^uniforms has shape .*give \(3, 2\)"):
        sample_inverse_cdf(np.full((3, 4), 0.25), np.full(shape, 0.5))


# --- races ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 9, 60])
def test_a_race_draws_from_its_weights(rng, vocab):
    weights = rng.gamma(0.5, size=vocab) * 3.0
    weights[rng.uniform(size=vocab) < 0.3] = 0.0
    weights[vocab // 2] = 1.0
    rows = np.broadcast_to(weights, (40_000, vocab))
    tokens = race_argmin(rows, rng.exponential(size=(40_000, vocab)))
    assert (weights[tokens] > 0).all()
    if (weights > 0).sum() > 1:
        assert chi_square_p_value(tokens, weights / weights.sum()) > SIGNIFICANCE


def test_two_races_with_the_same_exponentials_have_the_joint_law(rng):
    """docs/theory.md, (41); with the server's own exponentials the same test refuses."""
    num, vocab = 200_000, 6
    x, y = rng.dirichlet(np.full(vocab, 0.7), size=2)
    y[0] = 0.0
    laws = [np.broadcast_to(law, (num, vocab)) for law in (x, y / y.sum())]
    shared, own = rng.exponential(size=(2, num, vocab))
    joint = joint_law(x, y / y.sum()).ravel()
    draft = race_argmin(laws[0], shared)
    assert chi_square_p_value(draft * vocab + race_argmin(laws[1], shared), joint) > SIGNIFICANCE
    assert chi_square_p_value(draft * vocab + race_argmin(laws[1], own), joint) < SIGNIFICANCE


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_race_is_the_same_for_numpy_and_torch(rng, kind):
    weights = rng.dirichlet(np.full(500, 0.1), size=200).astype(kind)
    exponentials = rng.exponential(size=(200, 500)).astype(kind)
    with_torch = race_argmin(torch.from_numpy(weights), torch.from_numpy(exponentials))
    np.testing.assert_array_equal(with_torch.numpy(), race_argmin(weights, exponentials))


def test_a_race_at_the_edges_of_the_floats():
    """A time of zero wins, weight zero never does, and a time beyond all floats still may."""
    tiny = np.nextafter(0.0, 1.0)
    weights = np.array([[0.0, 0.5, 0.5], [0.0, 0.0, tiny], [tiny, 0.0, 1.0]])
    exponentials = np.array([[0.0, 0.0, 1e-9], [0.0, 1.0, 3.0], [1.0, 0.0, 700.0]])
    np.testing.assert_array_equal(race_argmin(weights, exponentials), [1, 2, 2])


def test_a_race_refuses_what_has_no_winner():
    with pytest.raises(ValueError, match=r"^weights .*without positive weight"):
        race_argmin(np.array([[0.5, 0.5], [0.0, 0.0]]), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^exponentials has shape \(1, 3\): give \(1, 2\)"):
        race_argmin(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"^exponentials = -1: allowed is \[0, inf\)"):
        race_argmin(np.ones((1, 2)), np.array([[1.0, -1.0]]))
