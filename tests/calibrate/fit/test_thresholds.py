"""Every rule's threshold of a trace, and its bootstrap interval, against slow ways."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.analysis import made_up_trace
from calibrate.fit.line import fit_line
from calibrate.fit.thresholds import NUM_RESAMPLES, DerivedThreshold, derive_thresholds
from calibrate.run.records import CalibrationRecord, DeriveRequest
from calibrate.run.traces import Trace
from hlmtheory.clusters import resample_prompts
from hlmtheory.guarantees import conformal_threshold, learn_then_test_threshold
from hlmtheory.risk import SkipAtoms
from hlmtheory.scores import score_named
from hlmtheory.thresholds import Threshold, risk_budget_threshold

REQUEST = DeriveRequest(policies=(), risks=(0.01, 0.05), confidence=0.9)


def calibration_of(trace: Trace) -> CalibrationRecord:
    """Of a calibration, thresholds read the fit alone."""
    can_reject = trace["target_prob"] < trace["draft_prob"]
    arguments = (trace["rejection_prob"], can_reject, trace.prompt_index, trace.num_prompts)
    return CalibrationRecord.model_construct(fit=fit_line(trace["uncertainty"], *arguments))


def derived(trace: Trace, name: str = "uncertainty") -> tuple[SkipAtoms, list[DerivedThreshold]]:
    score = score_named(name)
    atoms = SkipAtoms.of_drafts(
        score.of_draft(trace.step()), trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )

    def certified(alpha: float) -> list[Threshold]:
        return [
            conformal_threshold(atoms, alpha, score.high),
            learn_then_test_threshold(atoms, alpha, 1 - REQUEST.confidence, score.high),
        ]

    found = derive_thresholds(atoms, score, trace, calibration_of(trace), REQUEST, certified)
    return atoms, found


def test_rules_are_those_of_the_theory() -> None:
    trace = made_up_trace(1_500, 100)
    atoms, found = derived(trace)
    rules = [one.threshold.rule for one in found]
    assert rules == [
        "risk-averse", "risk-prone", "risk-0.01", "conformal-0.01", "ltt-0.01",
        "risk-0.05", "conformal-0.05", "ltt-0.05",
    ]  # fmt: skip
    fit = calibration_of(trace).fit
    slope, intercept, delta = fit.slope.value, fit.intercept.value, fit.delta.value
    assert found[0].threshold.value == -intercept / slope
    assert found[1].threshold.value == (delta - intercept) / slope
    assert found[5].threshold == risk_budget_threshold(atoms, 0.05)
    assert found[6].threshold == conformal_threshold(atoms, 0.05)
    ltt = learn_then_test_threshold(atoms, 0.05, 1 - 0.9)
    assert found[7].threshold == ltt
    assert found[7].threshold.confidence == pytest.approx(0.9)
    for one in found:
        certified = one.threshold.family in ("conformal", "ltt")
        assert (one.interval is None) == certified
        assert one.figure.value == (
            one.threshold.value if np.isfinite(one.threshold.value) else None
        )


def test_intervals_are_those_of_resampled_prompts() -> None:
    """The very same resamples, each put together token by token."""
    trace = made_up_trace(600, 30)
    _, found = derived(trace)
    u, beta, index = trace["uncertainty"], trace["rejection_prob"], trace.prompt_index
    rows = [np.flatnonzero(index == prompt) for prompt in range(30)]
    counts = resample_prompts(30, NUM_RESAMPLES, np.random.default_rng(0))
    averse, budget = [], []
    for row in counts.astype(int):
        drawn = np.concatenate([rows[prompt] for prompt in np.repeat(np.arange(30), row)])
        slope, intercept = np.polyfit(u[drawn], beta[drawn], 1)
        averse.append(-intercept / slope)
        order = np.argsort(u[drawn])
        risk = np.cumsum(beta[drawn][order]) / len(drawn)
        inside = int((risk <= 0.05).sum())
        budget.append(u[drawn][order][inside - 1] if inside else 0.0)
    low, high = np.quantile(averse, [0.05, 0.95])
    assert found[0].interval == pytest.approx((low, high), abs=1e-8)
    low, high = np.quantile(budget, [0.05, 0.95])
    # 400 quantiles of 600 tokens: the next score but one.
    step = np.max(np.diff(np.unique(u), n=1)[20:-20])
    assert found[5].interval == pytest.approx((low, high), abs=3 * step)


def test_another_score_has_a_line_and_bounds_of_its_own() -> None:
    trace = made_up_trace(1_500, 60)
    _, found = derived(trace, "max_logit")
    score = -trace["max_logit"]
    slope, intercept = np.polyfit(score, trace["rejection_prob"], 1)
    assert found[0].threshold.value == pytest.approx(-intercept / slope)
    assert found[0].threshold.feasible, "below 0, but this score has no lower bound"
    assert score.min() < found[5].threshold.value < score.max()
    # Without an upper bound, what skips everything is the largest score seen.
    trace.columns["rejection_prob"] *= 1e-6
    _, found = derived(trace, "max_logit")
    assert found[5].threshold.value == score.max()


def test_a_score_that_does_not_vary_is_a_named_result() -> None:
    trace = made_up_trace(600, 30)
    trace.columns["entropy"] = np.full(600, 1.5)
    _, found = derived(trace, "entropy")
    assert not found[0].threshold.feasible
    assert "not positive" in found[0].threshold.reason
    assert found[0].figure.value is None
    assert "already carry risk" in found[2].threshold.reason
