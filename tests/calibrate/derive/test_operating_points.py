"""Operating points: for any policy and any score, and as the full laws say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import AXES, RISKS, VOCAB, make_calibration, synthetic_step

from calibrate.derive.derivation import derive_run
from calibrate.derive.predict import METRICS, UNITS, point_policy
from calibrate.run.folder import read_record, write_record
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    DeriveRequest,
    Figure,
    OperatingPoint,
    RunRecord,
)
from calibrate.run.traces import read_trace, shard_paths, write_shard
from hlmtheory.policies import policy_class, policy_names
from hlmtheory.scores import SCORE_NAMES, score_named

THETAS, IMPORTANCES = (0.1, 0.02, 0.5), ("topk:16:1", "topk:4:1.5", "context:0:0.9")

OWN_POLICY = """
from dataclasses import dataclass
from typing import ClassVar

from hlmtheory.policies import GatedPolicy


@dataclass(frozen=True)
class Sparing(GatedPolicy):
    '''Sends but the largest probabilities, and asks for a grain of salt.'''

    name: ClassVar[str] = "sparing"
    label: ClassVar[str] = "sparing"
    marker: ClassVar[str] = "*"

    num_sent: int = 3

    @classmethod
    def variants(cls, fitted, options):
        return [("", {"num_sent": 3}), ("@more", {"num_sent": 7})]

    def entries(self, step, skip):
        return skip.zeros + self.num_sent
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points") / "run"
    make_calibration(folder)
    return folder


@pytest.fixture(scope="module")
def derived(run: Path) -> DerivationRecord:
    request = DeriveRequest(
        accounting="paper",
        policies=policy_names(),
        risks=RISKS,
        thetas=THETAS,
        importances=IMPORTANCES,
        draft_from_sent=True,
    )
    return derive_run(run, request)


def points_of(record: DerivationRecord, policy: str) -> dict[str, OperatingPoint]:
    return {point.rule: point for point in record.operating_points if point.policy == policy}


def value(point: OperatingPoint, metric: str) -> float:
    found = point.predicted[metric].value
    assert found is not None
    return found


def test_every_setting_has_a_name_of_its_own(derived: DerivationRecord) -> None:
    keys = [point.key for point in derived.operating_points]
    assert len(set(keys)) == len(keys)
    plain = set(points_of(derived, "u-hlm"))
    labels = {
        "cu-hlm-offline": ("", "@theta-0.02", "@theta-0.5", "@draft-from-sent"),
        "cu-hlm-online": ("", "@theta-0.02", "@theta-0.5"),
        "ui-hlm": ("", "@topk-4-1.5", "@context-0-0.9"),
    }
    for policy, wanted in labels.items():
        points = points_of(derived, policy)
        assert set(points) == {rule + label for rule in plain for label in wanted}
        assert {f"@{point.variant}" if point.variant else "" for point in points.values()} == set(
            wanted
        )


def test_what_a_rule_is_stands_in_fields_not_only_in_its_name(derived: DerivationRecord) -> None:
    points = points_of(derived, "u-hlm")
    budgets = {(point.family, point.budget) for point in points.values()}
    assert budgets == {("risk-averse", None), ("risk-prone", None)} | {
        (family, risk) for family in ("risk", "conformal", "ltt") for risk in RISKS
    }
    for rule, point in points.items():
        assert rule == point.family + (f"-{point.budget:g}" if point.budget is not None else "")
        assert point.score == "uncertainty"
        assert (point.confidence == 0.95) == (point.family == "ltt")
        assert (point.weighting is None) == (point.budget is None)
    assert not points["ltt-0.02"].feasible  # 12 prompts certify nothing
    assert "12 prompts" in points["ltt-0.02"].reason
    assert points["ltt-0.02"].predicted == {
        metric: Figure(value=None, unit=UNITS[metric]) for metric in METRICS
    }
    assert points["risk-prone"].reason == "threshold is at or above 1: every token is skipped"
    for rule in ("risk-0.02", "risk-averse"):
        threshold = points[rule].uncertainty_threshold
        assert threshold.low is not None
        assert threshold.low <= threshold.value <= threshold.high


