"""Rates and upload times: closed forms, Monte Carlo over fades, and brute force over traces."""

from __future__ import annotations

import json
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.derive.presets import link_from_dict, link_to_dict, load_link
from calibrate.run.resources import data_path
from hlmtheory.channel import (
    best_outage_rate_bps,
    capacity_bps,
    ergodic_rayleigh_rate_bps,
    linear_snr,
    outage_probability,
    scaled_exponential_integral,
)
from hlmtheory.link import (
    AwgnLink,
    ErgodicRayleighLink,
    Link,
    RateLink,
    RayleighOutageLink,
    TraceLink,
)

PAYLOAD = 690.0  # bits of thirty entries of 32,000
LINKS: tuple[Link, ...] = (
    AwgnLink(1e6, 10.0, 5.0),
    ErgodicRayleighLink(1e6, 10.0),
    RayleighOutageLink(1e6, 10.0, 2e6),
    RateLink(3e6, 20e6, 30.0),
    TraceLink((3e3, 0.0, 1e3, 8e3), sample_interval_ms=200.0),
)


def names(links: Any) -> list[str]:
    return [type(link).__name__ for link in links]


# --- channel -------------------------------------------------------------------------------------


def test_capacity_at_known_points():
    assert capacity_bps(1e6, snr_db=0.0) == pytest.approx(1e6)
    assert capacity_bps(1e6, snr=3.0) == pytest.approx(2e6)
    assert capacity_bps(20e6, snr_db=20.0) == pytest.approx(20e6 * math.log2(101))
    # W SNR / ln 2 where the SNR vanishes, with no digits lost in 1 + SNR.
    assert capacity_bps(1e6, snr=1e-20) == pytest.approx(1e-14 / math.log(2))


def test_the_two_scales_of_snr_meet():
    np.testing.assert_allclose(linear_snr(snr_db=np.array([-10.0, 0.0, 30.0])), [0.1, 1.0, 1e3])
    assert capacity_bps(1e6, 10.0) == pytest.approx(capacity_bps(1e6, snr_db=10.0))


@pytest.mark.parametrize("rate", [capacity_bps, ergodic_rayleigh_rate_bps, best_outage_rate_bps])
@pytest.mark.parametrize("snr", [-3.0, 0.0])
def test_an_snr_in_the_wrong_unit_is_found_by_its_sign(rate, snr):
    with pytest.raises(ValueError, match=r"wrong unit by its sign: give snr_db"):
        rate(1e6, snr)


def test_snr_must_come_in_exactly_one_scale():
    with pytest.raises(ValueError, match="exactly one"):
        capacity_bps(1e6)
    with pytest.raises(ValueError, match="exactly one"):
        capacity_bps(1e6, 10.0, snr_db=10.0)
    with pytest.raises(ValueError, match="snr_db"):
        capacity_bps(1e6, snr_db=float("nan"))
    with pytest.raises(ValueError, match="bandwidth_hz"):
        capacity_bps(0.0, snr_db=10.0)
    with pytest.raises(ValueError, match="wrong unit"):
        capacity_bps(1e6, np.array([3.0, -3.0]))


def test_exponential_integral_against_many_digits():
    a = np.concatenate([np.logspace(-12, 4, 90), np.linspace(99, 101, 21)])
    with mpmath.workdps(40):
        exact = np.array([float(mpmath.exp(mpmath.mpf(v)) * mpmath.e1(mpmath.mpf(v))) for v in a])
    # On both sides of where the asymptotic sum takes over from scipy's function.
    np.testing.assert_allclose(scaled_exponential_integral(a), exact, rtol=1e-14)
    assert scaled_exponential_integral(1e12) == pytest.approx(1e-12)


def test_ergodic_rate_is_the_mean_over_fades(rng):
    gain = rng.exponential(size=200_000)
    for snr_db in (-10.0, 10.0, 30.0):
        rates = capacity_bps(1e6, linear_snr(snr_db=snr_db) * gain)
        error = rates.std() / math.sqrt(len(rates))
        difference = rates.mean() - ergodic_rayleigh_rate_bps(1e6, snr_db=snr_db)
        assert abs(difference) < 4 * error


