"""Policies by name: which gate, which rule, which size, and the pairs that make no sense."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hlmtheory.gates import AlwaysSkip, NeverSkip, UncertaintyGate, UncertaintyImportanceGate
from hlmtheory.policies import (
    GATED_POLICIES,
    POLICY_NAMES,
    FixedSize,
    ImportanceSettings,
    OnlineSize,
    Policy,
    make_policy,
)
from hlmtheory.relation import linear_rejection
from hlmtheory.truncation import online_truncation_size
from hlmtheory.verification import (
    AskAndSample,
    DraftFromSent,
    FullDistribution,
    ResidualVerification,
    TruncatedDistribution,
    output_law,
)

SIZES = {"cu-hlm-offline": FixedSize(30), "cu-hlm-online": OnlineSize(0.1, 0.815, -0.066)}


def build(name: str) -> Policy:
    """A policy with whatever its name asks for."""
    return make_policy(name, 0.3 if name in GATED_POLICIES else None, size=SIZES.get(name))


@pytest.mark.parametrize(
    ("name", "gate", "rule"),
    [
        ("slm", AlwaysSkip, FullDistribution),
        ("llm", NeverSkip, AskAndSample),
        ("hlm", NeverSkip, FullDistribution),
        ("u-hlm", UncertaintyGate, FullDistribution),
        ("cu-hlm-offline", UncertaintyGate, TruncatedDistribution),
        ("cu-hlm-online", UncertaintyGate, TruncatedDistribution),
        ("ui-hlm", UncertaintyImportanceGate, FullDistribution),
        ("r-hlm", UncertaintyGate, ResidualVerification),
        ("ask-llm", UncertaintyGate, AskAndSample),
    ],
)
def test_each_name_is_one_gate_and_one_rule(name, gate, rule):
    policy = build(name)
    assert policy.name == name
    assert type(policy.gate) is gate
    assert type(policy.rule) is rule
    assert policy.size == SIZES.get(name)
    assert (policy.importance is not None) == (name == "ui-hlm")
    if name in GATED_POLICIES:
        assert policy.gate.threshold == 0.3


def test_every_name_is_covered_above():
    assert set(GATED_POLICIES) <= set(POLICY_NAMES)
    assert {build(name).name for name in POLICY_NAMES} == set(POLICY_NAMES)


def test_baselines_have_the_laws_they_stand_for(dirichlet_pairs):
    x, y = dirichlet_pairs(5, 20)
    probabilities = np.ones((5, 20, 3))
    laws = {
        name: output_law(policy.rule, x, y, policy.gate.skip_probability(probabilities, None))
        for name, policy in ((name, build(name)) for name in ("slm", "llm", "hlm"))
    }
    np.testing.assert_allclose(laws["slm"], x, atol=1e-14)
    np.testing.assert_allclose(laws["llm"], y, atol=1e-14)
    np.testing.assert_allclose(laws["hlm"], y, atol=1e-14)


def test_options_reach_their_place():
    assert make_policy("u-hlm", 0.3, statistic="sampled").gate.statistic == "sampled"
    settings = ImportanceSettings("context", k=1.0, gamma=0.9)
    assert make_policy("ui-hlm", 0.3, importance=settings).importance == settings
    assert make_policy("ui-hlm", 0.3).importance == ImportanceSettings()
    policy = make_policy("cu-hlm-offline", 0.3, size=FixedSize(30), draft_from_sent=True)
    assert type(policy.rule) is DraftFromSent


def test_a_threshold_above_one_is_read_as_one():
    """Risk-prone thresholds may exceed 1: they skip everything, as 1 does."""
    assert make_policy("u-hlm", 1.7).gate.threshold == 1.0


@pytest.mark.parametrize("name", GATED_POLICIES)
@pytest.mark.parametrize("threshold", [None, math.nan, -0.2])
def test_gated_policies_need_a_threshold(name, threshold):
    with pytest.raises(ValueError, match=rf"^threshold = {threshold}.*\[0, 1\]"):
        make_policy(name, threshold, size=SIZES.get(name))


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^policy = 'vlm': known are slm, llm, hlm"):
        make_policy("vlm", 0.3)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_truncating_policies_need_a_size(name):
    with pytest.raises(ValueError, match=rf"^policy {name}: rule 'truncated' needs a size"):
        make_policy(name, 0.3)


def test_the_two_truncating_names_keep_their_kind_of_size():
    with pytest.raises(ValueError, match=r"^policy cu-hlm-online"):
        make_policy("cu-hlm-online", 0.3, size=FixedSize(30))
    with pytest.raises(ValueError, match=r"^policy cu-hlm-offline"):
        make_policy("cu-hlm-offline", 0.3, size=SIZES["cu-hlm-online"])


def test_pairs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="no size"):
        Policy("hlm", NeverSkip(), FullDistribution(), size=FixedSize(3))
    with pytest.raises(ValueError, match="fixed size"):
        make_policy("cu-hlm-online", 0.3, size=SIZES["cu-hlm-online"], draft_from_sent=True)
    with pytest.raises(ValueError, match="importance settings do not match"):
        Policy("ui-hlm", UncertaintyImportanceGate(0.3), FullDistribution())
    with pytest.raises(ValueError, match="importance settings do not match"):
        Policy("u-hlm", UncertaintyGate(0.3), FullDistribution(), importance=ImportanceSettings())


@pytest.mark.parametrize("bad", [0, -3])
def test_fixed_size_is_checked(bad):
    with pytest.raises(ValueError, match=rf"^num_entries = {bad}: allowed is >= 1"):
        FixedSize(bad)


def test_importance_settings_are_checked():
    with pytest.raises(ValueError, match=r"^variant = 'mean'"):
        ImportanceSettings(variant="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gamma"):
        ImportanceSettings(gamma=math.nan)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_online_size_is_checked(bad):
    with pytest.raises(ValueError, match=r"^theta = .*\(0, inf\)"):
        OnlineSize(bad, 0.8, -0.06)
    with pytest.raises(ValueError, match=r"^eta = .*\(0, inf\)"):
        OnlineSize(0.1, 0.8, -0.06, eta=bad)


def test_sizes_of_each_kind_of_policy(rng):
    x = rng.dirichlet(np.full(200, 0.1), size=4)
    draft_prob, uncertainty = x.max(axis=-1), np.array([0.1, 0.4, 0.7, 1.0])
    assert build("u-hlm").sizes(x, draft_prob, uncertainty) is None
    assert build("cu-hlm-offline").sizes(x, draft_prob, uncertainty) == 30
    predicted = linear_rejection(uncertainty, 0.815, -0.066)
    np.testing.assert_array_equal(
        build("cu-hlm-online").sizes(x, draft_prob, uncertainty),
        online_truncation_size(x, draft_prob, predicted, theta=0.1),
    )


def test_fixed_size_never_exceeds_the_vocabulary():
    policy = make_policy("cu-hlm-offline", 0.3, size=FixedSize(1_000))
    assert policy.fixed_size(40) == 40
    assert policy.fixed_size(5_000) == 1_000
    for name in ("cu-hlm-online", "u-hlm"):
        with pytest.raises(ValueError, match=rf"^policy {name}: "):
            build(name).fixed_size(40)


def test_policies_cannot_be_changed():
    policy = build("u-hlm")
    with pytest.raises(AttributeError):
        policy.name = "hlm"  # type: ignore[misc]
    assert hash(policy) == hash(build("u-hlm"))
