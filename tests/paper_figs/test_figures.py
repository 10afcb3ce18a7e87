"""Figures, tables and report of a small synthetic run whose columns are known by construction."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from evidence import add_evidence
from matplotlib.figure import Figure as Drawing
from synthetic_run import (
    NUM_PROMPTS,
    NUM_STEPS,
    VOCAB,
    add_validation,
    make_run,
)

from calibrate.decode.recording import BIAS_SIZE_GRID, SIZE_GRID, THRESHOLD_GRID
from calibrate.derive.policy_tokens import predicted_tokens
from calibrate.run.errors import UserError
from calibrate.run.folder import read_json, write_json
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.policies import POLICY_NAMES
from paper_figs import draw
from paper_figs.figures import (
    attention,
    estimators,
    payload_bias,
    relation,
    thresholds,
    throughput_snr,
    truncation,
    validation,
)
from paper_figs.figures.curves import skip_risk_curve
from paper_figs.loaded import LoadedRun, load_run
from paper_figs.report import tables
from paper_figs.report.report import write_report
from paper_figs.style import (
    POLICY_STYLES,
    SERIES,
    caption_of,
    question_of,
    styled,
    take_words,
    wrap,
)

NASTY = 'x"><script src=//evil.example/x.js></script>$\\frac{$.jsonl'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "run"
    make_run(folder)
    add_evidence(folder)
    add_validation(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="module")
def drawings(loaded: LoadedRun) -> Iterator[dict[str, Drawing]]:
    with styled():
        found = dict(draw.figures(loaded))
        assert all(drawing is not None for drawing in found.values())
        yield {name: drawing for name, drawing in found.items() if drawing is not None}


@pytest.fixture
def stub_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built, but not rendered: that is slow, and other tests do it."""
    from paper_figs.report import report

    def save(drawn: Drawing, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"drawn")

    header = b"\x89PNG\r\n\x1a\n" + bytes(8) + (700).to_bytes(4, "big") + (400).to_bytes(4, "big")
    monkeypatch.setattr(draw, "save", save)
    monkeypatch.setattr(report, "png_bytes", lambda drawn: header)


@pytest.fixture
def without_validation(run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "validation.json").unlink()
    return copy


# What every figure owes its reader


@pytest.mark.parametrize("name", draw.figure_names())
def test_figure_says_what_it_is(name: str, drawings: dict[str, Drawing], loaded: LoadedRun) -> None:
    drawing = drawings[name]
    assert question_of(drawing).endswith("?")
    caption = caption_of(drawing)
    assert f"n = {NUM_PROMPTS} prompts" in caption
    assert f"{loaded.trace.num_tokens:,} tokens" in caption
    assert "synthetic" in caption
    assert "clustered by prompt" in caption


@pytest.mark.parametrize("name", draw.figure_names())
def test_every_axis_has_a_label_with_a_unit(name: str, drawings: dict[str, Drawing]) -> None:
    for axes in drawings[name].axes:
        if not axes.get_visible():
            continue
        x_shared = axes.get_shared_x_axes().get_siblings(axes)
        y_shared = axes.get_shared_y_axes().get_siblings(axes)
        for kind, group in (("x", x_shared), ("y", y_shared)):
            labels = {getattr(other, f"get_{kind}label")() for other in group} - {""}
            assert labels, f"{name}: an axis {kind} without a label"
            for label in labels - {"policy"}:  # names, not numbers
                assert re.search(r"\(.+\)", label, re.DOTALL), f"{name}: no unit in {label!r}"


@pytest.mark.parametrize("name", draw.figure_names())
def test_words_fit_on_the_page(name: str, drawings: dict[str, Drawing]) -> None:
    """Nothing drawn reaches over the edge, apart from half a pixel of antialiasing."""
    drawing = drawings[name]
    drawing.canvas.draw()
    inside = drawing.bbox
    tight = drawing.get_tightbbox().transformed(drawing.dpi_scale_trans)
    assert tight.x0 >= inside.x0 - 1
    assert tight.x1 <= inside.x1 + 1
    assert tight.y0 >= inside.y0 - 1
    assert tight.y1 <= inside.y1 + 1


