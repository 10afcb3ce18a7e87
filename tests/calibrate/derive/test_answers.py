"""Budgets for whole answers, and their distance by length, on a synthetic run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic_run import NUM_STEPS, make_calibration

from calibrate.derive.answers import NUM_TRIED, _last_within, answer_threshold
from calibrate.derive.derivation import derive_run
from calibrate.derive.predict import (
    answer_divergence_estimate,
    is_bounded,
    point_policy,
    policy_atoms,
    predicted_tokens,
)
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, DerivationRecord, DeriveRequest
from calibrate.run.traces import Trace, read_trace, shard_paths
from calibrate.run.wording import UNKNOWN_ANSWERS
from hlmtheory.policies import GatedPolicy, policy_from_settings

POLICIES = ("slm", "hlm", "u-hlm", "r-hlm", "coupled", "ask-llm", "cu-hlm-offline")
REQUEST = DeriveRequest(policies=POLICIES, risks=(0.02, 0.05), answer_risks=(0.1, 0.3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "run"
    make_calibration(folder)
    derive_run(folder, REQUEST)
    return folder


@pytest.fixture(scope="module")
def record(run: Path) -> DerivationRecord:
    return read_record(run, DerivationRecord)


@pytest.fixture(scope="module")
def trace(run: Path) -> Trace:
    return read_trace(shard_paths(run))


def gated(name: str, threshold: float = 0.0) -> GatedPolicy:
    policy = policy_from_settings(name, {}, threshold)
    assert isinstance(policy, GatedPolicy)
    return policy


@pytest.mark.parametrize("name", ["u-hlm", "r-hlm", "coupled", "ask-llm"])
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_a_budget_for_answers_is_kept_and_used(run, record, trace, name, alpha) -> None:
    points = {point.rule: point for point in record.operating_points if point.policy == name}
    point = points[f"answer-{alpha:g}"]
    assert point.feasible
    assert (point.family, point.budget, point.weighting) == ("answer", alpha, "answers")
    found = point.predicted["answer_divergence"]
    assert found.value <= alpha
    assert ("answer_divergence" in point.at_most) == (name == "coupled")
    policy = point_policy(record, point, read_record(run, CalibrationRecord).learned)
    tokens = predicted_tokens(trace, policy)
    assert answer_divergence_estimate(tokens).value == pytest.approx(found.value, abs=1e-9)
    # The next score breaks the budget, and no quantile below does: what lies between them may, for
    # on a dozen prompts the distance goes up and down by hundredths.
    atoms = policy_atoms(trace, policy)
    scores = np.unique(atoms.score)
    own = int(np.searchsorted(scores, policy.threshold)) - 1
    assert scores[own] <= policy.threshold < scores[own + 1]
    after = predicted_tokens(trace, policy.with_threshold(float(scores[own + 1])))
    assert answer_divergence_estimate(after).value > alpha
    for threshold in atoms.quantiles(NUM_TRIED):
        if threshold <= policy.threshold:
            before = predicted_tokens(trace, policy.with_threshold(float(threshold)))
            assert answer_divergence_estimate(before).value <= alpha


def test_each_policy_has_its_own_threshold(record) -> None:
    rates = {
        point.policy: point.predicted["skip_rate"].value
        for point in record.operating_points
        if point.rule == "answer-0.3"
    }
    assert rates["ask-llm"] < rates["u-hlm"]  # it strays further at the same gate


def test_what_is_not_recorded_is_infeasible_with_its_reason(record) -> None:
    points = [p for p in record.operating_points if p.policy == "cu-hlm-offline"]
    answers = [point for point in points if point.family == "answer"]
    assert [(point.feasible, point.reason) for point in answers] == [(False, UNKNOWN_ANSWERS)] * 2
    others = [point for point in points if point.feasible]
    assert others
    assert all(point.predicted["answer_divergence"].value is None for point in others)
    assert all(point.predicted["tokens_in_agreement"].value is None for point in others)


def test_budgets_at_both_ends(trace) -> None:
    policy = gated("u-hlm")
    atoms = policy_atoms(trace, policy)
    none = answer_threshold(trace, policy, atoms, -1e-12)  # the first tokens have no bias at all
    assert not none.feasible
    assert "already bring answers" in none.reason
    everything = answer_threshold(trace, policy, atoms, 1 - 1e-12)
    assert everything.feasible
    assert everything.value == policy.score.high


def test_the_search_stops_at_the_first_that_fails() -> None:
    """A distance that falls again beyond a peak: what lies behind the peak is not taken."""
    scores = np.arange(1000.0)
    first = scores[::50]
    for peak in (0, 1, 49, 50, 333, 999):
        tried: list[float] = []

        def keeps(score: float, peak: int = peak, tried: list[float] = tried) -> bool:
            tried.append(score)
            return not peak <= score < peak + 100

        last = _last_within(scores, first, keeps)
        assert last == peak - 1
        assert max(tried) < peak + 150
    assert _last_within(scores, first, lambda score: True) == 999


def test_curves_along_the_length_end_at_the_predicted_figure(record) -> None:
    points = {point.key: point for point in record.operating_points}
    curves = {f"{one.policy}/{one.rule}": one for one in record.answers}
    assert {"slm/none", "u-hlm/risk-0.02", "u-hlm/answer-0.1", "coupled/risk-0.05"} <= curves.keys()
    assert not any(key.startswith(("hlm/", "cu-hlm")) for key in curves)
    for key, one in curves.items():
        assert one.divergence.grid[0] == 1
        assert one.divergence.grid[-1] == NUM_STEPS
        whole = points[key].predicted["answer_divergence"].value
        assert one.divergence.value[-1] == pytest.approx(whole, abs=1e-12)
        assert one.at_most == ("answer_divergence" in points[key].at_most)
    # At one token of an answer little has been lost yet.
    one = curves["u-hlm/risk-0.05"].divergence.value
    assert one[0] < 0.5 * one[-1]


def test_the_device_alone_and_the_server_alone(record) -> None:
    points = {point.key: point for point in record.operating_points}
    assert points["hlm/none"].predicted["answer_divergence"].value == 0
    device = points["slm/none"].predicted
    assert device["answer_divergence"].value > 0.5
    assert device["tokens_in_agreement"].value < NUM_STEPS / 2


def test_bounds_are_told_from_values(trace) -> None:
    assert is_bounded(predicted_tokens(trace, gated("coupled", 0.5)))
    assert not is_bounded(predicted_tokens(trace, gated("coupled", 1.0)))  # the device alone
    for name in ("u-hlm", "r-hlm", "ask-llm"):
        assert not is_bounded(predicted_tokens(trace, gated(name, 0.5)))
