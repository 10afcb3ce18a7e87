"""A run folder: records go both ways, and what is not one is told in one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from calibrate.run.checksums import KEY, checksum
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import (
    check_writable,
    open_run,
    provenance,
    read_record,
    record_names,
    record_path,
    write_record,
    write_text,
)
from calibrate.run.records import (
    Figure,
    GivenModels,
    GuaranteeRow,
    GuaranteesRecord,
    QualityRecord,
    RunRecord,
    RunSettings,
    Timings,
)


def guarantees(**changes: object) -> GuaranteesRecord:
    share = Figure(value=0.1, low=0.05, high=1 / 3)
    row = GuaranteeRow(
        rule="risk", family="risk", test=None, cap=None, budget=0.01, source="halves",
        weighting="tokens", num_draws=3, num_calibration_prompts=4,
        violation_share=share, infeasible_share=share, skip_rate=share, risk=Figure(value=None),
    )  # fmt: skip
    return GuaranteesRecord(
        score="uncertainty", num_draws=3, num_prompts=4, num_tokens=5, confidence=0.95, seed=0,
        provenance=provenance(["hlm", "guarantees"]), certificates=(), rows=(row, row),
    ).model_copy(update=changes)  # fmt: skip


def test_records_go_both_ways(tmp_path: Path) -> None:
    record = guarantees()
    path = write_record(tmp_path, record)
    assert path == tmp_path / "guarantees.json"
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    assert read_record(tmp_path, GuaranteesRecord) == record


def test_names_are_part_of_the_file(tmp_path: Path) -> None:
    assert record_names(tmp_path, GuaranteesRecord) == []
    for name in ("lte", "default", "b-2.x"):
        write_record(tmp_path, guarantees(seed=len(name)), name)
    write_text(tmp_path / "guarantees.csv", "")
    assert record_names(tmp_path, GuaranteesRecord) == ["default", "b-2.x", "lte"]
    assert record_path(tmp_path, GuaranteesRecord, "lte").name == "guarantees.lte.json"
    assert read_record(tmp_path, GuaranteesRecord, "lte").seed == 3
    for name in ("", "../up", "a b"):
        with pytest.raises(UsageError, match="allowed are letters"):
            record_path(tmp_path, GuaranteesRecord, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"guarantees.json is not valid JSON; run `hlm guarantees` again"),
        ("[]", r"schema version None, this is 2; run `hlm guarantees` again"),
        ('{"schema_version": 1}', r"schema version 1, this is 2"),
        ('{"schema_version": 2}', r"not as `hlm guarantees` wrote it: its checksum does not match"),
        ("[" * 100_000, r"not valid JSON"),
    ],
)
def test_broken_files_name_themselves_and_the_command(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "guarantees.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_record(tmp_path, GuaranteesRecord)
    assert "\n" not in str(caught.value)


def test_unknown_keys_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = write_record(tmp_path, guarantees())
    content = json.loads(path.read_text())
    content["rows"][1]["colour"] = "red"
    content[KEY] = checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"\(rows\.1\.colour: Extra inputs are not permitted\)"):
        read_record(tmp_path, GuaranteesRecord)
    with pytest.raises(UserError, match=r"quality\.lte\.json is missing; run `hlm quality --name"):
        read_record(tmp_path, QualityRecord, "lte")
    with pytest.raises(UsageError, match="no such folder"):
        read_record(tmp_path / "none", GuaranteesRecord)


def test_an_edited_number_is_told_and_new_indentation_is_not(tmp_path: Path) -> None:
    path = write_record(tmp_path, guarantees())
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=4))
    assert read_record(tmp_path, GuaranteesRecord) == guarantees()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"guarantees\.json .* edited or damaged; restore it"):
        read_record(tmp_path, GuaranteesRecord)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_record(tmp_path, guarantees())
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, guarantees(confidence=float("nan")))
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["guarantees.json"]


def run_record(complete: bool, **changes: object) -> RunRecord:
    settings = RunSettings(
        pair="smollm2", given=GivenModels(), prompts="shipped", order="random", limit=4,
        max_new_tokens=8, batch_size=2, temperature=1.0, seed=0, dtype="bfloat16", device="cpu",
        trace="full",
    ).model_copy(update=changes)  # fmt: skip
    time = Figure(value=1.0, unit="ms")
    return RunRecord.model_construct(
        complete=complete, pair=None, settings=settings, prompt_ids=(), prompt_keys=(),
        provenance=provenance([]), num_prompts=0, num_tokens=0, wall_s=0.0, forward_s=0.0,
        timings=Timings(t_slm_ms=time, t_llm_ms=time, t_uncertainty_ms=time),
    )  # fmt: skip


def test_a_run_is_resumed_with_its_own_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    record = run_record(complete=False)
    assert open_run(run, record.settings, resume=False) == "new"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"run\.json: schema version None.*name another folder"):
        open_run(run, record.settings, resume=True)
    monkeypatch.setattr("calibrate.run.folder.read_record", lambda *_: record)
    with pytest.raises(UsageError, match="add --resume"):
        open_run(run, record.settings, resume=False)
    smaller = record.settings.model_copy(update={"batch_size": 7})
    assert open_run(run, smaller, resume=True) == "interrupted"
    with pytest.raises(UsageError, match=r"--resume: seed was 0 in .*, now 1"):
        open_run(run, record.settings.model_copy(update={"seed": 1}), resume=True)
    monkeypatch.setattr("calibrate.run.folder.read_record", lambda *_: run_record(complete=True))
    assert open_run(run, record.settings, resume=True) == "finished"
    with pytest.raises(UsageError, match="holds a finished run; go on with `hlm derive"):
        open_run(run, record.settings, resume=False)


def test_what_the_system_refuses_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"write .*a\.txt: No space left on device; make room"):
        write_text(tmp_path / "a.txt", "a")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for work in (
        lambda folder: write_text(folder / "b.txt", "b"),
        lambda folder: check_writable(folder),
    ):
        with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
            work(tmp_path / "file" / "run")
