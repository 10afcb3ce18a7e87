"""A law in b bits: its levels, its support, and that verifying with it loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from hlmtheory.acceptance import total_variation
from hlmtheory.quantised_law import (
    RANGE_OCTAVES,
    codes_of,
    law_of,
    levels,
    quantised_law,
    total_of,
)
from hlmtheory.verification import FullDistribution, output_bias


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_levels_rise_from_the_range_to_one(bits):
    values = levels(bits)
    assert len(values) == 2**bits
    assert values[0] == 0
    assert values[-1] == 1
    assert values[1] == pytest.approx(2.0**-RANGE_OCTAVES, rel=1e-12)
    assert np.all(np.diff(values) > 0)


def test_bits_out_of_range_are_refused():
    for bits in (1, 17):
        with pytest.raises(ValueError, match=rf"prob_bits = {bits}: allowed is 2 to 16"):
            levels(bits)


def test_a_law_keeps_support_and_order_and_stays_near(dirichlet_pairs):
    x, _ = dirichlet_pairs(50, 400)
    x[:, ::7] = 0
    x /= x.sum(-1, keepdims=True)
    found = quantised_law(x, 8)
    assert np.allclose(found.sum(-1), 1, atol=1e-12)
    assert np.array_equal(found > 0, x > 0)
    order = np.argsort(x, axis=-1)
    assert np.all(np.diff(np.take_along_axis(found, order, -1)) >= 0)
    # Within half a level in log x, up to one factor a row, where the range reaches.
    half = 2 ** (RANGE_OCTAVES / 254 / 2)
    inside = x > 2.0**-RANGE_OCTAVES
    ratio = np.where(inside, found / np.where(inside, x, 1), np.nan)
    assert np.nanmax(np.nanmax(ratio, -1) / np.nanmin(ratio, -1)) <= half**2 * (1 + 1e-12)


def test_more_bits_come_nearer(dirichlet_pairs):
    x, _ = dirichlet_pairs(50, 400)
    far = [float(np.mean(total_variation(quantised_law(x, bits), x))) for bits in (4, 6, 8, 10)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < far[0] / 32  # four times the levels, a quarter of the error, twice and more


def test_numpy_and_torch_agree(dirichlet_pairs):
    torch = pytest.importorskip("torch")
    x, _ = dirichlet_pairs(20, 300)
    assert np.array_equal(codes_of(torch.from_numpy(x), 8).numpy(), codes_of(x, 8))
    found = quantised_law(torch.from_numpy(x), 8).numpy()
    assert np.allclose(found, quantised_law(x, 8), rtol=1e-14, atol=0)


def test_part_of_a_law_is_told_by_its_codes_and_the_total(dirichlet_pairs):
    x, _ = dirichlet_pairs(20, 300)
    codes = codes_of(x, 8)
    some = law_of(codes[:, 10:40], total_of(codes, 8), 8, x)
    assert np.array_equal(some, quantised_law(x, 8)[:, 10:40])


def test_drafts_from_the_rounded_law_lose_nothing_and_others_do(dirichlet_pairs):
    """The law that is verified against must be the one that drafts come from; (62), (22)."""
    x, y = dirichlet_pairs(200, 50)
    rounded = quantised_law(x, 4)
    none = np.zeros_like(x)
    assert np.max(output_bias(FullDistribution(), rounded, y, none)) < 1e-12
    # Drafts from x, verified with the rounded law: the bias that rounding is said not to have.
    accepted = x * np.minimum(1, y / rounded)
    missing = 1 - accepted.sum(-1, keepdims=True)
    residual = np.maximum(y - rounded, 0)
    law = accepted + missing * residual / residual.sum(-1, keepdims=True)
    assert np.mean(total_variation(law, y)) > 1e-3
