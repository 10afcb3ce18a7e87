"""One text for numpy and torch: every public array function agrees between them in float64.

Both run the same formulas; they differ in the order of a sum and in the last bit of exp and log.
With 300 tokens and values of order 1 that is below 1e-13; the limit is 1e-12.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from other_device import OTHER, Elsewhere, other_device

import hlmtheory
from hlmtheory import (
    acceptance,
    cost,
    importance,
    link,
    relation,
    sampling,
    steps,
    truncation,
    uncertainty,
    verification,
)
from hlmtheory.cost import WireCosts
from hlmtheory.policies import policy_from_settings
from hlmtheory.policies.ask_llm import AskAndSample
from hlmtheory.policies.r_hlm import ResidualVerification
from hlmtheory.sampled_law import Sampling
from hlmtheory.scores import SCORE_NAMES, score_named

BATCH, VOCAB, LENGTH = 7, 300, 40
THETAS = uncertainty.temperatures()
PROFILE = cost.DeviceProfile(20.0, 2.0, 60.0, 3.0, 0.5, 200.0, 0.4)
Inputs = dict[str, np.ndarray]
Call = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    rng = np.random.default_rng(5)
    logits = rng.uniform(0.5, 5, size=(BATCH, 1)) * rng.standard_normal((BATCH, VOCAB))
    target = logits + rng.standard_normal((BATCH, VOCAB))
    x, y = (np.exp(z - z.max(axis=-1, keepdims=True)) for z in (logits, target))
    x, y = x / x.sum(axis=-1, keepdims=True), y / y.sum(axis=-1, keepdims=True)
    attention = rng.dirichlet(np.full(LENGTH, 0.3), size=BATCH)
    mask = np.arange(LENGTH) >= rng.integers(0, 10, size=(BATCH, 1))  # left padding
    attention = np.where(mask, attention, 0)
    attention /= attention.sum(axis=-1, keepdims=True)
    return {
        "logits": logits,
        "x": x,
        "y": y,
        "reference": truncation.truncated_distribution(x, 9),
        "sigma": rng.uniform(size=(BATCH, VOCAB)) * (rng.uniform(size=(BATCH, VOCAB)) < 0.5),
        "tokens": rng.integers(VOCAB, size=(BATCH, 5)),
        "draft_prob": rng.uniform(size=BATCH),
        "target_prob": rng.uniform(size=BATCH),
        "u": rng.uniform(size=BATCH),
        "u_sampled": rng.integers(0, 21, size=BATCH) / 20,
        "important": rng.uniform(size=BATCH) < 0.5,
        "p": rng.uniform(size=(BATCH, 5, 20)),
        "uniforms": rng.uniform(size=(BATCH, 5, 20)),
        "exponentials": rng.standard_exponential((BATCH, VOCAB)),
        "two_uniforms": rng.uniform(size=(BATCH, 2)),
        "size": rng.integers(1, VOCAB + 1, size=BATCH),
        "deviation": rng.uniform(0, 2, size=BATCH),
        "attention": attention,
        "mask": mask,
        "row": importance.normalised_attention(attention, mask),
        "sent": (rng.uniform(size=BATCH) < 0.5).astype(float),
        "uplink_ms": rng.uniform(0, 80, size=BATCH),
        "bits": rng.integers(0, 10_000, size=BATCH).astype(float),
        "skip_set_size": rng.integers(0, 4, size=BATCH),
    }


def live_step(a: dict[str, Any]) -> steps.LawStep:
    """A live step of the logits and laws, with a draft, an output and its random numbers."""
    noise = SimpleNamespace(
        draft=a["two_uniforms"],
        accept=a["u"],
        resample=a["two_uniforms"],
        perturbation=a["uniforms"][:, 0],
        races=lambda: a["exponentials"],
    )
    known = {"draft_token": a["tokens"][:, 0], "output_token": a["tokens"][:, 1]}
    axes = steps.Axes(VOCAB)
    return steps.LawStep(axes, a["logits"], a["x"], a["y"], noise, columns=known)


def public_array_functions() -> dict[str, Callable[..., Any]]:
    """Every public function of a room that takes or gives what the room annotates as Array."""
    found = {}
    for room in pkgutil.iter_modules(hlmtheory.__path__):
        if room.name in ("domain", "threads"):  # no array comes back
            continue
        module = importlib.import_module(f"hlmtheory.{room.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            kinds = [str(kind).split(" | ")[0] for kind in function.__annotations__.values()]
            if own and "Array" in kinds:
                found[name] = function
    return found


F = SimpleNamespace(**public_array_functions())
FUNCTIONS: dict[str, Call] = {
    "coupled_output_bias": lambda a: F.coupled_output_bias(
        a["x"][:, :5], a["y"][:, :5], a["x"][:, 5:10], a["y"][:, 5:10], a["sigma"][:, :5]
    ),
    "bracketed_columns": lambda a: [
        column
        for triple in F.bracketed_columns(
            a["x"][:, :9],
            a["y"][:, :9],
            a["x"][:, 3],
            a["y"][:, 3],
            F.total_variation(a["x"], a["y"]),
            a["x"][:, :9] == a["x"][:, 3:4],
        )
        for column in triple
    ],
    "coupled_output_probability": lambda a: F.coupled_output_probability(
        (a["x"][:, 0], a["y"][:, 0], a["x"][:, 0] / 2, a["u"], a["u"]),
        a["x"][:, :5],
        a["sigma"][:, 5:10],
        a["sigma"][:, :5],
    ),
    "at_output": lambda a: F.at_output(live_step(a), a["sigma"][:, :5]),
    "is_output": lambda a: F.is_output(live_step(a), 5),
    "coupled_output_law": lambda a: F.coupled_output_law(a["x"], a["y"], a["sigma"]),
    "coupling_columns": lambda a: F.coupling_columns(a["x"], a["y"], a["tokens"]),
    "joint_law": lambda a: F.joint_law(a["x"], a["y"]),
    "poisson_binomial_law": lambda a: F.poisson_binomial_law(a["p"], 7),
    "race_argmin": lambda a: F.race_argmin(a["x"], a["exponentials"]),
    "used_width": lambda a: float(F.used_width(a["sigma"] > 0.9)),
    "whole_skip": lambda a: F.whole_skip(live_step(a), a["u"] > 0.5).whole,
    "attention_entropy": lambda a: F.attention_entropy(a["row"]),
    "attention_sink": lambda a: F.attention_sink(a["attention"]),
    "bias_lower_bound": lambda a: F.bias_lower_bound(a["x"], a["y"], a["sigma"]),
    "context_attention": lambda a: F.context_attention(a["attention"], a["mask"]),
    "entropy": lambda a: F.entropy(a["x"]),
    "exact_uncertainty": lambda a: F.exact_uncertainty(a["logits"], a["tokens"], THETAS),
    "on_accelerator": lambda a: float(F.on_accelerator(a["x"])),
    "largest": lambda a: F.largest(a["x"], 30),
    "linear_rejection": lambda a: F.linear_rejection(a["u"], 0.82, -0.06),
    "may_skip": lambda a: F.may_skip(a["skip_set_size"], a["size"] // 40, 0.4),
    "log_partitions": lambda a: F.log_partitions(a["logits"], THETAS),
    "margin": lambda a: F.margin(a["x"]),
    "mean_throughput_at_skip_rate_tok_s": lambda a: F.mean_throughput_at_skip_rate_tok_s(
        a["u"], a["uplink_ms"] + 20, a["uplink_ms"] + 90
    ),
    "normalised_attention": lambda a: F.normalised_attention(a["attention"], a["mask"]),
    "normalised_entropy": lambda a: F.normalised_entropy(a["u"], a["size"]),
    "online_bound_denominator": lambda a: F.online_bound_denominator(a["draft_prob"], a["u"]),
    "online_truncation_size": lambda a: F.online_truncation_size(a["x"], a["draft_prob"], a["u"]),
    "output_bias": lambda a: [
        F.output_bias(rule, a["x"], a["y"], a["sigma"], a["size"]) for rule in RULES
    ],
    "output_law": lambda a: [
        F.output_law(rule, a["x"], a["y"], a["sigma"], a["size"]) for rule in RULES
    ],
    "parting_probability": lambda a: F.parting_probability(
        a["x"][:, :3], a["u"], a["draft_prob"], a["target_prob"]
    ),
    "of_candidates": lambda a: F.of_candidates(live_step(a), "prob"),
    "codes_of": lambda a: F.codes_of(a["x"], 8),
    "law_of": lambda a: F.law_of(
        F.codes_of(a["x"], 8), F.total_of(F.codes_of(a["x"], 8), 8), 8, a["x"]
    ),
    "quantised_law": lambda a: F.quantised_law(a["x"], 8),
    "total_of": lambda a: F.total_of(F.codes_of(a["x"], 8), 8),
    "values_of": lambda a: F.values_of(F.codes_of(a["x"], 8), 8),
    "wire_time_ms": lambda a: F.wire_time_ms(a["u"], a["bits"], 0.5, WireCosts(2.0, 3.0), 40.0),
    "payload_bits": lambda a: F.payload_bits(a["size"], VOCAB, accounting="full"),
    "perturbed_probabilities": lambda a: F.perturbed_probabilities(
        a["logits"], a["tokens"], THETAS
    ),
    "poisson_binomial_cdf": lambda a: F.poisson_binomial_cdf(a["p"], 7),
    "count_up_to": lambda a: F.count_up_to(-F.largest(a["x"], VOCAB)[0], -a["x"][:, :5]),
    "take_along_last_axis": lambda a: [
        F.take_along_last_axis(a["x"][:rows], a["tokens"][:rows]) for rows in (1, BATCH)
    ],
    "put_along_last_axis": lambda a: F.put_along_last_axis(
        a["x"], a["tokens"][:, :1], a["u"][:, None]
    ),
    "rejection_probability": lambda a: F.rejection_probability(a["draft_prob"], a["target_prob"]),
    "rejection_risk": lambda a: F.rejection_risk(a["x"], a["y"], a["sigma"]),
    "residual_distribution": lambda a: F.residual_distribution(a["x"], a["y"]),
    "sample_inverse_cdf": lambda a: F.sample_inverse_cdf(a["x"], a["two_uniforms"]),
    "penalised_logits": lambda a: F.penalised_logits(a["logits"], a["tokens"], 1.3),
    "sampled_law": lambda a: [
        F.sampled_law(a["logits"], one)
        for one in (Sampling(0.0), Sampling(0.6), Sampling(top_k=9, top_p=0.8))
    ],
    "support_size": lambda a: F.support_size(
        steps.LawStep(steps.Axes(VOCAB, Sampling(top_k=3)), a["logits"], a["sigma"], a["y"])
    ),
    "sampled_uncertainty": lambda a: F.sampled_uncertainty(a["p"], a["uniforms"]),
    "sampled_uncertainty_variance": lambda a: F.sampled_uncertainty_variance(a["p"]),
    "tail_deviation": lambda a: F.tail_deviation(a["x"]),
    "tail_deviation_at": lambda a: F.tail_deviation_at(a["x"], [1, 30, VOCAB]),
    "tail_level": lambda a: F.tail_level(a["u"], a["size"], VOCAB),
    "throughput_at_skip_rate_tok_s": lambda a: F.throughput_at_skip_rate_tok_s(
        a["u"], a["uplink_ms"] + 20, a["uplink_ms"] + 90
    ),
    "token_energy_j": lambda a: F.token_energy_j(a["sent"], a["uplink_ms"], PROFILE, 15.0),
    "token_time_ms": lambda a: F.token_time_ms(a["sent"], a["uplink_ms"], PROFILE, 15.0),
    "topk_attention": lambda a: F.topk_attention(a["row"], 8),
    "topk_importance_threshold": lambda a: F.topk_importance_threshold(a["u"], 0.8),
    "total_variation": lambda a: F.total_variation(a["x"], a["y"]),
    "truncated_distribution": lambda a: F.truncated_distribution(a["x"], a["size"]),
    "truncation_bias": lambda a: F.truncation_bias(a["x"], a["y"], a["size"]),
    "truncation_bias_bound": lambda a: F.truncation_bias_bound(a["deviation"]),
    "truncation_table": lambda a: F.truncation_table(
        a["x"], a["y"], F.largest(a["x"], 8)[1], [1, 30, VOCAB]
    ),
    "truncation_bound_soft": lambda a: F.truncation_bound_soft(
        a["deviation"], a["draft_prob"], a["u"]
    ),
}
RULES = (
    verification.FullDistribution(),
    verification.TruncatedDistribution(),
    verification.DraftFromSent(),
    ResidualVerification(),
    AskAndSample(),
)
POLICIES = tuple(
    policy_from_settings(name, settings, 0.4)
    for name, settings in (
        *((name, {}) for name in ("slm", "llm", "hlm", "u-hlm", "r-hlm", "ask-llm", "coupled")),
        ("cu-hlm-offline", {"num_entries": 9}),
        ("cu-hlm-offline", {"num_entries": 9, "draft_from_sent": True}),
        ("cu-hlm-online", {"theta": 0.1, "eta": 1.0, "slope": 0.815, "intercept": -0.066}),
    )
)
LEARNED = {
    "features": ("uncertainty", "entropy"),
    "mean": (0.4, 1.0),
    "scale": (0.3, 0.9),
    "coefficients": (1.3, 0.5),
    "intercept": -0.7,
}
SCORES = tuple(score_named(name, LEARNED) for name in SCORE_NAMES)
LINKS = (
    link.AwgnLink(1e6, 10.0),
    link.ErgodicRayleighLink(1e6, 10.0),
    link.RayleighOutageLink(1e6, 10.0, 1e6),
    link.TraceLink((1e5, 3e5, 2e6)),
)
METHODS: dict[str, Call] = {
    "step.columns": lambda a: [
        values
        for name, column in steps.COLUMNS.items()
        if column.compute is not None
        for values in as_list(live_step(a)[name])
    ],
    "score.of_draft": lambda a: [score.of_draft(live_step(a)) for score in SCORES],
    "score.skips": lambda a: [score.skips(live_step(a), 0.4) for score in SCORES],
    "score.skip_probability": lambda a: [
        values
        for score in SCORES
        for skip in [score.skip_probability(live_step(a), 0.4)]
        for values in (skip.candidates, skip.whole, skip.of_draft)
    ],
    "score.atoms": lambda a: [values for score in SCORES for values in score.atoms(live_step(a))],
    "skip.over_vocabulary": lambda a: (
        SCORES[0].skip_probability(live_step(a), 0.4).over_vocabulary(live_step(a))
    ),
    "policy.outcome": lambda a: [
        values for policy in POLICIES for values in vars(policy.outcome(live_step(a))).values()
    ],
    "policy.drawn": lambda a: [
        values for policy in POLICIES for values in vars(policy.drawn(live_step(a))).values()
    ],
    "policy.log_ratio": lambda a: [
        values for policy in POLICIES for values in policy.log_ratio(live_step(a))
    ],
    "policy.draft": lambda a: [policy.draft(live_step(a)) for policy in POLICIES],
    "policy.answer": lambda a: [
        values for policy in POLICIES for values in vars(policy.answer(live_step(a))).values()
    ],
    "rule.reference_law": lambda a: [rule.reference_law(a["x"], a["size"]) for rule in RULES],
    "rule.acceptance": lambda a: [
        rule.acceptance(a["draft_prob"], a["target_prob"]) for rule in RULES
    ],
    "rule.resample_weights": lambda a: [
        rule.resample_weights(a["x"], a["y"], a["sigma"] * a["x"]) for rule in RULES
    ],
    "running_threshold": lambda a: (
        importance.RunningThreshold.start(a["u"])
        .update(a["draft_prob"], 0.9)
        .update(a["target_prob"], 0.9)
        .threshold(1.5)
    ),
    "link.uplink_time_ms": lambda a: [channel.uplink_time_ms(a["bits"]) for channel in LINKS],
}


def as_list(result: Any) -> list[Any]:
    """One result or several, as a list."""
    return list(result) if isinstance(result, list | tuple) else [result]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_numpy_and_torch_agree(inputs, name):
    call = {**FUNCTIONS, **METHODS}[name]
    with_numpy = as_list(call(dict(inputs)))
    with_torch = as_list(call({key: torch.from_numpy(value) for key, value in inputs.items()}))
    assert len(with_numpy) == len(with_torch)
    for ours, theirs in zip(with_numpy, with_torch, strict=True):
        if isinstance(ours, float):
            assert type(theirs) is float
        else:
            assert isinstance(ours, np.ndarray)
            assert isinstance(theirs, torch.Tensor), "a numpy array came back for a tensor"
            assert str(theirs.dtype).removeprefix("torch.") == str(ours.dtype)
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *METHODS} - {"on_accelerator"}))
def test_an_accelerator_agrees(inputs, name):
    call = {**FUNCTIONS, **METHODS}[name]
    with_torch = as_list(call({key: torch.from_numpy(value) for key, value in inputs.items()}))
    with other_device():
        moved = {key: torch.from_numpy(value).to(OTHER) for key, value in inputs.items()}
        there = as_list(call(moved))
    for theirs, expected in zip(there, with_torch, strict=True):
        assert isinstance(theirs, Elsewhere | float), "a tensor of main memory came back"
        found = theirs if isinstance(theirs, float) else theirs.cpu()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_arguments_are_left_as_they_are(inputs, name):
    before = {key: value.copy() for key, value in inputs.items()}
    {**FUNCTIONS, **METHODS}[name](inputs)
    for key, value in before.items():
        np.testing.assert_array_equal(inputs[key], value, err_msg=f"{name} changed {key}")


def test_no_public_array_function_is_left_out():
    """Whatever a room annotates as Array must be in the list above."""
    assert set(vars(F)) == set(FUNCTIONS)


def test_refusals_are_the_same_for_tensors():
    for build in (np.array, torch.tensor):
        good = build([0.5, 0.5])
        with pytest.raises(ValueError, match=r"^x has an entry -1: .*logits"):
            acceptance.total_variation(build([2.0, -1.0]), good)
        with pytest.raises(ValueError, match=r"^y holds NaN"):
            acceptance.total_variation(good, build([0.5, float("nan")]))
        with pytest.raises(ValueError, match=r"^uncertainty = 1\.5: allowed is \[0, 1\]"):
            relation.linear_rejection(build([0.5, 1.5]), 0.8, 0.0)
        with pytest.raises(ValueError, match=r"^logits holds NaN"):
            uncertainty.log_partitions(build([0.5, float("inf")]), THETAS)
        with pytest.raises(ValueError, match=r"^weights "):
            sampling.sample_inverse_cdf(build([[0.0, 0.0]]), build([[0.5, 0.5]]))