@pytest.mark.parametrize("family", [list(POLICY_STYLES.values()), list(SERIES)])
def test_series_can_be_told_apart_in_grey(family: list[Any]) -> None:
    assert len({str(style.linestyle) for style in family}) == len(family)
    assert len({style.marker for style in family}) == len(family)
    # Light colours vanish on paper: relative luminance of each against white.
    for style in family:
        red, green, blue = matplotlib.colors.to_rgb(style.color)
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75


def test_every_policy_has_a_style() -> None:
    assert set(POLICY_NAMES) == set(POLICY_STYLES)


def test_drawing_leaves_settings_alone_and_opens_no_pyplot(loaded: LoadedRun) -> None:
    import subprocess
    import sys

    before = dict(matplotlib.rcParams)
    with styled():
        relation.figure(loaded)
    assert dict(matplotlib.rcParams) == before
    code = "import sys, paper_figs.draw; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What the figures show


def test_binned_means_are_those_of_the_tokens(loaded: LoadedRun) -> None:
    """Recomputed by an obvious loop over sorted tokens."""
    trace = loaded.trace
    u, beta = trace["uncertainty"], trace["rejection_prob"]
    with styled():
        drawing = relation.figure(loaded)
    assert drawing is not None
    container = drawing.axes[0].containers[0]
    x, y = container.lines[0].get_data()
    edges = np.unique(np.quantile(u, np.linspace(0, 1, 21)))  # tokens that tie share a bin
    assert len(x) == len(edges) - 1 == loaded.calibration["fit"]["num_bins"] < 20
    for i in range(len(x)):
        low = -1.0 if i == 0 else edges[i]
        inside = (u > low) & (u <= edges[i + 1])
        assert x[i] == pytest.approx(u[inside].mean())
        assert y[i] == pytest.approx(beta[inside].mean())
        interval = mean_over_tokens(
            beta[inside], trace.prompt_index[inside], trace.num_prompts
        ).interval(loaded.confidence)
        assert interval is not None
        low_drawn, high_drawn = container.lines[2][0].get_segments()[i][:, 1]
        assert (low_drawn, high_drawn) == pytest.approx(interval)


def test_line_band_is_the_interval_of_a_linear_combination(loaded: LoadedRun) -> None:
    """At u = 0 the band is the intercept's interval: statsmodels and ours must agree."""
    band = relation.line_band(loaded, np.array([0.0]))
    intercept = loaded.calibration["fit"]["intercept"]
    assert band.high[0] == pytest.approx(max(intercept["high"], 0.0), abs=1e-9)


def test_threshold_curves_pass_through_the_derived_predictions(loaded: LoadedRun) -> None:
    """The same risk by two ways: the figure's mean and the derivation's metric."""
    points = thresholds.drawn_points(loaded)
    assert points
    for point in points:
        threshold = min(point.uncertainty_threshold.value or 0.0, 1.0)
        skipped = loaded.trace["uncertainty"] <= threshold
        risk = float(np.mean(skipped * loaded.trace["rejection_prob"]))
        assert point.predicted["rejection_risk"].value == pytest.approx(risk)
        rates, risks = thresholds.predicted_curves(loaded)
        below = np.searchsorted(rates.grid, threshold, side="right") - 1
        above = min(below + 1, len(rates.grid) - 1)
        assert risks.value[below] - 1e-12 <= risk <= risks.value[above] + 1e-12


def test_infeasible_points_are_named_but_not_drawn(loaded: LoadedRun) -> None:
    policy = thresholds.drawn_points(loaded)[0].policy
    infeasible = [p.rule for p in loaded.points if p.policy == policy and not p.feasible]
    feasible = [p for p in loaded.points if p.policy == policy and p.feasible]
    assert infeasible, "twelve prompts cannot certify two per cent: the fixture must show it"
    with styled():
        drawing = thresholds.figure(loaded)
    assert drawing is not None
    top = drawing.axes[0]
    hollow = [line for line in top.lines if len(line.get_xdata()) == 1 and _is_hollow(line)]
    assert len(hollow) == len(feasible)
    shown = {round(float(line.get_xdata()[0]), 9) for line in hollow}
    assert shown == {round(min(p.uncertainty_threshold.value or 0.0, 1.0), 9) for p in feasible}
    assert ", ".join(infeasible) in caption_of(drawing)
    assert not any(p.rule in infeasible for p in payload_bias.plane_points(loaded))


