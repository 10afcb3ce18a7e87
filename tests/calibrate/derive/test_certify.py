"""Certified thresholds of a run: the losses they rest on, caps and their shares, and plans."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from toy_models import TableModel

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.derive import certify
from calibrate.derive.certify import (
    CAPPED_TESTS,
    caps_at,
    certificates,
    certified_thresholds,
    grid_losses,
)
from calibrate.derive.plan import (
    NUM_DRAWS,
    least_size,
    passing_share,
    prompts_for_width,
    thresholds_that_decide,
)
from calibrate.derive.predict import drawn_tokens, policy_atoms, predicted_tokens
from calibrate.run.errors import UsageError
from calibrate.run.prompts import TokenizedPrompt
from calibrate.run.traces import read_trace, write_shard
from hlmtheory.answer_cap import capped_skips
from hlmtheory.clusters import RatioEstimate, sum_by_prompt
from hlmtheory.guarantees import GridLosses, fixed_sequence_threshold
from hlmtheory.policies import GatedPolicy, policy_from_settings
from hlmtheory.risk import SkipRiskSums
from hlmtheory.risk_tests import p_value
from hlmtheory.scores import score_named


def traces(tmp_path, policy, num=300):
    rng = np.random.default_rng(4)
    device = 2 * rng.normal(size=(8, 8))
    server = device + 0.8 * rng.normal(size=(8, 8))
    settings = DecodingSettings(max_new_tokens=9, batch_size=num, seed=1)
    prompts = [TokenizedPrompt(f"{i:03d}", (1, 2)) for i in range(num)]
    policies = {"hlm": policy_from_settings("hlm"), "gate": policy}
    out = {}
    models = TableModel(device), TableModel(server)
    for batches in decode_together(*models, prompts, policies, settings, (5,)):
        for name, batch in batches.items():
            path = tmp_path / f"{name}.parquet"
            write_shard(path, batch.columns, batch.prompt_ids, {}, settings.axes(8))
            out[name] = read_trace([path])
    return out["hlm"], out["gate"]


def answers(trace):
    return [
        tuple(trace["output_token"][trace.prompt_index == prompt])
        for prompt in range(trace.num_prompts)
    ]


def test_recorded_parting_is_what_the_engine_does(tmp_path):
    """In the mean, for it is averaged over the draft."""
    grid = GatedPolicy(threshold=0.5).score.fixed_grid(8)
    threshold = float(grid[150])
    lossless, gated = traces(tmp_path, policy_from_settings("u-hlm", {}, threshold))
    differs = np.array(
        [one != other for one, other in zip(answers(lossless), answers(gated), strict=True)]
    )
    gate = GatedPolicy(threshold=0.5)
    losses = grid_losses(lossless, gate, "answers", 9).sums.rejected[:, 150]
    assert 0.05 < differs.mean() < 0.95
    error = np.std(losses - differs, ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() - differs.mean()) < 4.5 * error
    assert np.all((losses >= 0) & (losses <= 1))
    assert losses.std() < differs.std()
    with pytest.raises(ValueError, match=r"cap = 0\.3: it does not bound the loss of answers"):
        grid_losses(lossless, replace(gate, cap=0.3), "answers", 9).losses(0.1)


def test_parting_is_that_of_the_answers_weights(tmp_path):
    """1 - prod min(1, P/y) of docs/theory.md, (46), by the other road; and it bounds (1 - W)+."""
    lossless, _ = traces(tmp_path, policy_from_settings("u-hlm", {}, 0.3), 80)
    found = grid_losses(lossless, GatedPolicy(threshold=0.0), "answers", 9)
    for place in (130, 150, 185):
        policy = policy_from_settings("u-hlm", {}, float(found.sums.thresholds[place]))
        tokens = predicted_tokens(lossless, policy)
        sums = [
            sum_by_prompt(one, tokens.prompt_index, tokens.num_prompts)
            for one in (np.minimum(tokens.log_ratio[0], 0.0), tokens.log_ratio[0])
        ]
        np.testing.assert_allclose(found.sums.rejected[:, place], -np.expm1(sums[0]), atol=2e-5)
        assert np.all(np.clip(-np.expm1(sums[1]), 0, None) <= -np.expm1(sums[0]) + 1e-12)
        assert found.sums.rejected[:, place].max() > 0.05


@pytest.mark.parametrize("score", ["uncertainty", "uncertainty_sampled", "entropy"])
@pytest.mark.parametrize("cap", [None, 0.4])
@pytest.mark.parametrize("certified", ["prompts", "tokens"])
def test_losses_on_the_grid_are_those_of_the_policy(tmp_path, score, cap, certified):
    """Averaged without a cap, drawn under it; and then never above the cap."""
    gate = GatedPolicy(threshold=0.0, score=score_named(score), cap=cap)
    lossless, _ = traces(tmp_path, policy_from_settings("u-hlm", {}, 0.3), 60)
    found = grid_losses(lossless, gate, certified, 9)
    for place in (0, 60, 130, 200):
        policy = gate.with_threshold(float(found.sums.thresholds[place]))
        tokens = (predicted_tokens if cap is None else drawn_tokens)(lossless, policy)
        for name, values in (("skipped", tokens.skip), ("rejected", tokens.risk)):
            sums = sum_by_prompt(values, tokens.prompt_index, tokens.num_prompts)
            np.testing.assert_allclose(getattr(found.sums, name)[:, place], sums, atol=1e-5)
    losses, level = found.losses(0.1)
    assert np.all((losses >= 0) & (losses <= 1))
    assert level == pytest.approx(0.1 / (cap or 1.0))
    if cap is not None:
        assert np.all(found.sums.rejected <= cap * found.sums.num_tokens[:, None])


def test_caps_share_delta_and_auto_does_not(tmp_path):
    lossless, _ = traces(tmp_path, policy_from_settings("u-hlm", {}, 0.3), 100)
    assert caps_at(("auto", "0.3", "0.5"), 0.02, 0.05, 100) == [0.3, 0.5]
    assert caps_at(("auto",), 0.2, 0.05, 100) == []
    assert caps_at(("0.1",), 0.2, 0.05, 100) == [], "a cap below the budget keeps it by itself"
    gate = GatedPolicy(threshold=0.0)
    found = certificates(lossless, gate, (0.1,), 0.9, "tokens", ("0.3", "0.5"), 9)
    by_cap = {one.cap: one.confidence for one in found}
    assert by_cap == {None: pytest.approx(0.9), 0.3: pytest.approx(0.95), 0.5: pytest.approx(0.95)}
    assert {one.test for one in found if not one.guaranteed} == {"t"}
    for one in found:
        if one.feasible and one.guaranteed:
            assert one.bound <= 0.1 + 1e-9


def test_what_is_certified_reaches_the_rules(tmp_path):
    lossless, _ = traces(tmp_path, policy_from_settings("u-hlm", {}, 0.3), 200)
    for certified in ("prompts", "tokens", "answers"):
        for cap in (None, 0.4)[: 1 if certified == "answers" else 2]:
            policy = policy_from_settings("u-hlm", {} if cap is None else {"cap": cap}, 0.0)
            atoms = policy_atoms(lossless, GatedPolicy(threshold=0.0))
            found = certified_thresholds(lossless, policy, atoms, 0.2, 0.1, certified, 9)
            assert [one.family for one in found] == ["conformal", "ltt"][-len(found) :]
            assert len(found) == (2 if cap is None else 1)
            assert {one.weighting for one in found} == {certified}
    other = policy_from_settings("ask-llm", {}, 0.0)
    refused = certified_thresholds(lossless, other, atoms, 0.2, 0.1, "answers", 9)
    assert [one.feasible for one in refused] == [False, False]
    assert "accept/resample" in refused[0].reason
    unbounded = GatedPolicy(threshold=0.0, score=score_named("max_logit"), cap=0.4)
    with pytest.raises(UsageError, match="score max_logit has no bounds"):
        certified_thresholds(lossless, unbounded, atoms, 0.2, 0.1, "prompts", 9)


@pytest.mark.parametrize(
    ("test", "above"), [("betting", 1.5), ("wsr", 1.5), ("hoeffding-bentkus", 2.1), ("t", 1.12)]
)
def test_the_power_of_a_plan_is_that_of_the_test(rng, test, above):
    """Redrawn here, prompt by prompt: within 4.5 binomial errors of both."""
    losses = rng.beta(0.4, 8, size=120)
    level = above * losses.mean()  # where power is neither 0 nor 1
    share = passing_share(losses[:, None], level, 0.1, test, 150)
    drawn = losses[rng.integers(120, size=(400, 150))]
    again = float(np.mean(p_value(drawn, level, 0.1, test) <= 0.1))
    error = np.sqrt(0.25 / NUM_DRAWS + 0.25 / 400)
    assert 0.2 < again < 0.8
    assert abs(share - again) < 4.5 * error


def test_wsr_does_not_learn_from_the_order_of_ids(monkeypatch):
    """Topics in blocks, all but the last without loss, and a risk above the budget."""
    num, alpha, delta, draws = 160, 0.05, 0.1, 100
    grid, rng = np.array([0.5]), np.random.default_rng(2)
    certified = {"by id": 0, "as it is": 0}
    for draw in range(draws):
        topics = np.sort(rng.integers(8, size=num))  # draws of one law, sorted as ids are
        losses = np.where(topics == 7, 0.41, 0.0)[:, None]
        sums = SkipRiskSums(grid, np.ones((num, 1)), losses, np.ones(num))
        made = GridLosses(sums)
        certified["by id"] += fixed_sequence_threshold(made, alpha, delta, "wsr").feasible
        monkeypatch.setattr(certify, "grid_losses", lambda *_, made=made: made)
        for categories in ([], [str(topic) for topic in topics]):
            ids = [f"topic-{topic}-{draw:03d}-{i:03d}" for i, topic in enumerate(topics)]
            trace = SimpleNamespace(prompt_ids=ids, categories=categories, num_prompts=num)
            gate = GatedPolicy(threshold=0.0)
            found = certificates(trace, gate, (alpha,), 1 - delta, "prompts", (), 9)
            by_test = {one.test: one for one in found}
            assert by_test["betting"].guaranteed
            assert not by_test["t"].guaranteed
            assert by_test["wsr"].guaranteed == (not categories)
        certified["as it is"] += by_test["wsr"].feasible
    assert certified["by id"] == draws
    assert certified["as it is"] <= draws * delta + 3 * np.sqrt(draws * delta * (1 - delta))


@pytest.mark.parametrize(
    ("test", "above"), [("betting", 1.5), ("wsr", 1.5), ("hoeffding-bentkus", 2.1), ("t", 1.15)]
)
def test_the_power_of_a_plan_is_that_of_all_thresholds_up_to_the_goal(rng, test, above):
    """Redrawn here: losses of one mean that cross, so that either threshold may fail."""
    losses = rng.beta(0.4, 8, size=(120, 3))
    losses *= losses.mean() / losses.mean(axis=0) * [0.5, 1, 1]
    level = above * losses[:, 1].mean()
    share = passing_share(losses, level, 0.1, test, 150)
    drawn = losses[rng.integers(120, size=(400, 150))]
    passed = [p_value(drawn[:, :, place], level, 0.1, test) <= 0.1 for place in range(3)]
    again = float(np.mean(np.all(passed, axis=0)))
    error = np.sqrt(0.25 / NUM_DRAWS + 0.25 / 400)
    assert 0.05 < again < np.mean(passed, axis=1).min() - 0.05
    assert abs(share - again) < 4.5 * error
    alone = [passing_share(losses[:, [place]], level, 0.1, test, 150) for place in range(3)]
    assert share < min(alone)


def capped_grid(cap: float | None) -> GridLosses:
    """Of 40 equal answers: below a threshold that loses 0.3 of a token lies the goal, lossless.

    What a cap of one half lets a higher threshold skip first are drafts without a loss.
    """
    thresholds, num = np.array([0.05, 0.1, 0.2, 0.3]), 40
    scores = np.tile([0.9, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.9, 0.2], num)
    losses = np.tile([0, 0, 1.0, 0, 1, 0, 1, 0, 0, 0], num)
    answer = np.repeat(np.arange(num), 10)
    skips = scores[:, None] <= thresholds
    if cap is not None:
        skips = capped_skips(skips, answer, cap)
    sums = (sum_by_prompt(part, answer, num) for part in (1.0 * skips, skips * losses[:, None]))
    return GridLosses(SkipRiskSums(thresholds, *sums, np.full(num, 10.0)), "prompts", None, cap)


def test_a_plan_under_a_cap_passes_no_threshold_that_the_rule_stops_at():
    """The goal is lossless, but the rule never reaches it: the threshold before it loses 0.3."""
    held = capped_grid(0.5)
    np.testing.assert_allclose(held.sums.rejected[0] / 10, [0, 0.3, 0, 0])
    np.testing.assert_allclose(held.sums.skipped[0] / 10, [0, 0.3, 0.5, 0.5])
    assert fixed_sequence_threshold(held, 0.1, 0.05).value == 0.05
    losses, level = held.losses(0.1)
    for test in CAPPED_TESTS:
        assert passing_share(losses[:, [2]], level, 0.05, test, 40) == 1
        assert passing_share(losses[:, :3], level, 0.05, test, 40) == 0
        assert least_size(capped_grid, 0.1, 0.05, 0.8, test, True, 0.45, 0) is None
        # Within its budget the threshold before is in nobody's way.
        assert least_size(capped_grid, 0.35, 0.05, 0.8, test, True, 0.25, 0) is not None


def test_of_losses_that_rise_the_last_threshold_decides(rng):
    rising = np.cumsum(rng.random((30, 6)), axis=1)
    assert thresholds_that_decide(rising) == [5]
    crossing = rising.copy()
    crossing[3, 2] = 99.0
    assert thresholds_that_decide(crossing) == [5, 2]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize("width", [1.0, 0.5, 0.1, 0.02])
def test_the_prompts_of_a_width_are_the_least_whose_interval_is_no_wider(width, confidence):
    """By the interval itself, size by size; a normal quantile would take too few."""
    error, num_prompts = 0.06, 25

    def wide(num: int) -> float:
        spread = error * np.sqrt(num_prompts / num)
        low, high = RatioEstimate(0.3, float(spread), num).interval(confidence)
        return high - low

    found = prompts_for_width(error, num_prompts, width, confidence)
    assert wide(found) <= width * (1 + 1e-12)
    assert found == 2 or wide(found - 1) > width
    normal = np.ceil(num_prompts * (2 * stats.norm.ppf(0.5 + confidence / 2) * error / width) ** 2)
    assert found > normal or found == 2
    assert prompts_for_width(0.0, num_prompts, width, confidence) == 2
