"""Figures and tables of a run's optional files: what they show, and what they leave out."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from evidence import PLANE_GAMMAS, PLANE_KS, add_evidence, add_quality
from matplotlib.figure import Figure as Drawing
from synthetic_run import VOCAB, add_validation, make_run

from calibrate.derive.importance_plane import (
    PLANE_METRICS,
    derive_plane,
    gamma_grid,
    importance_plane,
    u_hlm_threshold,
)
from calibrate.derive.policy_tokens import metrics, predicted_tokens
from calibrate.derive.presets import published_audit, published_numbers
from calibrate.run.errors import UserError
from calibrate.run.folder import read_json
from hlmtheory.policies import ImportanceSettings
from hlmtheory.published import PublishedTable
from paper_figs.figures import (
    attenuation,
    guarantees,
)
from paper_figs.figures import (
    importance_plane as plane_figure,
)
from paper_figs.loaded import LoadedRun, load_run
from paper_figs.report import audit_table, tables
from paper_figs.report.report import write_report
from paper_figs.style import caption_of, styled

MODULES = (attenuation, guarantees, plane_figure)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence") / "run"
    make_run(folder)
    add_evidence(folder)
    add_validation(folder)
    add_quality(folder, ("u-hlm", "slm"))
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="module")
def drawings(loaded: LoadedRun) -> Iterator[dict[str, Drawing]]:
    with styled():
        yield {module.__name__: module.figure(loaded) for module in MODULES}


# What a run lacks


@pytest.mark.parametrize("module", MODULES)
def test_without_its_file_a_figure_is_left_out(module, loaded: LoadedRun) -> None:
    derived = {k: v for k, v in (loaded.derived or {}).items() if k != "importance_plane"}
    bare = replace(loaded, splits=None, attenuation=None, quality=None, derived=derived)
    with styled():
        assert module.figure(bare) is None


def test_a_broken_optional_file_is_one_clear_line(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "splits.json").write_text("{")
    with pytest.raises(UserError, match=r"splits\.json is not valid JSON"):
        load_run(copy)


# Guarantees


def test_guarantee_markers_are_the_stored_shares(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    axes = drawings[guarantees.__name__].axes
    assert loaded.splits is not None
    for column, source in enumerate(guarantees.SOURCES):
        for row_of_axes, key in enumerate(("violation_share", "skip_rate")):
            axis = axes[2 * row_of_axes + column]
            drawn = sorted(float(bars.lines[0].get_ydata()[0]) for bars in axis.containers)
            stored = sorted(r[key]["value"] for r in loaded.splits["rows"] if r["source"] == source)
            assert drawn == pytest.approx(stored)
    line = next(line for line in axes[0].lines if len(set(line.get_ydata())) == 1 and
                len(line.get_xdata()) == 2)  # fmt: skip
    assert line.get_ydata()[0] == pytest.approx(0.05)


def test_a_rule_that_is_never_feasible_is_hollow(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    assert loaded.splits is not None
    axis = drawings[guarantees.__name__].axes[0]
    hollow = sum(bars.lines[0].get_markerfacecolor() == "white" for bars in axis.containers)
    never = [
        row for row in loaded.splits["rows"]
        if row["source"] == "all-prompts" and row["infeasible_share"]["value"] == 1
    ]  # fmt: skip
    assert hollow == len(never) > 0, "twelve prompts cannot certify half a per cent"


# Attenuation


def test_attenuation_bars_are_the_stored_figures(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    rows = attenuation.attenuation_rows(loaded)
    ks = [row["num_temperatures"] for row in rows]
    assert ks == sorted(ks)
    left, right = drawings[attenuation.__name__].axes
    measured = left.containers[0].lines[0].get_ydata()
    assert list(measured) == [row["measured_correlation"]["value"] for row in rows]
    assert list(right.containers[0].lines[0].get_ydata()) == [
        row["correlation_gap"]["value"] for row in rows
    ]
    caption = caption_of(drawings[attenuation.__name__])
    assert "2 of 3 intervals contain 0" in caption, "the gap of 0.03 with half-width 0.02 does not"
    assert "n = 20 prompts, 640 tokens" in caption


def test_write_attenuation_reads_back_by_rising_k(tmp_path: Path) -> None:
    from calibrate.run.folder import Figure
    from calibrate.validate.attenuation import AttenuationRow, write_attenuation

    number = Figure(0.4, 0.3, 0.5)
    table = [
        AttenuationRow(k, 0.9, 0.5, 0.47, 0.7, number, number, number, number, 100, 10)
        for k in (20, 5)
    ]
    write_attenuation(tmp_path, table, {"name": "made up"})
    written = read_json(tmp_path, "attenuation.json")
    assert {"pair", "versions", "revision", "command"} < written.keys()
    found = written["rows"]
    assert [row["num_temperatures"] for row in found] == [5, 20]
    assert found[0]["measured_correlation"] == asdict(number)


# The importance plane


def test_plane_cells_are_the_predictions_of_that_policy(loaded: LoadedRun) -> None:
    """At a derived ui-hlm setting the plane and `derive` say the same."""
    plane = plane_figure.plane_of(loaded)
    assert plane is not None
    assert len(plane["cells"]) == len(PLANE_KS) * len(PLANE_GAMMAS)
    point = next(
        p for p in loaded.feasible if (p.policy, p.rule) == ("ui-hlm", plane["threshold_rule"])
    )
    assert point.uncertainty_threshold.value == plane["uncertainty_threshold"]
    setting = point.settings["importance"]
    cell = next(
        c for c in plane["cells"] if (c["k"], c["gamma"]) == (setting["k"], setting["gamma"])
    )
    for metric in PLANE_METRICS:
        assert cell["predicted"][metric]["value"] == pytest.approx(point.predicted[metric].value)
    values = plane_figure.plane_values(plane, "skip_rate")
    row, column = PLANE_KS.index(setting["k"]), PLANE_GAMMAS.index(setting["gamma"])
    assert values[row, column] == cell["predicted"]["skip_rate"]["value"]


def test_stricter_importance_skips_more(loaded: LoadedRun) -> None:
    plane = importance_plane(
        loaded.trace, loaded.calibration, loaded.economics(), (1, 4), (0.0, 0.5, 2.0, 50.0),
        "risk-0.02",
    )  # fmt: skip
    rates = plane_figure.plane_values(asdict(plane), "skip_rate")
    assert np.all(np.diff(rates, axis=1) >= 0)
    assert rates[:, -1] == pytest.approx(1.0)
    # gamma = 0 calls every context important: u-hlm at the same threshold.
    policy = loaded.policy_at("u-hlm", plane.uncertainty_threshold)
    assert policy is not None
    plain = metrics(predicted_tokens(loaded.trace, policy, VOCAB), loaded.economics())
    for cell in plane.cells:
        if cell.gamma == 0:
            for metric in PLANE_METRICS:
                assert cell.predicted[metric].value == pytest.approx(plain[metric].value)


def test_gamma_grid_goes_from_every_context_to_none(loaded: LoadedRun) -> None:
    gammas = gamma_grid(loaded.trace)
    assert list(gammas) == sorted(gammas)
    assert 1.0 in gammas
    q = loaded.trace["topk_attention"] * np.exp(loaded.trace["attention_entropy"])[:, None]
    # Two digits are kept, so up to a twentieth of rounding; a percentile lies beyond the ends.
    assert np.mean(q < gammas[0] / 1.05) <= 0.02
    assert np.mean(q > gammas[-1] * 1.05) <= 0.02


def test_infeasible_rule_gives_a_reason_and_no_cells(loaded: LoadedRun) -> None:
    fit = loaded.calibration["fit"]
    above = {"fit": fit | {"intercept": {"value": 0.1}}, "confidence": 0.95}
    plane = importance_plane(loaded.trace, above, loaded.economics(), (1,), (1.0,), "risk-averse")
    assert (plane.cells, plane.uncertainty_threshold) == ((), None)
    assert "below 0" in plane.reason
    with pytest.raises(ValueError, match=r"threshold_rule = 'ltt-0\.01'"):
        u_hlm_threshold(loaded.trace, above, "ltt-0.01")
    fallen_back = derive_plane(
        loaded.trace, above, loaded.economics(), (ImportanceSettings(gamma=1.37),), (0.02,), 0.95
    )
    assert fallen_back is not None
    assert fallen_back["threshold_rule"] == "risk-0.02"
    assert 1.37 in fallen_back["gammas"], "the derived setting has a cell of its own"
    assert not any(1 < gamma / 1.37 < 1.1 for gamma in fallen_back["gammas"])


def test_measured_cell_is_the_rerun_of_that_setting(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    plane = plane_figure.plane_of(loaded)
    assert plane is not None
    measured = plane_figure.measured_cells(loaded, plane)
    assert list(measured) == [(PLANE_KS.index(16), PLANE_GAMMAS.index(1.0))]
    axes = drawings[plane_figure.__name__].axes
    assert [len(axis.patches) for axis in axes] == [1] * len(PLANE_METRICS)
    moved = plane | {"uncertainty_threshold": 0.5 * plane["uncertainty_threshold"]}
    assert plane_figure.measured_cells(loaded, moved) == {}, "another threshold, another plane"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-7, "0"), (0.0013, "0.001"), (0.0126, "0.01"), (0.5, "0.50"), (12.34, "12.3"),
     (1234.0, "1234"), (123456.0, "1e5")],
)  # fmt: skip
def test_cell_text_fits_its_cell(value: float, text: str) -> None:
    assert plane_figure._short(value) == text
    assert len(text) <= 5


# The tables


def test_quality_stands_beside_its_rerun_and_nowhere_else(loaded: LoadedRun) -> None:
    lines = [line for line in tables.markdown(loaded).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    policy = ""
    for line in cells:
        policy = line[0] or policy
        if line[3] == "measured":
            scored = policy in ("u-hlm", "slm")
            assert (line[-2] != tables.NO_NUMBER) == (line[-1] != tables.NO_NUMBER) == scored
        elif line[3] == "predicted":
            assert line[-2:] == [tables.NO_NUMBER] * 2
    rows = list(csv.DictReader(tables.csv_text(loaded).splitlines()))
    for row in rows:
        scored = row["policy"] in ("u-hlm", "slm") and row["feasible"] == "True"
        assert row["bertscore_measured"] == ("0.9" if scored else "")
        assert row["cosine_measured_low"] == ("0.6" if scored else "")


def test_without_quality_the_columns_are_dashes(loaded: LoadedRun) -> None:
    text = tables.markdown(replace(loaded, quality=None))
    assert "no texts were scored" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert all(line.endswith("| – | – |") for line in lines if "| measured |" in line)


def test_published_rows_hold_the_shipped_numbers(loaded: LoadedRun) -> None:
    number = PublishedTable(published_numbers())
    rows = {row.paper: dict(zip(tables.TITLES, row.cells, strict=True))
            for row in tables.published_rows()}  # fmt: skip
    assert rows["U-HLM"]["skipped (%)"] == f"{100 * number('U-HLM', 'skip_rate').value:g}"
    assert rows["UI-HLM"]["BERTScore F1"] == f"{number('UI-HLM', 'bert_score').value:g}"
    for row in rows.values():
        for title, cell in row.items():
            if "throughput" in title and "HLM" not in cell and cell != tables.NO_NUMBER:
                assert float(cell) < 1, "UI-HLM's are token/s; the others say what they divide by"
    lines = tables.markdown(loaded).splitlines()
    u_hlm = next(i for i, line in enumerate(lines) if line.startswith("| *U-HLM*"))
    above = [line.split(" | ")[0].strip("| ") for line in lines[:u_hlm]]
    assert next(name for name in reversed(above) if name) == "u-hlm"


def test_audit_table_holds_every_comparison(tmp_path: Path) -> None:
    path = audit_table.write_audit(tmp_path)
    text = path.read_text(encoding="utf-8")
    rows, times = published_audit()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + len(times) + 4
    assert f"{sum(row.consistent for row in rows)} of {len(rows)} comparisons" in text
    for row in rows:
        assert row.explanation in text
    second_hand = [line for line in lines if "†" in line]
    assert len(second_hand) == sum(row.mark == "second-hand" for row in rows)


def test_report_holds_texts_and_audit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_figs.report import report

    header = b"\x89PNG\r\n\x1a\n" + bytes(8) + (700).to_bytes(4, "big") + (400).to_bytes(4, "big")
    monkeypatch.setattr(report, "png_bytes", lambda drawn: header)
    text = write_report(run).read_text(encoding="utf-8")
    assert "0.900\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.020" in text
    for row in published_audit()[0]:
        assert row.explanation.split(":")[0].split("'")[0].replace(">", "&gt;") in text
    json.loads((run / "splits.json").read_text())