def test_sizes_are_compared_at_one_tolerance(loaded: LoadedRun) -> None:
    from dataclasses import replace

    size = truncation.online_size(loaded)
    chosen = truncation.rerun_of(loaded, size)
    assert chosen is not None
    assert chosen.point.settings["theta"] == size.theta
    assert truncation.rerun_of(loaded, replace(size, theta=size.theta / 2)) is None
    assert truncation.rerun_of(replace(loaded, reruns=()), size) is None


def test_captions_quote_the_confidence_that_their_intervals_have(loaded: LoadedRun) -> None:
    """Derived at 90 %, calibrated at 95 %: each figure says its own."""
    from dataclasses import replace

    assert loaded.derived is not None
    other = replace(loaded, derived=loaded.derived | {"confidence": 0.9})
    expected = {"relation": "95%", "estimators": "95%", "thresholds": "90%", "payload_bias": "90%"}
    with styled():
        for name, drawing in draw.figures(other):
            if name in expected:
                assert drawing is not None
                assert f"{expected.pop(name)} intervals, clustered" in caption_of(drawing)
    assert not expected, "a figure was not looked at"
    assert "90% intervals, clustered" in tables.markdown(other)


def test_only_what_was_rerun_is_shown_if_anything_was(loaded: LoadedRun) -> None:
    from dataclasses import replace

    assert loaded.shown == loaded.feasible
    few = replace(loaded, cells=tuple(cell for cell in loaded.cells if cell.policy == "r-hlm"))
    assert {point.policy for point in few.shown} == {"r-hlm"}
    assert replace(loaded, cells=()).shown == loaded.feasible


def _is_hollow(line: Any) -> bool:
    return line.get_marker() not in ("None", "none", "") and line.get_markerfacecolor() == "white"


def test_measured_points_are_the_cells_of_the_rerun(loaded: LoadedRun) -> None:
    for point in payload_bias.plane_points(loaded):
        assert point.measured is not None
        cell = next(
            c for c in loaded.cells
            if (c.policy, c.rule, c.metric) == (point.policy, point.rule, "tv_bias")
        )  # fmt: skip
        assert point.measured[1] == cell.measured


def test_payload_axis_has_a_place_for_zero(drawings: dict[str, Drawing]) -> None:
    plane = drawings["payload_bias"].axes[0]
    assert plane.get_xscale() == "symlog"
    assert plane.get_xlim()[0] < 0 < plane.get_xlim()[1]
    assert 0.0 in plane.get_xticks()
    assert plane.xaxis.get_major_formatter()(0.0, 0) == "0"


def test_payload_paths_go_from_lossless_to_the_most_skipping(loaded: LoadedRun) -> None:
    path = payload_bias.threshold_path(loaded, "u-hlm")
    assert len(path) == len(THRESHOLD_GRID)
    assert np.all(np.diff(path[:, 0]) <= 1e-9), "a higher threshold never sends more"
    assert np.all(np.diff(path[:, 1]) >= -1e-9), "nor does it bias less"


def test_every_cell_is_drawn_once(loaded: LoadedRun, drawings: dict[str, Drawing]) -> None:
    drawn = [
        line for axes in drawings["validation"].axes for line in axes.lines
        if line.get_linestyle() == "None"
    ]  # fmt: skip
    assert sum(len(line.get_xdata()) for line in drawn) == len(loaded.cells)
    crosses = sum(len(line.get_xdata()) for line in drawn if line.get_marker() == "X")
    assert crosses == sum(not cell.covered for cell in loaded.cells)


def test_covered_cells_and_only_they_lie_in_the_grey_band(loaded: LoadedRun) -> None:
    for cell in loaded.cells:
        inside = abs(validation.normalised_error(cell)) <= 1 + 1e-9
        assert inside == cell.covered


def test_normalised_error_takes_the_side_of_the_measurement(loaded: LoadedRun) -> None:
    from dataclasses import replace

    from calibrate.run.folder import Figure

    cell = replace(
        loaded.cells[0], predicted=Figure(1.0, 0.5, 3.0), measured=Figure(2.0, None, None)
    )
    assert validation.normalised_error(cell) == pytest.approx(0.5)
    below = replace(cell, measured=Figure(0.0, None, None))
    assert validation.normalised_error(below) == pytest.approx(-2.0)
    fixed = replace(cell, predicted=Figure(1.0, 1.0, 1.0))
    assert validation.normalised_error(fixed) == np.inf
    assert validation.normalised_error(replace(fixed, measured=Figure(1.0))) == 0.0


