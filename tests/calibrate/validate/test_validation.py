"""Validations of a toy pair: reruns add up, are decoded once, and nothing is lost unasked."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_pair

from calibrate.derive.derivation import derive_run
from calibrate.fit.calibration import calibrate, prepare
from calibrate.pairs.models import Models
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import read_record, write_record
from calibrate.run.prompts import prompt_sizes
from calibrate.run.records import DerivationRecord, DeriveRequest, ValidationRecord
from calibrate.run.stopping import Interrupted, StoppedError, listen
from calibrate.run.traces import Shard, shards_in
from calibrate.run.watch import Watch
from calibrate.validate import validation
from calibrate.validate.rerun import rerun_identity, rerun_path
from calibrate.validate.validation import (
    ValidationPlan,
    compare_reruns,
    decode_missing,
    prepare_validation,
)
from calibrate.work import worker
from calibrate.work.crew import Staff, Told
from hlmtheory import api
from hlmtheory.sampled_law import PLAIN

pytestmark = pytest.mark.filterwarnings("default")
RULE = "risk-0.05"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the pair, its prompts and a derived run."""
    path = tmp_path_factory.mktemp("toy")
    toy_pair.make_pair(path)
    toy_pair.write_prompts(path / "prompts.txt")
    request = toy_pair.request(path, path / "run")
    calibrate(request, prepare(request), toy_pair.load(path))
    derive_run(path / "run", DeriveRequest(policies=("hlm", "u-hlm", "r-hlm"), risks=(0.05,)))
    return path


@pytest.fixture(scope="module")
def pair(made: Path):
    return toy_pair.load(made)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def plan(run: Path, *policies: str, **options) -> ValidationPlan:
    options = {"rules": (RULE,), "limit": 6} | options
    return prepare_validation(run, policies=policies, **options)


def validate(planned: ValidationPlan, pair) -> ValidationRecord:
    decode_missing(planned, pair)
    return compared(planned, pair)


def compared(planned: ValidationPlan, pair) -> ValidationRecord:
    return compare_reruns(planned, prompt_sizes(planned.prompts, pair.tokenizer))


def rows(record: ValidationRecord) -> list[tuple[str, str]]:
    return [(one.policy, one.rule) for one in record.reruns]


def test_another_policy_adds_to_what_was_validated(run, pair, monkeypatch) -> None:
    """The second decodes only its own, and the first one's figures stay."""
    first = validate(plan(run, "hlm"), pair)
    assert rows(first) == [("hlm", "none")]
    kept = {path: path.read_bytes() for path in (run / "reruns").rglob("*.parquet")}
    decoded = []
    honest = validation.decode_reruns

    def counted(crew, prompts, reruns, *arguments):
        decoded.extend(rerun.policy.name for rerun in reruns.values())
        return honest(crew, prompts, reruns, *arguments)

    monkeypatch.setattr(validation, "decode_reruns", counted)
    planned = plan(run, "u-hlm")
    assert planned.num_kept == 1
    second = validate(planned, pair)
    assert decoded == ["u-hlm"]
    assert rows(second) == [("hlm", "none"), ("u-hlm", RULE)]
    assert set(first.cells) <= set(second.cells)
    assert read_record(run, ValidationRecord) == second
    assert kept
    for path, content in kept.items():
        assert path.read_bytes() == content
    # Both again: nothing is left to decode, and the result is the same.
    third = plan(run, "hlm", "u-hlm")
    assert (third.missing, third.num_kept) == ({}, 2)
    assert compared(third, pair).cells == second.cells


def test_fresh_prompts_are_billed_at_their_own_length(run, pair) -> None:
    planned = plan(run, "hlm", rules=None)
    decode_missing(planned, pair)
    sizes = prompt_sizes(planned.prompts, pair.tokenizer)

    def uplink(sizes: dict[str, int]) -> tuple[float, int]:
        record = compare_reruns(planned, sizes)
        (found,) = (one for one in record.cells if one.metric == "uplink_bits_per_token")
        return found.measured.value, record.num_tokens

    index = np.ceil(np.log2(pair.vocab_size))
    (bits, num), (more, _) = uplink(sizes), uplink({name: n + 100 for name, n in sizes.items()})
    assert more - bits == pytest.approx(100 * index * len(sizes) / num)


