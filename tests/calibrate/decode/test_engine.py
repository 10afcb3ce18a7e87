"""The engine itself, on toy pairs whose laws are known: what it emits has the law it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from toy_models import TableModel

from calibrate.decode.engine import DecodingSettings, decode
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.policies import FixedSize, ImportanceSettings, OnlineSize, Policy, make_policy
from hlmtheory.truncation import online_truncation_size
from hlmtheory.uncertainty import exact_uncertainty, temperatures
from hlmtheory.verification import FullDistribution, bias_lower_bound, output_bias, output_law

VOCAB = 12
NUM_DRAWS = 200_000
NUM_PROMPTS = 2_000


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def laws() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    slm = 1.6 * rng.normal(size=VOCAB)
    slm[3] += 3.0  # one likely token, so that gates have something to skip
    return slm, slm + 0.9 * rng.normal(size=VOCAB)


def prompts(number: int) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(f"p{i:05d}", (1, 2)) for i in range(number)]


def run(slm, llm, policy, num_prompts=NUM_PROMPTS, steps=NUM_DRAWS // NUM_PROMPTS, eos=(), **kw):
    settings = DecodingSettings(
        **{"max_new_tokens": steps, "batch_size": num_prompts, "trace": "minimal", "seed": 3} | kw
    )
    batches = decode(TableModel(slm), TableModel(llm), prompts(num_prompts), policy, settings, eos)
    parts = []
    for batch in batches:
        columns = dict(batch.columns)
        columns["prompt_id"] = np.array(batch.prompt_ids)[columns.pop("row")]
        parts.append(columns)
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((out["step"], out["prompt_id"]))
    return {name: values[order] for name, values in out.items()}


def p_value(tokens: np.ndarray, law: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=len(law))
    return float(stats.chisquare(counts, law / law.sum() * counts.sum()).pvalue)


def sigma_of(logits: np.ndarray, threshold: float) -> np.ndarray:
    z = torch.tensor(logits, dtype=torch.float64)[None]
    tokens = torch.arange(len(logits))[None]
    return (exact_uncertainty(z, tokens, temperatures())[0].numpy() <= threshold).astype(float)


def test_hlm_emits_the_server_law(laws):
    slm, llm = laws
    columns = run(slm, llm, make_policy("hlm"))
    assert len(columns["output_token"]) == NUM_DRAWS
    assert p_value(columns["output_token"], softmax(llm)) > 1e-3
    # The drafts follow x, and are rejected as often as TV(x, y) says.
    assert p_value(columns["draft_token"], softmax(slm)) > 1e-3
    distance = np.abs(softmax(slm) - softmax(llm)).sum() / 2
    error = (distance * (1 - distance) / NUM_DRAWS) ** 0.5
    assert abs(1 - columns["accepted"].mean() - distance) < 4 * error
    np.testing.assert_allclose(columns["tv_distance"], distance, rtol=1e-5)


class ResamplesFromTarget(FullDistribution):
    """The commonest mistake: resample from y itself instead of the residual."""

    def resample_weights(self, reference, y, skipped):
        return y


def test_a_wrong_rule_fails_the_same_test(laws):
    slm, llm = laws
    wrong = Policy("hlm", make_policy("hlm").gate, ResamplesFromTarget())
    columns = run(slm, llm, wrong)
    assert p_value(columns["output_token"], softmax(llm)) < 1e-6


@pytest.mark.parametrize("name", ["u-hlm", "r-hlm", "ask-llm", "cu-hlm-offline", "slm", "llm"])
def test_each_policy_emits_its_exact_law(laws, name):
    slm, llm = laws
    threshold = 0.55
    size = FixedSize(2) if name == "cu-hlm-offline" else None
    policy = make_policy(name, threshold, size=size)
    columns = run(slm, llm, policy)
    x, y = softmax(slm), softmax(llm)
    sigma = {"slm": np.ones(VOCAB), "llm": np.zeros(VOCAB)}.get(name, sigma_of(slm, threshold))
    assert name in ("slm", "llm") or 0 < sigma.sum() < VOCAB
    law = output_law(policy.rule, x, y, sigma, 2 if size else None)
    assert p_value(columns["output_token"], law) > 1e-3
    # The exact bias that the engine records is the bias of that law.
    bias = output_bias(policy.rule, x, y, sigma, 2 if size else None)
    np.testing.assert_allclose(columns["policy_bias"], bias, atol=2e-6)
    if name not in ("slm", "llm"):
        drafts = columns["draft_token"]
        np.testing.assert_array_equal(columns["skipped"], sigma[drafts] > 0)


def test_total_variation_of_gated_output_is_the_risk(laws):
    slm, llm = laws
    threshold = 0.55
    x, y = softmax(slm), softmax(llm)
    sigma = sigma_of(slm, threshold)
    rho = float(bias_lower_bound(x, y, sigma))
    assert rho > 0.02
    columns = run(slm, llm, make_policy("u-hlm", threshold))
    frequency = np.bincount(columns["output_token"], minlength=VOCAB) / NUM_DRAWS
    # TV = P(A) - y(A) on the set A where the exact law exceeds y: a binomial frequency.
    above = output_law(FullDistribution(), x, y, sigma) > y
    measured = frequency[above].sum() - y[above].sum()
    error = (frequency[above].sum() * (1 - frequency[above].sum()) / NUM_DRAWS) ** 0.5
    assert abs(measured - rho) < 4 * error
    risk = columns["skipped"] * columns["rejection_prob"]
    assert abs(risk.mean() - rho) < 4 * risk.std() / NUM_DRAWS**0.5


def test_draft_from_sent_has_no_bias_for_any_size(laws):
    slm, llm = laws
    policy = make_policy("cu-hlm-offline", 0.0, size=FixedSize(2), draft_from_sent=True)
    columns = run(slm, llm, policy)
    assert p_value(columns["output_token"], softmax(llm)) > 1e-3
    np.testing.assert_allclose(columns["policy_bias"], 0, atol=2e-6)


def test_sampled_gate_skips_as_often_as_its_probability(laws):
    slm, llm = laws
    columns = run(slm, llm, make_policy("u-hlm", 0.4, statistic="sampled"))
    difference = columns["skipped"] - columns["policy_skip_prob"]
    assert 0.05 < columns["skipped"].mean() < 0.95
    assert abs(difference.mean()) < 4 * difference.std() / NUM_DRAWS**0.5


def test_online_size_is_the_one_of_the_drafted_token(laws):
    slm, llm = laws
    policy = make_policy("cu-hlm-online", 0.1, size=OnlineSize(0.3, 0.6, 0.0))
    columns = run(slm, llm, policy, num_prompts=200, steps=5)
    x = np.repeat(softmax(slm)[None], len(columns["step"]), 0)
    predicted = np.clip(0.6 * columns["uncertainty"].astype(float), 0, 1)
    sizes = online_truncation_size(x, columns["draft_prob"].astype(float), predicted, 0.3)
    np.testing.assert_array_equal(columns["policy_entries"], sizes)


def markov() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    slm = 1.5 * rng.normal(size=(VOCAB, VOCAB))
    return slm, slm + rng.normal(size=(VOCAB, VOCAB))


def test_tokens_do_not_depend_on_batch_or_order():
    slm, llm = markov()
    policy = make_policy("u-hlm", 0.5)
    small = run(slm, llm, policy, num_prompts=30, steps=20, eos=(5,), batch_size=4)
    large = run(slm, llm, policy, num_prompts=30, steps=20, eos=(5,), batch_size=30)
    for name in ("prompt_id", "step", "draft_token", "output_token", "accepted"):
        np.testing.assert_array_equal(small[name], large[name])
    other_seed = run(slm, llm, policy, num_prompts=30, steps=20, eos=(5,), batch_size=30, seed=4)
    assert len(other_seed["step"]) != len(small["step"]) or (
        (other_seed["output_token"] != small["output_token"]).any()
    )


def test_rows_end_with_their_end_token_and_not_before():
    slm, llm = markov()
    columns = run(slm, llm, make_policy("hlm"), num_prompts=50, steps=30, eos=(5,))
    for prompt in np.unique(columns["prompt_id"]):
        mine = columns["prompt_id"] == prompt
        ended = np.flatnonzero(columns["output_token"][mine] == 5)
        assert mine.sum() == (ended[0] + 1 if len(ended) else 30)
        np.testing.assert_array_equal(columns["step"][mine], np.arange(mine.sum()))


def test_a_longer_limit_continues_the_same_tokens():
    slm, llm = markov()
    short = run(slm, llm, make_policy("hlm"), num_prompts=9, steps=5)
    long = run(slm, llm, make_policy("hlm"), num_prompts=9, steps=11)
    np.testing.assert_array_equal(short["output_token"], long["output_token"][long["step"] < 5])


def full_trace(tmp_path, policy, asked=None, eos=(5,)):
    from calibrate.run.traces import read_trace, write_shard

    slm, llm = (TableModel(table) for table in markov())
    settings = DecodingSettings(max_new_tokens=20, batch_size=7, seed=5)
    paths = []
    for batch in decode(slm, llm, asked or prompts(20), policy, settings, eos):
        paths.append(tmp_path / f"{policy.name}-{len(paths)}.parquet")
        write_shard(paths[-1], batch.columns, batch.prompt_ids, {}, batch.categories)
    return read_trace(paths)


def test_categories_stay_with_their_prompts_through_the_trace(tmp_path):
    """Batches go by length, so neither prompts nor categories keep the order they came in."""
    asked = [
        TokenizedPrompt(f"p{i:02d}", (1,) * (2 + i * 7 % 5), ("code", "maths")[i % 3 == 0])
        for i in range(20)
    ]
    trace = full_trace(tmp_path, make_policy("hlm"), asked)
    assert dict(zip(trace.prompt_ids, trace.categories, strict=True)) == {
        prompt.prompt_id: prompt.category for prompt in asked
    }
    some = [*asked, TokenizedPrompt("none", (1, 2))]
    assert full_trace(tmp_path, make_policy("hlm"), some).categories == []


def test_truncation_bias_is_sampled_at_every_step_alike(tmp_path):
    trace = full_trace(tmp_path, make_policy("hlm"), prompts(400), eos=())
    recorded = np.isfinite(trace["truncation_bias"]).all(1)
    shares = np.array([recorded[trace["step"] == step].mean() for step in range(20)])
    # Of 400 prompts a quarter starts at each of four steps, as a hash has it: binomial.
    assert (abs(shares - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5).all()
    per_prompt = np.bincount(trace.prompt_index, weights=recorded)
    np.testing.assert_array_equal(per_prompt, 5)  # of twenty steps, each prompt gives five


class Failing(TableModel):
    def __init__(self, fail):
        super().__init__(markov()[0])
        self.fail = fail

    def start(self, contexts, attention, fill=True):
        return self.fail()


def no_memory():
    raise MemoryError


def first_batch(fail):
    slm, llm = Failing(fail), TableModel(markov()[1])
    settings = DecodingSettings(max_new_tokens=2, batch_size=7)
    return next(decode(slm, llm, prompts(9), make_policy("hlm"), settings, ()))


@pytest.mark.parametrize("fail", [no_memory, lambda: torch.empty(2**50)])
def test_a_batch_that_does_not_fit_names_the_way_out(fail):
    with pytest.raises(UserError, match="--batch-size 7: a batch of 7 prompts does not fit"):
        first_batch(fail)


def test_other_errors_are_not_taken_for_a_full_memory():
    with pytest.raises(RuntimeError, match="must match"):
        first_batch(lambda: torch.zeros(2) + torch.zeros(3))


@pytest.mark.parametrize("variant", ["topk", "context"])
def test_live_importance_equals_its_replay_from_the_trace(tmp_path, variant):
    from calibrate.decode.recording import TOPK_ATTENTION_GRID, replay_importance

    if variant == "topk":
        calibrated = full_trace(tmp_path, make_policy("hlm"))
        focus = calibrated["topk_attention"][:, TOPK_ATTENTION_GRID.index(2)]
        gamma = float(np.median(focus * np.exp(calibrated["attention_entropy"])))
        importance = ImportanceSettings("topk", 2, gamma)
    else:
        importance = ImportanceSettings("context", 0.8, 0.9)
    trace = full_trace(tmp_path, make_policy("ui-hlm", 0.3, importance=importance))
    important = replay_importance(trace, importance)
    assert 0.05 < important.mean() < 0.95
    np.testing.assert_array_equal(trace["skipped"], (trace["uncertainty"] <= 0.3) | ~important)
