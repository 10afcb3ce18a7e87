"""`hlm validate --wire` on the toy pair: processes, records, and the arithmetic of a prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import toy_pair

from calibrate.derive.derivation import derive_run
from calibrate.derive.predict import PolicyTokens, predicted_tokens
from calibrate.derive.presets import load_link
from calibrate.derive.roads import read_roads
from calibrate.fit.calibration import calibrate, prepare
from calibrate.pairs.loading import load_model
from calibrate.run.errors import UsageError
from calibrate.run.folder import read_record
from calibrate.run.prompts import text_key
from calibrate.run.records import CalibrationRecord, DeriveRequest, RunRecord, WireRecord
from calibrate.validate.wire import QUANTILES, WireTimes, prepare_wire, run_wire, wire_means
from calibrate.wire.protocol import ask_bytes, reply_bytes
from calibrate.wire.run import read_derived
from hlmtheory.cost import WireCosts, wire_time_ms
from hlmtheory.link import RateLink
from hlmtheory.policies import policy_from_settings

POINTS = ("u-hlm/risk-0.05", "r-hlm/risk-0.05", "coupled/risk-0.05", "hlm/none", "llm/none",
          "slm/none")  # fmt: skip


NUM_TOKENS = 5


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wire") / "run"
    request = toy_pair.request(toy, path)
    calibrate(request, prepare(request), toy_pair.load(toy))
    names = ("slm", "llm", "hlm", "u-hlm", "r-hlm", "coupled")
    derive_run(path, DeriveRequest(policies=names, risks=(0.05,)))
    return path


@pytest.fixture(scope="module")
def record(run: Path) -> WireRecord:
    """Two links, the second beside the first; answers shorter than the calibration's."""
    for link in ("fast", "slow.json"):
        if link == "slow.json":
            link = str(run.parent / link)
            entry = {"model": "rate", "rate_bps": 2e5, "downlink_bps": 1e6, "round_trip_ms": 30}
            Path(link).write_text(json.dumps(entry))
        plan = prepare_wire(
            run, "default", POINTS, [link], limit=3, max_new_tokens=NUM_TOKENS, num_threads=1
        )
        model = load_model(plan.spec.slm, dtype="float32", device="cpu")
        run_wire(plan, model, lambda token: None, lambda text: None)
    return read_record(run, WireRecord)


def test_the_wire_gives_the_tokens_of_one_process_and_frames_as_stated(record):
    assert [one.link_name for one in record.links] == ["fast", "slow"]
    for one in record.links:
        assert {f"{run.policy}/{run.rule}" for run in one.runs} == set(POINTS)
        for run in one.runs:
            assert run.same_tokens_share == 1
            assert run.framing_as_stated


def test_answers_are_predicted_from_as_many_tokens_of_the_calibration(run, record):
    calibration = read_record(run, CalibrationRecord)
    trace = read_roads(run, calibration).server
    skip = predicted_tokens(trace, read_derived(run, "default").policy("u-hlm/risk-0.05")).skip
    early = float(skip[trace["step"] < NUM_TOKENS].mean())
    assert abs(early - float(skip.mean())) > 0.01
    one = next(one for one in record.links[0].runs if one.policy == "u-hlm")
    cell = next(cell for cell in one.cells if cell.metric == "skip_rate")
    assert cell.predicted.value == pytest.approx(early)
    assert one.num_tokens <= 3 * NUM_TOKENS
    with pytest.raises(UsageError, match="--max-new-tokens 500: allowed is at most"):
        prepare_wire(run, "default", POINTS, ["fast"], limit=3, max_new_tokens=500)


def test_no_message_of_a_slow_link_arrives_before_its_last_bit_has_left(run, record):
    """A bound that no machine breaks, token by token: bits over both rates and the round trip."""
    for name in ("u-hlm-risk-0.05", "r-hlm-risk-0.05", "coupled-risk-0.05", "hlm-none"):
        sent = pq.read_table(run / "wire" / "slow" / f"{name}.parquet").to_pandas()
        sent = sent[sent.sent_bytes > 0]
        least = 8e3 * sent.sent_bytes / 2e5 + 8e3 * sent.received_bytes / 1e6 + 30
        assert len(sent)
        assert (sent.wait_ms > least - 1).all()  # both ends' clocks tick in less than a millisecond
        fast = pq.read_table(run / "wire" / "fast" / f"{name}.parquet").to_pandas()
        assert not (fast[fast.sent_bytes > 0].wait_ms > least.min() - 1).all()


def test_what_is_kept_of_tokens_says_its_units(run, record):
    path = run / "wire" / "slow" / "u-hlm-risk-0.05.parquet"
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"hlmtheory"])
    assert header["units"]["wait_ms"] == "ms"
    frame = table.to_pandas()
    assert (frame.sent_bytes[frame.skipped] == 0).all()
    assert (frame.wait_ms[~frame.skipped] > 0).all()