@given(st.floats(-30, 50))
def test_fading_costs_rate(snr_db):
    ergodic = ergodic_rayleigh_rate_bps(1e6, snr_db=snr_db)
    awgn = capacity_bps(1e6, snr_db=snr_db)
    outage = best_outage_rate_bps(1e6, snr_db=snr_db)
    goodput = outage * (1 - outage_probability(outage, 1e6, snr_db=snr_db))
    # Knowing the fade beats a fixed rate, and no fade beats any: both by Jensen or by choice.
    assert goodput < ergodic < awgn


def test_ergodic_rate_meets_capacity_at_low_snr():
    ratio = ergodic_rayleigh_rate_bps(1e6, snr=1e-6) / capacity_bps(1e6, snr=1e-6)
    assert ratio == pytest.approx(1.0, abs=2e-6)


def test_outage_is_the_share_of_weak_fades(rng):
    gain = rng.exponential(size=200_000)
    capacities = capacity_bps(1e6, 10.0 * gain)
    for rate in (0.5e6, 2e6, 4e6):
        p = outage_probability(rate, 1e6, snr=10.0)
        seen = np.mean(capacities < rate)
        assert abs(seen - p) < 4 * math.sqrt(p * (1 - p) / len(gain))
        weakest = -math.log1p(-p)  # the gain that carries just this rate
        assert capacity_bps(1e6, 10.0 * weakest) == pytest.approx(rate)


def test_floats_mix_with_arrays():
    rates, ratios = np.array([1e5, 1e6]), np.array([1.0, 10.0])
    by_rate = outage_probability(rates, 1e6, snr=10.0)
    by_snr = outage_probability(1e6, 1e6, snr=ratios)
    both = outage_probability(rates, 1e6, snr_db=10 * np.log10(ratios))
    assert by_rate[1] == pytest.approx(by_snr[1], rel=1e-14)
    assert both[1] == pytest.approx(by_rate[1], rel=1e-12)
    assert outage_probability(1e6, 1e6, snr=10.0) == pytest.approx(by_rate[1], rel=1e-14)


def test_best_fixed_rate_beats_its_neighbours():
    best = best_outage_rate_bps(180e3, snr_db=10.0)
    rates = best * np.array([0.9, 0.99, 1.0, 1.01, 1.1])
    times = [RayleighOutageLink(180e3, 10.0, r).uplink_time_ms(PAYLOAD) for r in rates]
    assert np.argmin(times) == 2


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS, ids=names(LINKS))
def test_time_rises_with_the_payload_and_nothing_is_free(link):
    times = link.uplink_time_ms(np.array([0.0, 1.0, 100.0, 1e4, 1e6]))
    assert times[0] == 0
    assert np.all(np.diff(times) > 0)
    with pytest.raises(ValueError, match="bits"):
        link.uplink_time_ms(np.array([-1.0]))


@pytest.mark.parametrize("link", LINKS, ids=names(LINKS))
def test_floats_and_tensors_are_taken_like_arrays(link):
    bits = np.array([[0.0, 17.0], [690.0, 92_000.0]])
    mean = link.uplink_time_ms(bits)
    as_torch = link.uplink_time_ms(torch.from_numpy(bits))
    assert isinstance(as_torch, torch.Tensor)
    # The same formulas in the same order: what differs is the last bit of log and exp.
    np.testing.assert_allclose(as_torch.numpy(), mean, rtol=1e-13)
    assert link.uplink_time_ms(690.0) == pytest.approx(float(mean[1, 0]), rel=1e-14)


def test_outage_link_sends_until_a_block_carries_the_payload(rng):
    link = RayleighOutageLink(1e6, 5.0, 1.5e6)
    gains = rng.exponential(size=(100_000, 60))
    carried = capacity_bps(1e6, linear_snr(snr_db=5.0) * gains) >= link.rate_bps
    assert carried.any(axis=1).all()
    times = 1e3 * PAYLOAD / link.rate_bps * (1 + carried.argmax(axis=1))
    error = times.std() / math.sqrt(len(times))
    assert abs(times.mean() - link.uplink_time_ms(PAYLOAD)) < 4 * error


