"""Certified thresholds of a run: the losses they rest on, caps and their shares, and plans."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from toy_models import TableModel

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.derive import certify
from calibrate.derive.certify import caps_at, certificates, certified_thresholds, grid_losses
from calibrate.derive.plan import NUM_DRAWS, passing_share
from calibrate.derive.predict import drawn_tokens, policy_atoms, predicted_tokens
from calibrate.run.errors import UsageError
from calibrate.run.prompts import TokenizedPrompt
from calibrate.run.traces import read_trace, write_shard
from hlmtheory.clusters import sum_by_prompt
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
    share = passing_share(losses, level, 0.1, test, 150)
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
