"""The coupled draws against integrals, loops and limits that share no code with them.

Sums here have at most a few dozen terms of size one, each off by 2.2e-16: 1e-12 is far above that
and far below any error of a formula.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from hlmtheory.acceptance import total_variation
from hlmtheory.coupling import (
    coupled_output_bias,
    coupled_output_law,
    coupling_columns,
    joint_law,
)
from hlmtheory.head import Head

EXACT = 1e-12


def obvious_agreement(x: np.ndarray, y: np.ndarray, v: int) -> float:
    """1/sum_j max(x_j/x_v, y_j/y_v), as published."""
    if x[v] == 0 or y[v] == 0:
        return 0.0
    return float(1 / np.maximum(x / x[v], y / y[v]).sum())


def obvious_columns(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Agreement and Phi in ratios y/x, both positive: a walk from one ratio to the next."""
    ratio = y / x
    agreement, race = np.empty_like(x), np.empty_like(x)
    phi, before, level_before, behind, ahead = 0.0, 0.0, 1.0, 0.0, 1.0
    for v in np.argsort(ratio):
        behind, ahead = behind + x[v], ahead - y[v]
        level = behind * ratio[v] + ahead
        phi += (ratio[v] - before) / (level_before * level)
        agreement[v], race[v] = y[v] / level, phi
        before, level_before = ratio[v], level
    return agreement, race


def risk_and_floor(x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> tuple[float, float]:
    """rho of (11) and rho_min of (13)."""
    return float(sigma @ np.maximum(x - y, 0)), float(np.maximum(sigma * x - y, 0).sum())


def joint_by_quadrature(x: np.ndarray, y: np.ndarray, i: int, v: int) -> float:
    """P(d = i, o = v), i != v, from the plane of (E_i, E_v) in polar form; no conditioning.

    The other E_k must exceed max(x_k E_i/x_i, y_k E_v/y_v); with E_i = l z, E_v = l (1 - z) the
    integral over l is 1/c(z)^2.
    """
    others = [k for k in range(len(x)) if k not in (i, v)]
    low, high = y[i] / (y[i] + y[v]), x[i] / (x[i] + x[v])
    if low >= high:
        return 0.0

    def integrand(z: float) -> float:
        waits = np.maximum(x[others] * z / x[i], y[others] * (1 - z) / y[v])
        return float((1 + waits.sum()) ** -2)

    per_wait = x[others] / x[i] * y[v] / np.where(y[others] > 0, y[others], 1)
    knots = sorted({low, high, *(k for k in 1 / (1 + per_wait) if low < k < high)})
    pieces = itertools.pairwise(knots)
    return sum(integrate.quad(integrand, *piece, epsabs=1e-13)[0] for piece in pieces)


def test_one_skipped_token_has_the_published_bias_on_1000_pairs(rng, dirichlet_pairs):
    """x_v - 1/sum_j max(x_j/x_v, y_j/y_v): from the law of the output, and from the two columns."""
    for vocab, concentration in ((2, 1.0), (5, 0.3), (12, 0.1), (40, 1.0)):
        x, y = dirichlet_pairs(250, vocab, concentration=concentration)
        v = rng.integers(vocab, size=250)
        sigma = np.eye(vocab)[v]
        wanted = [p[k] - obvious_agreement(p, q, k) for p, q, k in zip(x, y, v, strict=True)]
        law_bias = total_variation(coupled_output_law(x, y, sigma), y)
        np.testing.assert_allclose(law_bias, wanted, rtol=0, atol=EXACT)
        p, q = (np.take_along_axis(law, v[:, None], axis=-1) for law in (x, y))
        columns = coupling_columns(x, y, v[:, None])
        bias = coupled_output_bias(p, q, *columns, np.ones((250, 1)))
        np.testing.assert_allclose(bias, wanted, rtol=0, atol=EXACT)


def test_the_margins_of_the_joint_law_are_x_and_y(dirichlet_pairs):
    for vocab in (1, 2, 6, 30):
        x, y = dirichlet_pairs(200, vocab)
        joint = joint_law(x, y)
        assert (joint >= 0).all()
        np.testing.assert_allclose(joint.sum(axis=-1), x, rtol=0, atol=EXACT)
        np.testing.assert_allclose(joint.sum(axis=-2), y, rtol=0, atol=EXACT)


def test_the_joint_law_is_the_integral_over_both_races(dirichlet_pairs):
    for vocab in (2, 3, 6):
        x, y = dirichlet_pairs(4, vocab, concentration=0.6)
        for p, q, joint in zip(x, y, joint_law(x, y), strict=True):
            for i, v in np.ndindex(vocab, vocab):
                wanted = obvious_agreement(p, q, i) if i == v else joint_by_quadrature(p, q, i, v)
                assert joint[i, v] == pytest.approx(wanted, abs=1e-11)


def test_negative_control_independent_server_noise_is_another_law(dirichlet_pairs):
    """Without shared randomness a skipped v has bias x_v (1 - y_v), not the formula."""
    x, y = dirichlet_pairs(50, 8)
    sigma = np.eye(8)[x.argmax(axis=-1)]
    coupled = total_variation(coupled_output_law(x, y, sigma), y)
    independent = total_variation(sigma * x + (1 - (sigma * x).sum(-1, keepdims=True)) * y, y)
    assert (coupled <= independent + EXACT).all()
    assert (independent - coupled).max() > 0.05


@pytest.mark.parametrize("sharp", [True, False], ids=["sharp", "fractional"])
def test_bias_from_the_candidates_is_that_of_the_whole_law(rng, dirichlet_pairs, sharp):
    batch, vocab, head = 300, 20, 7
    x, y = dirichlet_pairs(batch, vocab)
    x[: batch // 3, 3] = 0.0  # a candidate that the device never draws
    x /= x.sum(axis=-1, keepdims=True)
    ids = rng.permuted(np.tile(np.arange(vocab), (batch, 1)), axis=-1)[:, :head]
    told = rng.uniform(size=(batch, head)) * (rng.uniform(size=(batch, head)) < 0.7)
    told = np.ceil(told) if sharp else told
    sigma = np.zeros((batch, vocab))
    np.put_along_axis(sigma, ids, told, axis=-1)
    wanted = total_variation(coupled_output_law(x, y, sigma), y)
    p, q = (np.take_along_axis(law, ids, axis=-1) for law in (x, y))
    bias = coupled_output_bias(p, q, *coupling_columns(x, y, ids), told)
    np.testing.assert_allclose(bias, wanted, rtol=0, atol=EXACT)
    assert wanted.max() > 0.2
    if sharp:
        booleans = coupled_output_bias(p, q, *coupling_columns(x, y, ids), told > 0)
        np.testing.assert_array_equal(booleans, bias)


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1)), min_size=6, max_size=6)


