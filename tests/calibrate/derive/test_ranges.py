"""No interval leaves the range of what it is of: shares, risks, bits, thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibrate.derive.predict import METRICS, RANGES
from calibrate.run.figure import SHARE, mean_figure
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, DerivationRecord, Figure, ValidationRecord


def inside(number: Figure, low: float, high: float) -> bool:
    ends = [end for end in (number.low, number.high) if end is not None]
    return all(low <= end <= high for end in ends)


@pytest.mark.parametrize("metric", METRICS)
def test_predictions_and_reruns_stay_in_the_range_of_their_metric(
    metric: str, judged_run: Path
) -> None:
    points = read_record(judged_run, DerivationRecord).operating_points
    cells = [c for c in read_record(judged_run, ValidationRecord).cells if c.metric == metric]
    figures = [point.predicted[metric] for point in points]
    figures += [number for cell in cells for number in (cell.predicted, cell.measured)]
    assert any(number.low is not None for number in figures)
    assert all(inside(number, *RANGES[metric]) for number in figures)


def test_thresholds_shares_and_curves_do_too(judged_run: Path) -> None:
    derivation = read_record(judged_run, DerivationRecord)
    assert all(inside(p.uncertainty_threshold, 0, 1) for p in derivation.operating_points)
    assert derivation.thresholds is not None
    curves = (derivation.thresholds.skip_rate, derivation.thresholds.risk)
    assert all(inside(number, 0, 1) for curve in curves for number in curve.figures())
    fit = read_record(judged_run, CalibrationRecord).fit
    assert inside(fit.mean_rejection, 0, 1)
    assert inside(fit.delta, 0, 1)


def test_an_interval_is_cut_and_its_value_stays() -> None:
    values = np.array([0.0, 0.0, 0.0, 0.2])
    plain, cut = (mean_figure(values, 0.95, "", *ends) for ends in ((), SHARE))
    assert plain.low is not None
    assert plain.low < 0
    assert (cut.value, cut.low, cut.high) == (plain.value, 0.0, plain.high)
