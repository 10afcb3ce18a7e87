"""Whole answers of the embedded pair: predicted, measured, and what a score of them makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.decode.models import TransformerModel
from calibrate.derive.predict import PolicyTokens, measured_tokens, predicted_tokens
from calibrate.run.prompts import draw_prompts, read_prompts, tokenize_prompts
from calibrate.run.traces import Trace
from hlmtheory.answers import answer_divergence, log_weights, tokens_in_agreement
from hlmtheory.policies import Policy, policy_from_settings

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]
NUM_PROMPTS, LENGTH = 32, 12
POLICIES: dict[str, Policy] = {
    name: policy_from_settings(name, settings, 0.6)
    for name, settings in (
        ("hlm", {}), ("u-hlm", {}), ("r-hlm", {}), ("ask-llm", {}), ("coupled", {}),
        ("cu-hlm-offline", {"num_entries": 30}),
    )
}  # fmt: skip
MOST = 4.0
"""Standard errors over prompts: of a dozen normal means one exceeds it once in a thousand."""


@pytest.fixture(scope="module")
def traces() -> Mapping[str, Trace]:
    """Every policy on the same prompts with the same random numbers."""
    from calibrate.pairs.registry import load_pair, resolve_pair

    spec = resolve_pair("smollm2", None, None, None)
    pair = load_pair(spec, dtype="float32", attention=True)
    drawn = draw_prompts(read_prompts(None), "calibration", NUM_PROMPTS, 0)
    prompts = tokenize_prompts(drawn, pair.tokenizer, LENGTH, pair.max_context)
    models = (TransformerModel(one, pair.vocab_size) for one in (pair.slm, pair.llm))
    settings = DecodingSettings(max_new_tokens=LENGTH, batch_size=NUM_PROMPTS, seed=21)
    others = [name for name in POLICIES if name != "hlm"]
    (batch,) = decode_together(
        *models, prompts, POLICIES, settings, pair.eos_token_ids, minimal=others
    )
    out = {}
    for name, one in batch.items():
        columns = {
            key: values.astype(np.float64) if values.dtype == np.float32 else values
            for key, values in one.columns.items()
        }
        columns["prompt_index"] = columns.pop("row")
        out[name] = Trace(columns, list(one.prompt_ids), settings.axes(pair.vocab_size))
    return out


def distances(tokens: PolicyTokens) -> np.ndarray:
    """(1 - W)+ of each answer, from the law that it follows."""
    weights = log_weights(tokens.log_ratio[0], tokens.prompt_index, tokens.num_prompts)
    return answer_divergence(weights[:, -1])


def answers(trace: Trace) -> list[list[int]]:
    tokens = trace["output_token"].tolist()
    return [
        [tokens[i] for i in np.flatnonzero(trace.prompt_index == prompt)]
        for prompt in range(trace.num_prompts)
    ]


def of_rerun(trace: Trace, policy: Policy) -> PolicyTokens:
    """Nothing here is priced, so the length of a prompt is nobody's matter."""
    return measured_tokens(trace, policy, np.zeros(trace.num_prompts))


def z_score(differences: np.ndarray) -> float:
    """Mean of independent differences over its standard error."""
    return float(differences.mean() / (differences.std(ddof=1) / len(differences) ** 0.5))


@pytest.mark.parametrize("name", ["u-hlm", "r-hlm", "ask-llm"])
def test_predicted_and_measured_are_one_number(traces, name, capsys) -> None:
    """E_Y[(1 - W)+] along the server's answers, E_P[(1 - 1/W)+] along the policy's own."""
    policy = POLICIES[name]
    predicted = distances(predicted_tokens(traces["hlm"], policy))
    measured = distances(of_rerun(traces[name], policy))
    with capsys.disabled():
        print(f"\n{name}: predicted {predicted.mean():.3f}, measured {measured.mean():.3f}")
    assert 0.05 < predicted.mean() < 0.95
    assert abs(z_score(measured - predicted)) < MOST


def test_an_upper_bound_is_not_far_above(traces) -> None:
    policy = POLICIES["coupled"]
    tokens = predicted_tokens(traces["hlm"], policy)
    least, most = (
        answer_divergence(log_weights(one, tokens.prompt_index, tokens.num_prompts)[:, -1])
        for one in tokens.log_ratio
    )
    assert (least >= most - 1e-6).all()
    assert least.mean() - most.mean() < 0.05
    assert abs(z_score(distances(of_rerun(traces["coupled"], policy)) - most)) < MOST


def test_lossless_decoding_weighs_nothing_and_truncation_is_measured(traces) -> None:
    assert (traces["hlm"]["policy_log_ratio"] == 0).all()
    assert np.isnan(predicted_tokens(traces["hlm"], POLICIES["cu-hlm-offline"]).log_ratio).all()
    found = distances(of_rerun(traces["cu-hlm-offline"], POLICIES["cu-hlm-offline"]))
    plain = distances(of_rerun(traces["u-hlm"], POLICIES["u-hlm"]))
    assert found.mean() > plain.mean() - MOST * np.hypot(
        *(a.std() / 32**0.5 for a in (found, plain))
    )


def test_common_beginnings_are_as_long_as_predicted(traces, capsys) -> None:
    """hlm and u-hlm under common random numbers: (47)."""
    tokens = predicted_tokens(traces["hlm"], POLICIES["u-hlm"])
    expected = tokens_in_agreement(tokens.log_ratio[0], tokens.prompt_index, tokens.num_prompts)
    observed = []
    for mine, theirs in zip(answers(traces["u-hlm"]), answers(traces["hlm"]), strict=True):
        apart = [i for i, pair in enumerate(zip(mine, theirs, strict=False)) if len(set(pair)) > 1]
        observed.append(apart[0] if apart else min(len(mine), len(theirs)))
    with capsys.disabled():
        print(
            f"\ntokens in agreement: {expected.mean():.2f} expected, {np.mean(observed):.2f} seen"
        )
    assert np.mean(observed) < LENGTH - 1
    assert abs(z_score(np.array(observed) - expected)) < MOST


@pytest.mark.parametrize("name", ["u-hlm", "ask-llm"])
def test_a_score_of_real_answers_moves_by_no_more(traces, name, capsys) -> None:
    """The share of different tokens in an answer; and the likelier-law score, which moves by TV."""
    policy = POLICIES[name]
    served, own = (predicted_tokens(traces["hlm"], policy), of_rerun(traces[name], policy))
    distance = (distances(served) + distances(own)) / 2
    theirs, ours = (
        np.array([len(set(one)) / len(one) for one in answers(traces[key])])
        for key in ("hlm", name)
    )
    moved = ours - theirs
    error = float(np.std(np.abs(moved.mean()) - distance, ddof=1) + moved.std(ddof=1))
    with capsys.disabled():
        print(f"\n{name}: variety moves by {moved.mean():+.3f}, TV {distance.mean():.3f}")
    assert abs(moved.mean()) <= distance.mean() + MOST * error / NUM_PROMPTS**0.5
    # 1 where the answer is likelier under the policy: E_P - E_Y is TV itself.
    signs = []
    for tokens, sign in ((served, 1.0), (own, -1.0)):
        weight = log_weights(sign * tokens.log_ratio[0], tokens.prompt_index, NUM_PROMPTS)[:, -1]
        signs.append((weight > 1e-5).astype(float))
    assert abs(z_score(signs[1] - signs[0] - distance)) < MOST
