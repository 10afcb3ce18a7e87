"""The answer cap: its bound at any length, its state, and the gate it is put on."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import law_step, random_logits, stored

from hlmtheory.answer_cap import cap_fraction, capped_skips, may_skip, suggested_cap
from hlmtheory.policies import GatedPolicy, policy_from_settings

CAPS = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)


@settings(max_examples=60, deadline=None)
@given(CAPS, st.integers(0, 2**32 - 1))
def test_the_share_never_exceeds_the_cap_and_is_the_loop_of_the_definition(cap, seed):
    """At every length, for every pattern of wishes; and no draft is refused that had room."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=6)
    index = np.repeat(np.arange(6), lengths)
    wanted = rng.uniform(size=(len(index), 3)) < rng.uniform(size=3)
    done = capped_skips(wanted, index, cap)
    kappa = Fraction(round(cap * 1000), 1000)
    for prompt in range(6):
        for column in range(3):
            skipped = 0
            rows = np.flatnonzero(index == prompt)
            for place, row in enumerate(rows):
                room = Fraction(skipped + 1, place + 1) <= kappa
                assert done[row, column] == (wanted[row, column] and room)
                skipped += int(done[row, column])
                assert Fraction(skipped, place + 1) <= kappa


def test_whole_numbers_decide_where_floats_would_not():
    """0.29 x 100 is 28.999... in doubles; 0.7 x 10 is above 7."""
    assert may_skip(np.array(28), np.array(99), 0.29)
    assert not may_skip(np.array(29), np.array(99), 0.29)
    assert may_skip(np.array(6), np.array(9), 0.7)
    assert not may_skip(np.array(7), np.array(9), 0.7)


@pytest.mark.parametrize("cap", [0.0, 1.0, -0.1, 1.5, 1 / 3, 0.12345, float("nan"), float("inf")])
def test_caps_are_checked(cap):
    with pytest.raises(ValueError, match=r"allowed is a multiple of 0.001 in \(0, 1\)"):
        cap_fraction(cap)
    with pytest.raises(ValueError, match="allowed is a multiple"):
        policy_from_settings("u-hlm", {"cap": cap}, 0.3)


def test_the_suggested_cap_can_certify_and_needs_no_look():
    """Loss-free, n prompts at that cap double the growth that 1/delta asks for, up to rounding."""
    for num in (80, 160, 640):
        for alpha in (0.01, 0.02, 0.05):
            cap = suggested_cap(alpha, 0.05, num)
            if cap is not None:
                growth = num * np.log1p(alpha / cap / (1 - alpha / cap))
                assert growth > np.log(1 / 0.05)
    assert suggested_cap(0.01, 0.05, 160) == 0.3
    assert suggested_cap(0.02, 0.05, 160) == 0.5
    assert suggested_cap(0.05, 0.05, 160) is None
    assert suggested_cap(0.001, 0.05, 160) == 0.1
    # The least cap is 0.1: where the largest that could certify is below, it certifies nothing.
    assert 160 * 0.001 / np.log(1 / 0.05) < 0.1
    assert 160 * np.log1p(0.001 / (0.1 - 0.001)) < np.log(1 / 0.05)


# --- on a gate -----------------------------------------------------------------------------------


def walk(policy, steps, keep=None):
    """Skips of each step of a batch, and the columns that the policy remembers."""
    memory, out = policy.memory(), []
    for number, step in enumerate(steps):
        step = step.with_columns({"step": np.full(len(step["draft_token"]), number)})
        step = step.with_columns(memory.update(step))
        memory.advance(step)
        memory.observe(step)
        out.append((step, policy.skips(step), policy.skip_probability(step)))
        if keep is not None:
            memory.keep(keep)
    return out


@pytest.mark.parametrize("score", ["uncertainty", "entropy"])
def test_capped_gates_skip_what_the_gate_wants_and_the_cap_allows(rng, score):
    from hlmtheory.scores import score_named

    steps = [law_step(rng, *random_logits(rng, 30, 40)) for _ in range(12)]
    free = policy_from_settings("u-hlm", {}, 0.6, score_named(score))
    capped = policy_from_settings("u-hlm", {"cap": 0.4}, 0.6, score_named(score))
    wanted = np.array([free.skips(step) for step in steps])
    expected = capped_skips(wanted.T.reshape(-1, 1), np.repeat(np.arange(30), 12), 0.4)
    for part in (steps, [stored(step) for step in steps]):
        found = walk(capped, part)
        done = np.array([skips for _, skips, _ in found])
        np.testing.assert_array_equal(done.T.reshape(-1), expected[:, 0])
        for (step, _, sigma), plain in zip(found, part, strict=True):
            mass = free.skip_probability(plain).mass(plain)
            np.testing.assert_allclose(sigma.mass(step), mass * step["may_skip"])
    assert 0 < expected.sum() < wanted.sum(), "the cap binds"


def test_rows_may_be_dropped_and_repeated(rng):
    """Two copies of an answer go on from its count."""
    logits = random_logits(rng, 4, 40)
    steps = [law_step(rng, *logits) for _ in range(6)]
    # The first skip that 0.4 allows is the third token's, the second the fifth's.
    steps[2] = steps[2].with_columns({"uncertainty": np.array([0.0, 0.0, 1.0, 1.0])})
    policy = policy_from_settings("u-hlm", {"cap": 0.4}, 0.5)
    first = walk(policy, steps)
    memory = policy.memory()
    for number, step in enumerate(steps[:3]):
        step = step.with_columns({"step": np.full(4, number)})
        memory.advance(step.with_columns(memory.update(step)))
    memory.keep(np.array([2, 2, 0]))
    again = law_step(rng, *(one[[2, 2, 0]] for one in logits))
    again = again.with_columns({"step": np.full(3, 3)})
    assert first[3][0]["may_skip"].tolist() == [False, False, True, True]
    assert memory.update(again)["may_skip"].tolist() == [True, True, False]


def test_everything_skipped_under_a_cap_is_not_everything(rng):
    """At the threshold that skips all, biases are those of the steps that the cap lets through."""
    step = law_step(rng, *random_logits(rng, 20, 40))
    room = np.arange(20) % 2 == 0
    known = {"step": np.zeros(20, dtype=int), "may_skip": room}
    for name, settings_ in (
        ("u-hlm", {}), ("coupled", {}), ("cu-hlm-offline", {"num_entries": 4}),
    ):  # fmt: skip
        policy = policy_from_settings(name, settings_ | {"cap": 0.5}, 1.0)
        live = step.with_columns(known)
        for one in (live, stored(step).with_columns(known)):
            outcome = policy.outcome(one)
            np.testing.assert_allclose(outcome.skip, room)
            np.testing.assert_allclose(outcome.bias[room], step["tv_distance"][room], rtol=1e-6)
        if name == "coupled":
            np.testing.assert_allclose(policy.outcome(live).bias[~room], 0, atol=1e-12)


def test_settings_hold_the_cap_only_where_there_is_one():
    plain = policy_from_settings("ui-hlm", {}, 0.3)
    capped = policy_from_settings("ui-hlm", {"cap": 0.4}, 0.3)
    assert "cap" not in plain.settings()
    assert capped.settings()["cap"] == 0.4
    assert policy_from_settings("ui-hlm", capped.settings(), 0.3) == capped


def test_a_gate_of_ones_own_cannot_go_around_the_cap():
    with pytest.raises(TypeError, match="a gate of one's own is `gate`"):
        type("Mine", (GatedPolicy,), {"skip_probability": lambda self, step: None})