def test_skip_risk_curve_is_the_obvious_loop(rng: np.random.Generator) -> None:
    score, beta = rng.integers(0, 5, 60) / 4, rng.uniform(size=60)
    risk, rate = skip_risk_curve(score, beta)
    expected = [(0.0, 0.0)]
    for level in sorted(set(score)):
        skipped = score <= level
        expected.append((float((beta * skipped).mean()), float(skipped.mean())))
    assert np.column_stack([risk, rate]) == pytest.approx(np.array(expected))


def test_estimator_curves_end_where_calibration_says(loaded: LoadedRun) -> None:
    """Skip rate at a budget, from the curve and from calibration.json.

    The calibration bins scores to 200 quantiles; one bin more or less is 1/200 at most, and one
    token where tokens are fewer.
    """
    beta = loaded.trace["rejection_prob"]
    tolerance = 1 / 200 + 1.5 / loaded.trace.num_tokens
    scores = estimators.estimator_scores(loaded.trace)
    for entry in loaded.calibration["estimators"]:
        score = scores[entry["name"]]
        risk, rate = skip_risk_curve(score, beta)
        for level, figure in entry["skip_rate_at_risk"].items():
            best = float(rate[risk <= float(level)].max())
            assert figure["value"] == pytest.approx(best, abs=tolerance)


def test_truncation_bounds_are_ordered(loaded: LoadedRun) -> None:
    soft, sharp, exact = truncation.bias_curves(loaded)
    assert list(sharp.grid) == list(SIZE_GRID)
    assert np.all(soft.value >= 2.8 * sharp.value - 1e-12)
    assert np.all(np.diff(sharp.value) <= 1e-12)
    assert list(exact.grid) == list(BIAS_SIZE_GRID)


def test_importance_dots_agree_with_the_gate(loaded: LoadedRun) -> None:
    """The figure's comparison of I_t with I_th is what the policy's replay decides."""
    from calibrate.decode.recording import replay_importance
    from hlmtheory.policies import ImportanceSettings

    rows = attention.example_rows(loaded)
    assert len(rows) == NUM_STEPS
    for settings in (ImportanceSettings(), ImportanceSettings("context", 0.5, 0.9)):
        importance, threshold = attention.importance_and_threshold(loaded, rows, settings)
        decided = replay_importance(loaded.trace, settings)[rows]
        assert list(~(importance < threshold)) == list(decided)
        assert 0 < decided.sum() < len(decided) or settings.variant == "topk"


def test_normalised_entropy_of_a_uniform_row_is_one(loaded: LoadedRun) -> None:
    columns = dict(loaded.trace.columns)
    columns["attention_entropy"] = np.log(columns["num_attended"] - 1.0)
    from dataclasses import replace

    from calibrate.run.traces import Trace

    uniform = replace(loaded, trace=Trace(columns, loaded.trace.prompt_ids))
    assert attention.normalised_entropy(uniform) == pytest.approx(1.0)


def test_throughput_at_the_derived_snr_is_the_prediction(loaded: LoadedRun) -> None:
    link = loaded.economics().link
    rule = throughput_snr.chosen_rule(loaded)
    assert rule is not None
    for point in throughput_snr.points_at(loaded, rule):
        tokens = predicted_tokens(loaded.trace, point.to_policy(), VOCAB)
        for metric, _ in throughput_snr.PANELS:
            found = throughput_snr.along_snr(loaded, tokens, metric, np.array([link.snr_db]))  # type: ignore[attr-defined]
            assert found.value[0] == pytest.approx(point.predicted[metric].value)


# Files


def test_draw_run_writes_every_format_and_leaves_no_temporary(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "PNG_DPI", 40)
    output = tmp_path / "out"
    told: list[object] = []
    written = draw.draw_run(run, output, told.append)
    names = {f"{name}.{kind}" for name in draw.figure_names() for kind in ("png", "pdf")}
    assert {path.name for path in written} == names | {
        "main_table.md",
        "main_table.csv",
        "audit_table.md",
    }
    assert {path.name for path in output.iterdir()} == {path.name for path in written}
    assert len(told) == len(draw.figure_names())
    for path in written:
        head = path.read_bytes()[:8]
        if path.suffix == ".png":
            assert head == b"\x89PNG\r\n\x1a\n"
        if path.suffix == ".pdf":
            assert head.startswith(b"%PDF")