@settings(max_examples=400, deadline=None)
@given(weights, weights, st.lists(st.floats(0, 1), min_size=6, max_size=6), st.booleans())
def test_bias_lies_between_its_bounds(x, y, sigma, sharp):
    """rho_min <= bias <= sum_v sigma_v (x_v - a_v); for a sharp gate the floor is rho."""
    x, y, sigma = np.array(x) + 1e-12, np.array(y) + 1e-12, np.array(sigma)
    x, y, sigma = x / x.sum(), y / y.sum(), np.round(sigma) if sharp else sigma
    bias = total_variation(coupled_output_law(x, y, sigma), y)
    met = np.array([obvious_agreement(x, y, v) for v in range(6)])
    rho, floor = risk_and_floor(x, y, sigma)
    assert bias >= floor - EXACT
    assert bias <= sigma @ (x - met) + EXACT
    if sharp:
        assert bias >= rho - EXACT
    # A skipped token's own loss, from x_v and y_v alone.
    assert (met <= np.minimum(x, y) + EXACT).all()
    assert (met >= x * y / (x + y - x * y) - EXACT).all()


def test_a_fractional_gate_may_lie_below_accept_resample():
    """The floor of every scheme is rho_min; rho is none for a fractional gate: (41e)."""
    x, y, sigma = np.array([0.4, 0.4, 0.2]), np.array([0.1, 0.3, 0.6]), np.array([1.0, 0.3, 0.0])
    bias = float(total_variation(coupled_output_law(x, y, sigma), y))
    rho, floor = risk_and_floor(x, y, sigma)
    assert (bias, floor, rho) == pytest.approx((0.3, 0.3, 0.33), abs=EXACT)


