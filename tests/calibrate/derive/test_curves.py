"""The curves that a derivation keeps: each against its definition, worked out another way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import AXES, RISKS, VOCAB, make_calibration, synthetic_step

from calibrate.derive.curves import comparison_rule, size_distribution
from calibrate.derive.derivation import derive_run
from calibrate.derive.predict import (
    drawn_tokens,
    economics_of,
    metrics,
    point_policy,
    predicted_tokens,
    uplink_bits,
)
from calibrate.derive.presets import LINK_MODELS, link_to_dict
from calibrate.run.folder import read_record
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    DeriveRequest,
    Figure,
    OperatingPoint,
)
from calibrate.run.traces import Trace, read_trace, shard_paths
from hlmtheory.link import (
    AwgnLink,
    ErgodicRayleighLink,
    Link,
    RateLink,
    RayleighOutageLink,
    TraceLink,
)
from hlmtheory.policies import policy_names
from hlmtheory.truncation import tail_deviation_at, truncation_bias

IMPORTANCES = ("topk:16:1", "topk:4:1.5", "context:0:0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves") / "run"
    make_calibration(folder)
    return folder


@pytest.fixture(scope="module")
def trace(run: Path) -> Trace:
    return read_trace(shard_paths(run))


@pytest.fixture(scope="module")
def derived(run: Path) -> DerivationRecord:
    request = DeriveRequest(
        policies=policy_names(), risks=RISKS, importances=IMPORTANCES, accounting="paper"
    )
    return derive_run(run, request)


def point_named(record: DerivationRecord, key: str) -> OperatingPoint:
    return next(point for point in record.operating_points if point.key == key)


def test_threshold_curves_pass_through_the_derived_points(derived: DerivationRecord) -> None:
    curves = derived.thresholds
    assert (curves.skip_rate.grid[0], curves.skip_rate.grid[-1]) == (0.0, 1.0)
    for rule in ("risk-0.02", "risk-0.05"):
        point = point_named(derived, f"u-hlm/{rule}")
        for metric, curve in (("skip_rate", curves.skip_rate), ("rejection_risk", curves.risk)):
            above = int(np.searchsorted(curve.grid, point.uncertainty_threshold.value))
            value = point.predicted[metric].value
            assert curve.value[above - 1] - 1e-6 <= value <= curve.value[above] + 1e-6
    step, _, _ = synthetic_step(0)
    assert curves.skip_rate.value[-1] == pytest.approx(1.0, abs=1e-6)
    assert curves.risk.value[-1] == pytest.approx(step["tv_distance"].mean(), abs=1e-6)
    low, high = (np.array(end, dtype=float) for end in (curves.risk.low, curves.risk.high))
    assert (high - low).max() > 0.01


def test_paths_rise_from_nothing_to_the_device_alone(
    derived: DerivationRecord, trace: Trace
) -> None:
    # Beyond the least end of a head single contexts are read off their drafts: no curve there has
    # to rise step by step, only to stay above what the heads have said.
    head_says = float(trace.columns["head_uncertainty"][:, -1].min())
    gated = [info.name for info in derived.policies if info.gated]
    assert [path.policy for path in derived.paths] == gated
    device = point_named(derived, "slm/none").predicted["tv_bias"].value
    for path in derived.paths:
        assert list(path.thresholds) == sorted(path.thresholds)
        assert len(path.thresholds) > 20
        said = sum(threshold < head_says for threshold in path.thresholds)
        assert said > 15
        assert list(path.skip_rate[:said]) == sorted(path.skip_rate[:said])
        assert min(path.skip_rate[said:]) >= path.skip_rate[said - 1]
        assert path.skip_rate[-1] == pytest.approx(1.0, abs=1e-6)
        assert path.tv_bias[-1] == pytest.approx(device, abs=1e-6)
        assert path.uplink_bits_per_token[-1] == pytest.approx(0.0, abs=0.01)
    # Every derived threshold is on its policy's path, with the very prediction of the point.
    path = next(one for one in derived.paths if one.policy == "r-hlm")
    point = point_named(derived, "r-hlm/risk-0.02")
    place = path.thresholds.index(point.uncertainty_threshold.value)
    assert path.tv_bias[place] == point.predicted["tv_bias"].value


def test_the_sweep_is_the_metrics_at_each_snr(derived: DerivationRecord, trace: Trace) -> None:
    sweep, link = derived.sweep, derived.link
    assert sweep.rule == "risk-0.02"  # of the two budgets the one nearer 1 %
    assert (sweep.quantity, sweep.unit, sweep.spacing) == ("uplink SNR", "dB", "linear")
    assert (len(sweep.grid), sweep.grid[0], sweep.grid[-1]) == (51, -15.0, 35.0)
    assert [one.policy for one in sweep.series] == list(policy_names())
    for one in sweep.series:
        for name in ("throughput_tok_s", "mean_throughput_tok_s"):
            values = getattr(one, name).value
            assert list(values) == sorted(values)
    slm = sweep.series[0].throughput_tok_s
    np.testing.assert_allclose(slm.value, 50.0)  # 20 ms whatever the link
    hlm = next(one for one in sweep.series if one.policy == "hlm")
    for place in (0, 25, 50):
        rate = link["bandwidth_hz"] * np.log2(1 + 10 ** (sweep.grid[place] / 10))
        token_ms = 20.0 + 1e3 * 16 * VOCAB / rate + link["round_trip_ms"] + 30.0
        assert hlm.throughput_tok_s.value[place] == pytest.approx(1e3 / token_ms)
    # At the derivation's own SNR the sweep is the operating point.
    assert sweep.own == link["snr_db"]
    own = sweep.grid.index(sweep.own)
    point = point_named(derived, "coupled/risk-0.02")
    coupled = next(one for one in sweep.series if one.policy == "coupled")
    expected = point.predicted["throughput_tok_s"].value
    assert coupled.throughput_tok_s.value[own] == pytest.approx(expected)


LINKS = {
    "awgn": AwgnLink(1e6, 12.0, 3.0),
    "ergodic-rayleigh": ErgodicRayleighLink(1e6, 12.0, 3.0),
    "rayleigh-outage": RayleighOutageLink(1e6, 12.0, rate_bps=2e6, round_trip_ms=3.0),
    "rate": RateLink(2e6, 1e7, 3.0),
    "trace": TraceLink((5e5, 0.0, 2e6), 3.0),
}
assert LINKS.keys() == LINK_MODELS.keys()


def with_link(run: Path, folder: Path, link: Link) -> DerivationRecord:
    """A derivation for that link, in a file of its own."""
    path = folder / "link.json"
    path.write_text(json.dumps(link_to_dict(link)))
    request = DeriveRequest(
        policies=("hlm", "u-hlm"), risks=RISKS, link=str(path), accounting="paper"
    )
    return derive_run(run, request, "own-link")


@pytest.mark.parametrize("name", LINKS)
def test_the_sweep_is_of_the_derivations_own_link(run: Path, tmp_path: Path, name: str) -> None:
    """Every token of hlm takes 20 ms, 16 bit a token of the vocabulary on the link, and 33 ms."""
    derived = with_link(run, tmp_path, LINKS[name])
    sweep, own_link = derived.sweep, LINKS[name]
    assert sweep.quantity == own_link.quantity.name
    assert sweep.grid == own_link.sweep()
    (hlm,) = (one for one in sweep.series if one.policy == "hlm")
    for place in range(0, len(sweep.grid), 10):
        if name in ("rate", "trace"):
            factor = sweep.grid[place] / (2e6 if name == "rate" else 2.5e6 / 3)
            rates = {"rate_bps": 2e6 * factor} if name == "rate" else {
                "rates_bps": (5e5 * factor, 0.0, 2e6 * factor)
            }  # fmt: skip
            link = replace(own_link, **rates)
        else:
            link = replace(own_link, snr_db=sweep.grid[place])
        token_ms = 20.0 + link.uplink_time_ms(np.array(16.0 * VOCAB)) + 3.0 + 30.0
        assert hlm.throughput_tok_s.value[place] == pytest.approx(1e3 / token_ms)
    own = sweep.grid.index(sweep.own)
    for one in sweep.series:
        point = point_named(derived, f"{one.policy}/{one.rule}")
        for metric in ("throughput_tok_s", "mean_throughput_tok_s"):
            said = point.predicted[metric].value
            assert getattr(one, metric).value[own] == pytest.approx(said)


def test_the_links_differ_where_the_sweep_is_steep(run: Path, tmp_path: Path) -> None:
    """The control: an AWGN sweep is not that of a fading link."""
    awgn, fading = (
        with_link(run, tmp_path, LINKS[name]).sweep for name in ("awgn", "ergodic-rayleigh")
    )
    first, other = (one.series[0].throughput_tok_s.value[15] for one in (awgn, fading))
    # At 0 dB the ergodic rate is 0.86 of capacity, and the payload a fourteenth of the time.
    assert first - other > 0.005 * first


def test_no_sweep_where_all_blocks_fail(run: Path, tmp_path: Path) -> None:
    """2 Mbit/s over 1 MHz at -15 dB: the chance of a block is exp(-3 / 0.03), 4e-42."""
    outage = with_link(run, tmp_path, LINKS["rayleigh-outage"]).sweep
    assert outage.grid[0] > -15.0
    assert outage.grid[-1] == 35.0


def test_payloads_are_the_bits_of_sent_tokens(derived: DerivationRecord, trace: Trace) -> None:
    found = {one.policy: one for one in derived.payloads}
    assert set(found) == set(policy_names()) - {"slm", "llm"}
    every = found["hlm"].bits
    assert every.num_tokens == trace.num_tokens
    assert set(every.quantiles) == {16.0 * VOCAB}, "8 bit and an index of 8 for each of 256"
    assert found["u-hlm"].bits.num_tokens < trace.num_tokens
    assert set(found["u-hlm"].bits.quantiles) == {16.0 * VOCAB}
    assert set(found["coupled"].bits.quantiles) == {0.0}
    # Share of sent tokens times their mean is the mean over all.
    one = found["cu-hlm-online"]
    point = point_named(derived, f"{one.policy}/{one.rule}")
    tokens = drawn_tokens(trace, point_policy(derived, point, None))
    everywhere = uplink_bits(tokens, economics_of(derived)).mean()
    share = one.bits.num_tokens / trace.num_tokens
    assert share * one.bits.mean == pytest.approx(everywhere)
    assert one.bits.quantiles[0] < one.bits.quantiles[-1]


def test_the_rule_to_compare_at(derived: DerivationRecord) -> None:
    points = [point for point in derived.operating_points if point.family != "risk"]
    assert comparison_rule(points) == "risk-averse"  # risk-prone skips everything
    assert comparison_rule([point for point in points if point.score is None]) is None
    rare = [point for point in derived.operating_points if point.key != "u-hlm/risk-0.02"]
    assert comparison_rule(rare) == "risk-0.05"  # more policies have it


def test_truncation_curves_are_means_over_contexts(derived: DerivationRecord) -> None:
    step, row, steps = synthetic_step(0)
    found = derived.truncation
    sharp = tail_deviation_at(step.x, AXES.truncation_sizes).mean(0) / 2
    np.testing.assert_allclose(found.sharp_bound.value, sharp, atol=1e-6)
    assert found.sharp_bound.grid == tuple(map(float, AXES.truncation_sizes))
    sampled = (steps + row) % 4 == 0
    exact = [truncation_bias(step.x, step.y, k)[sampled].mean() for k in AXES.truncation_sizes]
    np.testing.assert_allclose(found.exact.value, exact, atol=1e-6)
    assert (found.num_tokens, found.num_exact) == (len(row), int(sampled.sum()))
    ratio = np.array(found.soft_bound.value[:-1]) / np.array(found.sharp_bound.value[:-1])
    assert ((ratio >= 2.885) & (ratio <= 6.384)).all()  # 2/D, hlmtheory.truncation
    assert (
        found.chosen_size
        == point_named(derived, "cu-hlm-offline/risk-0.02").settings["num_entries"]
    )


def test_online_sizes_are_of_the_tokens_that_are_sent(
    derived: DerivationRecord, trace: Trace, run: Path
) -> None:
    found = derived.truncation
    assert found.online_point == "cu-hlm-online/risk-0.02"
    point = point_named(derived, found.online_point)
    learned = read_record(run, CalibrationRecord).learned
    tokens = drawn_tokens(trace, point_policy(derived, point, learned))
    sent = trace["uncertainty"] > point.uncertainty_threshold.value
    np.testing.assert_array_equal(tokens.skip < 0.5, sent)
    assert found.online.num_tokens == sent.sum()
    assert found.online.mean == pytest.approx(tokens.entries[sent].mean())
    assert found.online.quantiles[50] == pytest.approx(np.median(tokens.entries[sent]))


def test_size_distributions_leave_out_what_is_unknown() -> None:
    found = size_distribution(np.array([np.nan, 1.0, 2.0, 9.0]))
    assert (found.num_tokens, found.mean, len(found.levels)) == (3, 4.0, 101)
    assert (found.quantiles[0], found.quantiles[50], found.quantiles[-1]) == (1.0, 2.0, 9.0)


def test_the_plane_holds_the_derived_importances(derived: DerivationRecord) -> None:
    plane = derived.importance_plane
    assert (plane.policy, plane.threshold_rule) == ("ui-hlm", "risk-averse")
    plain = point_named(derived, "u-hlm/risk-averse")
    assert plane.uncertainty_threshold == plain.uncertainty_threshold.value
    assert plane.ks == AXES.attention_sizes
    assert {1.0, 1.5} <= set(plane.gammas)  # not the context variant's 0.9
    assert [(cell.k, cell.gamma) for cell in plane.cells] == [
        (k, gamma) for k in plane.ks for gamma in plane.gammas
    ]
    rates = np.array([cell.predicted["skip_rate"].value for cell in plane.cells])
    rates = rates.reshape(len(plane.ks), -1)
    assert (np.diff(rates, axis=1) >= -1e-9).all()  # a stricter importance skips more
    assert rates.min() >= plain.predicted["skip_rate"].value - 1e-9


def test_the_example_follows_its_formula(derived: DerivationRecord, trace: Trace) -> None:
    found = derived.importance_example
    rows = np.flatnonzero(trace.prompt_index == trace.prompt_ids.index(found.prompt_id))
    assert len(rows) == np.bincount(trace.prompt_index).max()
    assert found.setting == "topk-16-1"
    importance = trace["topk_attention"][rows, AXES.attention_sizes.index(16)]
    threshold = np.exp(-trace["attention_entropy"][rows])
    np.testing.assert_allclose(found.importance, importance)
    np.testing.assert_allclose(found.threshold, threshold)
    assert found.important == tuple(importance >= threshold)


def test_a_running_threshold_has_none_at_its_first_step(run: Path) -> None:
    request = DeriveRequest(policies=("ui-hlm",), importances=("context:0:0.9",), risks=RISKS)
    found = derive_run(run, request, "context").importance_example
    assert found.threshold[0] is None
    assert found.important[0]
    assert all(value is not None for value in found.threshold[1:])
    # Memory of one step on: the second threshold is the first importance.
    assert found.threshold[1] == pytest.approx(found.importance[0])


def test_the_optimum_is_the_best_of_all_paths(
    derived: DerivationRecord, trace: Trace, run: Path
) -> None:
    economics = economics_of(derived)
    assert {(one.budget, one.objective) for one in derived.optima} == {
        (risk, objective)
        for risk in RISKS
        for objective in ("throughput", "mean-throughput", "energy")
    }
    best: dict[str, tuple[str, Callable[[float, float], float]]] = {
        "throughput": ("throughput_tok_s", max),
        "energy": ("energy_j_per_token", min),
    }
    for one in derived.optima:
        assert one.feasible
        assert one.predicted["total_bias"] <= one.budget
        if one.objective not in best:
            continue
        metric, better = best[one.objective]
        # No derived point within the budget beats it.
        for point in derived.operating_points:
            bias = point.predicted["tv_bias"].value
            risk = point.predicted["rejection_risk"].value
            if point.variant or not point.feasible or max(bias, risk) > one.budget:
                continue
            learned = read_record(run, CalibrationRecord).learned
            tokens = predicted_tokens(trace, point_policy(derived, point, learned))
            value = metrics(tokens, economics)[metric].value
            assert better(value, one.predicted[metric]) == pytest.approx(
                one.predicted[metric], rel=1e-6
            )


def test_no_optimum_where_no_policy_keeps_the_budget(run: Path) -> None:
    found = derive_run(run, DeriveRequest(policies=("slm",), risks=(0.01,)), "device")
    for one in found.optima:
        assert (one.feasible, one.policy, one.predicted) == (False, None, {})
        assert "no point keeps the budget 0.01" in one.reason
    assert (found.thresholds, found.sweep, found.paths) == (None, None, ())
    assert found.operating_points[0].uncertainty_threshold == Figure(value=None)