def test_a_rerun_says_what_it_ran(run, pair) -> None:
    planned = plan(run, "u-hlm")
    record = validate(planned, pair)
    (path,) = planned.paths.values()
    assert record.reruns[0].folder == path.name
    header = Shard(shards_in(path)[0]).header
    (point,) = planned.points
    assert header["policy"] == "u-hlm"
    assert header["threshold"] == point.uncertainty_threshold.value
    assert (header["score"], header["seed"]) == ("uncertainty", 1)
    assert list(header["prompt_keys"]) == list(record.prompt_ids)
    assert header["axes"]["vocab_size"] == toy_pair.VOCAB_SIZE
    assert header["provenance"]["versions"]["torch"]
    assert planned.trace(point).prompt_ids == sorted(record.prompt_ids)
    (rerun,) = record.reruns
    assert rerun.entries_per_sent_token.value == toy_pair.VOCAB_SIZE
    sources = {cell.metric: cell.source for cell in record.cells}
    assert (sources["skip_rate"], sources["token_time_ms"]) == ("counted", "implied")


def test_another_seed_is_refused_and_replaces_only_when_asked(run, pair) -> None:
    first = validate(plan(run, "hlm"), pair)
    files = sorted(path.name for path in (run / "reruns").iterdir())
    with pytest.raises(UsageError, match=r"--seed 5: validation\.json is of seed 1; --replace"):
        plan(run, "hlm", seed=5)
    assert read_record(run, ValidationRecord) == first
    second = validate(plan(run, "hlm", seed=5, replace=True), pair)
    assert second.seed == 5
    now = sorted(path.name for path in (run / "reruns").iterdir())
    assert set(files) < set(now)
    # Back to the first seed: its rerun is there still.
    assert plan(run, "hlm", replace=True).missing == {}


def test_other_prompts_are_refused_with_both_numbers(run, pair) -> None:
    validate(plan(run, "hlm"), pair)
    with pytest.raises(UsageError, match="is of 6 prompts, these are 8") as caught:
        plan(run, "hlm", limit=8)
    assert "--replace" in str(caught.value)
    assert plan(run, "hlm", limit=8, replace=True).num_kept == 0


def test_a_rerun_of_other_settings_than_are_derived_now_is_not_held_against_them(run, pair) -> None:
    record = validate(plan(run, "u-hlm"), pair)
    (rerun,) = record.reruns
    other = rerun.model_copy(update={"folder": "u-hlm-0000000000"})
    write_record(run, record.model_copy(update={"reruns": (other,)}))
    with pytest.raises(UsageError, match=r"u-hlm/risk-0\.05 at u-hlm-0000000000") as caught:
        plan(run, "hlm")
    assert "--replace" in str(caught.value)


def test_validations_of_two_names_share_their_reruns(run, pair) -> None:
    validate(plan(run, "u-hlm"), pair)
    derive_run(run, DeriveRequest(policies=("u-hlm",), risks=(0.05,)), name="full-payload")
    other = plan(run, "u-hlm", name="full-payload")
    assert other.missing == {}
    record = compared(other, pair)
    assert record.derivation == "full-payload"
    assert (run / "validation.full-payload.json").is_file()
    assert (run / "validation.json").is_file()


def test_what_was_decoded_stays_when_it_is_interrupted(run, pair) -> None:
    """The finished batch is not decoded again, and the rest gives the tokens of a quiet run."""
    planned = plan(run, "hlm", "u-hlm", "r-hlm", batch_size=4)

    def at_batch(number: int, total: int) -> None:
        assert total == 2
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_missing(planned, pair, Told(job=at_batch))
    assert (planned.num_kept, len(planned.missing)) == (0, 3)
    kept = {path: path.read_bytes() for path in (run / "reruns").rglob("*.parquet")}
    assert len(kept) == 3
    assert not (run / "validation.json").exists()
    assert not list(run.rglob("*.part"))
    steps = []
    decode_missing(planned, pair, Told(lambda emitted, spared: steps.append((emitted, spared))))
    assert sum(map(sum, steps)) == 3 * 2 * planned.calibration.settings.max_new_tokens
    assert planned.missing == {}
    assert all(path.read_bytes() == content for path, content in kept.items())
    resumed = [planned.trace(point)["output_token"] for point in planned.points]
    shutil.rmtree(run / "reruns")
    decode_missing(planned, pair)
    for point, tokens in zip(planned.points, resumed, strict=True):
        assert np.array_equal(planned.trace(point)["output_token"], tokens)


def in_memory(pair) -> Models:
    """The pair as calls share it, loaded already."""
    models = Models()
    models._loaded, models._attention = pair, True
    return models