def test_what_was_run_is_not_run_again_unasked(run, record):
    with pytest.raises(UsageError, match="over fast: was run; --replace writes"):
        prepare_wire(run, "default", POINTS[:1], ["fast"], limit=3, max_new_tokens=NUM_TOKENS)
    with pytest.raises(UsageError, match=r"wire\.json is of seed"):
        prepare_wire(run, "default", POINTS[:1], ["10mbit"], 2, None, NUM_TOKENS)
    assert prepare_wire(
        run, "default", POINTS[:1], ["fast"], 3, None, NUM_TOKENS, replace_earlier=True
    )
    # A file is known by its name, and by what it says.
    slow = str(run.parent / "slow.json")
    with pytest.raises(UsageError, match="over slow: was run; --replace writes"):
        prepare_wire(run, "default", POINTS[:1], [slow], limit=3, max_new_tokens=NUM_TOKENS)
    other = run.parent / "other" / "slow.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"model": "rate", "rate_bps": 3e5, "round_trip_ms": 30}))
    with pytest.raises(UsageError, match=r"wire\.json has another link of this name"):
        prepare_wire(run, "default", POINTS[:1], [str(other)], limit=3, max_new_tokens=NUM_TOKENS)
    with pytest.raises(UsageError, match="another link is called slow; rename"):
        prepare_wire(
            run, "default", POINTS[:1], [slow, str(other)], limit=3, max_new_tokens=NUM_TOKENS
        )


def test_probes_are_prompts_that_were_calibrated_on_and_as_many_as_are_validated(run):
    plan = prepare_wire(run, "default", POINTS[:1], ["fast"], limit=20, replace_earlier=True)
    used = set(read_record(run, RunRecord).prompt_keys)
    assert len(plan.prompts) == len(plan.probes) == 20
    assert all(text_key(one.text) in used for one in plan.probes)
    assert not any(text_key(one.text) in used for one in plan.prompts)


def test_points_and_links_that_are_not_there_are_told(run):
    with pytest.raises(UsageError, match="--point u-hlm/risk-9: not derived; feasible are"):
        prepare_wire(run, "default", ["u-hlm/risk-9"], ["fast"], limit=2)
    with pytest.raises(UsageError, match="--link nowhere: no such file or preset"):
        prepare_wire(run, "default", ["hlm/none"], ["nowhere"], limit=2)


def test_predicted_times_are_those_of_the_obvious_loop(rng):
    """Skips and sizes known, token by token: (63) added up by hand."""
    vocab, num = 1000, 60
    prompt = np.repeat(np.arange(6), 10)
    skip = (rng.random(num) < 0.4).astype(float)
    entries = np.where(skip > 0, 0.0, rng.integers(1, 300, num))
    policy = policy_from_settings("r-hlm", {}, 0.3)
    nothing = np.zeros(num)
    tokens = PolicyTokens(
        policy, skip, nothing, nothing, entries, nothing, np.zeros((2, num)), prompt, 6, np.zeros(6)
    )
    link, costs = RateLink(1e6, 4e6, 40.0), WireCosts(50.0, 70.0)
    found = wire_means(tokens, link, costs, vocab, 8)
    total_ms = bits = unseen = 0.0
    inverse, spent_ms = 0.0, []
    for i in range(num):
        unseen = 0 if i % 10 == 0 else unseen
        if skip[i]:
            unseen, spent = unseen + 1, 50.0
        else:
            payload = entries[i] * (8 + 10) + unseen * 10
            frame = 8 * ask_bytes(int(payload))
            spent = 50 + 70 + 40 + frame / 1e3 + 8 * reply_bytes(vocab) / 4e3
            bits, unseen = bits + payload, 0
        if i % 10:  # the first of an answer waits for both prefills
            spent_ms.append(spent)
            total_ms += spent
            inverse += 1e3 / spent
    later = num - 6
    assert found["token_time_ms"].value == pytest.approx(total_ms / later)
    assert found["throughput_tok_s"].value == pytest.approx(1e3 * later / total_ms)
    assert found["mean_throughput_tok_s"].value == pytest.approx(inverse / later)
    assert found["uplink_bits_per_token"].value == pytest.approx(bits / num)
    assert found["skip_rate"].value == pytest.approx(skip.mean())
    quantiles = WireTimes.of(tokens, link, costs, vocab, 8).quantiles(QUANTILES)
    assert quantiles == pytest.approx(np.quantile(spent_ms, QUANTILES, method="inverted_cdf"))


def test_a_stream_overlaps_its_link():
    costs = WireCosts(0.0, 20.0)
    for down, expected in ((5.0, 20.0), (50.0, 50.0)):
        found = wire_time_ms(np.zeros(3), np.zeros(3), down, costs, 40.0, server_only=True)
        assert found == pytest.approx([expected] * 3)


def test_shipped_links_have_a_downlink():
    for name in ("fast", "10mbit", "1mbit", "lte", "wifi", "iot", "nr-fr1"):
        link = load_link(name)
        assert link.downlink_time_ms(1e4) == pytest.approx(link.uplink_time_ms(1e4))
    assert RateLink(1e6, 4e6).downlink_time_ms(4e6) == pytest.approx(1e3)
