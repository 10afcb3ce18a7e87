"""Gate and truncation together from the table of a step, against the law on the whole vocabulary.

WORST is rounding in double precision. CHORD bounds what a chord of the table adds: a quarter of the
distance of two nodes, h = 1/16 of w of the whole head, times the change of slope there; the slopes
in w are between 0 and -1, and w is at most 1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hlmtheory import truncation_bias as module
from hlmtheory.order import largest
from hlmtheory.truncation import truncated_distribution, truncation_bias
from hlmtheory.truncation_bias import ENTRIES, NUM_NODES, bias_from_table, truncation_table
from hlmtheory.verification import TruncatedDistribution, output_bias

WORST = 1e-9
CHORD = 1 / 64
SIZES = (1, 2, 5, 8, 9, 30, 31, 100, 500, 2000)


def laws(rng: np.random.Generator, kind: str, num: int, vocab: int) -> tuple[np.ndarray, ...]:
    logits = rng.uniform(0.5, 6, size=(num, 1)) * rng.standard_normal((num, vocab))
    if kind == "apart":
        other = rng.uniform(0.5, 6, size=(num, 1)) * rng.standard_normal((num, vocab))
    else:
        other = logits + {"near": 0.7, "nearer": 0.1}[kind] * rng.standard_normal((num, vocab))
    weights = [np.exp(z - z.max(-1, keepdims=True)) for z in (logits, other)]
    return tuple(w / w.sum(-1, keepdims=True) for w in weights)


def sizes_of(vocab: int) -> list[int]:
    return sorted({k for k in SIZES if k < vocab} | {vocab - 1, vocab})


def both(x, y, head, sizes, sigma, table=None) -> tuple[np.ndarray, np.ndarray]:
    """Bias from the table and of the exact law, (B, G)."""
    found = truncation_table(x, y, head, sizes) if table is None else table
    found = np.asarray(found, dtype=float).reshape(len(x), len(sizes), len(ENTRIES))
    of_head = [np.take_along_axis(law, head, -1) for law in (x, y)]
    whole = np.zeros_like(x)
    np.put_along_axis(whole, head, sigma, -1)
    got, exact = [], []
    for place, k in enumerate(sizes):
        size = np.full(len(x), k)
        got.append(bias_from_table(found[:, place], *of_head, sigma, size, x.shape[-1]))
        exact.append(output_bias(TruncatedDistribution(), x, y, whole, k))
    return np.stack(got, -1), np.stack(exact, -1)


CASES = [
    (kind, vocab, num_head)
    for kind in ("apart", "near", "nearer")
    for vocab, num_head in ((2, 2), (3, 1), (40, 8), (30, 30), (400, 32), (3000, 32))
]


@pytest.mark.parametrize(("kind", "vocab", "num_head"), CASES)
def test_any_gate_within_the_head_has_the_bias_of_the_exact_law(kind, vocab, num_head):
    """At nodes exact; between them above it by a chord, and less than its bound."""
    rng = np.random.default_rng(vocab)
    x, y = laws(rng, kind, 20, vocab)
    head, sizes = largest(x, num_head)[1], sizes_of(vocab)
    for share in (0.0, 1.0, 5 / (NUM_NODES - 1)):  # of w at every node: sigma is one number
        got, exact = both(x, y, head, sizes, np.full(head.shape, share))
        np.testing.assert_allclose(got, exact, atol=WORST)
    prefix = (np.arange(num_head) < rng.integers(0, num_head + 1, (20, 1))).astype(float)
    for sigma in (prefix, rng.random(head.shape), (rng.random(head.shape) < 0.3) * 1.0):
        got, exact = both(x, y, head, sizes, sigma)
        assert (got - exact >= -WORST).all()
        assert (got - exact <= CHORD).all()
        assert np.mean(got - exact) <= CHORD / 20


def test_chords_are_within_the_bound_that_the_table_itself_gives():
    """A slope at a node lies between those of the chords beside it: h/4 times their difference."""
    rng = np.random.default_rng(1)
    x, y = laws(rng, "near", 300, 500)
    head, k = largest(x, 32)[1], 4
    table = truncation_table(x, y, head, [k])
    nodes = table[:, 2:]
    steps = np.diff(nodes, axis=-1)
    assert (steps <= WORST).all()  # falling
    assert (np.diff(steps, axis=-1) >= -WORST).all()  # convex
    for node in range(1, NUM_NODES - 2):
        share = (node + rng.random((300, 1))) / (NUM_NODES - 1)
        got, exact = both(x, y, head, [k], np.broadcast_to(share, head.shape), table)
        bound = (steps[:, node + 1] - steps[:, node - 1]) / 4
        assert (got[:, 0] - exact[:, 0] <= bound + WORST).all()
    one = (np.arange(32) == 0) * np.ones((300, 1))
    naive = both(x, y, head, [k], one)[1][:, 0] - both(x, y, head, [k], 0 * one)[1][:, 0]
    # Negative control: rho + tau, a bound, is not this figure.
    rho = np.take_along_axis(np.maximum(x - y, 0), head[:, :1], -1)[:, 0]
    assert np.max(np.abs(rho - naive)) > 0.05


@pytest.mark.parametrize("kind", ["apart", "near"])
def test_the_fast_table_is_the_definition(kind, monkeypatch):
    rng = np.random.default_rng(2)
    for vocab in (5, 60, 900):
        x, y = laws(rng, kind, 6, vocab)
        head, sizes = largest(x, min(32, vocab))[1], sizes_of(vocab)
        fast = truncation_table(torch.from_numpy(x), torch.from_numpy(y), head, sizes)
        assert isinstance(fast, torch.Tensor)
        monkeypatch.setattr(module, "is_torch_array", lambda _: True)
        slow = truncation_table(x, y, head, sizes)
        monkeypatch.undo()
        np.testing.assert_allclose(fast.numpy(), slow, atol=WORST)


def test_a_residual_that_tops_up_beyond_one_counts_every_token():
    """r > 1: tokens that x puts below the tail level, or within the k sent, come too often too."""
    vocab, sizes = 60, [1, 2, 20, 41, 50]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p, q = (rng.dirichlet(np.full(vocab, 0.05))[None] for _ in range(2))
        top = largest(p, 4)[1]
        found = truncation_table(p, q, top, sizes).reshape(len(sizes), -1)
        share = np.divide(found[:, 0], found[:, 1], where=found[:, 1] > 0, out=np.zeros(5))
        got, exact = both(p, q, top, sizes, np.zeros(top.shape))
        np.testing.assert_allclose(got, exact, atol=WORST)
        if (share > 1.01).any():
            break
    assert (share > 1.01).any()


def test_tails_without_mass_ties_and_laws_without_overlap():
    x = np.array([[0.5, 0.3, 0.2, 0, 0, 0], [0.7, 0.2, 0.06, 0.04, 0, 0], [0.6, 0.4, 0, 0, 0, 0]])
    y = np.array([[0.2, 0, 0.1, 0.7, 0, 0], [0, 0, 0, 0, 0.5, 0.5], [0.4, 0.6, 0, 0, 0, 0]])
    for num_head in (1, 2, 6):
        head, sizes = largest(x, num_head)[1], (1, 2, 3, 4, 5, 6)
        for sigma in (np.zeros(head.shape), np.ones(head.shape)):
            got, exact = both(x, y, head, sizes, sigma)
            np.testing.assert_allclose(got, exact, atol=WORST)
    flat = np.full((1, 50), 0.02)
    got, exact = both(flat, flat, largest(flat, 8)[1], [1, 3, 20, 50], np.zeros((1, 8)))
    np.testing.assert_allclose(got, exact, atol=WORST)
    sent = truncated_distribution(x, 2)  # y = xhat: nothing is refused, the bias is TV(x, xhat)
    got, exact = both(x, sent, largest(x, 2)[1], [2], np.zeros((3, 2)))
    np.testing.assert_allclose(got, exact, atol=WORST)


def test_without_a_gate_it_is_the_bias_of_truncation_and_in_single_precision_nearly_so():
    """float32 sums over 5,000 tokens of total 1 lose at most about 1e-5."""
    rng = np.random.default_rng(3)
    x, y = laws(rng, "near", 6, 5000)
    head, sizes = largest(x, 32)[1], (1, 30, 700)
    got, _ = both(x, y, head, sizes, np.zeros(head.shape))
    expected = np.stack([truncation_bias(x, y, k) for k in sizes], -1)
    np.testing.assert_allclose(got, expected, atol=WORST)
    narrow = truncation_table(x.astype(np.float32), y.astype(np.float32), head, sizes)
    assert narrow.dtype == np.float32
    got, _ = both(x, y, head, sizes, np.zeros(head.shape), narrow)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_bad_size_is_named():
    x = np.full((1, 3), 1 / 3)
    with pytest.raises(ValueError, match="size = 0"):
        truncation_table(x, x, largest(x, 2)[1], (0,))


def test_a_sharp_gate_keeps_truncation_from_less_bias_than_the_risk_and_a_fractional_one_does_not(
    rng,
):
    """docs/theory.md, (30): the budget for R is necessary under sharp gates alone."""
    x, y = laws(rng, "apart", 300, 6)
    sharp = (rng.random(x.shape) < 0.5).astype(float)
    for size in (1, 2, 4):
        bias = output_bias(TruncatedDistribution(), x, y, sharp, size)
        assert np.min(bias - np.sum(sharp * np.maximum(x - y, 0), -1)) > -1e-12
    x, y = np.array([[0.16, 0.35, 0.30, 0.19]]), np.array([[0.08, 0.07, 0.73, 0.12]])
    gate = np.array([[0.34, 0.93, 0.06, 0.32]])
    risk = np.sum(gate * np.maximum(x - y, 0))
    floor = np.sum(np.maximum(gate * x - y, 0))
    bias = float(output_bias(TruncatedDistribution(), x, y, gate, 1)[0])
    assert floor <= bias < risk - 0.02
