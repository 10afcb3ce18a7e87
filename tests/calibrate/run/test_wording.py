"""Verdicts in one sentence: they follow the records, and turn where the records do."""

from __future__ import annotations

from typing import Any

import paper_records
import pytest

from calibrate.run.records import Figure, PlanRecord, PlanRow, Repeats, ValidationRecord
from calibrate.run.wording import (
    coverage_details,
    coverage_text,
    guarantees_text,
    plan_texts,
    verdict_text,
)


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


def test_a_study_of_guarantees_says_whether_promises_were_kept() -> None:
    record = paper_records.guarantees_record()
    families = {row.family for row in record.rows}
    assert {"ltt", "risk"} <= families
    for low, verdict in ((0.0, "keep"), (0.2, "do not keep")):
        broken = Figure(value=0.25, low=low, high=0.4)
        rows = tuple(
            row.model_copy(update={"violation_share": broken}) if row.family == "ltt" else row
            for row in record.rows
        )
        text = guarantees_text(record.model_copy(update={"rows": rows}))
        assert text.startswith(f"certified thresholds {verdict} their promise")
        assert "met on the calibration alone" in text


def test_a_plan_says_the_fewest_prompts_of_the_rules_that_promise() -> None:
    def row(rule: str, num_prompts: int | None, guaranteed: bool) -> PlanRow:
        return PlanRow(
            budget=0.01, rule=rule, test=None, guaranteed=guaranteed, cap=None,
            goal_skip_rate=0.2, without_loss=1, num_prompts=num_prompts, wall_s=60.0,
        )  # fmt: skip

    def plan(*rows: PlanRow) -> PlanRecord:
        return PlanRecord(
            num_prompts=160, num_tokens=9000, score="uncertainty", certified="prompts",
            confidence=0.95, power=0.8, most=5000, ms_per_prompt=1.0, rows=rows, intervals=(),
        )  # fmt: skip

    (text,) = plan_texts(plan(row("a", 700, True), row("b", 500, True), row("t", 10, False)))
    assert "500 prompts, 1 min here" in text
    assert "(b); this run has 160" in text
    (text,) = plan_texts(plan(row("a", None, True), row("t", 10, False)))
    assert text.endswith("more than 5,000 prompts")
    # What is more than is read unless told otherwise is told, and how.
    _, more = plan_texts(plan(row("a", 4_480, True)))
    # 4,480 x 9,000 / 160 tokens, and a tenth more, for answers may be longer.
    assert "about 252,000 tokens: `hlm calibrate --read-tokens 277200` looks at all" in more
    assert len(plan_texts(plan(row("a", 4_440, True)))) == 1