def test_outage_link_refuses_a_rate_that_never_gets_through():
    with pytest.raises(ValueError, match="every block fails"):
        RayleighOutageLink(1e6, 0.0, 50e6)


# --- the quantity that a link is swept along -----------------------------------------------------


@pytest.mark.parametrize("link", LINKS, ids=names(LINKS))
def test_a_sweep_rises_holds_the_link_itself_and_makes_it_better(link):
    amounts = link.sweep()
    assert list(amounts) == sorted(set(amounts))
    assert link.amount in amounts
    assert link.at(link.amount) == link
    assert [link.at(amount).amount for amount in amounts] == pytest.approx(amounts, rel=1e-14)
    times = [link.at(amount).uplink_time_ms(1e4) for amount in amounts]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)
    assert {link.at(amount).round_trip_ms for amount in amounts} == {link.round_trip_ms}


def test_channels_are_swept_along_their_snr_in_db():
    awgn = AwgnLink(1e6, 12.0)
    assert awgn.sweep() == tuple(range(-15, 36))
    assert (awgn.quantity.unit, awgn.quantity.spacing) == ("dB", "linear")
    assert awgn.at(0.0).uplink_time_ms(1e6) == pytest.approx(1e3)  # log2(1 + 1) bit a second and Hz
    # Its own SNR is among them wherever it lies.
    assert AwgnLink(1e6, 12.5).sweep()[27:29] == (12.0, 12.5)
    assert ErgodicRayleighLink(1e6, 40.0).sweep()[-2:] == (35.0, 40.0)


def test_a_sweep_leaves_out_what_never_gets_through():
    """2 Mbit/s over 1 MHz: a block fails with 1 - exp(-3 / SNR), which is 1 below -10.9 dB."""
    link = RayleighOutageLink(1e6, 10.0, 2e6)
    least = link.sweep()[0]
    assert least > -15.0
    assert link.at(least).outage < 1.0
    with pytest.raises(ValueError, match="every block fails"):
        link.at(least - 1.0)


def test_rates_are_swept_in_equal_ratios_and_a_downlink_stays():
    link = RateLink(3e6, 20e6, 30.0)
    amounts = np.array(link.sweep())
    assert (amounts[0], amounts[-1]) == pytest.approx((1e5, 9e7))
    np.testing.assert_allclose(np.diff(np.log(amounts)), np.log(30) / 15)
    assert (link.quantity.unit, link.quantity.spacing) == ("bit/s", "log")
    slower = link.at(1.5e6)
    assert slower.uplink_time_ms(690.0) == pytest.approx(2 * link.uplink_time_ms(690.0))
    assert slower.downlink_time_ms(690.0) == link.downlink_time_ms(690.0)
    alike = RateLink(3e6).at(1.5e6)
    assert alike.downlink_time_ms(690.0) == alike.uplink_time_ms(690.0)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.floats(0.05, 20.0),
    st.integers(0, 200),
)
def test_a_scaled_trace_carries_as_much_more_in_the_same_time(rates, scale, bits):
    link = TraceLink(tuple(1e3 * rate for rate in rates), 7.0, sample_interval_ms=1.0)
    scaled = link.at(scale * link.amount)
    assert scaled.amount == pytest.approx(scale * link.amount)
    assert [rate == 0 for rate in scaled.rates_bps] == [rate == 0 for rate in link.rates_bps]
    payload = bits + 0.125  # off the levels where a gap makes the time jump
    expected = link.uplink_time_ms(payload)
    assert scaled.uplink_time_ms(scale * payload) == pytest.approx(expected, rel=1e-9)


def test_a_trace_is_swept_along_its_mean_rate():
    link = TraceLink((2e5, 0.0, 4e6))
    assert link.amount == pytest.approx(1.4e6)
    assert link.sweep()[15] == link.amount
    assert (link.sweep()[0], link.sweep()[-1]) == pytest.approx((1.4e6 / 30, 4.2e7))
    with pytest.raises(ValueError, match="amount = 0"):
        link.at(0.0)


# --- traces --------------------------------------------------------------------------------------


