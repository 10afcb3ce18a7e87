"""Figures of records whose numbers are written down: what they show, and what they leave out."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import paper_records
import pytest
from matplotlib.figure import Figure as Drawing
from paper_records import GAMMAS, KS, NUM_PROMPTS, NUM_TOKENS, POLICIES, fig

from calibrate.derive.presets import LINK_MODELS, link_to_dict
from calibrate.run.errors import UserError
from calibrate.run.figure import NBSP, excludes_zero
from calibrate.run.records import Curve, Figure, LinkSweep
from calibrate.run.resources import data_path
from hlmtheory.link import (
    AwgnLink,
    ErgodicRayleighLink,
    Link,
    RateLink,
    RayleighOutageLink,
    TraceLink,
)
from paper_figs import draw
from paper_figs.figures import (
    answers,
    attention,
    attenuation,
    context_shift,
    costs,
    estimators,
    guarantees,
    importance_plane,
    payload_bias,
    payload_sizes,
    relation,
    skipping,
    thresholds,
    throughput,
    truncation,
    validation,
)
from paper_figs.loaded import METRIC_LABELS, LoadedRun, load_run
from paper_figs.style import (
    COINCIDE,
    GREY,
    SERIES,
    caption_of,
    coinciding,
    error_lengths,
    is_narrow,
    new_figure,
    parts,
    policy_style,
    question_of,
    styled,
    take_words,
    wrap,
)

ROOT = Path(__file__).resolve().parents[2]
BARE: dict[str, Any] = {
    "derivation": None, "validation": None, "quality": None, "guarantees": None,
    "attenuation": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedRun:
    return paper_records.full_run()


@pytest.fixture(scope="module")
def drawings(loaded: LoadedRun) -> Iterator[dict[str, Drawing]]:
    with styled():
        found = dict(draw.figures(loaded))
        assert not any(isinstance(drawing, str) for drawing in found.values())
        yield {name: drawing for name, drawing in found.items() if isinstance(drawing, Drawing)}


@pytest.fixture(scope="module")
def narrow(loaded: LoadedRun) -> dict[str, Drawing]:
    """The same for one column of a paper, their words apart."""
    with styled(num_columns=1):
        found = {name: drawn for name, drawn in draw.figures(loaded) if isinstance(drawn, Drawing)}
        for drawing in found.values():
            take_words(drawing)
    return found


def drawn_by(module: ModuleType, loaded: LoadedRun) -> Drawing:
    drawing = module.figure(loaded)
    assert isinstance(drawing, Drawing)
    return drawing


def changed(loaded: LoadedRun, **changes: Any) -> LoadedRun:
    """The run with fields of its derivation exchanged."""
    assert loaded.derivation is not None
    return replace(loaded, derivation=loaded.derivation.model_copy(update=changes))


def values_of(bars: Any) -> list[float]:
    return [float(value) for value in bars.lines[0].get_ydata()]


# What every figure owes its reader


@pytest.mark.parametrize("name", draw.figure_names())
def test_figure_says_what_it_is(name: str, drawings: dict[str, Drawing]) -> None:
    assert question_of(drawings[name]).endswith("?")
    caption = caption_of(drawings[name])
    assert f"n = {NUM_PROMPTS} prompts, {NUM_TOKENS} tokens" in caption
    assert "synthetic" in caption
    assert "clustered by prompt" in caption


@pytest.mark.parametrize("name", draw.figure_names())
def test_every_axis_has_a_label_with_a_unit(name: str, drawings: dict[str, Drawing]) -> None:
    for axes in drawings[name].axes:
        if not axes.get_visible():
            continue
        for kind in "xy":
            shared = getattr(axes, f"get_shared_{kind}_axes")().get_siblings(axes)
            labels = {getattr(other, f"get_{kind}label")() for other in shared} - {""}
            assert labels, f"{name}: an axis {kind} without a label"
            for label in labels - {"policy"}:  # names, not numbers
                assert re.search(r"\(.+\)", label, re.DOTALL), f"{name}: no unit in {label!r}"


@pytest.mark.parametrize("name", draw.figure_names())
def test_words_fit_on_the_page(name: str, drawings: dict[str, Drawing]) -> None:
    """Nothing drawn reaches over the edge, apart from half a pixel of antialiasing."""
    assert_words_fit(drawings[name])


@pytest.mark.parametrize("name", draw.figure_names())
def test_one_column_holds_every_figure(name: str, narrow: dict[str, Drawing]) -> None:
    """3.5 inches wide, nothing over the edge, and every panel says what its own axes are."""
    drawing = narrow[name]
    assert drawing.get_size_inches()[0] == 3.5
    assert_words_fit(drawing)
    assert all(axes.get_ylabel() for axes in drawing.axes if axes.get_visible())


def test_panels_of_one_column_stand_below_each_other(
    drawings: dict[str, Drawing], narrow: dict[str, Drawing]
) -> None:
    wide = [axes.get_position() for axes in drawings["guarantees"].axes]
    tall = [axes.get_position() for axes in narrow["guarantees"].axes]
    assert len({round(box.x0, 2) for box in wide}) == 2
    assert len({round(box.x0, 2) for box in tall}) == 1
    assert [box.y0 for box in tall] == sorted((box.y0 for box in tall), reverse=True)
    first, second, *_ = narrow["guarantees"].axes
    assert first.get_ylim() == second.get_ylim(), "panels of a row share their axis all the same"


def test_a_caller_in_two_columns_is_not_left_in_one() -> None:
    with styled(num_columns=1):
        assert is_narrow()
    with styled():
        assert not is_narrow()


def assert_words_fit(drawing: Drawing) -> None:
    drawing.canvas.draw()
    inside = drawing.bbox
    tight = drawing.get_tightbbox().transformed(drawing.dpi_scale_trans)
    assert tight.x0 >= inside.x0 - 1
    assert tight.x1 <= inside.x1 + 1
    assert tight.y0 >= inside.y0 - 1
    assert tight.y1 <= inside.y1 + 1


def test_series_can_be_told_apart_in_grey() -> None:
    assert len({str(style.linestyle) for style in SERIES}) == len(SERIES)
    assert len({style.marker for style in SERIES}) == len(SERIES)
    # Light colours vanish on paper: relative luminance of each against white.
    for style in SERIES:
        red, green, blue = matplotlib.colors.to_rgb(style.color)
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75


def test_a_policy_looks_as_its_record_says(loaded: LoadedRun) -> None:
    assert loaded.derivation is not None
    for info in loaded.derivation.policies:
        style = policy_style(info)
        assert (style.color, style.marker) == (info.color, info.marker)
        assert style.linestyle == ((0, info.dashes) if info.dashes else "solid")
    assert loaded.style("not-derived") is SERIES[-1]
    assert loaded.label("not-derived") == "not-derived"


def test_a_policy_nobody_foresaw_is_drawn(loaded: LoadedRun) -> None:
    """Name, label and look come from the records alone."""
    assert loaded.derivation is not None
    old = next(info for info in loaded.derivation.policies if info.name == "r-hlm")
    mine = old.model_copy(update={"name": "mine", "label": "my own", "source": "mine.py:Mine"})

    def renamed(entries: Any) -> Any:
        return tuple(
            entry.model_copy(update={"policy": "mine"}) if entry.policy == "r-hlm" else entry
            for entry in entries
        )

    other = changed(
        replace(loaded, validation=None),
        policies=tuple(mine if info is old else info for info in loaded.derivation.policies),
        operating_points=renamed(loaded.derivation.operating_points),
        paths=renamed(loaded.derivation.paths),
    )
    with styled():
        plane = drawn_by(payload_bias, other).axes[0]
    names = " ".join(plane.get_legend_handles_labels()[1])
    assert "my own\n(mine)" in names
    assert "r-hlm" not in names


def test_drawing_imports_no_model_and_opens_no_window(tmp_path: Path) -> None:
    """In its own interpreter, from a folder; the records are built there too."""
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import paper_records
from paper_figs import draw
draw.save = lambda drawn, path: None
run = paper_records.write_run(Path({str(tmp_path / "run")!r}))
draw.draw_run(run, Path({str(tmp_path / "out")!r}))
from paper_figs.report import report
report.png_bytes = lambda drawn: bytes(24)
report.write_report(run)
heavy = {{"torch", "transformers", "sklearn", "statsmodels", "matplotlib.pyplot"}}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_of_the_caller_are_left_alone(loaded: LoadedRun) -> None:
    before = dict(matplotlib.rcParams)
    with styled():
        drawn_by(relation, loaded)
    assert dict(matplotlib.rcParams) == before


# Helpers of drawing


def test_parts_and_error_lengths() -> None:
    found = parts([Figure(value=1.0, low=0.5, high=3.0), Figure(value=None)], 10)
    assert found[:, 0].tolist() == [10.0, 5.0, 30.0]
    assert np.isnan(found[:, 1]).all()
    assert error_lengths(found).tolist() == [[5.0, 0.0], [20.0, 0.0]]
    along = Curve(grid=(0.0, 1.0), value=(1.0, None), low=(None, None), high=(2.0, None))
    assert parts(along)[2, 0] == 2.0
    assert error_lengths(parts(along)).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_wrap_breaks_at_spaces_only_and_keeps_the_words() -> None:
    text = "one two three\N{NO-BREAK SPACE}four " * 20
    wrapped = wrap(text, 120.0, 8.0)
    assert wrapped.split() == text.split()
    lines = wrapped.split("\n")
    assert len(lines) > 5
    assert not any(line.endswith("three") for line in lines)


def test_words_are_taken_for_the_report(loaded: LoadedRun) -> None:
    with styled():
        drawing = drawn_by(estimators, loaded)
        height = drawing.get_size_inches()[1]
        question, caption = take_words(drawing)
    assert question.endswith("?")
    assert "clustered by prompt" in caption
    assert question_of(drawing) == caption_of(drawing) == ""
    assert drawing.get_size_inches()[1] < height


# What the figures show


def test_bins_and_what_the_line_leaves_over(drawings: dict[str, Drawing]) -> None:
    """beta = u**2 against the line u - 1/6, which is clipped to [0, 1]."""
    top, bottom = drawings["relation"].axes
    u = top.containers[0].lines[0].get_xdata()
    assert values_of(top.containers[0]) == pytest.approx(u**2)
    assert values_of(bottom.containers[0]) == pytest.approx(u**2 - np.maximum(u - 1 / 6, 0))
    low, high = top.containers[0].lines[2][0].get_segments()[3][:, 1]
    assert (low, high) == pytest.approx((0.9 * u[3] ** 2, 1.1 * u[3] ** 2))


def test_threshold_figure_takes_points_that_lie_on_the_curves(loaded: LoadedRun) -> None:
    points = thresholds.drawn_points(loaded)
    assert {point.policy for point in points} == {"u-hlm"}
    assert [point.rule for point in points] == ["risk-0.01", "risk-0.02", "risk-0.05", "risk-prone"]
    # A second condition skips more than the threshold says: such a policy is not on the curve.
    other = [p for p in loaded.feasible if p.policy == "ui-hlm" and p.rule != "risk-prone"]
    assert other
    assert not any(loaded.on_curve(point) for point in other)
    ungated = next(point for point in loaded.feasible if point.rule == "none")
    assert not loaded.on_curve(ungated)


def test_points_that_a_pilot_moved_off_the_curve_are_drawn_with_their_reruns() -> None:
    """The shipped run: the points that the figure's answer speaks of were lost to the pilot."""
    shipped = load_run(data_path("results", "qwen2.5-coder"))
    points = {point.rule: point for point in thresholds.drawn_points(shipped)}
    assert {point.policy for point in points.values()} == {shipped.gates[0].policy}
    for rule in ("risk-0.01", "risk-0.02", "risk-0.05"):
        assert shipped.measured(points[rule])