@pytest.mark.usefixtures("stub_rendering")
def test_without_validation_the_others_are_drawn(without_validation: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    outdated = output / "validation.png"
    outdated.write_bytes(b"of an earlier run")
    written = {path.name for path in draw.draw_run(without_validation, output)}
    missing = {f"{name}.png" for name in draw.figure_names()} - written
    assert missing == {"validation.png", "context_shift.png"}
    assert not outdated.exists(), "an outdated figure must not stay among the new ones"


@pytest.mark.usefixtures("stub_rendering")
def test_only_a_calibration_is_enough_for_its_figures(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "validation.json").unlink()
    (copy / "operating_points.json").unlink()
    written = {path.name for path in draw.draw_run(copy, tmp_path / "out")}
    expected = {"relation", "attenuation", "guarantees", "estimators", "truncation", "attention"}
    drawn = {f"{name}.{kind}" for name in expected for kind in ("png", "pdf")}
    assert written == drawn | {"audit_table.md"}
    text = write_report(copy).read_text(encoding="utf-8")
    assert "Nothing was derived yet" in text
    assert "Nothing was rerun yet" in text


def test_a_minimal_trace_leaves_out_what_it_lacks(loaded: LoadedRun) -> None:
    from dataclasses import replace

    from calibrate.run.traces import Trace

    full = ("skip_set", "tail_deviation", "truncation_bias", "attention", "context", "topk", "num_")
    columns = {k: v for k, v in loaded.trace.columns.items() if not k.startswith(full)}
    bare = replace(loaded, trace=Trace(columns, loaded.trace.prompt_ids))
    with styled():
        found = dict(draw.figures(bare))
    missing = {name for name, drawing in found.items() if drawing is None}
    assert missing == {"truncation", "payload_bias", "throughput_snr", "attention"}


@pytest.mark.usefixtures("stub_rendering")
def test_no_calibration_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder"):
        draw.draw_run(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"calibration\.json is missing; run `hlm calibrate`"):
        draw.draw_run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stub_rendering")
def test_cells_of_an_earlier_derivation_are_not_shown_as_current(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    derived = read_json(copy, "operating_points.json")
    point = next(p for p in derived["operating_points"] if p["policy"] == "u-hlm")
    point["predicted"]["skip_rate"]["value"] += 0.01
    point["uncertainty_threshold"]["value"] += 0.01
    write_json(copy / "operating_points.json", derived)
    loaded = load_run(copy)
    assert loaded.outdated == (("u-hlm", point["rule"]),)
    stale = next(p for p in loaded.points if (p.policy, p.rule) == ("u-hlm", point["rule"]))
    assert loaded.measured(stale) == {}
    assert not any(r.point.rule == stale.rule and r.point.policy == "u-hlm" for r in loaded.reruns)
    assert "Derived anew since the rerun" in write_report(copy).read_text(encoding="utf-8")


def test_a_pair_that_never_rejects_is_drawn(loaded: LoadedRun) -> None:
    """All risks are zero: no axis collapses, which Matplotlib would warn of."""
    from dataclasses import replace

    from calibrate.run.traces import Trace

    columns = dict(loaded.trace.columns)
    for name in ("rejection_prob", "truncation_bias", "skip_set_bias"):
        columns[name] = 0.0 * columns[name]
    agreeing = replace(loaded, trace=Trace(columns, loaded.trace.prompt_ids))
    with styled():
        for module in (relation, thresholds, estimators, truncation, payload_bias):
            drawing = module.figure(agreeing)
            assert drawing is not None
            drawing.canvas.draw()


# The table


def test_csv_holds_every_point_unrounded(loaded: LoadedRun) -> None:
    rows = list(csv.DictReader(tables.csv_text(loaded).splitlines()))
    assert len(rows) == len(loaded.points)
    for row, point in zip(rows, loaded.points, strict=True):
        assert (row["policy"], row["rule"]) == (point.policy, point.rule)
        assert (row["feasible"] == "True") == point.feasible
        value = point.predicted["tv_bias"].value
        assert row["tv_bias_predicted"] == ("" if value is None else repr(value))
        cells = loaded.measured(point)
        assert bool(row["tv_bias_measured"]) == bool(cells)


def test_markdown_has_one_width_and_names_infeasible_points(loaded: LoadedRun) -> None:
    text = tables.markdown(loaded)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    num_points = len(loaded.feasible)
    assert sum("| predicted |" in line for line in lines) == num_points
    assert sum("| measured |" in line for line in lines) == num_points
    for point in loaded.points:
        if not point.feasible:
            assert f"{point.policy}/{point.rule}" in text


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.078, 0.0567, "0.078 ± 0.057"),
        (1087356.9, 66845.2, "1,087,357 ± 66,845"),
        (14.468, 0.529, "14.47 ± 0.53"),
        (0.0, 0.0, "0"),
        (100.0, 0.0, "100"),
        (1e-7, 1e-8, "0"),
        (12.3456789, 0.000058, "12.3457 ± 0.0001"),
    ],
)
def test_short_text_shows_the_digits_that_its_interval_supports(
    value: float, half: float, text: str
) -> None:
    from calibrate.run.folder import Figure

    shown = tables.short_text(Figure(value, value - half, value + half))
    assert shown.replace("\N{NO-BREAK SPACE}", " ") == text


