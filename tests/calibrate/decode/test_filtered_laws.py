"""The engine at temperature 0, under top-k, top-p and a penalty: exact laws, exact texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import toy_pair
from scipy import stats
from toy_models import TableModel
from transformers import GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.decode.models import TransformerModel
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.coupling import coupled_output_law
from hlmtheory.policies import Policy, policy_from_settings
from hlmtheory.sampled_law import Sampling, sampled_law
from hlmtheory.uncertainty import exact_uncertainty, temperatures
from hlmtheory.verification import output_law

VOCAB, NUM_PROMPTS, STEPS = 12, 400, 60
SETTINGS = {
    "hlm": {}, "llm": {}, "slm": {}, "u-hlm": {}, "r-hlm": {}, "ask-llm": {}, "coupled": {},
    "cu-hlm-offline": {"num_entries": 2},
    "cu-hlm-online": {"theta": 0.3, "eta": 1.0, "slope": 0.6, "intercept": 0.0},
}  # fmt: skip
ONE_SIZE = [name for name in SETTINGS if name != "cu-hlm-online"]
NUCLEI = (Sampling(top_p=0.8), Sampling(1.3, top_k=4))


Columns = dict[str, np.ndarray]


def columns_of(slm, llm, policy: Policy, *rest, **settings) -> Columns:
    """Columns of one policy; see :func:`columns_of_all`."""
    return columns_of_all(slm, llm, {"": policy}, *rest, **settings)[""]


def columns_of_all(
    slm,
    llm,
    policies: dict[str, Policy],
    prompts: Sequence[TokenizedPrompt],
    sampling: Sampling,
    **settings,
) -> dict[str, Columns]:
    """Columns of one batch, decoded together, by prompt and step, in the order of the prompts."""
    settings = {"trace": "minimal", "batch_size": len(prompts), "seed": 5} | settings
    eos = settings.pop("eos", ())
    (batches,) = decode_together(
        slm, llm, prompts, policies, DecodingSettings(sampling, **settings), eos
    )
    place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    out = {}
    for label, batch in batches.items():
        row = np.array([place[one] for one in batch.prompt_ids])[batch.columns["row"]]
        order = np.lexsort((batch.columns["step"], row))
        columns = batch.columns | {"row": row}
        out[label] = {name: values[order] for name, values in columns.items()}
    return out


def texts(columns: Columns) -> list[list[int]]:
    """The tokens of each prompt."""
    return [
        columns["output_token"][columns["row"] == row].tolist() for row in np.unique(columns["row"])
    ]


@pytest.mark.parametrize("sampling", NUCLEI, ids=str)
@pytest.mark.parametrize("name", ONE_SIZE)
def test_each_policy_emits_its_exact_law(name, sampling):
    """Chi-square over the tokens that the law has; none of any other is ever emitted."""
    rng = np.random.default_rng(7)
    z = 1.3 * rng.normal(size=VOCAB)
    z[3] += 2.0
    w = z + 1.0 * rng.normal(size=VOCAB)
    x, y = (sampled_law(one[None].astype(float), sampling)[0] for one in (z, w))
    assert ((x > 0) & (y == 0)).any()
    assert ((y > 0) & (x == 0)).any()
    policy = policy_from_settings(name, SETTINGS[name], 0.62)
    u = exact_uncertainty(z, np.arange(VOCAB), temperatures())
    sigma = (u <= 0.62).astype(float) if policy.gated else np.full(VOCAB, float(name == "slm"))
    assert not policy.gated or 0 < sigma @ x < 1
    size = SETTINGS[name].get("num_entries")
    law = (
        coupled_output_law(x, y, sigma)
        if name == "coupled"
        else output_law(policy.rule, x, y, sigma, size)
    )
    prompts = [TokenizedPrompt(f"p{i:04d}", (1, 2)) for i in range(NUM_PROMPTS)]
    found = columns_of(
        TableModel(z), TableModel(w), policy, prompts, sampling, max_new_tokens=STEPS
    )
    counts = np.bincount(found["output_token"], minlength=VOCAB)
    possible = law > 1e-9
    assert counts[~possible].sum() == 0
    expected = law[possible] / law[possible].sum() * counts.sum()
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3
    np.testing.assert_allclose(found["policy_bias"], np.abs(law - y).sum() / 2, atol=2e-6)
    np.testing.assert_allclose(found["policy_risk"], sigma @ np.maximum(x - y, 0), atol=2e-6)
    np.testing.assert_array_equal(found["support_size"], np.count_nonzero(x))
    if name in ("hlm", "u-hlm", "cu-hlm-offline"):
        sent = found["policy_entries"][~found["skipped"]]
        np.testing.assert_array_equal(sent, size or np.count_nonzero(x))


def test_at_temperature_0_every_gate_ends_in_one_text():
    """Skipped: the device's likeliest token. Asked, whatever is sent: the server's likeliest."""
    rng = np.random.default_rng(1)
    z = rng.uniform(0.5, 3, size=(VOCAB, 1)) * rng.normal(size=(VOCAB, VOCAB))
    w = z + rng.normal(size=(VOCAB, VOCAB))
    device, server = z.argmax(-1), w.argmax(-1)
    assert 0 < (device != server).mean() < 1
    u = exact_uncertainty(z, device[:, None], temperatures())[:, 0]
    prompts = [TokenizedPrompt(f"p{i}", (1, i)) for i in range(VOCAB)]
    for name, settings in SETTINGS.items():
        for threshold in (0.0, 0.5, 0.7):
            policy = policy_from_settings(name, settings, threshold)
            skips = u <= threshold if policy.gated else np.full(VOCAB, name == "slm")
            follow = np.where(skips, device, server)
            models = TableModel(z), TableModel(w)
            found = columns_of(*models, policy, prompts, Sampling(0.0), max_new_tokens=9)
            expected = []
            for i in range(VOCAB):
                text = [i]
                for _ in range(9):
                    text.append(int(follow[text[-1]]))
                expected.append(text[1:])
            assert texts(found) == expected, (name, threshold)
            disagree = (found["draft_token"] != server[_contexts(found, prompts)]).astype(float)
            np.testing.assert_array_equal(found["rejection_prob"], disagree)
            np.testing.assert_array_equal(found["tv_distance"], disagree)
            np.testing.assert_allclose(found["policy_bias"], found["skipped"] * disagree, atol=1e-7)
            np.testing.assert_allclose(found["entropy"], 0, atol=1e-30)
            assert not np.signbit(found["entropy"]).any()
            if name in ("r-hlm", "ask-llm", "coupled"):
                assert (found["policy_entries"] == 0).all()


def _contexts(found: Columns, prompts: Sequence[TokenizedPrompt]) -> np.ndarray:
    """The last token before each step."""
    before = np.roll(found["output_token"], 1)
    first = found["step"] == 0
    before[first] = [prompts[row].tokens[-1] for row in found["row"][first]]
    return before


def test_the_penalty_sees_each_rows_own_context():
    """Prompts of several lengths, answers that end early and rows that part under other policies.

    Against a loop over one text at a time, with transformers' processor on both models' logits;
    the uncertainty is of the penalised ones.
    """
    rng = np.random.default_rng(3)
    w = 2 * rng.normal(size=(VOCAB, VOCAB))
    z = w + 0.7 * rng.normal(size=w.shape)
    penalty, eos = 1.8, (2, 5, 7)
    prompts = [
        TokenizedPrompt(f"p{i}", tuple(rng.integers(VOCAB, size=n).tolist()))
        for i, n in enumerate(rng.integers(2, 9, size=40))
    ]

    def text_of(prompt: TokenizedPrompt, threshold: float, penalty: float) -> list[int]:
        process = RepetitionPenaltyLogitsProcessor(penalty)
        text = list(prompt.tokens)
        while len(text) < len(prompt.tokens) + 12:
            device, server = (
                process(
                    torch.tensor([text]), torch.tensor(one[text[-1]], dtype=torch.float32)[None]
                )
                for one in (z, w)
            )
            draft = device.argmax(-1, keepdim=True)
            u = float(exact_uncertainty(device, draft, temperatures()))
            text.append(int(draft if u <= threshold else server.argmax()))
            if text[-1] in eos:
                break
        return text[len(prompt.tokens) :]

    thresholds = {"hlm": -1.0, "llm": -1.0, "u-hlm": 0.5, "coupled": 0.6, "slm": 1.0}
    policies = {name: policy_from_settings(name, {}, abs(t)) for name, t in thresholds.items()}
    sampling = Sampling(0.0, repetition_penalty=penalty)
    found = columns_of_all(
        TableModel(z), TableModel(w), policies, prompts, sampling, max_new_tokens=12, eos=eos
    )
    expected = {
        name: [text_of(prompt, threshold, penalty) for prompt in prompts]
        for name, threshold in thresholds.items()
    }
    assert {name: texts(columns) for name, columns in found.items()} == expected
    lengths = {len(text) for name in expected for text in expected[name]}
    assert len(lengths) > 3
    different = {tuple(map(tuple, of)) for of in expected.values()}
    assert len(different) == 4  # hlm and llm are one
    assert expected["hlm"] != [text_of(prompt, -1.0, 1.0) for prompt in prompts]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    toy_pair.make_pair(folder)
    return toy_pair.load(folder)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_at_temperature_0_hlm_writes_what_transformers_generates(pair, penalty):
    """Token by token, on a real network, whatever the device model says."""
    rng = np.random.default_rng(2)
    prompts = [
        TokenizedPrompt(f"p{i}", tuple(rng.integers(3, 96, size=n).tolist()))
        for i, n in enumerate((3, 7, 5, 11, 4, 9))
    ]
    config = GenerationConfig(
        do_sample=False, repetition_penalty=penalty, max_new_tokens=20, pad_token_id=0,
        eos_token_id=list(pair.eos_token_ids),
    )  # fmt: skip
    expected = [
        pair.llm.generate(torch.tensor([prompt.tokens]), generation_config=config)[0].tolist()
        for prompt in prompts
    ]
    models = [TransformerModel(model, pair.vocab_size) for model in (pair.slm, pair.llm)]
    sampling = Sampling(0.0, repetition_penalty=penalty)
    policies = {name: policy_from_settings(name, {}, 0.0) for name in ("hlm", "llm", "coupled")}
    found = columns_of_all(
        *models, policies, prompts, sampling, max_new_tokens=20, eos=pair.eos_token_ids
    )
    for columns in found.values():
        written = [list(p.tokens) + text for p, text in zip(prompts, texts(columns), strict=True)]
        assert written == expected
