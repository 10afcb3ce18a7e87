"""README and docs/findings.md say what the shipped results say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import paper_records
import pytest

from calibrate.run.figure import NO_VALUE, number_text, scaled
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, Figure, RunRecord
from calibrate.run.resources import data_path
from paper_figs.loaded import LoadedRun
from paper_figs.report.findings import REAL, ROOT, costs, findings, pages, summary


@pytest.fixture(scope="module")
def loaded() -> LoadedRun:
    return paper_records.full_run()


def test_numbers_on_the_pages_are_those_of_the_results() -> None:
    made = pages(data_path("results"))
    assert [path.name for path in made] == ["README.md", "findings.md", "choosing.md"]
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_figures_of_the_findings_are_there() -> None:
    shown = re.findall(r"]\((figures/[^)]+)\)", (ROOT / "docs" / "findings.md").read_text())
    assert shown
    for path in shown:
        assert (ROOT / "docs" / path).is_file()


def test_the_guide_has_each_policy_once(loaded: LoadedRun) -> None:
    lines = costs(loaded).splitlines()[2:]
    names = [line.split("`")[1] for line in lines]
    expected = {p.policy for p in loaded.feasible if p.rule in ("none", "risk-0.01")}
    assert sorted(names) == sorted(expected)


def table(loaded: LoadedRun) -> dict[str, str]:
    """README's table: result by what was measured."""
    lines = summary(loaded).splitlines()[2:]
    return dict(line.strip("| ").split(" | ") for line in lines)  # type: ignore[misc]


def test_readme_has_five_rows_with_a_number_each(loaded: LoadedRun) -> None:
    for run in (loaded, replace(loaded, validation=None)):
        rows = table(run)
        assert len(rows) == 5
        assert all(re.search(r"\d", result) for result in rows.values())


def test_readme_says_what_reruns_said_once_there_are_some(loaded: LoadedRun) -> None:
    assert loaded.validation is not None
    covered = loaded.validation.coverage
    assert list(table(loaded).values())[-1] == f"{covered.covered} of {covered.total}"
    assert "correlation" in list(table(replace(loaded, validation=None)))[-1]


def test_a_changed_result_is_a_changed_finding(loaded: LoadedRun) -> None:
    """Negative control: the comparison with README can fail."""
    fit = loaded.calibration.fit.model_copy(update={"slope": Figure(value=1.1)})
    moved = replace(loaded, calibration=loaded.calibration.model_copy(update={"fit": fit}))
    assert findings([moved], moved) != findings([loaded], loaded)
    skipped = loaded.calibration.estimators[0].model_copy(
        update={"skip_rate_at_risk": {"0.01": Figure(value=0.5)}}
    )
    others = loaded.calibration.estimators[1:]
    better = loaded.calibration.model_copy(update={"estimators": (skipped, *others)})
    moved = replace(loaded, calibration=better)
    assert summary(moved) != summary(loaded)


def test_figures_of_reruns_are_shown_where_the_drawn_run_has_some(loaded: LoadedRun) -> None:
    """Another run's reruns alone fill the tables."""
    bare = replace(loaded, validation=None)
    both, other = findings([loaded], loaded), findings([loaded], bare)
    for name in ("validation.png", "context_shift.png"):
        assert name in both
        assert name not in other
    assert both.count("| run |") == other.count("| run |") == 2