def test_settings_are_those_of_the_name(derived: DerivationRecord) -> None:
    offline, online = (points_of(derived, f"cu-hlm-{kind}") for kind in ("offline", "online"))
    assert online["risk-0.05"].settings["theta"] == 0.1
    assert online["risk-0.05@theta-0.5"].settings["theta"] == 0.5
    # A smaller tolerance never sends less.
    rules = (f"risk-0.05{label}" for label in ("@theta-0.5", "", "@theta-0.02"))
    entries = [offline[rule].settings["num_entries"] for rule in rules]
    assert entries == sorted(entries)
    assert entries[0] < entries[-1]
    sent = offline["risk-0.05@draft-from-sent"]
    assert sent.settings["num_entries"] == offline["risk-0.05"].settings["num_entries"]
    importance = points_of(derived, "ui-hlm")["risk-0.05@context-0-0.9"].settings["importance"]
    assert importance == {"variant": "context", "k": 0.0, "gamma": 0.9}


def test_thresholds_do_not_depend_on_what_is_sent(derived: DerivationRecord) -> None:
    plain = points_of(derived, "u-hlm")
    for policy in ("cu-hlm-offline", "cu-hlm-online", "r-hlm", "coupled", "ask-llm"):
        for rule, point in points_of(derived, policy).items():
            expected = plain[rule.partition("@")[0]].uncertainty_threshold
            assert point.uncertainty_threshold == expected


def test_predictions_are_those_of_the_full_laws(derived: DerivationRecord) -> None:
    step, _, _ = synthetic_step(0)
    x, y, order = step.x, step.y, np.argsort(-step.logits, axis=1)
    u = np.empty_like(x)
    np.put_along_axis(u, order, step["candidate_uncertainty"], axis=1)  # all VOCAB are candidates
    excess = np.clip(x - y, 0, None)
    tested = 0
    for rule in ("risk-averse", "risk-0.02", "risk-0.05"):
        point = points_of(derived, "u-hlm")[rule]
        inside = u <= point.uncertainty_threshold.value
        assert inside.sum(1).max() < 32  # so that the recorded head decides
        tested += inside.any()
        skipped = (inside * x).sum(1)
        assert value(point, "skip_rate") == pytest.approx(skipped.mean(), abs=1e-6)
        for metric in ("rejection_risk", "tv_bias"):
            assert value(point, metric) == pytest.approx((inside * excess).sum(1).mean(), abs=1e-6)
        # 16 bits a probability, every probability of every token that is sent: (18)
        bits = 16 * VOCAB * (1 - skipped).mean()
        assert value(point, "uplink_bits_per_token") == pytest.approx(bits, rel=1e-6)
        residual = points_of(derived, "r-hlm")[rule]
        sent = 16 * (inside.sum(1) * (1 - skipped)).mean()
        assert value(residual, "uplink_bits_per_token") == pytest.approx(sent, abs=2e-5)
    assert tested == 3


def test_baselines_have_closed_forms(derived: DerivationRecord) -> None:
    step, _, _ = synthetic_step(0)
    slm, llm, hlm = (points_of(derived, name)["none"] for name in ("slm", "llm", "hlm"))
    distance = np.abs(step.x - step.y).sum(1).mean() / 2
    assert value(slm, "tv_bias") == pytest.approx(distance, abs=1e-6)
    assert (value(llm, "tv_bias"), value(hlm, "tv_bias")) == (0.0, 0.0)
    # Nobody looks at the uncertainty: the device's 20 ms at 4 W, and nothing else.
    assert value(slm, "token_time_ms") == pytest.approx(20.0)
    assert value(slm, "throughput_tok_s") == pytest.approx(50.0)
    assert value(slm, "energy_j_per_token") == pytest.approx(0.08)
    assert value(slm, "uplink_bits_per_token") == 0
    assert value(hlm, "uplink_bits_per_token") == pytest.approx(16 * VOCAB)
    for point in (slm, llm, hlm):
        assert (point.family, point.score, point.budget, point.bound) == ("none", None, None, None)


@pytest.mark.parametrize("name", SCORE_NAMES)
def test_every_score_gates(run: Path, name: str) -> None:
    request = DeriveRequest(policies=("hlm", "u-hlm", "ui-hlm"), score=name, risks=RISKS)
    found = derive_run(run, request, name)
    assert read_record(run, DerivationRecord, name) == found
    learned = read_record(run, CalibrationRecord).learned
    score = score_named(name, None if learned is None else learned.model_dump())
    step, rejection = read_trace(shard_paths(run)).step(), None
    for risk in RISKS:
        point = points_of(found, "u-hlm")[f"risk-{risk:g}"]
        assert (point.score, point.feasible) == (name, True)
        # The largest threshold within the budget: the prediction keeps it, and nearly uses it up.
        rejection = value(point, "rejection_risk")
        assert 0.7 * risk < rejection <= risk + 1e-6
        policy = point_policy(found, point, learned)
        assert policy.settings() == point.settings
        assert policy.score == score
        drawn = score.skips(step, point.uncertainty_threshold.value).mean()
        assert value(point, "skip_rate") == pytest.approx(drawn, abs=0.15)  # 138 drafts: 3 errors
    assert found.thresholds.score == name
    curve = found.thresholds.skip_rate
    assert len(curve.grid) == 161
    assert list(curve.value) == sorted(curve.value)