def test_the_interruption_is_told_in_one_line(run, pair, monkeypatch) -> None:
    def stop(*_) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(validation, "decode_missing", stop)
    said = r"finished batches stay in .*reruns; the same command"
    with pytest.raises(StoppedError, match=said) as caught:
        api._rerun(plan(run, "hlm"), in_memory(pair), "cpu", None, Staff(), Watch())
    assert caught.value.exit_code == 143


def test_sigterm_lets_the_batch_in_work_be_kept(run, pair, monkeypatch) -> None:
    """It comes while the first of two batches is decoded."""
    before = signal.getsignal(signal.SIGTERM)
    planned = plan(run, "hlm", batch_size=4)
    write, written = worker.write_shard, []

    def terminated(*arguments) -> None:
        signal.raise_signal(signal.SIGTERM)
        written.append(write(*arguments))

    monkeypatch.setattr(worker, "write_shard", terminated)
    listen()
    try:
        with pytest.raises(StoppedError) as caught:
            api._rerun(planned, in_memory(pair), "cpu", None, Staff(), Watch())
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert caught.value.exit_code == 143
    assert len(written) == len(list((run / "reruns").rglob("*.parquet"))) == 1


def test_points_that_decide_alike_share_a_rerun(run, pair) -> None:
    """Two rules with one threshold: decoded once, compared twice."""
    derivation = read_record(run, DerivationRecord)
    (point,) = plan(run, "u-hlm").points
    twin = point.model_copy(update={"rule": "twin"})
    points = (*derivation.operating_points, twin)
    write_record(run, derivation.model_copy(update={"operating_points": points}))
    planned = plan(run, "u-hlm", rules=(RULE, "twin"))
    assert len(planned.points) == 2
    assert len(planned.missing) == 1
    record = validate(planned, pair)
    assert len({one.folder for one in record.reruns}) == 1
    assert len(rows(record)) == 2


def test_a_rerun_is_kept_by_all_that_decides_its_tokens(run, tmp_path) -> None:
    planned = plan(run, "u-hlm")
    (point,) = planned.points
    base = planned.identity(point)

    def name_of(**changes) -> str:
        return rerun_path(run, base | changes).name

    assert name_of() == rerun_path(run, dict(reversed(base.items()))).name
    backwards = replace(planned, prompts=planned.prompts[::-1])
    assert rerun_path(run, backwards.identity(point)).name == name_of()
    others = {
        name_of(seed=9), name_of(threshold=0.123), name_of(sampling={"top_p": 0.5}),
        name_of(score="x"),
        name_of(max_new_tokens=3), name_of(prompt_keys={"a": "b"}), name_of(settings={"k": 1}),
        name_of(thetas=(0.0, 1.0)),
    }  # fmt: skip
    assert len(others | {name_of()}) == 9
    # Of an own policy the text counts, not the place.
    found = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text)
        source = f"{tmp_path / folder / 'mine.py'}:Mine"
        found.append(rerun_identity(point, source, planned.prompts, 1, 8, PLAIN, (0.0,))["source"])
    assert found[0] == found[1] != found[2]


def test_a_policy_is_chosen_by_name_and_nothing_matches_is_said(run) -> None:
    with pytest.raises(UsageError, match="--policy slm: not derived"):
        plan(run, "slm")
    with pytest.raises(UsageError, match="--point u-hlm/risk-9: not derived"):
        prepare_validation(run, points=("u-hlm/risk-9",))
    with pytest.raises(UsageError, match="no derived operating point matches"):
        prepare_validation(run, policies=("hlm",), points=(f"u-hlm/{RULE}",))
    with pytest.raises(UserError, match=r"operating_points\.lte\.json is missing.*--name lte"):
        prepare_validation(run, name="lte")


def test_a_rerun_keeps_the_payload_of_its_asked_tokens(judged_run: Path) -> None:
    """Of the compared points alone; share of asked tokens times their mean is what was measured."""
    derivation = read_record(judged_run, DerivationRecord)
    found = read_record(judged_run, ValidationRecord)
    compared = {(one.policy, one.rule) for one in derivation.payloads}
    measured = {
        (cell.policy, cell.rule): cell.measured.value
        for cell in found.cells
        if cell.metric == "uplink_bits_per_token"
    }
    kept = {(one.policy, one.rule): one for one in found.reruns if one.payload is not None}
    assert kept.keys() == compared
    for key, one in kept.items():
        share = one.payload.num_tokens / one.num_tokens
        assert share * one.payload.mean == pytest.approx(measured[key]), key
