"""Figures: intervals by their textbook formulas, and how numbers are printed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from calibrate.run.figure import (
    as_figure,
    curve,
    excludes_zero,
    figure,
    mean_figure,
    number_text,
    scaled,
    share_figure,
)
from calibrate.run.records import Figure
from hlmtheory.clusters import mean_over_tokens


def test_a_mean_has_students_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    found = mean_figure(values, 0.9, "ms")
    low, high = stats.t.interval(0.9, 3, values.mean(), stats.sem(values))
    assert found.value == pytest.approx(4.0)
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert found.unit == "ms"
    assert mean_figure(values[:1], 0.9) == Figure(value=1.0)


def test_bounds_clip_the_interval_alone() -> None:
    estimate = mean_over_tokens(np.array([0.0, 0.0, 1.0]), np.arange(3), 3)
    free, clipped = as_figure(estimate), as_figure(estimate, low_bound=0.0, high_bound=1.0)
    assert free.low is not None
    assert free.low < 0
    assert (clipped.value, clipped.low, clipped.high) == (free.value, 0.0, 1.0)


def test_a_share_of_nothing_is_null() -> None:
    assert share_figure(0, 0, 0.95) == Figure(value=None)
    found = share_figure(0, 10, 0.95)  # Clopper-Pearson with no success
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025**0.1)


def test_what_is_not_finite_is_null() -> None:
    assert figure(math.nan, 0.0, 1.0, "J") == Figure(value=None, unit="J")
    assert figure(1.0, -math.inf, 2.0) == Figure(value=1.0, low=None, high=2.0)


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 1.0, False), (None, None, 0)],
)
def test_excludes_zero(low: float | None, high: float | None, excludes: bool) -> None:
    assert excludes_zero(Figure(value=0.1, low=low, high=high)) == bool(excludes)


def test_curves_line_up_with_their_grid() -> None:
    estimates = [mean_over_tokens(np.arange(4.0) + k, np.arange(4), 4) for k in range(2)]
    found = curve([0.5, 1.5], estimates, 0.95)
    assert found.grid == (0.5, 1.5)
    assert found.value == (1.5, 2.5)
    assert found.low[0] == as_figure(estimates[0]).low
    assert curve([1.0], [mean_over_tokens(np.ones(2), np.zeros(2, int), 1)], 0.95).low == (None,)


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.012345, {}, "0.0123"),
        (1234567.8, {}, "1,234,568"),
        (99.96, {}, "100"),
        (-0.5, {}, "−0.5"),
        (-0.0001, {"decimals": 2}, "0.00"),
        (2.0, {"decimals": 1}, "2.0"),
        (None, {}, "–"),
        (math.nan, {}, "–"),
        (Figure(value=None, unit="ms"), {}, "–"),
        (Figure(value=0.5, low=-0.25, high=1.0), {}, "0.5 [−0.25, 1]"),
        (Figure(value=0.5, low=0.25, high=1.0), {"interval": False}, "0.5"),
        (Figure(value=0.5), {"decimals": 2}, "0.50"),
    ],
)
def test_number_text(value: Figure | float | None, options: dict, text: str) -> None:
    assert number_text(value, **options).replace("\N{NO-BREAK SPACE}", " ") == text
    assert " " not in number_text(value, **options)


def test_scaled_keeps_what_is_not_there() -> None:
    found = scaled(Figure(value=0.5, low=None, high=0.75), 100, "%")
    assert found == Figure(value=50.0, low=None, high=75.0, unit="%")
    assert scaled(Figure(value=None), 100) == Figure(value=None)
