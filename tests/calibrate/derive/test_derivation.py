"""Derivations are kept under names, and what was validated is not destroyed unasked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from synthetic_run import add_pilot, add_validation, make_calibration, make_run

from calibrate.derive.derivation import derive_run, parse_importance, replaced_note
from calibrate.derive.plan import plan_run
from calibrate.derive.predict import point_policy
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import (
    read_record,
    record_names,
    record_path,
    write_record,
    write_text,
)
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    DeriveRequest,
    OperatingPoint,
    RunRecord,
    ValidationRecord,
)

REQUEST = DeriveRequest(policies=("hlm", "u-hlm"), risks=(0.02,))
OTHER = REQUEST.model_copy(update={"link": "lte"})


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    make_calibration(folder)
    return folder


@pytest.fixture
def run(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "run"))


def points_of(record: DerivationRecord, policy: str) -> dict[str, OperatingPoint]:
    return {point.rule: point for point in record.operating_points if point.policy == policy}


def test_derivations_are_kept_by_name_and_read_back_as_they_were(run: Path) -> None:
    command = ("hlm", "derive", "RUN")
    plain, lte = derive_run(run, REQUEST, command=command), derive_run(run, OTHER, "lte")
    assert record_names(run, DerivationRecord) == ["default", "lte"]
    assert plain.provenance.command == command
    for record in (plain, lte):
        assert read_record(run, DerivationRecord, record.name) == record
    assert lte.link["name"] == "lte"
    slower = points_of(lte, "hlm")["none"].predicted["token_time_ms"].value
    assert slower > points_of(plain, "hlm")["none"].predicted["token_time_ms"].value


def test_every_field_goes_both_ways(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    before = read_record(tmp_path / "run", DerivationRecord)
    pilot = add_pilot(tmp_path / "run")
    record = derive_run(tmp_path / "run", before.request)
    assert record.pilot == pilot
    # The server's road is its own; a gated policy's is where the pilot led.
    for name, moved in (("hlm", False), ("u-hlm", True)):
        one, other = (points_of(each, name) for each in (before, record))
        changed = [one[rule].predicted != other[rule].predicted for rule in one]
        assert any(changed) == moved
    # Nothing that a full trace can give is missing, so that the comparison is of everything.
    for name in DerivationRecord.model_fields:
        assert getattr(record, name) not in (None, (), {}), name
    assert record == DerivationRecord.model_validate(record.model_dump(mode="json"))
    assert record == derive_run(tmp_path / "run", record.request).model_copy(
        update={"provenance": record.provenance}
    )


def test_a_pilot_that_lost_a_shard_moves_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    request = read_record(tmp_path / "run", DerivationRecord).request
    add_pilot(tmp_path / "run")
    info = read_record(tmp_path / "run", RunRecord)
    assert info.pilot is not None
    more = info.pilot.model_copy(update={"num_tokens": info.pilot.num_tokens + 7})
    write_record(tmp_path / "run", info.model_copy(update={"pilot": more}))
    with pytest.raises(UserError, match=r"pilot holds \d+ tokens, run.json is of \d+: a shard was"):
        derive_run(tmp_path / "run", request)


def test_what_nobody_validated_is_replaced_with_a_note(run: Path) -> None:
    assert replaced_note(run, REQUEST, "default") == ""
    derive_run(run, REQUEST)
    assert "operating_points.json is replaced" in replaced_note(run, OTHER, "default")
    assert derive_run(run, OTHER).request.link == "lte"


def test_what_was_validated_stays_unless_it_is_replaced(run: Path) -> None:
    judged = derive_run(run, REQUEST, "mine")
    validation = add_validation(run, "mine")
    assert validation.derivation == "mine"
    reruns = sorted((run / "reruns").iterdir())
    # The same request again gives it back as it was, provenance and all.
    again = REQUEST.model_copy(update={"risks": (0.02, 0.02), "policies": ("hlm", "u-hlm", "hlm")})
    assert derive_run(run, again, "mine", command=("hlm",)) == judged
    # Another one may go elsewhere, but not there.
    derive_run(run, OTHER)
    with pytest.raises(UsageError, match=r"--name mine: .*another request.*--replace") as caught:
        derive_run(run, OTHER, "mine")
    assert "\n" not in str(caught.value)
    assert read_record(run, DerivationRecord, "mine") == judged
    assert read_record(run, ValidationRecord, "mine") == validation
    # Asked for, the validation goes with what it judged; reruns are kept by their own settings.
    assert "validation.mine.json removed" in replaced_note(run, OTHER, "mine", replace=True)
    assert derive_run(run, OTHER, "mine", replace=True).request == OTHER
    assert record_names(run, ValidationRecord) == []
    assert sorted((run / "reruns").iterdir()) == reruns


def test_the_same_words_for_another_link_are_another_request(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    text = '{"model": "awgn", "bandwidth_hz": 1e6, "snr_db": SNR, "round_trip_ms": 5.0}'
    link.write_text(text.replace("SNR", "10"))
    request = REQUEST.model_copy(update={"link": str(link)})
    derive_run(run, request)
    add_validation(run)
    assert derive_run(run, request).link["snr_db"] == 10
    link.write_text(text.replace("SNR", "20"))
    with pytest.raises(UsageError, match=r"would hold other numbers, and validation\.json rests"):
        derive_run(run, request)
    assert derive_run(run, request, "faster").link["snr_db"] == 20
    record_path(run, DerivationRecord).unlink()
    with pytest.raises(UsageError, match=r"is gone, and validation\.json rests on it"):
        derive_run(run, request)
    assert derive_run(run, request, replace=True).link["snr_db"] == 20
    assert record_names(run, ValidationRecord) == []


def test_what_was_validated_and_cannot_be_read_stays_unless_it_is_replaced(run: Path) -> None:
    derive_run(run, REQUEST)
    add_validation(run)
    write_text(record_path(run, DerivationRecord), "{")
    for refused in (replaced_note, derive_run):
        with pytest.raises(UsageError, match=r"broken or of another version.*--replace to remove"):
            refused(run, REQUEST, "default")
    assert derive_run(run, REQUEST, replace=True) == read_record(run, DerivationRecord)
    assert record_names(run, ValidationRecord) == []


def test_a_broken_derivation_is_replaced_if_nothing_rests_on_it(run: Path) -> None:
    write_text(record_path(run, DerivationRecord), "{")
    assert derive_run(run, REQUEST) == read_record(run, DerivationRecord)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policies": ("u-hlm", "gpt")}, "--policy gpt: unknown; known are"),
        ({"policies": ("nowhere.py:Mine",)}, "--policy nowhere.py:Mine: no such file"),
        ({"policies": ("ui-hlm",), "importances": ("topk:3:1",)}, "--policy ui-hlm: k = 3: allow"),
        ({"policies": ("ui-hlm",), "importances": ("mean:1:1",)}, "variant = 'mean': allowed"),
        ({"importances": ("topk:1",)}, "--importance topk:1: k and gamma are two numbers"),
        (
            {"certify": "answers", "answer_caps": ("auto",)},
            "^--answer-cap auto: a cap does not bound the loss of --certify answers",
        ),
        ({"score": "doubt"}, "--score doubt: .*known are uncertainty,"),
        ({"link": "pigeon"}, "--link pigeon: no such file or preset"),
        ({"profile": "abacus"}, "--profile abacus: no such file or preset"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    run: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        derive_run(run, REQUEST.model_copy(update=change))
    assert "\n" not in str(caught.value)
    assert record_names(run, DerivationRecord) == []


def test_importances_are_read() -> None:
    assert parse_importance("context:0:0.9") == {"variant": "context", "k": 0.0, "gamma": 0.9}


def test_capped_gates_are_points_of_their_own(run: Path) -> None:
    """Stored as settings, certified alone, and rebuilt as the policy that the engine runs."""
    request = DeriveRequest(
        policies=("hlm", "u-hlm", "cu-hlm-offline"), risks=(0.05, 0.3), certify="tokens",
        answer_caps=("0.6", "0.8"), confidence=0.6,
    )  # fmt: skip
    record = derive_run(run, request, "capped")
    points = points_of(record, "u-hlm")
    capped = {rule: point for rule, point in points.items() if "@cap" in rule}
    assert set(capped) == {
        f"ltt-{risk}@cap-{cap}" for risk in ("0.05", "0.3") for cap in ("0.6", "0.8")
    }
    for rule, point in capped.items():
        assert point.settings == {"cap": float(rule[-3:])}
        assert point.variant == f"cap-{rule[-3:]}"
        assert (point.weighting, point.family) == ("tokens", "ltt")
        assert point.confidence == pytest.approx(0.8), "two caps share what 60 % leave"
        if point.feasible:
            policy = point_policy(record, point, None)
            assert policy.cap == float(rule[-3:])
            assert point.predicted["skip_rate"].value <= policy.cap + 0.05
    assert any(point.feasible for point in capped.values())
    assert points["ltt-0.3"].confidence == pytest.approx(0.6)
    assert points["ltt-0.3"].settings == {}
    assert points_of(record, "cu-hlm-offline")["ltt-0.3@cap-0.6"].settings["cap"] == 0.6
    assert {one.cap for one in record.certificates} == {None, 0.6, 0.8}
    assert {one.certified for one in record.certificates} == {"tokens"}
    assert read_record(run, DerivationRecord, "capped") == record


def test_answers_are_certified_where_their_law_is_known(run: Path) -> None:
    """Policies share the thresholds of a gate, but not a certificate that is not theirs."""
    request = DeriveRequest(
        policies=("hlm", "u-hlm", "ask-llm"), risks=(0.9,), certify="answers", confidence=0.5
    )
    record = derive_run(run, request, "answers")
    own, other = (points_of(record, name) for name in ("u-hlm", "ask-llm"))
    assert own["ltt-0.9"].feasible
    assert own["ltt-0.9"].weighting == "answers"
    assert not other["ltt-0.9"].feasible
    assert "accept/resample" in other["ltt-0.9"].reason
    assert own["risk-0.9"].uncertainty_threshold == other["risk-0.9"].uncertainty_threshold


def test_a_plan_about_tokens_has_the_goal_of_its_risk_whatever_the_limit(run: Path) -> None:
    """Half the budget is spent at one threshold; only what it takes to certify it grows."""
    near, over = plan_run(run, (0.2,), certified="tokens"), plan_run(run, (0.2,))
    info = read_record(run, RunRecord)
    for kind in (RunRecord, CalibrationRecord):
        record = read_record(run, kind)
        settings = record.settings.model_copy(update={"max_new_tokens": 64})
        write_record(run, record.model_copy(update={"settings": settings}))
    far = plan_run(run, (0.2,), certified="tokens")
    grown = 64 / info.settings.max_new_tokens
    assert far.rows[0].goal_skip_rate == near.rows[0].goal_skip_rate > 0
    assert far.rows[0].goal_skip_rate == pytest.approx(over.rows[0].goal_skip_rate, abs=0.2)
    for one, other, plain in zip(near.rows, far.rows, over.rows, strict=True):
        if one.rule in ("betting", "conformal"):
            assert other.without_loss == pytest.approx(grown * one.without_loss, rel=0.35, abs=3)
            assert one.without_loss >= plain.without_loss
        if None not in (one.num_prompts, other.num_prompts):
            assert other.num_prompts >= one.num_prompts


def test_a_plan_is_of_the_runs_own_prompts_and_clock(run: Path) -> None:
    info = read_record(run, RunRecord)
    found = plan_run(run, (0.05, 0.2))
    assert found.ms_per_prompt == pytest.approx(1e3 * info.wall_s / info.num_prompts)
    rows = {(row.rule, row.budget): row for row in found.rows}
    for (rule, budget), row in rows.items():
        if row.num_prompts is not None:
            assert row.wall_s == pytest.approx(row.num_prompts * found.ms_per_prompt / 1e3)
            if row.guaranteed and row.cap is None and "@" not in rule:
                # In most draws, so not below what no loss at all would take, but for the steps.
                assert row.num_prompts >= row.without_loss
        assert 0 < row.goal_skip_rate < 1
        larger = rows[rule, 0.2].num_prompts
        assert budget == 0.2 or larger is None or (row.num_prompts or 1e9) >= larger
    assert not rows["t", 0.05].guaranteed
    assert not rows["conformal", 0.05].guaranteed
    wide, narrow = (
        {one.budget: one.num_prompts for one in plan.intervals if one.metric == "skip_rate"}
        for plan in (found, plan_run(run, (0.05, 0.2), width=0.025))
    )
    for budget, num in wide.items():
        assert 4 * num - 16 <= narrow[budget] <= 4 * num  # t falls with n, so less than four times
    about_answers = plan_run(run, (0.5,), certified="answers").rows
    assert {row.rule for row in about_answers} == {rule for rule, _ in rows if "@" not in rule}
    with pytest.raises(UsageError, match="score max_logit has no bounds"):
        plan_run(run, (0.05,), score_name="max_logit")