def test_the_floor_is_met_at_the_ends_of_the_ratio_only(rng):
    """A single skipped token has bias rho if its y/x is the smallest or largest, else more."""
    x, y = rng.dirichlet(np.ones(6), size=2)
    order = np.argsort(y / x)
    biases = total_variation(coupled_output_law(*np.broadcast_arrays(x, y, np.eye(6))), y)[order]
    risks = np.maximum(x - y, 0)[order]
    np.testing.assert_allclose(biases[[0, -1]], risks[[0, -1]], rtol=0, atol=EXACT)
    assert (biases[1:-1] > risks[1:-1] + 1e-4).all()


def test_the_gate_that_never_skips_and_the_one_that_always_does(dirichlet_pairs):
    x, y = dirichlet_pairs(50, 9)
    np.testing.assert_allclose(coupled_output_law(x, y, 0 * x), y, rtol=0, atol=EXACT)
    np.testing.assert_allclose(coupled_output_law(x, y, 0 * x + 1), x, rtol=0, atol=EXACT)


def test_equal_laws_always_meet(dirichlet_pairs):
    x, _ = dirichlet_pairs(20, 10)
    ids = np.tile(np.arange(10), (20, 1))
    columns = coupling_columns(x, x, ids)
    np.testing.assert_allclose(columns[0], x, rtol=0, atol=EXACT)
    np.testing.assert_allclose(joint_law(x, x), x[:, :, None] * np.eye(10), rtol=0, atol=EXACT)
    bias = coupled_output_bias(x, x, *columns, np.full((20, 10), 0.7))
    np.testing.assert_allclose(bias, 0, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, 0, 0, 0], [0.2, 0.3, 0.5, 0]),
        ([0.2, 0.3, 0.5, 0], [1.0, 0, 0, 0]),
        ([1.0, 0, 0, 0], [0, 1.0, 0, 0]),
        ([1.0, 0, 0, 0], [1.0, 0, 0, 0]),
        ([0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]),
        ([0.5, 0.2, 0.3, 0], [0.6, 0, 0.1, 0.3]),
        ([1 - 1e-300, 1e-300, 0, 0], [1e-310, 1.0, 0, 0]),
    ],
)
def test_zeros_and_point_masses(x, y):
    """Tokens that one side, or neither, can draw: the margins hold, nothing is NaN."""
    x, y = np.array(x), np.array(y)
    joint = joint_law(x, y)
    np.testing.assert_allclose(joint.sum(axis=-1), x, rtol=0, atol=EXACT)
    np.testing.assert_allclose(joint.sum(axis=-2), y, rtol=0, atol=EXACT)
    ids = np.arange(4)[None]
    agreement, race = coupling_columns(x[None], y[None], ids)
    np.testing.assert_allclose(agreement[0], np.diag(joint), rtol=0, atol=EXACT)
    assert ((race >= 0) & (race <= 2 + EXACT)).all()
    sigma = np.array([1.0, 0.5, 0, 1.0])
    wanted = total_variation(coupled_output_law(x, y, sigma), y)
    bias = coupled_output_bias(x[None], y[None], agreement, race, sigma[None])
    np.testing.assert_allclose(bias, wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_large_vocabulary_keeps_the_precision_of_its_inputs(rng, kind):
    """50,000 tokens over 20 orders of magnitude: rounding stays that of float64.

    x and y sum to 1 within 1e-5 in float32 only, and enter as the proportions that a race sees.
    """
    logits = rng.normal(0, 4, size=50_000)
    x, y = np.exp(logits), np.exp(logits + rng.normal(0, 1.5, size=50_000))
    x, y = (x / x.sum()).astype(kind), (y / y.sum()).astype(kind)
    ids = np.append(np.argsort(-x)[:40], rng.integers(50_000, size=40))
    agreement, race = coupling_columns(x[None], y[None], ids[None])
    assert agreement.dtype == race.dtype == np.float64
    p, q = x.astype(float) / x.astype(float).sum(), y.astype(float) / y.astype(float).sum()
    walked, phi = obvious_columns(p, q)
    wanted = [obvious_agreement(p, q, v) for v in ids]
    np.testing.assert_allclose(agreement[0], wanted, rtol=1e-11, atol=0)
    np.testing.assert_allclose(walked[ids], wanted, rtol=1e-9, atol=0)  # the walk's own rounding
    np.testing.assert_allclose(race[0], phi[ids], rtol=0, atol=1e-11)


def test_numpy_and_torch_give_the_same(rng, dirichlet_pairs):
    x, y = dirichlet_pairs(11, 60)
    ids = rng.integers(60, size=(11, 9))
    sigma = rng.uniform(size=(11, 60))
    for kind in (np.float64, np.float32):
        ours = x.astype(kind), y.astype(kind)
        theirs = tuple(torch.from_numpy(law) for law in ours)
        columns = coupling_columns(*ours, ids), coupling_columns(*theirs, torch.from_numpy(ids))
        laws = (
            coupled_output_law(*ours, sigma),
            coupled_output_law(*theirs, torch.from_numpy(sigma)),
        )
        for with_numpy, with_torch in zip(*columns, strict=True):
            assert with_torch.dtype == torch.float64
            np.testing.assert_allclose(with_torch.numpy(), with_numpy, rtol=0, atol=EXACT)
        np.testing.assert_allclose(laws[1].numpy(), laws[0], rtol=0, atol=EXACT)


def test_tensors_outside_main_memory_run_the_same_formulas(rng, dirichlet_pairs, monkeypatch):
    """There torch sorts: forced here by leaving the rows as they came."""
    x, y = dirichlet_pairs(5, 40)
    ids = rng.integers(40, size=(5, 7))
    wanted = coupling_columns(x, y, ids)
    monkeypatch.setattr(Head, "rows", staticmethod(lambda rows: rows))
    found = coupling_columns(*(torch.from_numpy(a) for a in (x, y, ids)))
    for ours, theirs in zip(wanted, found, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=0, atol=EXACT)


def test_what_was_not_recorded_is_nan_unless_nothing_is_skipped():
    """NaN only where a skipped candidate's columns are missing."""
    x, y = np.array([[0.7, 0.3]] * 4), np.array([[0.4, 0.6]] * 4)
    agreement, race = (c.copy() for c in coupling_columns(x, y, np.array([[0, 1]] * 4)))
    agreement[:3], race[:3] = np.nan, np.nan
    agreement[2, 0], race[2, 0] = agreement[3, 0], race[3, 0]
    sigma = np.array([[0.0, 0], [0, 0.5], [1, 0], [1, 0]])
    bias = coupled_output_bias(x, y, agreement, race, sigma)
    np.testing.assert_allclose(bias, [0, np.nan, 0.3, 0.3], rtol=0, atol=EXACT)
    assert bias[0] == 0
    tensors = [torch.from_numpy(column) for column in (x, y, agreement, race, sigma)]
    np.testing.assert_allclose(coupled_output_bias(*tensors).numpy(), bias, rtol=0, atol=EXACT)


def test_refusals_name_the_argument():
    x = np.array([[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"^y sums to 1 only within"):
        coupling_columns(x, 2 * x, np.array([[0]]))
    with pytest.raises(ValueError, match=r"^x, y, token_ids have shapes .*give \(B, V\)"):
        coupling_columns(x[0], x[0], np.array([0]))
    for token in (-1, 2):
        with pytest.raises(ValueError, match=rf"^token_ids holds {token}: allowed is 0 to V - 1"):
            coupling_columns(x, x, np.array([[0, token]]))
    with pytest.raises(ValueError, match=r"^skip_probability = 1\.5: allowed is \[0, 1\]"):
        coupled_output_law(x, x, x + 1)
    with pytest.raises(ValueError, match=r"^skip_probability = 1\.5: allowed is \[0, 1\]"):
        coupled_output_bias(x, x, x, x, x + 1)
