"""docs/formats.md says what the code says."""

from __future__ import annotations

from calibrate.run import records
from calibrate.run.formats import PATH, formats_text
from hlmtheory import steps


def test_the_document_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == formats_text(), (
        "docs/formats.md is stale: run `python -m calibrate.run.formats`"
    )


def test_every_field_and_column_stands_in_it() -> None:
    lines = PATH.read_text(encoding="utf-8").splitlines()
    keys = {line.split("`")[1] for line in lines if line.startswith("| `")}
    kinds = [
        kind
        for kind in vars(records).values()
        if isinstance(kind, type) and issubclass(kind, records.Record)
    ]
    assert len(kinds) > len(records.STAGES)
    for kind in kinds:
        assert set(kind.model_fields) <= keys, kind
    assert {name for name, column in steps.COLUMNS.items() if column.text} <= keys
    assert {"prompt_id", "category"} <= keys
    heading = next(line for line in lines if ".parquet" in line)
    for folder in ("traces/", "pilot/", "reruns/POLICY-HASH/"):
        assert f"{folder}*.parquet" in heading
    for stage in records.STAGES:
        assert f"## {stage.file_name}" in lines
    fit = lines[lines.index("### LineFit") :]
    meaning = "P(y_d < x_d), the share of drafts that can be rejected at all."
    assert f"| `delta` | `Figure` | {meaning} |" in fit
