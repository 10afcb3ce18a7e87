"""Expected, drawn and measured tokens through one metrics(): closed forms, redraws, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_models import law_step, random_logits, softmax, stored

from calibrate.derive.predict import (
    METRICS,
    SOURCES,
    UNITS,
    Economics,
    PolicyTokens,
    drawn_tokens,
    measured_tokens,
    metrics,
    policy_atoms,
    predicted_tokens,
    unsent_before,
)
from calibrate.run.traces import Trace
from hlmtheory.clusters import RatioEstimate, mean_over_tokens
from hlmtheory.cost import DeviceProfile, index_bits
from hlmtheory.link import AwgnLink
from hlmtheory.policies import policy_from_settings, policy_names
from hlmtheory.risk import skip_risk_sums
from hlmtheory.steps import Axes
from hlmtheory.uncertainty import exact_uncertainty, temperatures

PROFILE = DeviceProfile(20.0, 2.0, 60.0, 3.0, 0.5, 200.0, 0.4)
LINK = AwgnLink(1e5, 10.0, round_trip_ms=15.0)
VOCAB = 60
SETTINGS = {
    "cu-hlm-offline": {"num_entries": 4},
    "cu-hlm-online": {"theta": 0.3, "eta": 1.0, "slope": 0.8, "intercept": 0.0},
}
PLAIN = [name for name in policy_names() if name != "ui-hlm"]


def a_policy(name: str, threshold: float = 0.45):
    return policy_from_settings(name, SETTINGS.get(name, {}), threshold)


def economics(accounting: str = "full") -> Economics:
    return Economics(LINK, PROFILE, VOCAB, accounting)


def tokens_of(
    name: str, skip, entries, lengths, beta=0.3, bias=0.1, prompt_tokens=0.0
) -> PolicyTokens:
    skip = np.asarray(skip, dtype=float)
    index = np.repeat(np.arange(len(lengths)), lengths)
    risk = skip * beta
    bias = np.broadcast_to(np.asarray(bias, dtype=float), skip.shape)
    return PolicyTokens(
        a_policy(name),
        skip,
        risk,
        bias,
        np.asarray(entries, dtype=float),
        risk,
        np.zeros((2, len(skip))),
        index,
        len(lengths),
        np.full(len(lengths), prompt_tokens),
    )


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("accounting", ["paper", "full"])
def test_a_probability_of_0_or_1_is_a_count(accounting):
    """Two answers of three tokens by hand: u-hlm, V = 60, so 6 bits an index and 14 a pair."""
    skipped = np.array([1, 0, 1, 0, 1, 0])
    tokens = tokens_of("u-hlm", skipped, 60 * (1 - skipped), (3, 3))
    found = metrics(tokens, economics(accounting))
    unsent = np.array([0, 1, 0, 0, 0, 1])
    bits = 60.0 * 14 + (0 if accounting == "paper" else 6 * (1 + unsent))
    bits, reply = np.where(skipped, 0, bits), 0.0 if accounting == "paper" else 6.0
    up, down = np.asarray(LINK.uplink_time_ms(bits)), float(LINK.downlink_time_ms(reply))
    ms = 22 + np.where(skipped, 0, up + 75 + down)
    joule = 1e-3 * (3 * 22 + np.where(skipped, 0, 0.5 * up + 200 * 60 + 0.4 * (75 + down)))
    for name, values in (
        ("skip_rate", skipped),
        ("rejection_risk", 0.3 * skipped),
        ("uplink_bits_per_token", bits),
        ("downlink_bits_per_token", reply * (1 - skipped)),
        ("token_time_ms", ms),
        ("mean_throughput_tok_s", 1e3 / ms),
        ("energy_j_per_token", joule),
        ("tv_bias", np.full(6, 0.1)),
    ):
        expected = mean_over_tokens(values.astype(float), tokens.prompt_index, 2)
        assert found[name].value == pytest.approx(expected.value, rel=1e-12), name
        assert found[name].standard_error == pytest.approx(expected.standard_error, abs=1e-12)
    assert found["throughput_tok_s"].value == pytest.approx(1e3 / ms.mean())
    # Three of six tokens take 60 ms of the server each.
    assert found["devices_per_server"].value == pytest.approx(ms.sum() / (3 * 60))
    assert tuple(found) == METRICS == tuple(UNITS)
    assert set(SOURCES) == set(METRICS)


def test_expected_times_are_those_of_skipping_and_sending():
    """E[1/t] is not 1/E[t]: a token skipped with probability 1/4 is 22 ms or 97 ms and the link."""
    tokens = tokens_of("u-hlm", [0.25], [0.75 * 60], (1,))
    found = metrics(tokens, economics())
    sent_ms = 97 + float(LINK.uplink_time_ms(np.array(840.0 + 6)) + LINK.downlink_time_ms(6))
    assert found["token_time_ms"].value == pytest.approx(0.25 * 22 + 0.75 * sent_ms)
    expected = 1e3 * (0.25 / 22 + 0.75 / sent_ms)
    assert found["mean_throughput_tok_s"].value == pytest.approx(expected)
    inverse = 1e3 / (0.25 * 22 + 0.75 * sent_ms)
    assert found["throughput_tok_s"].value == pytest.approx(inverse)
    assert expected > 1.1 * inverse
    assert found["uplink_bits_per_token"].value == pytest.approx(0.75 * 846)


def test_baselines_cost_what_they_are():
    reply_ms = float(LINK.downlink_time_ms(6))
    hlm_ms = 95 + float(LINK.uplink_time_ms(846.0)) + reply_ms
    llm_ms = 60 + 15 + reply_ms  # of two answers of a token each: a round trip a token
    for name, skip, entries, up, down, ms, devices in (
        ("slm", 1, 0, 0, 0, 20, None),
        ("llm", 0, 0, 0, 6, llm_ms, llm_ms / 60),
        ("hlm", 0, 60, 846, 6, hlm_ms, hlm_ms / 60),
    ):
        found = metrics(tokens_of(name, [skip] * 2, [entries] * 2, (1, 1)), economics())
        assert found["uplink_bits_per_token"].value == up
        assert found["downlink_bits_per_token"].value == down
        assert found["token_time_ms"].value == pytest.approx(ms)
        carried = found["devices_per_server"].value
        assert np.isnan(carried) if devices is None else carried == pytest.approx(devices)


@pytest.mark.parametrize("name", ["llm", "hlm", "u-hlm"])
def test_full_accounting_bills_prompt_once_an_answer_to_whoever_asks(name: str) -> None:
    """Each prompt with its own length, of whichever prompts the answers are."""
    lengths, prompts = (2, 6), np.array([10.0, 50.0])
    entries = 0 if name == "llm" else 60

    def bits(name: str, skip: float, entries: float, **changes: bool) -> RatioEstimate:
        tokens = tokens_of(name, [skip] * 8, [entries] * 8, lengths, prompt_tokens=prompts)
        return metrics(tokens, replace(economics("full"), **changes))["uplink_bits_per_token"]

    found, without = bits(name, 0, entries), bits(name, 0, entries, prompts_sent=False)
    assert found.value - without.value == pytest.approx(60 * index_bits(VOCAB) / 8)
    # Its error knows that prompts differ: the ratio of sums over two prompts, by hand.
    own = index_bits(VOCAB) * prompts
    mean = own.sum() / 8
    influence = (own - mean * np.array(lengths)) / 8
    np.testing.assert_allclose(found.influence - without.influence, influence, atol=1e-9)
    assert bits("slm", 1, 0).value == 0


def test_the_server_alone_pays_its_replies_and_a_round_trip_an_answer() -> None:
    rich = economics("full")
    found = metrics(tokens_of("llm", [0] * 8, [0] * 8, (2, 6), prompt_tokens=30.0), rich)
    bits = index_bits(VOCAB) * 2 * 30 / 8  # two prompts
    assert found["uplink_bits_per_token"].value == pytest.approx(bits)
    assert found["downlink_bits_per_token"].value == index_bits(VOCAB)
    uplink_ms = float(LINK.uplink_time_ms(np.array(bits)))
    waits = LINK.round_trip_ms * 2 / 8 + float(LINK.downlink_time_ms(index_bits(VOCAB)))
    assert found["token_time_ms"].value == pytest.approx(PROFILE.t_llm_ms + uplink_ms + waits)
    energy = PROFILE.p_tx_w * uplink_ms + PROFILE.p_llm_w * PROFILE.t_llm_ms
    energy += PROFILE.p_idle_w * (PROFILE.t_llm_ms + waits)
    assert found["energy_j_per_token"].value == pytest.approx(energy / 1e3)


def test_error_of_throughput_is_that_of_time_by_the_delta_method():
    skip = np.array([1, 0, 0, 1, 0, 0, 0, 1, 1])
    found = metrics(tokens_of("u-hlm", skip, 60 * (1 - skip), (2, 3, 4)), economics())
    time, speed = found["token_time_ms"], found["throughput_tok_s"]
    relative = time.standard_error / time.value
    assert speed.standard_error / speed.value == pytest.approx(relative)
    np.testing.assert_allclose(speed.influence / speed.value, -time.influence / time.value)


# --- tokens not yet told -------------------------------------------------------------------------


def test_tokens_not_yet_told_are_a_count_for_certain_skips(rng):
    skipped = (rng.uniform(size=200) < 0.6).astype(float)
    index = np.sort(rng.integers(0, 12, size=200))
    counts, run = [], 0
    for t in range(200):
        run = run if t and index[t] == index[t - 1] else 0
        counts.append(run)
        run = run + 1 if skipped[t] else 0
    np.testing.assert_array_equal(unsent_before(skipped, index, np.zeros(12)), counts)


def test_tokens_not_yet_told_are_the_mean_of_simulated_answers(rng):
    p = rng.uniform(size=14)
    index = np.repeat([0, 2], [5, 9])
    num = 40_000
    drawn = rng.uniform(size=(num, 14)) < p
    counts = np.zeros((num, 14))
    for t in range(1, 14):
        if index[t] == index[t - 1]:
            counts[:, t] = np.where(drawn[:, t - 1], counts[:, t - 1] + 1, 0)
    error = counts.std(0) / num**0.5
    assert (np.abs(counts.mean(0) - unsent_before(p, index, np.zeros(3))) <= 4.5 * error).all()
    assert unsent_before(np.ones(4), np.zeros(4, dtype=int), np.zeros(1)).tolist() == [0, 1, 2, 3]
    skipped = np.array([1.0, 1.0, 0.0, 1.0])
    assert unsent_before(
        np.tile(skipped, 2), np.repeat([0, 1], 4), np.array([5.0, 9.0])
    ).tolist() == [5, 6, 7, 0, 9, 10, 11, 0]


# --- expected, drawn and measured ----------------------------------------------------------------


def redrawn(rng, num_redraws: int, lengths=(3, 5, 4), flat: float = 1.0, known=None) -> Trace:
    """One trace of many prompts: the same contexts again and again, with drafts of their own."""
    num = sum(lengths)
    z, w = random_logits(rng, num, VOCAB)
    z, w = (np.tile(flat * values, (num_redraws, 1)) for values in (z, w))
    cumulative = softmax(z).cumsum(-1)
    drafts = (cumulative < rng.uniform(size=(len(z), 1)) * cumulative[:, -1:]).sum(-1)
    recorded = stored(law_step(rng, z, w, drafts=drafts), known)
    columns = {name: recorded[name] for name in recorded._columns}
    columns["step"] = np.tile(np.concatenate([np.arange(n) for n in lengths]), num_redraws)
    prompts = num_redraws * len(lengths)
    columns["prompt_index"] = np.repeat(np.arange(prompts), np.tile(lengths, num_redraws))
    return Trace(columns, [f"{i:05d}" for i in range(prompts)], Axes(VOCAB))


@pytest.fixture(scope="module")
def many() -> Trace:
    return redrawn(np.random.default_rng(8), 400)


@pytest.mark.parametrize("accounting", ["paper", "full"])
@pytest.mark.parametrize("name", [one for one in PLAIN if one != "cu-hlm-online"])
def test_the_mean_over_many_redraws_is_the_expected_one(many, name, accounting):
    """Same contexts, 400 sets of drafts: within 4.5 standard errors, redraws independent."""
    policy = a_policy(name)
    expected = metrics(predicted_tokens(many, policy), economics(accounting))
    drawn = metrics(drawn_tokens(many, policy), economics(accounting))
    for metric in METRICS:
        if metric == "mean_throughput_tok_s" and accounting == "full":
            continue  # its bits are those of a mean count of tokens not yet told
        if np.isnan(expected[metric].value):
            # Its law is not recorded; or it never asks a server.
            assert name in ("cu-hlm-offline", "coupled", "slm")
            continue
        gap = drawn[metric].value - expected[metric].value
        pieces = drawn[metric].influence - expected[metric].influence
        error = np.sqrt((pieces.reshape(400, -1).sum(1) ** 2).sum())
        assert abs(gap) <= 4.5 * error + 1e-9 * abs(expected[metric].value), metric


def test_averaging_over_the_draft_narrows_the_errors(many):
    for name in ("u-hlm", "r-hlm", "coupled"):
        expected = metrics(predicted_tokens(many, a_policy(name)), economics())
        drawn = metrics(drawn_tokens(many, a_policy(name)), economics())
        for metric in ("skip_rate", "rejection_risk", "token_time_ms"):
            assert expected[metric].standard_error < 0.8 * drawn[metric].standard_error
        # The bias is of the law both times.
        assert expected["tv_bias"].value == pytest.approx(drawn["tv_bias"].value, abs=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_a_rerun_of_the_same_drafts_measures_what_was_drawn(many, name):
    policy = a_policy(name)
    drawn = drawn_tokens(many, policy)
    columns = many.columns | {
        "skipped": drawn.skip > 0.5,
        "policy_bias": drawn.bias,
        "policy_entries": drawn.entries,
        "policy_risk": drawn.rho,
        "policy_log_ratio": -drawn.log_ratio[0],
    }
    measured = measured_tokens(
        Trace(columns, many.prompt_ids, many.axes), policy, drawn.num_prompt_tokens
    )
    one, other = (metrics(tokens, economics("full")) for tokens in (drawn, measured))
    for metric in METRICS:
        if name == "coupled" and metric == "tokens_in_agreement":
            continue  # drawn, its ratio is known within bounds only
        assert one[metric].value == pytest.approx(other[metric].value, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("accounting", ["paper", "full"])
def test_beyond_the_head_bits_are_right_on_average(accounting):
    """At a threshold past the head a skipped draft stands for its mass, also in what is sent."""
    seed, flat = 3, 0.15
    z = flat * random_logits(np.random.default_rng(seed), 3, VOCAB)[0]
    trace = redrawn(np.random.default_rng(seed), 1500, (1, 1, 1), flat)
    u = exact_uncertainty(z, np.tile(np.arange(VOCAB), (3, 1)), temperatures())
    threshold = float(np.quantile(u, 0.8))
    skip = ((u <= threshold) * softmax(z)).sum(-1)
    assert ((u <= threshold).sum(-1) > 35).any()
    policy = a_policy("u-hlm", threshold)
    found = metrics(predicted_tokens(trace, policy), economics(accounting))
    bits, reply = (846, 6) if accounting == "full" else (840, 0)
    sent_ms = 97 + float(LINK.uplink_time_ms(float(bits)) + LINK.downlink_time_ms(reply))
    for metric, exact in (
        ("skip_rate", skip.mean()),
        ("uplink_bits_per_token", bits * (1 - skip).mean()),
        ("token_time_ms", (22 * skip + sent_ms * (1 - skip)).mean()),
        ("mean_throughput_tok_s", 1e3 * (skip / 22 + (1 - skip) / sent_ms).mean()),
    ):
        assert abs(found[metric].value - exact) < 4.5 * found[metric].standard_error, metric
        assert found[metric].standard_error < 0.15 * abs(exact), metric


def test_mean_bias_does_not_choose_contexts_by_what_they_skip():
    """Coupling and truncation recorded at every fourth step: the mean is that of all of them."""
    rng = np.random.default_rng(4)
    num = 4000
    known = rng.permutation(num) % 4 == 0
    contexts = (5,) * (num // 5)
    seed = int(rng.integers(1 << 30))
    full = redrawn(np.random.default_rng(seed), 1, contexts)
    partly = redrawn(np.random.default_rng(seed), 1, contexts, known=known)
    for name in ("coupled", "cu-hlm-offline"):
        policy = a_policy(name)
        exact = metrics(predicted_tokens(full, policy), economics())["tv_bias"]
        tokens = predicted_tokens(partly, policy)
        np.testing.assert_array_equal(np.isfinite(tokens.bias), known)
        found = metrics(tokens, economics())["tv_bias"]
        pieces = found.influence - exact.influence
        error = float(np.sqrt((pieces**2).sum()))
        assert abs(found.value - exact.value) < 4.5 * error
        assert error < 0.1 * exact.value
        # Negative control: were contexts that skip nothing always known, their zeros would count
        # four times.
        if name == "coupled":
            biased = replace(tokens, bias=np.where(tokens.skip == 0, 0.0, tokens.bias))
            chosen = np.nanmean(biased.bias)
            assert exact.value - chosen > 10 * error
        # The part known everywhere narrows the error of the rest.
        alone = mean_over_tokens(tokens.bias, tokens.prompt_index, tokens.num_prompts)
        assert found.standard_error < alone.standard_error


@pytest.mark.parametrize("name", ["coupled", "cu-hlm-offline"])
def test_skipping_everything_is_known_at_every_token(name):
    rng = np.random.default_rng(5)
    trace = redrawn(rng, 1, (4, 4), known=np.arange(8) % 4 == 0)
    tokens = predicted_tokens(trace, a_policy(name, 1.0))
    np.testing.assert_allclose(tokens.bias, trace["tv_distance"])


def test_atoms_of_a_trace_are_the_risk_curve_of_its_policy(many):
    policy = a_policy("u-hlm")
    grid = np.array([0.1, 0.3, 0.45, 0.7, 0.9, 1.0])
    sums = skip_risk_sums(policy_atoms(many, policy), grid)
    np.testing.assert_allclose(sums.num_tokens, np.bincount(many.prompt_index))
    for column, threshold in enumerate(grid):
        tokens = predicted_tokens(many, policy.with_threshold(float(threshold)))
        for values, of_tokens in ((sums.skipped, tokens.skip), (sums.rejected, tokens.risk)):
            expected = np.bincount(many.prompt_index, weights=of_tokens)
            np.testing.assert_allclose(values[:, column], expected, atol=1e-6)