def test_infeasible_points_are_named_but_not_drawn(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    drawing = drawings["thresholds"]
    hollow = [
        line for line in drawing.axes[0].lines
        if len(line.get_xdata()) == 1 and line.get_markerfacecolor() == "white"
    ]  # fmt: skip
    points = thresholds.drawn_points(loaded)
    shown = {round(float(line.get_xdata()[0]), 9) for line in hollow}
    assert shown == {round(min(p.uncertainty_threshold.value or 0.0, 1.0), 9) for p in points}
    assert "Infeasible, so not drawn: ltt-0.01" in caption_of(drawing)
    assert not any(p.rule == "ltt-0.01" for p in payload_bias.plane_points(loaded))


def test_a_score_without_an_end_has_its_own_axis(loaded: LoadedRun) -> None:
    """Entropy in nats, from 0 to 9: thresholds and grids are nine times those of u."""
    assert loaded.derivation is not None
    curves = loaded.derivation.thresholds
    assert curves is not None

    def stretched(means: Curve) -> Curve:
        return means.model_copy(update={"grid": tuple(9 * place for place in means.grid)})

    points = tuple(
        point.model_copy(
            update={
                "score": point.score and "entropy",
                "uncertainty_threshold": Figure(value=9 * point.uncertainty_threshold.value,
                                                unit="nat")
                if point.uncertainty_threshold.value is not None
                else Figure(value=None),
            }
        )
        for point in loaded.derivation.operating_points
    )  # fmt: skip
    other = changed(
        loaded,
        operating_points=points,
        thresholds=curves.model_copy(
            update={
                "score": "entropy",
                "skip_rate": stretched(curves.skip_rate),
                "risk": stretched(curves.risk),
            }
        ),
    )
    with styled():
        bottom = drawn_by(thresholds, other).axes[1]
    assert bottom.get_xlim()[1] == pytest.approx(9 * 1.03)
    assert bottom.get_xlabel() == "threshold u_th on the score: entropy (nat)"


def test_guarantee_markers_are_the_stored_shares(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    axes, record = drawings["guarantees"].axes, loaded.guarantees
    assert record is not None
    for column, source in enumerate(guarantees.SOURCES):
        for row_of_axes, key in enumerate(("violation_share", "skip_rate")):
            bars = axes[2 * row_of_axes + column].containers
            drawn = [r for r in record.rows if r.source == source and r.rule in guarantees.RULES]
            stored = sorted(getattr(r, key).value for r in drawn)
            assert sorted(values_of(each)[0] for each in bars) == pytest.approx(stored)
    hollow = sum(bars.lines[0].get_markerfacecolor() == "white" for bars in axes[0].containers)
    assert hollow == 1, "ltt at half a per cent never had a threshold"
    caption = caption_of(drawings["guarantees"])
    assert "risk over tokens, conformal over prompts, ltt over prompts" in caption
    assert "Infeasible in some (a): ltt at 1\N{NO-BREAK SPACE}% in 40% of them" in caption


def test_attenuation_bars_are_the_stored_figures_by_rising_k(drawings: dict[str, Drawing]) -> None:
    left, right = drawings["attenuation"].axes
    assert values_of(right.containers[0]) == [-0.01, 0.0, 0.03]
    expected = [0.5 * (k / (k + 2)) ** 0.5 + gap for k, gap in ((5, -0.01), (20, 0), (100, 0.03))]
    assert values_of(left.containers[0]) == pytest.approx(expected)
    caption = caption_of(drawings["attenuation"])
    assert "2 of 3 intervals contain 0" in caption, "the gap of 0.03 with half-width 0.02 does not"
    assert "n = 20 prompts, 640 tokens" in caption


def test_estimators_are_drawn_by_their_stored_curves(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    left, right = drawings["estimators"].axes
    for line, bars, entry in zip(
        left.lines, right.containers, loaded.calibration.estimators, strict=False
    ):
        assert line.get_label() == entry.label
        assert line.get_ydata() == pytest.approx(100 * np.array(entry.skip_rate))
        assert values_of(bars) == pytest.approx(
            [100 * float(figure.value or 0) for figure in entry.skip_rate_at_risk.values()]
        )


def test_truncation_shows_the_rerun_of_its_own_point(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    labels = drawings["truncation"].axes[1].get_legend_handles_labels()[1]
    assert [label.partition(":")[0] for label in labels] == ["predicted", "measured"]
    assert "median 31.6" in labels[0], "log-uniform from 1 to 1000"
    assert loaded.derivation is not None
    assert loaded.derivation.truncation is not None
    other = loaded.derivation.truncation.model_copy(update={"online_point": "cu-hlm-online/risk-9"})
    assert truncation.measured_sizes(loaded, other) is None
    bare = changed(loaded, truncation=other.model_copy(update={"online": None}))
    with styled():
        assert len(drawn_by(truncation, bare).axes) == 1


def test_both_policies_that_send_next_to_nothing_are_named(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    """In every comparison of payload and bias."""
    plane = drawings["payload_bias"].axes[0]
    both = {"residual verification\n(r-hlm)", "coupled draws\n(coupled)"}
    assert both <= set(plane.get_legend_handles_labels()[1])
    labels = [text.get_text() for text in drawings["throughput"].axes[1].get_legend().texts]
    assert set(labels) == {loaded.legend(entry[0]) for entry in POLICIES}
    assert "U-HLM" in labels, "a label that says the name says it once"


def test_curves_that_coincide_are_one_with_all_names(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    """Throughputs of this run follow the length of the name: three have 3 letters, two have 5."""
    left, right = drawings["throughput"].axes
    along = [line for line in left.lines if len(line.get_xdata()) > 10]
    assert len(along) == len({len(entry[0]) for entry in POLICIES})
    handles, labels = right.get_legend_handles_labels()
    looks = {label: (handle.get_linestyle(), handle.get_marker(), handle.get_markerfacecolor())
             for handle, label in zip(handles, labels, strict=True)}  # fmt: skip
    own, other = looks["U-HLM"], looks["residual verification\n(r-hlm)"]
    assert own[0] == other[0], "one line"
    assert own[1:] != other[1:], "reruns keep their markers"
    with styled():
        bare = drawn_by(throughput, replace(loaded, validation=None)).axes[1]
    labels = bare.get_legend_handles_labels()[1]
    assert labels[0] == "device alone (slm)\nserver alone (llm)\nHLM"
    assert "U-HLM\nresidual verification (r-hlm)" in labels
    plane = drawings["payload_bias"].axes[0]
    paths = [line for line in plane.lines if len(line.get_xdata()) == 101]
    assert len(paths) == sum(entry[2] for entry in POLICIES) - 1
    caption = caption_of(drawings["payload_bias"])
    assert "Those of U-HLM and UI-HLM coincide: drawn as one." in caption


@pytest.mark.parametrize(
    ("shift", "as_one"), [(0.0, True), (0.4 * COINCIDE, True), (2.5 * COINCIDE, False)]
)
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_lines_are_one_if_no_eye_tells_them_apart(shift: float, as_one: bool, scale: str) -> None:
    """On an axis from 1 to 100, whose hundredth is 0.99, or a factor of 10**0.02."""
    with styled():
        _, ((left, right),) = new_figure(1, 2, 3.0)
        for axes in (left, right):
            axes.set(xlim=(0, 1), ylim=(1, 100), yscale=scale)
    x = np.linspace(0, 1, 50)
    fine = np.linspace(0, 1, 173)  # other places of the same line
    height = 10**shift if scale == "log" else 0.0

    def line(axes: Any, at: np.ndarray, moved: bool) -> Any:
        y = 3 + 20 * at
        if moved:
            y = y * height**2 if scale == "log" else y + 99 * shift
        return axes.plot(at, y)[0]

    first = [line(left, x, False), line(left, fine, True)]
    assert coinciding(first) == ([[0, 1]] if as_one else [[0], [1]])
    apart = [right.plot(x, 3 + 20 * x)[0], right.plot(x, 60 - 20 * x)[0]]
    assert coinciding(first, apart) == [[0], [1]], "in every panel, or not at all"


def test_upright_lines_coincide_too() -> None:
    """A payload that is always the same is an upright line, of however many points."""
    with styled():
        _, ((axes,),) = new_figure(1, 1, 3.0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
    lines = [axes.plot(np.full(n, at), np.linspace(0, 1, n))[0]
             for n, at in ((5, 0.5), (50, 0.5), (5, 0.6))]  # fmt: skip
    assert coinciding(lines) == [[0, 1], [2]]


def test_payload_axis_has_a_place_for_zero(drawings: dict[str, Drawing]) -> None:
    plane = drawings["payload_bias"].axes[0]
    assert plane.get_xscale() == "symlog"
    assert plane.get_xlim()[0] < 0 < plane.get_xlim()[1]
    assert 0.0 in plane.get_xticks()
    assert plane.xaxis.get_major_formatter()(0.0, 0) == "0"


def test_payload_points_are_predictions_and_reruns(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    points = payload_bias.plane_points(loaded)
    assert not any(point.rule == "risk-prone" for point in points), "skips all, as the device alone"
    plane = drawings["payload_bias"].axes[0]
    measured = {(float(b.lines[0].get_xdata()[0]), values_of(b)[0]) for b in plane.containers}
    assert measured == {
        tuple(float(loaded.measured(point)[m].measured.value or 0.0) for m in payload_bias.METRICS)
        for point in points
    }


def test_cost_bars_are_the_predictions_and_markers_the_reruns(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    axes = drawings["costs"].axes
    for axis, metric in zip(axes, (costs.THROUGHPUT, costs.ENERGY), strict=True):
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == [point.predicted[metric].value for point in loaded.compared]
        markers = [
            float(line.get_xdata()[0]) for line in axis.lines
            if len(line.get_xdata()) == 1 and line.get_marker() not in ("|", "None")
        ]  # fmt: skip
        stored = [loaded.measured(point)[metric].measured.value for point in loaded.compared]
        assert markers == pytest.approx(stored)
    assert "Link wifi, profile measured" in caption_of(drawings["costs"])


def test_payload_lines_are_the_stored_quantiles(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    assert loaded.derivation is not None
    lines = [line for line in drawings["payload_sizes"].axes[0].lines if len(line.get_xdata()) > 2]
    drawn = {tuple(line.get_xdata()[1:]) for line in lines}
    assert drawn == {one.bits.quantiles for one in loaded.derivation.payloads}
    told = payload_sizes.answer(loaded)
    assert told.startswith("It differs most with CU-HLM, online k: from 16 to 16,000 bit")
    assert payload_sizes.figure(changed(loaded, payloads=())) is None


def test_answers_lie_at_the_skip_rates_of_their_points(loaded: LoadedRun) -> None:
    plane = drawn_by(skipping, loaded).axes[0]
    known = [p for members in answers.budget_points(loaded).values() for p in members]
    stored = {(p.predicted["skip_rate"].value, p.predicted[answers.METRIC].value) for p in known}
    hollow = {
        (float(x), float(y))
        for bars in plane.containers
        if bars.lines[0].get_markerfacecolor() == "white"
        for x, y in zip(*bars.lines[0].get_data(), strict=True)
    }
    assert hollow == stored


def over_link(loaded: LoadedRun, link: Link) -> LoadedRun:
    """The run derived for that link, its curves the same numbers along the link's own sweep."""
    assert loaded.derivation is not None
    assert loaded.derivation.sweep is not None
    grid, quantity = link.sweep(), link.quantity

    def moved(means: Curve) -> Curve:
        ends = {name: getattr(means, name)[: len(grid)] for name in ("value", "low", "high")}
        return Curve(grid=grid, **ends)

    series = tuple(
        one.model_copy(update={name: moved(getattr(one, name)) for name in throughput.PANELS})
        for one in loaded.derivation.sweep.series
    )
    sweep = LinkSweep(
        rule="risk-0.02", quantity=quantity.name, unit=quantity.unit, spacing=quantity.spacing,
        own=link.amount, grid=grid, series=series,
    )  # fmt: skip
    bare = replace(loaded, validation=None)
    return changed(bare, sweep=sweep, link={"name": "field", **link_to_dict(link)})


@pytest.mark.parametrize(
    ("link", "label", "scale", "told"),
    [
        (AwgnLink(2e7, 20.0, 5.0), "uplink SNR (dB)", "linear",
         "AWGN link of 20 MHz, at capacity, the downlink as the uplink, round trip 5 ms"),
        (ErgodicRayleighLink(5e6, 12.0), "mean uplink SNR (dB)", "linear",
         "Rayleigh link of 5 MHz, at its ergodic rate"),
        (RayleighOutageLink(5e6, 10.0, 2e6), "mean uplink SNR (dB)", "linear",
         "Rayleigh link of 5 MHz with outage, at a fixed 2 Mbit/s"),
        (RateLink(3e6, 20e6, 30.0), "uplink rate (bit/s)", "log",
         "constant rate, the downlink at 20 Mbit/s throughout, round trip 30 ms"),
        (TraceLink((1e6, 0.0, 2e6)), "mean uplink rate (bit/s)", "log",
         "trace of 3 rates, all scaled alike, the downlink as the uplink"),
    ],
    ids=LINK_MODELS,
)  # fmt: skip
def test_the_throughput_figure_is_of_any_link(
    loaded: LoadedRun, link: Link, label: str, scale: str, told: str
) -> None:
    with styled():
        drawing = drawn_by(throughput, over_link(loaded, link))
    for axes in drawing.axes:
        assert axes.get_xlabel() == label
        assert axes.get_xscale() == scale
        assert axes.get_xlim() == pytest.approx((link.sweep()[0], link.sweep()[-1]))
        (grey,) = (line for line in axes.lines if len(set(line.get_xdata())) == 1)
        assert grey.get_color() == GREY
        assert set(grey.get_xdata()) == {link.amount}
    said = caption_of(drawing).replace(NBSP, " ")
    assert told in said
    own = {"linear": f"{link.amount:g} dB", "log": f"{link.amount / 1e6:g} Mbit/s"}[scale]
    assert f"Grey line: {own}, the link of the derivation." in said


def test_the_answer_names_the_ends_of_the_sweep(loaded: LoadedRun) -> None:
    said = throughput.answer(over_link(loaded, RateLink(1e6))).replace(NBSP, " ")
    assert re.search(r"token/s at 33\.3 kbit/s \(.+\) and .+ token/s at 30 Mbit/s \(", said)
    assert "token/s at −15 dB" in throughput.answer(loaded).replace(NBSP, " ")


def test_throughput_markers_lie_on_the_rerun_of_that_rule(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    assert loaded.derivation is not None
    assert loaded.derivation.sweep is not None
    left, right = drawings["throughput"].axes
    for axis, metric in ((left, "throughput_tok_s"), (right, "mean_throughput_tok_s")):
        for bars, series in zip(axis.containers, loaded.derivation.sweep.series, strict=True):
            found = throughput.measured_series(loaded, series)
            assert found is not None
            along = getattr(found, metric)
            at = bars.lines[0].get_xdata()
            assert len(at) == throughput.NUM_MARKERS
            assert values_of(bars) == pytest.approx(np.interp(at, along.grid, along.value))
    num = len(loaded.derivation.sweep.grid)
    places = [throughput.marker_places(num, share) for share in np.linspace(0, 0.99, 9)]
    assert 0 <= min(map(min, places)) <= max(map(max, places)) < num


def test_importance_dots_are_the_stored_decisions(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    assert loaded.derivation is not None
    example = loaded.derivation.importance_example
    assert example is not None
    axes = drawings["attention"].axes[2]
    full, hollow = (line for line in axes.lines if line.get_linestyle() == "None")
    assert len(full.get_xdata()) == sum(example.important)
    assert len(hollow.get_xdata()) == len(example.step) - sum(example.important)
    with styled():
        assert len(drawn_by(attention, replace(loaded, **BARE)).axes) == 2, "nothing was derived"


def test_measured_cell_is_the_rerun_of_that_setting(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    assert loaded.derivation is not None
    plane = loaded.derivation.importance_plane
    assert plane is not None
    assert list(importance_plane.measured_cells(loaded, plane)) == [
        (KS.index(16), GAMMAS.index(1.0))
    ]
    assert [len(axis.patches) for axis in drawings["importance_plane"].axes] == [1] * 4
    moved = plane.model_copy(update={"uncertainty_threshold": 0.1})
    assert importance_plane.measured_cells(loaded, moved) == {}, "another threshold, another plane"
    texts = {text.get_text() for text in drawings["importance_plane"].axes[3].texts}
    assert {"6.00", "3.00", "1.50"} <= texts


def test_every_judged_cell_is_drawn_once(loaded: LoadedRun, drawings: dict[str, Drawing]) -> None:
    drawn = [
        line for axes in drawings["validation"].axes for line in axes.lines
        if line.get_linestyle() == "None"
    ]  # fmt: skip
    assert sum(len(line.get_xdata()) for line in drawn) == len(loaded.cells)
    crosses = sum(len(line.get_xdata()) for line in drawn if line.get_marker() == "X")
    assert crosses == sum(not cell.covered for cell in loaded.cells) > 0


def test_the_longest_title_fits_in_the_last_column(loaded: LoadedRun) -> None:
    assert loaded.validation is not None
    longest = max(METRIC_LABELS, key=lambda metric: len(METRIC_LABELS[metric]))
    order = [*(metric for metric in METRIC_LABELS if metric != longest)][:3]
    point = next(cell for cell in loaded.cells if cell.policy == "u-hlm")
    cells = tuple(point.model_copy(update={"metric": metric}) for metric in (*order, longest))
    few = replace(loaded, validation=loaded.validation.model_copy(update={"cells": cells}))
    with styled():
        assert_words_fit(drawn_by(validation, few))


def test_covered_cells_and_only_they_lie_in_the_grey_band(loaded: LoadedRun) -> None:
    for cell in loaded.cells:
        assert (abs(validation.normalised_error(cell)) <= 1 + 1e-9) == cell.covered


def test_normalised_error_takes_the_side_of_the_measurement(loaded: LoadedRun) -> None:
    def error(predicted: Figure, measured: float) -> float:
        changes = {"predicted": predicted, "measured": Figure(value=measured)}
        return validation.normalised_error(loaded.cells[0].model_copy(update=changes))

    wide = Figure(value=1.0, low=0.5, high=3.0)
    assert error(wide, 2.0) == pytest.approx(0.5)
    assert error(wide, 0.0) == pytest.approx(-2.0)
    fixed = Figure(value=1.0, low=1.0, high=1.0)
    assert error(fixed, 2.0) == np.inf
    assert error(fixed, 1.0) == 0.0


def test_shifts_with_an_interval_without_zero_are_crosses(
    loaded: LoadedRun, drawings: dict[str, Drawing]
) -> None:
    rows = context_shift.shift_rows(loaded)
    away = sum(excludes_zero(row.below_threshold) for row in rows)
    assert 0 < away < len(rows)
    first = drawings["context_shift"].axes[0]
    crosses = [bars for bars in first.containers if bars.lines[0].get_marker() == "X"]
    assert [len(bars.lines[0].get_xdata()) for bars in crosses] == [away]
    assert f"of {len(rows)} reruns (a) {away}" in caption_of(drawings["context_shift"])


def test_captions_quote_the_confidence_that_their_intervals_have(loaded: LoadedRun) -> None:
    """Derived at 90 %, calibrated at 95 %: each figure says its own."""
    other = changed(loaded, confidence=0.9)
    expected = {"relation": "95%", "estimators": "95%", "thresholds": "90%", "payload_bias": "90%",
                "truncation": "90%"}  # fmt: skip
    with styled():
        for name, drawing in draw.figures(other):
            if name in expected:
                assert isinstance(drawing, Drawing)
                assert f"{expected.pop(name)} intervals, clustered" in caption_of(drawing)
    assert not expected, "a figure was not looked at"


def test_a_pair_that_never_rejects_is_drawn(loaded: LoadedRun) -> None:
    """All risks are zero: no axis collapses, which Matplotlib would warn of."""
    assert loaded.derivation is not None
    assert loaded.derivation.thresholds is not None
    assert loaded.derivation.truncation is not None
    derivation = loaded.derivation
    zero = fig(0.0)

    def flat(means: Curve) -> Curve:
        nothing = tuple(0.0 for _ in means.grid)
        return Curve(grid=means.grid, value=nothing, low=nothing, high=nothing)

    agreeing = changed(
        replace(loaded, validation=None),
        operating_points=tuple(
            point.model_copy(
                update={"predicted": point.predicted | {"rejection_risk": zero, "tv_bias": zero}}
            )
            for point in loaded.feasible
        ),
        thresholds=derivation.thresholds.model_copy(
            update={"risk": flat(derivation.thresholds.risk)}
        ),
        truncation=derivation.truncation.model_copy(
            update={"exact": flat(derivation.truncation.exact)}
        ),
        paths=(),
    )
    fit = agreeing.calibration.fit.model_copy(update={"mean_rejection": zero})
    calibration = agreeing.calibration.model_copy(update={"fit": fit})
    with styled():
        for module in (relation, thresholds, estimators, truncation, payload_bias):
            drawing = drawn_by(module, replace(agreeing, calibration=calibration))
            drawing.canvas.draw()


# What a run lacks


def test_each_missing_figure_names_the_command_that_makes_it(loaded: LoadedRun) -> None:
    """One line a figure: what is missing, and what to run."""
    with styled():
        found = dict(draw.figures(replace(loaded, **BARE)))
    lines = {name: drawing for name, drawing in found.items() if isinstance(drawing, str)}
    commands = {
        "attenuation": "attenuation", "answers": "derive", "guarantees": "guarantees",
        "thresholds": "derive", "skipping": "derive", "payload_sizes": "derive", "costs": "derive",
        "truncation": "derive", "payload_bias": "derive", "throughput": "derive",
        "importance_plane": "derive", "validation": "validate", "context_shift": "validate",
    }  # fmt: skip
    assert lines.keys() == commands.keys()
    for name, command in commands.items():
        assert f"`hlm {command} RUN`" in lines[name]
        assert "\n" not in lines[name]
    named = draw.lack(replace(loaded, validation=None, name="lte"), validation)
    assert "validation.json of derivation lte" in named


def test_a_part_that_a_derivation_lacks_is_said(loaded: LoadedRun) -> None:
    """A minimal trace: no truncation, no attention, no plane."""
    calibration = loaded.calibration.model_copy(update={"attention": None})
    bare = changed(
        replace(loaded, calibration=calibration),
        truncation=None, importance_plane=None, sweep=None, thresholds=None,
    )  # fmt: skip
    with styled():
        found = dict(draw.figures(bare))
    lines = {name for name, drawing in found.items() if isinstance(drawing, str)}
    assert lines == {
        "truncation", "attention", "importance_plane", "throughput", "thresholds", "costs"
    }  # fmt: skip
    assert "--trace full" in str(found["truncation"])


def test_only_what_was_rerun_is_shown_if_anything_was(loaded: LoadedRun) -> None:
    assert loaded.validation is not None
    assert {point.rule for point in loaded.shown} == {
        "none", "risk-0.01", "risk-0.02", "risk-0.05"
    }  # fmt: skip
    assert replace(loaded, validation=None).shown == loaded.feasible
    few = tuple(cell for cell in loaded.cells if cell.policy == "r-hlm")
    other = replace(loaded, validation=loaded.validation.model_copy(update={"cells": few}))
    assert {point.policy for point in other.shown} == {"r-hlm"}


def test_cells_of_an_earlier_derivation_are_not_shown_as_current(loaded: LoadedRun) -> None:
    points = list(loaded.points)
    place = next(i for i, p in enumerate(points) if p.key == "u-hlm/risk-0.02")
    moved = points[place].predicted | {"skip_rate": fig(0.5)}
    points[place] = points[place].model_copy(update={"predicted": moved})
    other = changed(loaded, operating_points=tuple(points))
    assert other.outdated == (("u-hlm", "risk-0.02"),)
    assert other.measured(points[place]) == {}
    assert other.rerun_of(points[place]) is None
    assert loaded.outdated == ()


# Files


def test_draw_run_writes_every_format_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "PNG_DPI", 40)
    monkeypatch.setattr(draw, "MODULES", draw.MODULES[:3])  # the report's test renders all
    run = paper_records.write_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.iterdir()}
    output, told = tmp_path / "out", list[object]()
    written = draw.draw_run(run, output, told.append)
    names = {f"{name}.{kind}" for name in draw.figure_names() for kind in ("png", "pdf")}
    assert {path.name for path in written} == names | {
        "main_table.md", "main_table.csv", "audit_table.md"
    }  # fmt: skip
    assert {path.name for path in output.iterdir()} == {path.name for path in written}
    assert told == [f"{name}: drawn" for name in draw.figure_names()]
    for path in written:
        head = path.read_bytes()[:8]
        if path.suffix == ".png":
            assert head == b"\x89PNG\r\n\x1a\n"
        if path.suffix == ".pdf":
            assert head.startswith(b"%PDF")
    assert {path: path.read_bytes() for path in run.iterdir()} == before, "figures read, only"


def test_figures_for_a_paper_have_their_words_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.5 inches of PDF, which is 252 points, without a title; and the words without loss."""
    monkeypatch.setattr(draw, "PNG_DPI", 40)
    monkeypatch.setattr(draw, "MODULES", (relation,))
    run = paper_records.write_run(tmp_path / "run")
    output = tmp_path / "paper"
    written = {path.name for path in draw.draw_run(run, output, paper=1)}
    assert {"relation.png", "relation.pdf", "relation.txt"} <= written
    title, caption = (output / "relation.txt").read_text(encoding="utf-8").strip().split("\n\n")
    with styled():
        drawing = drawn_by(relation, load_run(run))
    assert (title, caption) == (question_of(drawing), caption_of(drawing))
    box = re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+) ", (output / "relation.pdf").read_bytes())
    assert box is not None
    assert float(box[1]) == pytest.approx(252)
    monkeypatch.setattr(draw, "MODULES", (attenuation,))
    (output / "attenuation.txt").write_text("of an earlier drawing")
    (run / "attenuation.json").unlink()
    draw.draw_run(run, output, paper=1)
    assert not (output / "attenuation.txt").exists()


@pytest.fixture
def stub_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built, but not rendered: that is slow, and other tests do it."""

    def save(drawn: Drawing, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"drawn")

    monkeypatch.setattr(draw, "save", save)


@pytest.mark.usefixtures("stub_save")
def test_without_validation_the_others_are_drawn(tmp_path: Path) -> None:
    run = paper_records.write_run(tmp_path / "run")
    (run / "validation.json").unlink()
    output, told = tmp_path / "out", list[object]()
    output.mkdir()
    outdated = output / "validation.png"
    outdated.write_bytes(b"of an earlier run")
    written = {path.name for path in draw.draw_run(run, output, told.append)}
    missing = {f"{name}.png" for name in draw.figure_names()} - written
    assert missing == {"validation.png", "context_shift.png"}
    assert not outdated.exists(), "an outdated figure must not stay among the new ones"
    assert sum(f"`hlm validate {run}`" in str(line) for line in told) == 2


@pytest.mark.usefixtures("stub_save")
def test_a_named_derivation_is_drawn_with_its_own_validation(tmp_path: Path) -> None:
    run = paper_records.write_run(tmp_path / "run")
    named = paper_records.derivation_record("lte", confidence=0.9)
    paper_records.write_record(run, named, "lte")
    assert load_run(run, "lte").validation is None, "the default one judged another derivation"
    judged = paper_records.validation_record(named, seed=7)
    paper_records.write_record(run, judged, "night")
    loaded = load_run(run, "lte")
    assert (loaded.name, loaded.validation_name) == ("lte", "night")
    assert loaded.derivation == named
    assert loaded.validation == judged
    assert load_run(run).validation_name == "default"
    with pytest.raises(UserError, match=r"operating_points\.5g\.json is missing"):
        draw.draw_run(run, tmp_path / "out", name="5g")


def test_no_calibration_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder"):
        draw.draw_run(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"calibration\.json is missing; run `hlm calibrate`"):
        draw.draw_run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_optional_file_is_one_clear_line(tmp_path: Path) -> None:
    run = paper_records.write_run(tmp_path / "run")
    (run / "guarantees.json").write_text("{")
    with pytest.raises(UserError, match=r"guarantees\.json is not valid JSON"):
        load_run(run)


# Whole answers


def test_answers_are_drawn_as_they_are_stored(loaded: LoadedRun) -> None:
    left, right = drawn_by(answers, loaded).axes
    assert loaded.derivation is not None
    stored = [one for one in loaded.derivation.answers if one.policy == "u-hlm"]
    lines = [line for line in left.lines if len(line.get_xdata()) > 1]
    drawn = [list(line.get_ydata()) for line in lines]
    assert drawn == [list(one.divergence.value) for one in stored]
    names = [text.get_text() for text in left.texts]
    assert names == ["1 %", "2 %", "5 %"]
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert any("coupled" in label for label in labels)
    assert not any("online" in label for label in labels)  # nothing is known of its answers
    assert "Upper bounds: coupled draws." in caption_of(drawn_by(answers, loaded))


def test_a_derivation_from_before_answers_has_no_such_figure(loaded: LoadedRun) -> None:
    assert answers.figure(changed(loaded, answers=())) is None