# The report


class Page(HTMLParser):
    """Tags, attributes and whether they nest."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page_text(run: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "PNG_DPI", 40)
        return write_report(run).read_text(encoding="utf-8")


def test_report_holds_every_figure_and_section(page_text: str, loaded: LoadedRun) -> None:
    page = Page(page_text)
    assert page.open == []
    figure_ids = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert figure_ids == [f"figure-{name}" for name in draw.figure_names()]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(figure_ids)
    assert all((image["src"] or "").startswith("data:image/png;base64,iVBOR") for image in images)
    assert all(image["alt"] for image in images)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert targets
    assert {f"#{name}" for name in ids} >= targets
    summary = loaded.validation["coverage"] if loaded.validation else {}
    assert f"{summary['covered']} of {summary['total']} measured figures" in page_text
    assert "ab" * 32 in page_text


def test_report_asks_nothing_of_the_network(page_text: str) -> None:
    assert not re.search(r"https?://", page_text)
    assert not re.search(r"@import|url\(", page_text)
    page = Page(page_text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action"):
            target = attrs.get(name)
            assert target is None or target.startswith(("data:", "#"))


def test_report_counts_covered_cells_by_metric(page_text: str, loaded: LoadedRun) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page_text))
    for metric in ("skip_rate", "tv_bias"):
        cells = [cell for cell in loaded.cells if cell.metric == metric]
        covered = sum(cell.covered for cell in cells)
        label = {"skip_rate": "skip rate (share of tokens)", "tv_bias": "TV bias (probability)"}
        assert f"{label[metric]} {covered} {len(cells)}" in text
    assert page_text.count("✗ ") == sum(not cell.covered for cell in loaded.cells)


@pytest.mark.usefixtures("stub_rendering")
def test_malicious_names_stay_text(tmp_path: Path) -> None:
    """A prompt file, or a prompt id that a figure's caption cites, may hold anything."""
    folder = tmp_path / "run"
    make_run(folder, prompts_file=NASTY, prompt_name=NASTY)
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "<script" not in text
    assert "&lt;script" in text
    with styled():
        drawing = attention.figure(load_run(folder))
        assert drawing is not None
        assert NASTY in caption_of(drawing)
        draw.png_bytes(drawing)  # a dollar sign must not be read as a formula


def test_figures_in_the_report_carry_no_words_twice(loaded: LoadedRun) -> None:
    with styled():
        drawing = estimators.figure(loaded)
        assert drawing is not None
        height = drawing.get_size_inches()[1]
        question, caption = take_words(drawing)
        assert question.endswith("?")
        assert "clustered by prompt" in caption
        assert question_of(drawing) == caption_of(drawing) == ""
        assert drawing.get_size_inches()[1] < height


def test_wrap_breaks_at_spaces_only_and_keeps_the_words() -> None:
    text = "one two three\N{NO-BREAK SPACE}four " * 20
    wrapped = wrap(text, 120.0, 8.0)
    assert wrapped.split() == text.split()
    lines = wrapped.split("\n")
    assert len(lines) > 5
    assert not any(line.endswith("three") for line in lines)


@pytest.mark.usefixtures("stub_rendering")
def test_json_on_disk_is_left_as_it_was(run: Path, tmp_path: Path) -> None:
    """Figures read results; they never write them."""
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    draw.draw_run(run, tmp_path / "out")
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before
    assert all(json.loads(content) for content in before.values())
