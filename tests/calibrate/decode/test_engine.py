"""The engine itself, on toy pairs whose laws are known: what it emits has the law it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from toy_models import TableModel, softmax

from calibrate.decode.engine import DecodingSettings, _places, decode, decode_together
from calibrate.decode.streams import step_noise, stream_key
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.coupling import coupled_output_law
from hlmtheory.policies import Policy, policy_class, policy_from_settings, policy_names
from hlmtheory.quantised_law import quantised_law
from hlmtheory.scores import score_named
from hlmtheory.steps import Step
from hlmtheory.truncation import online_truncation_size
from hlmtheory.uncertainty import exact_uncertainty, temperatures
from hlmtheory.verification import FullDistribution, bias_lower_bound, output_law

VOCAB = 12
NUM_DRAWS = 200_000
NUM_PROMPTS = 2_000


def make(name: str, threshold: float | None = None, score: str | None = None, **settings) -> Policy:
    return policy_from_settings(
        name, settings, threshold, None if score is None else score_named(score)
    )


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
    columns = run(slm, llm, make("hlm"))
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


class Wrong(policy_class("hlm")):
    rule = ResamplesFromTarget()


def test_a_rounded_device_law_is_drafted_from_and_loses_nothing(laws):
    slm, llm = laws
    columns = run(slm, llm, make("hlm"), prob_bits=3)
    rounded = quantised_law(softmax(slm)[None], 3)[0]
    assert np.abs(rounded - softmax(slm)).sum() > 0.1  # three bits are coarse
    assert p_value(columns["draft_token"], rounded) > 1e-3
    assert p_value(columns["draft_token"], softmax(slm)) < 1e-9
    assert p_value(columns["output_token"], softmax(llm)) > 1e-3


def test_a_wrong_rule_fails_the_same_test(laws):
    slm, llm = laws
    columns = run(slm, llm, Wrong())
    assert p_value(columns["output_token"], softmax(llm)) < 1e-6


GATED = {
    name: {
        "cu-hlm-offline": {"num_entries": 2},
        "cu-hlm-online": {"theta": 0.3, "eta": 1.0, "slope": 0.6, "intercept": 0.0},
        "ui-hlm": {},
    }.get(name, {})
    for name in policy_names()
    if policy_class(name).gated
}
WITH_ONE_SIZE = sorted(set(GATED) - {"cu-hlm-online", "ui-hlm"})
THRESHOLD = 0.55


def law_of(policy: Policy, sigma: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if policy.name == "coupled":
        return coupled_output_law(x, y, sigma)
    return output_law(policy.rule, x, y, sigma, getattr(policy, "num_entries", None))


@pytest.mark.parametrize("name", ["slm", "llm", *WITH_ONE_SIZE])
def test_each_policy_emits_its_exact_law(laws, name):
    slm, llm = laws
    policy = make(name, THRESHOLD, **GATED.get(name, {}))
    columns = run(slm, llm, policy, num_prompts=400)
    x, y = softmax(slm), softmax(llm)
    sigma = {"slm": np.ones(VOCAB), "llm": np.zeros(VOCAB)}.get(name, sigma_of(slm, THRESHOLD))
    law = y if name == "llm" else law_of(policy, sigma, x, y)
    assert name in ("slm", "llm") or 0 < sigma.sum() < VOCAB
    assert p_value(columns["output_token"], law) > 1e-4
    if policy.role != "server":
        assert p_value(columns["draft_token"], x) > 1e-4
    # What the engine records of the policy is what that law says.
    bias, skip = np.abs(law - y).sum() / 2, sigma @ x
    np.testing.assert_allclose(columns["policy_bias"], bias, atol=2e-6)
    np.testing.assert_allclose(columns["policy_skip_prob"], skip, atol=2e-6)
    risk = sigma @ np.maximum(x - y, 0)
    np.testing.assert_allclose(columns["policy_risk"], risk, atol=2e-6)
    if name not in ("slm", "llm"):
        drafts = columns["draft_token"]
        np.testing.assert_array_equal(columns["skipped"], sigma[drafts] > 0)
        if bias > 0.01:  # another law fails the same test
            assert p_value(columns["output_token"], y) < 1e-6
    size = {"u-hlm": VOCAB, "r-hlm": sigma.sum(), "cu-hlm-offline": 2}.get(name, 0)
    np.testing.assert_array_equal(columns["policy_entries"], np.where(columns["skipped"], 0, size))


@pytest.mark.parametrize("name", WITH_ONE_SIZE)
def test_sampled_scores_emit_the_law_of_their_probabilities(laws, name):
    """A gate that draws lots: sigma = P(u_K <= threshold), independent of the other draws."""
    from scipy.stats import poisson_binom

    from hlmtheory.uncertainty import perturbed_probabilities

    slm, llm = laws
    policy = make(name, 0.45, "uncertainty_sampled", **GATED[name])
    columns = run(slm, llm, policy, num_prompts=200)
    p = perturbed_probabilities(slm, np.arange(VOCAB), temperatures())
    sigma = np.array([poisson_binom.cdf(9, 1 - row) for row in p])
    assert ((sigma > 0.01) & (sigma < 0.99)).any()
    law = law_of(policy, sigma, softmax(slm), softmax(llm))
    assert p_value(columns["output_token"], law) > 1e-4
    np.testing.assert_allclose(
        columns["policy_bias"], np.abs(law - softmax(llm)).sum() / 2, atol=2e-6
    )
    np.testing.assert_allclose(columns["policy_skip_prob"], sigma @ softmax(slm), atol=2e-6)


@pytest.mark.parametrize(
    "score", ["entropy", "one_minus_max_prob", "one_minus_margin", "max_logit"]
)
@pytest.mark.parametrize("name", ["u-hlm", "coupled", "r-hlm"])
def test_scores_of_the_context_skip_all_drafts_or_none(laws, name, score):
    slm, llm = laws
    x, y = softmax(slm), softmax(llm)
    value = {
        "entropy": stats.entropy(x),
        "one_minus_max_prob": 1 - x.max(),
        "one_minus_margin": 1 - np.sort(x)[-1] + np.sort(x)[-2],
        "max_logit": -slm.max(),
    }[score]
    for threshold, law in ((value + 0.01, x), (value - 0.01, y)):
        columns = run(slm, llm, make(name, threshold, score), num_prompts=500, steps=40)
        assert p_value(columns["output_token"], law) > 1e-4
        np.testing.assert_array_equal(columns["skipped"], law is x)
        np.testing.assert_allclose(columns["policy_bias"], np.abs(law - y).sum() / 2, atol=2e-6)


# --- coupled -------------------------------------------------------------------------------------


def test_coupled_draws_agree_as_often_as_the_coupling_says(laws):
    """P(d = o) = sum of the diagonal of the joint law, and d, o have it cell by cell."""
    from hlmtheory.coupling import joint_law

    slm, llm = laws
    columns = run(slm, llm, make("coupled", 0.0))
    assert not columns["skipped"].any()
    joint = joint_law(softmax(slm), softmax(llm))
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (columns["draft_token"], columns["output_token"]), 1)
    expected = joint * NUM_DRAWS
    assert counts[joint == 0].sum() == 0
    cells = expected >= 5
    kept = np.append(counts[cells], counts[~cells].sum())
    law = np.append(expected[cells], expected[~cells].sum())
    assert stats.chisquare(kept, law * kept.sum() / law.sum()).pvalue > 1e-4
    np.testing.assert_array_equal(
        columns["accepted"], columns["draft_token"] == columns["output_token"]
    )
    rate = np.trace(joint)
    assert abs(columns["accepted"].mean() - rate) < 4 * (rate * (1 - rate) / NUM_DRAWS) ** 0.5
    # Negative control: independent draws of the same two laws do not.
    independent = np.outer(softmax(slm), softmax(llm)) * NUM_DRAWS
    other = np.append(independent[cells], independent[~cells].sum())
    assert stats.chisquare(kept, other * kept.sum() / other.sum()).pvalue < 1e-6


def test_coupled_is_lossless_alone_and_not_below_the_risk_with_a_gate(laws):
    slm, llm = laws
    alone = run(slm, llm, make("coupled", 0.0))
    assert p_value(alone["output_token"], softmax(llm)) > 1e-4
    np.testing.assert_allclose(alone["policy_bias"], 0, atol=1e-7)
    gated = run(slm, llm, make("coupled", THRESHOLD), num_prompts=20, steps=5)
    assert (gated["policy_bias"] >= gated["policy_risk"] - 1e-6).all()


@pytest.mark.parametrize("policy", [make("coupled", 0.4), make("u-hlm", 0.4)], ids=["race", "cdf"])
def test_shared_noise_does_not_depend_on_the_batch(policy):
    """Device and server each make the noise from (seed, prompt, step) alone."""
    slm, llm = markov()
    small = run(slm, llm, policy, num_prompts=25, steps=20, eos=(5,), batch_size=3)
    large = run(slm, llm, policy, num_prompts=25, steps=20, eos=(5,), batch_size=25)
    for name in ("prompt_id", "step", "draft_token", "output_token", "accepted", "skipped"):
        np.testing.assert_array_equal(small[name], large[name])


def noise_of(seed: int, ids: list[str], steps: list[int], vocab: int = 50):
    return step_noise([stream_key(seed, one) for one in ids], steps, vocab, torch.device("cpu"))


def test_random_numbers_are_a_pure_function_of_seed_prompt_and_step():
    together = noise_of(3, ["a", "b", "c", "c"], [0, 5, 2, 7])
    for row, step in ((2, 2), (3, 7)):
        alone = noise_of(3, ["c"], [step])
        np.testing.assert_array_equal(together.races()[row], alone.races()[0])
        np.testing.assert_array_equal(together.uniforms[row], alone.uniforms[0])
    some = together.rows(torch.tensor([3, 1]))
    np.testing.assert_array_equal(some.races(), together.races()[[3, 1]])
    np.testing.assert_array_equal(some.accept, together.accept[[3, 1]])
    assert together.races() is together.races()
    assert (noise_of(4, ["c"], [2]).races() != noise_of(3, ["c"], [2]).races()).all()
    # Steps follow one another in one stream: no number of it comes twice.
    stream = noise_of(3, ["c"] * 40, list(range(40))).uniforms.numpy()
    assert len(np.unique(stream)) == stream.size
    ids = [str(i) for i in range(50)]
    first = noise_of(3, ids, [0] * 50, 400)
    # Uniforms and races of a step never share a block of the counter.
    assert stats.kstest(first.races().numpy().ravel(), "expon").pvalue > 1e-4
    made = 1 - np.exp(-first.races().numpy()[:, :100])
    # Four standard errors of a correlation of independent pairs.
    found = np.corrcoef(made.ravel(), first.uniforms.numpy()[:, :100].ravel())[0, 1]
    assert abs(found) < 4 / np.sqrt(made.size)


# --- several policies in one decode --------------------------------------------------------------


def test_policies_decoded_together_get_the_tokens_that_they_get_alone():
    """Rows fork where answers part, end one by one, and keep what each policy remembers."""
    slm, llm = markov()
    policies = {
        "hlm": make("hlm"),
        "u": make("u-hlm", 0.6),
        "again": make("u-hlm", 0.6),
        "r": make("r-hlm", 0.6),
        "race": make("coupled", 0.4),
        "ask": make("ask-llm", 0.6),
        "ui": make("ui-hlm", 0.6, importance={"variant": "context", "k": 0.5, "gamma": 0.9}),
        "slm": make("slm"),
    }
    settings = DecodingSettings(max_new_tokens=15, batch_size=9, trace="full", seed=3)
    models = (TableModel(slm), TableModel(llm))
    asked, steps = prompts(20), []

    def count(emitted: int, spared: int) -> None:
        steps.append(emitted + spared)

    together = list(decode_together(*models, asked, policies, settings, (5,), count))
    assert sum(steps) == len(policies) * len(asked) * settings.max_new_tokens
    assert len(together) == 3
    for name, policy in policies.items():
        alone = list(decode(*models, asked, policy, settings, (5,)))
        for one, batch in zip(alone, together, strict=True):
            assert one.prompt_ids == batch[name].prompt_ids
            assert one.columns.keys() == batch[name].columns.keys()
            for column, values in one.columns.items():
                # The place of a row in a vector instruction may round its last bit otherwise.
                limit = 2e-6 if values.dtype.kind == "f" else 0
                np.testing.assert_allclose(
                    batch[name].columns[column], values, atol=limit, rtol=limit, err_msg=column
                )
    # They do part, and for good.
    texts = {
        name: [tuple(batch[name].columns["output_token"]) for batch in together]
        for name in policies
    }
    assert texts["u"] == texts["again"]
    assert len(set(map(tuple, texts.values()))) == len(policies) - 1


def test_few_rows_leave_their_place_when_a_batch_forks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = int(rng.integers(1, 12))
        children = np.sort(rng.integers(0, rows, size=rng.integers(0, 20)))
        places = _places(children)
        assert sorted(places) == list(range(len(children)))
        parents = np.empty(len(children), dtype=int)
        parents[places] = children
        kept = {row for row in children if row < len(children)}
        assert sum(parents == np.arange(len(children))) == len(kept)


# --- further laws --------------------------------------------------------------------------------


def test_total_variation_of_gated_output_is_the_risk(laws):
    slm, llm = laws
    threshold = 0.55
    x, y = softmax(slm), softmax(llm)
    sigma = sigma_of(slm, threshold)
    rho = float(bias_lower_bound(x, y, sigma))
    assert rho > 0.02
    columns = run(slm, llm, make("u-hlm", threshold))
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
    policy = make("cu-hlm-offline", 0.0, num_entries=2, draft_from_sent=True)
    columns = run(slm, llm, policy)
    assert p_value(columns["output_token"], softmax(llm)) > 1e-4
    np.testing.assert_allclose(columns["policy_bias"], 0, atol=2e-6)


def test_draft_from_sent_with_a_gate_emits_its_law(laws):
    slm, llm = laws
    policy = make("cu-hlm-offline", THRESHOLD, num_entries=2, draft_from_sent=True)
    columns = run(slm, llm, policy)
    x, y, sigma = softmax(slm), softmax(llm), sigma_of(slm, THRESHOLD)
    law = output_law(policy.rule, x, y, sigma, 2)
    assert p_value(columns["output_token"], law) > 1e-4
    bias = np.abs(law - y).sum() / 2
    for name in ("policy_bias", "policy_risk"):
        np.testing.assert_allclose(columns[name], bias, atol=2e-6)


def test_online_size_is_the_one_of_the_drafted_token():
    slm, llm = markov()
    policy = make("cu-hlm-online", 0.1, **GATED["cu-hlm-online"])
    columns = run(slm, llm, policy, num_prompts=100, steps=10)
    before = np.where(columns["step"] > 0, np.roll(columns["output_token"], 1), 2)
    predicted = np.clip(0.6 * columns["uncertainty"].astype(float), 0, 1)
    draft_prob = columns["draft_prob"].astype(float)
    sizes = online_truncation_size(softmax(slm[before]), draft_prob, predicted, 0.3)
    sent = np.where(columns["skipped"], 0, sizes)
    np.testing.assert_array_equal(columns["policy_entries"], sent)
    assert len(np.unique(sent)) > 3


def markov() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    slm = 1.5 * rng.normal(size=(VOCAB, VOCAB))
    return slm, slm + rng.normal(size=(VOCAB, VOCAB))


def test_tokens_do_not_depend_on_batch_or_order():
    slm, llm = markov()
    policy = make("u-hlm", 0.5)
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
    columns = run(slm, llm, make("hlm"), num_prompts=50, steps=30, eos=(5,))
    for prompt in np.unique(columns["prompt_id"]):
        mine = columns["prompt_id"] == prompt
        ended = np.flatnonzero(columns["output_token"][mine] == 5)
        assert mine.sum() == (ended[0] + 1 if len(ended) else 30)
        np.testing.assert_array_equal(columns["step"][mine], np.arange(mine.sum()))


def test_a_longer_limit_continues_the_same_tokens():
    slm, llm = markov()
    short = run(slm, llm, make("hlm"), num_prompts=9, steps=5)
    long = run(slm, llm, make("hlm"), num_prompts=9, steps=11)
    np.testing.assert_array_equal(short["output_token"], long["output_token"][long["step"] < 5])


def full_trace(tmp_path, policy, asked=None, eos=(5,), models=None, seed=5):
    from calibrate.run.traces import read_trace, write_shard

    slm, llm = models or (TableModel(table) for table in markov())
    batch_size = 7 if models is None else len(asked)
    settings = DecodingSettings(max_new_tokens=20, batch_size=batch_size, seed=seed)
    paths = []
    for batch in decode(slm, llm, asked or prompts(20), policy, settings, eos):
        paths.append(tmp_path / f"{policy.name}-{len(paths)}.parquet")
        axes = settings.axes(VOCAB)
        write_shard(paths[-1], batch.columns, batch.prompt_ids, {}, axes, batch.categories)
    return read_trace(paths)


def test_categories_stay_with_their_prompts_through_the_trace(tmp_path):
    """Batches go by length, so neither prompts nor categories keep the order they came in."""
    asked = [
        TokenizedPrompt(f"p{i:02d}", (1,) * (2 + i * 7 % 5), ("code", "maths")[i % 3 == 0])
        for i in range(20)
    ]
    trace = full_trace(tmp_path, make("hlm"), asked)
    assert dict(zip(trace.prompt_ids, trace.categories, strict=True)) == {
        prompt.prompt_id: prompt.category for prompt in asked
    }
    some = [*asked, TokenizedPrompt("none", (1, 2))]
    assert full_trace(tmp_path, make("hlm"), some).categories == []


def test_costly_columns_are_sampled_at_every_step_alike_and_nan_elsewhere(tmp_path):
    trace = full_trace(tmp_path, make("hlm"), prompts(400), eos=())
    recorded = np.isfinite(trace["truncation_table"]).all(1)
    for name in ("truncation_table", "head_agreement", "head_race"):
        known = np.isfinite(trace[name])
        np.testing.assert_array_equal(known, np.broadcast_to(recorded[:, None], known.shape))
    shares = np.array([recorded[trace["step"] == step].mean() for step in range(20)])
    # Of 400 prompts a quarter starts at each of four steps, as a hash has it: binomial.
    assert (abs(shares - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5).all()
    per_prompt = np.bincount(trace.prompt_index, weights=recorded)
    np.testing.assert_array_equal(per_prompt, 5)  # of twenty steps, each prompt gives five


def test_a_full_trace_holds_the_head_of_its_contexts(tmp_path):
    """Every stored column against the tables of the two models."""
    from hlmtheory.coupling import coupling_columns

    trace = full_trace(tmp_path, make("hlm"), prompts(30), eos=())
    slm, llm = markov()
    before = np.where(trace["step"] > 0, np.roll(trace["output_token"], 1), 2)
    z = slm[before]
    x, y = softmax(z), softmax(llm[before])
    order = np.argsort(-z, -1)
    u = exact_uncertainty(z, order, temperatures())
    for name, values in (
        ("head_prob", np.take_along_axis(x, order, -1)),
        ("head_target_prob", np.take_along_axis(y, order, -1)),
        ("head_uncertainty", u),
        ("tv_distance", np.abs(x - y).sum(-1) / 2),
        ("max_logit", z.max(-1)),
    ):
        np.testing.assert_allclose(trace[name], values, atol=3e-6, err_msg=name)
    due = np.isfinite(trace["head_race"][:, 0])
    agreement, race = coupling_columns(x[due], y[due], order[due])
    np.testing.assert_allclose(trace["head_agreement"][due], agreement, atol=3e-6)
    np.testing.assert_allclose(trace["head_race"][due], race, atol=3e-6)
    place = np.argmax(order == trace["draft_token"][:, None], axis=-1)
    np.testing.assert_array_equal(trace["draft_rank"], place)
    for token in ("draft", "output"):
        at = np.arange(len(x)), trace[f"{token}_token"]
        prob = "draft_prob" if token == "draft" else "output_prob"
        np.testing.assert_allclose(trace[prob], x[at], atol=3e-6)


def test_a_minimal_trace_leaves_the_head_out():
    columns = run(*markov(), make("u-hlm", 0.3), num_prompts=3, steps=3)
    assert not [name for name in columns if name.startswith(("head_", "topk", "tail", "trunc"))]
    assert {"uncertainty_sampled", "output_uncertainty", "policy_risk"} <= set(columns)


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
    return next(decode(slm, llm, prompts(9), make("hlm"), settings, ()))


@pytest.mark.parametrize("fail", [no_memory, lambda: torch.empty(2**50)])
def test_a_prompt_that_does_not_fit_even_alone_names_the_way_out(fail):
    with pytest.raises(UserError, match="prompt 'p00000' does not fit the memory, even alone"):
        first_batch(fail)


class Small(TableModel):
    """Holds a few contexts, and runs out of memory with more: at the start, or a step later."""

    def __init__(self, logits, most, late):
        super().__init__(logits)
        self.most, self.late = most, late

    def start(self, contexts, attention, fill=True):
        session = super().start(contexts, attention, fill)
        if len(contexts) > self.most:
            if not self.late:
                raise torch.OutOfMemoryError("CUDA out of memory")
            honest, steps = session.step, []

            def step(tokens):
                steps.append(len(tokens))
                if len(steps) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return honest(tokens)

            session.step = step
        return session


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_that_does_not_fit_is_halved_and_has_the_same_rows(late):
    slm, llm = markov()
    asked = prompts(9)
    settings = DecodingSettings(max_new_tokens=6, batch_size=9)
    policies = {"hlm": make("hlm"), "u-hlm": make("u-hlm", 0.3)}
    (whole,) = decode_together(TableModel(slm), TableModel(llm), asked, policies, settings, (5,))
    notes, steps = [], []
    (halved,) = decode_together(
        Small(slm, 3, late), TableModel(llm), asked, policies, settings, (5,),
        lambda *two: steps.append(two), on_note=notes.append,
    )  # fmt: skip
    assert [note.split(":")[0] for note in notes] == [
        f"a batch of {num} prompts does not fit the memory" for num in (9, 5, 4)
    ]
    assert "halved; --batch-size 5 saves" in notes[0]
    assert sum(emitted for emitted, _ in steps) == sum(len(one.columns["row"])
                                                       for one in whole.values())  # fmt: skip
    assert sum(map(sum, steps)) == 2 * 9 * 6  # what was tried in vain is taken back
    for name, batch in whole.items():
        other = halved[name]
        assert (other.prompt_ids, other.categories) == (batch.prompt_ids, batch.categories)
        assert other.columns.keys() == batch.columns.keys()
        for column, values in batch.columns.items():
            # Vectorised sums over a step's rows round in the last place of float32.
            rtol = 1e-6 if values.dtype.kind == "f" else 0
            np.testing.assert_allclose(other.columns[column], values, rtol, err_msg=column)


def test_other_errors_are_not_taken_for_a_full_memory():
    with pytest.raises(RuntimeError, match="must match"):
        first_batch(lambda: torch.zeros(2) + torch.zeros(3))


@pytest.mark.parametrize("variant", ["topk", "context"])
def test_live_importance_equals_its_replay_from_the_trace(tmp_path, variant):
    from calibrate.derive.predict import remembered

    if variant == "topk":
        calibrated = full_trace(tmp_path, make("hlm"))
        focus = calibrated["topk_attention"][:, calibrated.axes.attention_sizes.index(2)]
        gamma = float(np.median(focus * np.exp(calibrated["attention_entropy"])))
        importance = {"variant": "topk", "k": 2, "gamma": gamma}
    else:
        importance = {"variant": "context", "k": 0.8, "gamma": 0.9}
    policy = make("ui-hlm", 0.3, importance=importance)
    trace = full_trace(tmp_path, policy)
    important = remembered(trace, policy)["important"]
    assert 0.05 < important.mean() < 0.95
    np.testing.assert_array_equal(trace["skipped"], (trace["uncertainty"] <= 0.3) | ~important)


def test_a_recorded_rerun_predicts_itself(tmp_path):
    """The policy on the stored steps says what it said live, in single precision."""
    from calibrate.derive.predict import drawn_tokens, predicted_tokens

    for name, settings in GATED.items():
        policy = make(name, THRESHOLD, **settings)
        trace = full_trace(tmp_path, policy)
        expected, drawn = predicted_tokens(trace, policy), drawn_tokens(trace, policy)
        np.testing.assert_allclose(expected.skip, trace["policy_skip_prob"], atol=3e-6)
        np.testing.assert_allclose(expected.risk, trace["policy_risk"], atol=3e-6)
        np.testing.assert_array_equal(drawn.skip, trace["skipped"])
        if name != "cu-hlm-online":  # its size is read off a grid
            np.testing.assert_allclose(drawn.entries, trace["policy_entries"], atol=3e-6)
        known = np.isfinite(expected.bias)
        assert known.any()
        if not name.startswith("cu-hlm"):
            bias = trace["policy_bias"][known]
            np.testing.assert_allclose(expected.bias[known], bias, atol=3e-6, err_msg=name)


# --- under an answer cap -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GATED))
def test_a_capped_policy_keeps_its_cap_and_predicts_itself(tmp_path, name):
    """Answers of any length, rows dropped as they end: live, replayed and recounted alike."""
    from calibrate.derive.predict import drawn_tokens, predicted_tokens, remembered

    settings = dict(GATED[name])
    if name == "ui-hlm":  # away from ties of importance and threshold, which rounding decides
        settings = {"importance": {"variant": "context", "k": 0.8, "gamma": 0.9}}
    policy = make(name, 0.7, cap=0.3, **settings)
    trace = full_trace(tmp_path, policy)
    lengths = np.bincount(trace.prompt_index)
    skipped = np.bincount(trace.prompt_index, weights=trace["skipped"])
    assert np.all(skipped <= 0.3 * lengths + 1e-9)
    assert lengths.min() < lengths.max()
    may = remembered(trace, policy)["may_skip"]
    assert skipped.sum() > 0
    assert policy.gate_of_draft(Step(trace.axes, remembered(trace, policy)))[~may].any()
    assert not trace["skipped"][~may].any()
    expected, drawn = predicted_tokens(trace, policy), drawn_tokens(trace, policy)
    np.testing.assert_array_equal(drawn.skip, trace["skipped"])
    np.testing.assert_allclose(expected.skip, trace["policy_skip_prob"], atol=3e-6)
    np.testing.assert_allclose(expected.risk, trace["policy_risk"], atol=3e-6)
    assert np.all(expected.skip[~may] == 0)


@pytest.mark.parametrize("name", ["u-hlm", "r-hlm", "coupled"])
def test_a_lossless_trace_predicts_a_capped_policy(laws, tmp_path, name):
    """Contexts that do not matter, so there is no shift: within 4.5 standard errors."""
    from calibrate.derive.predict import measured_tokens, predicted_tokens

    policy, asked = make(name, 0.7, cap=0.4), prompts(400)
    models = [TableModel(one) for one in laws]
    rerun, lossless = (
        full_trace(tmp_path, one, asked, (), models, seed)
        for seed, one in enumerate((policy, make("hlm")))
    )
    found, averaged = (
        measured_tokens(rerun, policy, np.zeros(rerun.num_prompts)),
        predicted_tokens(lossless, policy),
    )
    assert found.skip.mean() < measured_share(lossless, 0.7), "the cap binds"
    for part in ("skip", "risk", "rho"):
        estimates = [
            mean_over_tokens(getattr(one, part), one.prompt_index, one.num_prompts)
            for one in (found, averaged)
        ]
        error = np.hypot(*(one.standard_error for one in estimates))
        assert abs(estimates[0].value - estimates[1].value) < 4.5 * error, part


def measured_share(trace, threshold):
    return np.mean(trace["uncertainty"] <= threshold)


class BrokenModel(TableModel):
    """Gives one bad logit to the context that ends in token 1."""

    def __init__(self, logits: np.ndarray, bad: float) -> None:
        super().__init__(np.tile(logits, (VOCAB, 1)))
        self.table[1, 4] = bad


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["device", "server"])
def test_broken_logits_stop_with_prompt_step_and_model(laws, bad, side) -> None:
    models = [TableModel(law) for law in laws]
    models[side == "server"] = BrokenModel(laws[side == "server"], bad)
    asked = [TokenizedPrompt("good", (1, 3)), TokenizedPrompt("bad", (3, 1))]
    settings = DecodingSettings(max_new_tokens=2, trace="minimal")
    said = f"the {side} model gave NaN or infinite logits for prompt 'bad' at step 0"
    with pytest.raises(UserError, match=said):
        list(decode(*models, asked, make("hlm"), settings, ()))


def test_a_token_that_is_never_drawn_is_no_fault(laws) -> None:
    slm, llm = (BrokenModel(law, -np.inf) for law in laws)
    settings = DecodingSettings(max_new_tokens=2, trace="minimal")
    (batch,) = decode(slm, llm, [TokenizedPrompt("a", (3, 1))], make("hlm"), settings, ())
    assert np.isfinite(batch.columns["uncertainty"]).all()
    assert np.isfinite(batch.columns["rejection_prob"]).all()