def test_somebodys_own_policy_is_a_file(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_POLICY)
    source = f"{file}:Sparing"
    request = DeriveRequest(policies=("u-hlm", source), risks=RISKS, accounting="paper")
    found = derive_run(run, request, "mine")
    info = found.policies[1]
    assert (info.name, info.source, info.marker, info.gated) == ("sparing", source, "*", True)
    point, more = (points_of(found, "sparing")[f"risk-0.05{label}"] for label in ("", "@more"))
    assert more.settings == {"num_sent": 7}
    sent = 1 - value(point, "skip_rate")
    assert value(point, "uplink_bits_per_token") == pytest.approx(16 * 3 * sent, rel=1e-6)
    assert value(more, "uplink_bits_per_token") == pytest.approx(16 * 7 * sent, rel=1e-6)
    policy = point_policy(found, point, None)
    assert type(policy) is policy_class(source)
    assert policy.settings() == point.settings
    assert [path.policy for path in found.paths] == ["u-hlm", "sparing"]
    assert {one.policy for one in found.sweep.series} == {"u-hlm", "sparing"}


@pytest.fixture
def edited(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same calibration with some columns of its trace changed."""

    def edit(**columns: Callable[[np.ndarray], np.ndarray | None]) -> Path:
        trace = read_trace(shard_paths(run))
        found = {name: values for name, values in trace.columns.items() if name != "prompt_index"}
        for name, change in columns.items():
            changed = change(found.pop(name))
            if changed is not None:
                found[name] = changed
        found["row"] = trace.prompt_index
        folder = tmp_path / "edited"
        write_shard(
            folder / "traces" / "shard-00000.parquet", found, trace.prompt_ids, {}, trace.axes
        )
        for kind in (RunRecord, CalibrationRecord):
            write_record(folder, read_record(run, kind))
        return folder

    return edit


def test_a_size_that_no_tolerance_meets_is_said(edited: Callable[..., Path]) -> None:
    folder = edited(tail_deviation=lambda values: values + 1.0)
    request = DeriveRequest(policies=("cu-hlm-offline",), risks=RISKS)
    point = points_of(derive_run(folder, request), "cu-hlm-offline")["risk-0.05"]
    assert point.feasible
    assert point.settings["num_entries"] == VOCAB
    assert point.reason == f"no stored size meets theta = 0.1: k = {VOCAB}, the largest"


def test_without_attention_what_needs_it_is_infeasible(edited: Callable[..., Path]) -> None:
    folder = edited(topk_attention=lambda values: None)
    found = derive_run(folder, DeriveRequest(policies=("u-hlm", "ui-hlm"), risks=RISKS))
    (point,) = points_of(found, "ui-hlm").values()
    assert (point.feasible, point.rule) == (False, "none")
    assert point.reason.endswith("calibrate again with --trace full")
    assert (found.importance_plane, found.importance_example) == (None, None)


def test_the_axes_of_the_file_say_what_its_columns_mean(edited: Callable[..., Path]) -> None:
    """k of the fixed size comes from the trace's own sizes, whatever the code records today."""
    folder = edited()
    sizes = tuple(2 * size for size in AXES.truncation_sizes)
    trace = read_trace(shard_paths(folder))
    columns = {name: v for name, v in trace.columns.items() if name != "prompt_index"}
    columns["row"] = trace.prompt_index
    axes = dataclasses.replace(AXES, vocab_size=2 * VOCAB, truncation_sizes=sizes)
    columns["tail_deviation"] = columns["tail_deviation"][:, : len(axes.truncation_sizes)]
    request = DeriveRequest(policies=("cu-hlm-offline",), risks=RISKS)
    before = points_of(derive_run(folder, request), "cu-hlm-offline")["risk-0.05"]
    write_shard(folder / "traces" / "shard-00000.parquet", columns, trace.prompt_ids, {}, axes)
    after = points_of(derive_run(folder, request), "cu-hlm-offline")["risk-0.05"]
    assert after.settings["num_entries"] == 2 * before.settings["num_entries"]