def upload_reference(link: TraceLink, start_ms: float, bits: float) -> float:
    """The obvious loop: walk from sample to sample until the payload is through."""
    now, left = start_ms, bits
    slot = int(start_ms // link.sample_interval_ms)
    while left > 0:
        rate = link.rates_bps[slot % len(link.rates_bps)] / 1e3
        ends = (slot + 1) * link.sample_interval_ms
        if rate * (ends - now) >= left:
            return now + left / rate - start_ms
        left -= rate * (ends - now)
        now, slot = ends, slot + 1
    return now - start_ms


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_trace_mean_is_that_of_walks_along_the_trace(rates, bits):
    link = TraceLink(tuple(1e3 * r for r in rates), sample_interval_ms=1.0)
    # An eighth keeps F(s) + B off the levels where a gap makes the time jump.
    payload = bits + 0.125 if bits else 0.0
    per_slot = 64
    starts = (np.arange(per_slot * len(rates)) + 0.5) / per_slot
    walks = [upload_reference(link, start, payload) for start in starts]
    # Between at most two breaks a slot the time is linear in the start, where a midpoint rule is
    # exact; a cell with a break errs by at most what the time changes there: a slope of nine, or a
    # gap of the whole trace.
    worst = 2 * len(rates) * (len(rates) + 10 / per_slot) / len(starts)
    assert np.mean(walks) == pytest.approx(link.uplink_time_ms(payload), abs=worst)


@pytest.mark.parametrize("bits", [0.3, 5.0, 17.0, 60.5])
def test_trace_mean_is_the_integral_over_the_start(bits):
    link = TraceLink((0.0, 1e3, 5e3, 0.0, 0.0, 2e3), sample_interval_ms=2.0)
    starts = 12 * (np.arange(6_000) + 0.5) / 6_000
    times = [upload_reference(link, start, bits) for start in starts]
    # A midpoint rule misplaces each of at most twelve jumps of at most six ms by half a cell.
    assert np.mean(times) == pytest.approx(link.uplink_time_ms(bits), abs=12 * 6 / 6_000)


def test_short_payload_takes_the_mean_reciprocal_rate():
    rates = (2e5, 1e6, 4e6)
    link = TraceLink(rates)
    expected = 1e3 * np.mean(1 / np.array(rates))
    # What crosses a sample edge, a share of 5e-9 of the starts, is all the difference.
    assert link.uplink_time_ms(1e-3) / 1e-3 == pytest.approx(expected, rel=1e-6)


def test_long_payload_takes_the_mean_rate():
    link = TraceLink((2e5, 0.0, 4e6))
    bits = 1e3 * 4.2e6  # a thousand times what the trace carries once
    # A third of the starts wait out half a gap of one second that others end in front of.
    assert link.uplink_time_ms(bits) == pytest.approx(1000 * 3000.0 - 1000.0 / 3 / 2, rel=1e-9)


def test_constant_trace_is_a_constant_link():
    link = TraceLink((5e5,) * 7, sample_interval_ms=3.0)
    bits = np.array([1.0, 690.0, 1e5])
    np.testing.assert_allclose(link.uplink_time_ms(bits), 1e3 * bits / 5e5, rtol=1e-9)


def test_trace_refusals():
    for rates in ((), (0.0, 0.0)):
        with pytest.raises(ValueError, match="no positive rate"):
            TraceLink(rates)
    with pytest.raises(ValueError, match="rates_bps"):
        TraceLink((1e3, -1.0))
    with pytest.raises(ValueError, match="sample_interval_ms"):
        TraceLink((1e3,), sample_interval_ms=0.0)


# --- presets -------------------------------------------------------------------------------------

PRESETS = sorted(path.stem for path in data_path("links").glob("*.json"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_say_where_each_number_is_from(name):
    link = load_link(name)
    assert link_from_dict(link_to_dict(link)) == link
    entry = json.loads(data_path("links", f"{name}.json").read_text(encoding="utf-8"))
    numbers = {key for key, value in entry.items() if isinstance(value, int | float)}
    assert set(entry["source"]) == numbers
    assert all(entry["source"].values())
    # A payload of k = 30 must not take longer than a person would wait.
    assert 0 < link.uplink_time_ms(PAYLOAD) < 1e3
