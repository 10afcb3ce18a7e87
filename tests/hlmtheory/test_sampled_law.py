"""Laws as they are deployed: against transformers' processors, the definition, and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hlmtheory.sampled_law import PLAIN, Sampling, penalised_logits, sampled_law

SAMPLINGS = [
    PLAIN,
    Sampling(0.3),
    Sampling(top_k=1),
    Sampling(top_k=50),
    Sampling(top_p=0.05),
    Sampling(top_p=0.95),
    Sampling(0.7, top_k=20, top_p=0.8, repetition_penalty=1.1),
    Sampling(1.5, top_p=0.999, repetition_penalty=0.8),
]


def reference(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The law that transformers samples from: its own processors, in its own order."""
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(steps)(tokens, logits).softmax(-1)


def law_of(logits, tokens, sampling: Sampling):
    return sampled_law(penalised_logits(logits, tokens, sampling.repetition_penalty), sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("vocab", [7, 200, 5000])
def test_laws_are_those_that_transformers_samples(rng, sampling, vocab):
    """Float64 and no ties: the same support, the same law; in torch and in numpy."""
    scale = rng.uniform(0.2, 6, size=(12, 1))
    logits = torch.tensor(scale * rng.standard_normal((12, vocab)))
    tokens = torch.tensor(rng.integers(vocab, size=(12, 30)))  # with repeats
    expected = reference(logits, tokens, sampling)
    found = law_of(logits, tokens, sampling)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    in_numpy = law_of(logits.numpy(), tokens.numpy(), sampling)
    np.testing.assert_allclose(in_numpy, expected.numpy(), rtol=1e-12, atol=1e-15)


def test_single_precision_differs_from_transformers_at_edges_only(rng):
    """Theirs adds up the nucleus in single precision: an edge moves where a sum rounds to it."""
    logits = torch.tensor(3 * rng.standard_normal((64, 5000)), dtype=torch.float32)
    sampling = Sampling(top_p=0.95)
    found, theirs = sampled_law(logits, sampling), reference(logits, logits[:, :0].long(), sampling)
    exact = sampled_law(logits.double(), sampling)
    for law, most in ((found, 1), (theirs, 3)):
        assert ((law > 0).sum(-1) - (exact > 0).sum(-1)).abs().max() <= most
    assert found.dtype == torch.float32
    assert (found.double().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("to", [np.asarray, torch.tensor])
def test_at_temperature_0_the_lowest_of_equal_ids_has_it_all(to):
    logits = np.array([[1.0, 3, 3, 0], [2, 2, 2, 2], [-5, -7, -6, -5.0]])
    law = np.asarray(sampled_law(to(logits), Sampling(0.0, top_k=2, top_p=0.5)))
    np.testing.assert_array_equal(law, np.eye(4)[[1, 0, 0]])


@pytest.mark.parametrize("to", [np.asarray, torch.tensor])
def test_equal_logits_are_kept_or_dropped_together(to):
    """0.4, 0.2, 0.2, 0.2 and nearly nothing: the edge lies in the tie, and the tie stays whole."""
    logits = to(np.log(np.array([[0.2, 0.4, 0.2, 0.2, 1e-9]])))
    for sampling in (Sampling(top_p=0.5), Sampling(top_k=2)):
        np.testing.assert_allclose(
            np.asarray(sampled_law(logits, sampling)), [[0.2, 0.4, 0.2, 0.2, 0]], rtol=1e-8
        )
    first = np.asarray(sampled_law(logits, Sampling(top_p=0.3)))
    np.testing.assert_allclose(first, [[0, 1, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("to", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("vocab", "top_p"),
    [(50, 5e-8), (3, 1e-9), (1000, 1e-9), (32_000, 1e-9), (49_152, 1e-9), (1, 1e-9), (50, 1e-300)],
)
def test_the_likeliest_stay_however_small_top_p_is(to, dtype, vocab, top_p):
    """Of a uniform law that is all of it: one tie. Else it is the largest, or the two that tie."""
    logits = np.zeros((3, vocab), dtype)
    logits[1, vocab // 2] = 1e-3
    logits[2, [0, -1]] = 2.0
    law = np.asarray(sampled_law(to(logits), Sampling(1.0, 0, top_p)))
    for row, size in zip(law, (vocab, 1, min(2, vocab)), strict=True):
        assert np.count_nonzero(row) == size
        np.testing.assert_allclose(row[row > 0], 1 / size, rtol=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.integers(0, 70),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_filters_keep_the_least_likely_enough_prefix(seed, vocab, temperature, top_k, top_p, ties):
    """By the definition: a law, rising in the logits, no smaller than asked, and no larger."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(0, 5) * rng.standard_normal(vocab)
    z = np.round(z) if ties else z
    sampling = Sampling(temperature, top_k, top_p)
    x = sampled_law(z[None], sampling)[0]
    assert abs(x.sum() - 1) < 1e-12
    assert sampling.filtered or (x > 0).all()
    kept = x > 0
    if temperature == 0:
        assert list(np.flatnonzero(kept)) == [int(np.argmax(z))]
        return
    assert kept.all() or z[kept].min() > z[~kept].max()  # a prefix, ties whole
    order = np.argsort(-z, kind="stable")
    assert (np.diff(x[order]) <= 1e-18).all()
    p = np.exp((z - z.max()) / temperature)
    allowed = np.ones(vocab, dtype=bool) if not top_k else z >= np.sort(z)[::-1][:top_k][-1]
    p = np.where(allowed, p, 0) / p[allowed].sum()
    if top_p < 1:
        least = p[kept].min()
        assert p[kept].sum() >= top_p - 1e-12
        assert p[p > least].sum() < top_p + 1e-12  # without its last ties it would not reach p
    else:
        assert (kept == allowed).all()
    np.testing.assert_allclose(x, np.where(kept, p, 0) / p[kept].sum(), rtol=1e-12)


def test_the_penalty_counts_a_token_once_and_looks_at_its_sign(rng):
    logits = np.array([[2.0, -2, 0, 1, 5]])
    once = penalised_logits(logits, np.array([[0, 1, 2]]), 2.0)
    np.testing.assert_allclose(once, [[1, -4, 0, 1, 5]])
    np.testing.assert_allclose(penalised_logits(logits, np.array([[0, 1, 2, 1, 1]]), 2.0), once)
    np.testing.assert_allclose(logits, [[2.0, -2, 0, 1, 5]])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1.0}, r"^temperature = -1: allowed is 0.01 to 10, or 0"),
        ({"temperature": 0.001}, r"^temperature = 0.001: allowed"),
        ({"temperature": float("nan")}, r"^temperature = nan"),
        ({"top_k": -1}, r"^top_k = -1: allowed is 1 and more, or 0"),
        ({"top_p": 0.0}, r"^top_p = 0: allowed is above 0"),
        ({"top_p": 95.0}, r"^top_p = 95: allowed"),
        ({"repetition_penalty": 0.0}, r"^repetition_penalty = 0: allowed is \(0, inf\)"),
    ],
)
def test_what_is_no_sampling_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**values)


def test_samplings_say_what_they_are():
    assert str(Sampling(0.0)) == "T = 0"
    text = "T = 0.7, top-k 20, top-p 0.8, repetition penalty 1.1"
    assert str(Sampling(0.7, 20, 0.8, 1.1)) == text
    assert [Sampling(repetition_penalty=1.1).filtered, Sampling(0.0).filtered] == [False, True]