def payload_rows(loaded: LoadedRun) -> dict[str, list[str]]:
    """Rows of the third finding, by policy and in their order."""
    part = findings([loaded], loaded).split("## 3. ")[1].split("## 4. ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return {line[0].strip("`"): line[1:] for line in lines}


def test_payload_and_bias_of_every_gated_policy_by_what_it_sends(loaded: LoadedRun) -> None:
    """As predicted, also where reruns are there: one row is never half of each."""
    rows = payload_rows(loaded)
    assert sorted(rows) == ["coupled", "cu-hlm-online", "r-hlm", "u-hlm", "ui-hlm"]
    assert payload_rows(replace(loaded, validation=None)) == rows
    first = {name: float(row[0].split()[0].replace(",", "")) for name, row in rows.items()}
    assert list(rows) == sorted(rows, key=first.__getitem__)
    points = {point.key: point.predicted for point in loaded.feasible}
    bias = points["coupled/risk-0.01"]["tv_bias"]
    assert rows["coupled"][3].replace("\N{NO-BREAK SPACE}", " ") == (
        f"{number_text(scaled(bias, 100))} %".replace("\N{NO-BREAK SPACE}", " ")
    )
    assert " least\n" in findings([loaded], loaded)


def test_the_shift_and_what_missed_stand_beside_one_another(loaded: LoadedRun) -> None:
    assert loaded.validation is not None
    text = findings([loaded], loaded)
    points = number_text(Figure(value=2, low=1, high=3), 2)
    assert f"| RUN | `cu-hlm-online` 24 | {points} | 0.01 | {points} | +3.0 |" in text
    good = tuple(cell.model_copy(update={"covered": True}) for cell in loaded.cells)
    changes = {"cells": good, "pooled_shift": None}
    fine = replace(loaded, validation=loaded.validation.model_copy(update=changes))
    assert "| RUN | none" + f" | {NO_VALUE}" * 4 + " |" in findings([fine], fine)


def test_findings_of_runs_that_lack_parts(loaded: LoadedRun) -> None:
    bare = replace(loaded, validation=None, guarantees=None)
    text = findings([bare], bare)
    assert "None of the shipped runs was rerun yet" in text
    assert "## 4. " not in text


def test_the_clock_says_which_policy_is_fastest_and_what_missed(loaded: LoadedRun) -> None:
    assert loaded.wire is not None
    links = loaded.wire.links
    fastest = min(
        (run for run in links[0].runs if run.rule != "none"),
        key=lambda run: run.token_time.measured.value or 0.0,
    )
    row = next(text for what, text in table(loaded).items() if "by the clock" in what)
    assert row.startswith(f"`{fastest.policy}` {number_text(fastest.token_time.measured)} ms; ")
    part = findings([loaded], loaded).split("## 5. ")[1]
    assert part.count("| `") == len(links[0].runs)
    assert "10 Mbit/s, 40 ms" in part
    assert "miss" not in part
    cell = links[1].runs[0].token_time
    slow = cell.model_copy(update={"measured": Figure(value=4 * cell.predicted.value),
                                   "covered": False})  # fmt: skip
    runs = (links[1].runs[0].model_copy(update={"cells": (slow,)}), *links[1].runs[1:])
    changed = (links[0], links[1].model_copy(update={"runs": runs}))
    moved = replace(loaded, wire=loaded.wire.model_copy(update={"links": changed}))
    text = findings([moved], moved).replace("\N{NO-BREAK SPACE}", " ")
    name = runs[0].policy
    assert f"`{name}` over 1 Mbit/s, 40 ms by \N{MINUS SIGN}75.0 %" in text
    assert "## 5. " not in findings([replace(loaded, wire=None)], loaded)


def test_calibration_is_what_the_shipped_trace_gives() -> None:
    """Point values and bootstrap intervals alike; numpy's sums may differ in the last digits."""
    from calibrate.fit.calibration import summarise
    from calibrate.run.traces import read_trace, shard_paths

    run = data_path("results") / REAL
    made = summarise(read_trace(shard_paths(run)), read_record(run, RunRecord))
    shipped = read_record(run, CalibrationRecord)
    for found, kept in zip(numbers(made.model_dump()), numbers(shipped.model_dump()), strict=True):
        assert found == pytest.approx(kept, rel=1e-9, abs=1e-12)


def numbers(content: Any) -> Iterator[float]:
    """Every number of a record, in order."""
    if isinstance(content, dict | tuple | list):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from numbers(inner)
    elif isinstance(content, int | float):
        yield content
