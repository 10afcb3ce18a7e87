"""Verdicts in one sentence: they follow the records, and turn where the records do."""

from __future__ import annotations

from typing import Any

import paper_records
import pytest

from calibrate.run.records import Figure, Repeats, ValidationRecord
from calibrate.run.wording import coverage_details, coverage_text, verdict_text


def validation(at_most: float, as_wide: float) -> ValidationRecord:
    record = paper_records.validation_record(paper_records.derivation_record())
    hold = Repeats(
        num_repeats=1000, share=Figure(value=0.95, low=0.9, high=0.99),
        probability_of_at_most=at_most, probability_of_at_least=1.0,
        widest_error=4.25, probability_of_as_wide=as_wide,
    )  # fmt: skip
    return record.model_copy(
        update={"coverage": record.coverage.model_copy(update={"if_predictions_hold": hold})}
    )


@pytest.mark.parametrize(
    ("at_most", "as_wide", "verdict"),
    [(0.5, 0.5, "hold"), (0.01, 0.5, "do not hold"), (0.5, 0.01, "do not hold")],
)
def test_predictions_hold_unless_chance_hardly_covers_as_few_or_errs_as_wide(
    at_most: float, as_wide: float, verdict: str
) -> None:
    record = validation(at_most, as_wide)
    text = coverage_text(record)
    assert text.startswith(f"The predictions {verdict}: ")
    assert text.count(". ") == 0  # one sentence
    assert ("standard errors off" in text) == (as_wide < 0.05)
    total = record.coverage.total
    assert f"{round(0.9 * total)} to {round(0.99 * total)} were to be expected" in text
    assert any("4.2" in detail for detail in coverage_details(record))


def test_without_a_spread_nothing_is_claimed() -> None:
    record = validation(0.5, 0.5)
    coverage = record.coverage.model_copy(update={"if_predictions_hold": None})
    text = coverage_text(record.model_copy(update={"coverage": coverage}))
    assert text.startswith("Too few prompts to say whether the predictions hold")


def fitted(**changes: Any) -> str:
    record = paper_records.calibration_record()
    fit = record.fit.model_copy(update=changes)
    return verdict_text(record.model_copy(update={"fit": fit}))


def test_a_calibration_says_whether_uncertainty_tells_rejections() -> None:
    assert fitted().startswith("uncertainty tells rejections here")
    flat = Figure(value=0.01, low=-0.05, high=0.07)
    assert fitted(slope=flat).startswith("uncertainty does not tell rejections here")
    same = Figure(value=1e-8, low=0.0, high=2e-8)
    assert fitted(mean_rejection=same, slope=flat).endswith("both models have the same law")
    assert "too few prompts" in fitted(slope=Figure(value=0.5))
    assert fitted(degenerate="no spread").endswith("rejections here: no spread")
