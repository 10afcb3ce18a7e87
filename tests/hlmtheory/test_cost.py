"""Bits, times, throughputs and energy of a token: the published values, and the obvious loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate.derive.presets import load_profile
from calibrate.run.resources import data_path
from hlmtheory.cost import (
    DeviceProfile,
    index_bits,
    mean_throughput_at_skip_rate_tok_s,
    payload_bits,
    reply_bits,
    speedup_ceiling,
    throughput_at_skip_rate_tok_s,
    token_energy_j,
    token_time_ms,
)
from hlmtheory.serving import used_profile

PROFILE = DeviceProfile(40.0, 1.0, 30.0, 4.0, 1.0, 300.0, 0.5)
V = 32_000


# --- payload -------------------------------------------------------------------------------------


def test_published_payloads():
    assert payload_bits(V, V, accounting="paper") == 8 * 92_000
    assert payload_bits(30, V, accounting="paper") == 8 * 86.25


def test_index_bits():
    assert [index_bits(v) for v in (2, 3, 1024, 1025, V, 151_936)] == [1, 2, 10, 11, 15, 18]
    with pytest.raises(ValueError, match="vocab_size"):
        index_bits(1)


def test_full_accounting_bills_all_that_crosses_the_link():
    index = index_bits(V)
    paper = payload_bits(30, V, accounting="paper")
    full = payload_bits(30, V, num_unsent=4)
    assert full == paper + index + 4 * index  # draft, resync
    residual = payload_bits(2, V, draft_sent=False)
    assert residual == 2 * (8 + index)  # entries alone
    assert reply_bits(V) == index
    # The paper's accounting looks at nothing but the entries.
    assert payload_bits(30, V, accounting="paper", num_unsent=4, draft_sent=False) == paper
    assert reply_bits(V, "paper") == 0


def test_payload_of_arrays():
    sizes = np.array([0, 1, 30, V])
    np.testing.assert_array_equal(payload_bits(sizes, V, accounting="paper"), 23 * sizes)
    tensor = torch.from_numpy(sizes)
    full = payload_bits(tensor, V, num_unsent=tensor)
    np.testing.assert_array_equal(full, 23 * sizes + 15 + 15 * sizes)


def test_payload_refusals():
    for match, arguments in (
        ("num_entries", {"num_entries": -1}),
        ("prob_bits", {"num_entries": 1, "prob_bits": 0}),
        ("accounting", {"num_entries": 1, "accounting": "both"}),
        ("num_unsent", {"num_entries": 1, "num_unsent": -1}),
    ):
        with pytest.raises(ValueError, match=match):
            payload_bits(vocab_size=V, **arguments)


# --- time and energy -----------------------------------------------------------------------------


def token_reference(sent: bool, uplink_ms: float, round_trip_ms: float) -> tuple[float, float]:
    """Stage by stage: what the device does, then what the server does."""
    ms = PROFILE.t_slm_ms + PROFILE.t_uncertainty_ms
    millijoules = PROFILE.p_slm_w * ms
    if sent:
        ms += uplink_ms + PROFILE.t_llm_ms + round_trip_ms
        millijoules += PROFILE.p_tx_w * uplink_ms + PROFILE.p_llm_w * PROFILE.t_llm_ms
        millijoules += PROFILE.p_idle_w * (PROFILE.t_llm_ms + round_trip_ms)
    return ms, millijoules / 1e3


def test_time_and_energy_stage_by_stage(rng):
    sent = (rng.uniform(size=50) < 0.5).astype(float)
    uplink = sent * rng.uniform(0, 100, size=50)
    expected = np.array(
        [token_reference(bool(s), t, 15.0) for s, t in zip(sent, uplink, strict=True)]
    )
    np.testing.assert_allclose(token_time_ms(sent, uplink, PROFILE, 15.0), expected[:, 0])
    np.testing.assert_allclose(token_energy_j(sent, uplink, PROFILE, 15.0), expected[:, 1])


def test_server_alone():
    """No device time; the round trip at the first token alone, a reply to each."""
    alone, trips = used_profile(PROFILE, gated=False, server_only=True), np.array([15.0, 0.0])
    times = token_time_ms(np.ones(2), np.zeros(2), alone, trips, 2.0)
    assert times.tolist() == [47.0, 32.0]
    energy = token_energy_j(np.ones(2), np.zeros(2), alone, trips, 2.0)
    assert energy == pytest.approx([30e-3 * 300.5 + 17e-3 * 0.5, 30e-3 * 300.5 + 2e-3 * 0.5])


def test_energy_saved_is_at_most_the_share_skipped(rng):
    uplink = np.full(1000, 25.0)
    hlm = token_energy_j(np.ones(1000), uplink, PROFILE, 15.0).mean()
    sent = (rng.uniform(size=1000) < 0.6).astype(float)
    saved = 1 - token_energy_j(sent, sent * uplink, PROFILE, 15.0).mean() / hlm
    assert 0 < saved <= 1 - sent.mean()


# --- throughput ----------------------------------------------------------------------------------


def test_throughputs_from_tokens_and_from_the_skip_rate(rng):
    sent = (rng.uniform(size=4000) < 0.3).astype(float)
    uplink = sent * rng.exponential(80.0, size=4000)
    times = token_time_ms(sent, uplink, PROFILE, 15.0)
    skip, of_sent = 1 - sent.mean(), times[sent == 1]
    found = throughput_at_skip_rate_tok_s(skip, 41.0, of_sent.mean())
    assert found == pytest.approx(1e3 / times.mean(), rel=1e-12)
    harmonic = 1 / np.mean(1 / of_sent)
    found = mean_throughput_at_skip_rate_tok_s(skip, 41.0, harmonic)
    assert found == pytest.approx((1e3 / times).mean(), rel=1e-12)
    # The arithmetic mean in its place is a lower bound.
    lower = mean_throughput_at_skip_rate_tok_s(skip, 41.0, of_sent.mean())
    assert lower < found


def test_throughput_refusals():
    with pytest.raises(ValueError, match="skip_rate"):
        throughput_at_skip_rate_tok_s(1.2, 1.0, 2.0)
    with pytest.raises(ValueError, match="sent_ms"):
        mean_throughput_at_skip_rate_tok_s(0.2, 1.0, 0.0)


def test_published_ceilings():
    assert round(speedup_ceiling(0.4593), 2) == 1.85
    assert round(speedup_ceiling(0.748, 0.026), 1) == 152.6


@given(
    st.floats(0, 0.99), st.floats(1e-3, 1), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 10)
)
def test_nothing_passes_the_ceiling_in_mean_token_time(skip, ratio, uplink, llm, device):
    baseline = device + uplink + llm
    policy = device + (1 - skip) * (ratio * uplink + llm)
    if policy > 0:
        assert baseline / policy <= speedup_ceiling(skip, ratio) * (1 + 1e-12)


def test_mean_throughput_passes_the_ceiling():
    """The negative control: the other average has no ceiling."""
    skip, sent_ms = 0.4593, 1000.0
    gain = mean_throughput_at_skip_rate_tok_s(skip, 1.0, sent_ms) / (1e3 / sent_ms)
    assert gain > 100 * speedup_ceiling(skip)


def test_ceiling_refusals():
    with pytest.raises(ValueError, match="skip_rate"):
        speedup_ceiling(1.0)
    with pytest.raises(ValueError, match="sent_cost_ratio"):
        speedup_ceiling(0.5, 0.0)


# --- profiles ------------------------------------------------------------------------------------

PRESETS = sorted(path.stem for path in data_path("devices").glob("*.json"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_each_number_is_from(name):
    profile = load_profile(name, {})
    entry = json.loads(data_path("devices", f"{name}.json").read_text(encoding="utf-8"))
    numbers = {key for key, value in entry.items() if isinstance(value, int | float)}
    assert set(entry["source"]) == numbers
    assumed = {key for key in numbers if entry["source"][key].startswith("assumed")}
    assert set(profile.assumed) == assumed
    assert math.isfinite(float(token_energy_j(np.ones(1), np.ones(1), profile)[0]))


def test_profile_refusals():
    with pytest.raises(ValueError, match="p_tx_w"):
        DeviceProfile(1, 1, 1, 1, -1, 1)
    with pytest.raises(ValueError, match="'p_gpu_w'"):
        DeviceProfile(1, 1, 1, 1, 1, 1, assumed=("p_gpu_w",))
