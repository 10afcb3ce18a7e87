"""The optimiser against exhaustive search, the Pareto front against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlmtheory.cost import (
    DeviceProfile,
    token_energy_j,
    token_time_ms,
)
from hlmtheory.link import AwgnLink
from hlmtheory.optimise import (
    OBJECTIVES,
    Choice,
    PolicyCurve,
    best_choice,
    curve_choices,
)

PROFILE = DeviceProfile(40.0, 1.0, 30.0, 4.0, 1.0, 300.0, 0.5)
LINK = AwgnLink(1e5, 10.0, 15.0)
GRID = np.linspace(0, 1, 21)


def curve(policy: str, bits: float, bias: float, num_entries: int | None = None) -> PolicyCurve:
    """Skip rate and risk that rise with the threshold."""
    return PolicyCurve(
        policy,
        "some rule",
        GRID,
        GRID,
        0.3 * GRID**3,
        np.full(len(GRID), bits),
        np.where(GRID < 1, bias * (1 - GRID), 0.0),
        num_entries,
    )


CURVES = (
    curve("u-hlm", 736_000.0, 0.0),
    curve("cu-hlm-offline", 690.0, 0.05, 30),
    curve("cu-hlm-offline", 5_888.0, 0.01, 256),
    curve("r-hlm", 30.0, 0.0),
)


def every_choice(curves: tuple[PolicyCurve, ...]) -> list[Choice]:
    return [choice for c in curves for choice in curve_choices(c, LINK, PROFILE)]


# --- pricing -------------------------------------------------------------------------------------


def test_points_cost_what_their_tokens_cost():
    """A point with skip rate 0.35 against twenty tokens, seven of them skipped."""
    one = PolicyCurve("u-hlm", "full", *(np.array([v]) for v in (0.2, 0.35, 0.01, 9_000.0, 0.02)))
    sent = np.array([0.0] * 7 + [1.0] * 13)
    uplink = sent * LINK.uplink_time_ms(9_000.0)
    times = token_time_ms(sent, uplink, PROFILE, LINK.round_trip_ms)
    energy = token_energy_j(sent, uplink, PROFILE, LINK.round_trip_ms)
    (choice,) = curve_choices(one, LINK, PROFILE)
    assert choice.token_time_ms == pytest.approx(times.mean())
    assert choice.throughput_tok_s == pytest.approx(1e3 / times.mean())
    assert choice.mean_throughput_tok_s == pytest.approx((1e3 / times).mean())
    assert choice.energy_j_per_token == pytest.approx(energy.mean())
    assert choice.uplink_bits_per_token == pytest.approx(0.65 * 9_000)
    assert choice.total_bias == pytest.approx(0.03)
    assert choice.feasible
    assert choice.reason == ""


def test_degenerate_points_say_so():
    choices = curve_choices(CURVES[0], LINK, PROFILE)
    assert choices[0].reason == "degenerate: no token is skipped"
    assert choices[-1].reason == "degenerate: every token is skipped"


def test_server_alone_costs_the_server():
    zero = np.zeros(1)
    bits = np.array([90.0])
    llm = PolicyCurve(
        "llm", "none", zero, zero, zero, bits, zero, server_only=True, num_exchanges=0.02
    )
    (choice,) = curve_choices(llm, LINK, PROFILE)
    uplink_ms = float(LINK.uplink_time_ms(bits)[0])
    asked_ms = 0.02 * LINK.round_trip_ms
    assert choice.token_time_ms == pytest.approx(PROFILE.t_llm_ms + uplink_ms + asked_ms)


def test_without_a_gate_nobody_works_out_the_uncertainty():
    one = np.ones(1)
    times = [
        curve_choices(
            PolicyCurve("slm", "none", 0 * one, one, 0 * one, 0 * one, one, gated=gated),
            LINK,
            PROFILE,
        )[0].token_time_ms
        for gated in (False, True)
    ]
    assert times == [PROFILE.t_slm_ms, PROFILE.t_slm_ms + PROFILE.t_uncertainty_ms]


# --- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(alpha=st.floats(0, 0.4))
def test_optimum_is_the_best_of_all_points(objective, alpha):
    best = best_choice(CURVES, LINK, PROFILE, alpha, objective)
    allowed = [c for c in every_choice(CURVES) if c.total_bias <= alpha]
    assert best in allowed
    assert best.loss(objective) == min(c.loss(objective) for c in allowed)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_larger_budget_never_hurts(objective):
    losses = [
        best_choice(CURVES, LINK, PROFILE, alpha, objective).loss(objective)
        for alpha in np.linspace(0, 0.4, 41)
    ]
    assert np.all(np.diff(losses) <= 0)


def test_the_budget_decides_the_policy():
    # Without a residual rule, a tight budget pays for the full distribution.
    some = CURVES[:3]
    names = [best_choice(some, LINK, PROFILE, alpha).num_entries for alpha in (1e-3, 0.02, 0.06)]
    assert names == [None, 256, 30]


def test_budget_that_nothing_keeps_is_a_result():
    only = (curve("cu-hlm-offline", 690.0, 0.05, 30),)
    least = min(c.total_bias for c in every_choice(only))
    found = best_choice(only, LINK, PROFILE, least / 2)
    assert not found.feasible
    assert found.policy == ""
    assert "cu-hlm-offline" in found.reason
    assert f"{least:.3g}" in found.reason
    assert math.isnan(found.token_time_ms)
    assert best_choice(only, LINK, PROFILE, least).feasible


def test_ties_go_to_the_smaller_bias():
    same = tuple(
        PolicyCurve(name, "r", *(np.array([v]) for v in (0.2, 0.3, risk, 690.0, 0.0)))
        for name, risk in (("worse", 0.02), ("better", 0.01))
    )
    assert best_choice(same, LINK, PROFILE, 0.1).policy == "better"


# --- refusals ------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ValueError, match="alpha"):
        best_choice(CURVES, LINK, PROFILE, 1.5)
    with pytest.raises(ValueError, match="objective"):
        best_choice(CURVES, LINK, PROFILE, 0.1, "speed")
    with pytest.raises(ValueError, match="curves is empty"):
        best_choice((), LINK, PROFILE, 0.1)
    with pytest.raises(ValueError, match=r"risk has shape \(2,\)"):
        PolicyCurve("p", "r", GRID, GRID, np.zeros(2), GRID, GRID)
    with pytest.raises(ValueError, match="skip_rate"):
        PolicyCurve("p", "r", GRID, 2 * GRID, GRID, GRID, GRID)
    with pytest.raises(ValueError, match="payload_bits"):
        PolicyCurve("p", "r", GRID, GRID, GRID, -GRID, GRID)
    with pytest.raises(ValueError, match="uncertainty_threshold"):
        PolicyCurve("p", "r", *(np.zeros(0) for _ in range(5)))
