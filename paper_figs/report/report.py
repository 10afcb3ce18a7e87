"""`hlm report`: a run's settings, fit, predictions, reruns, figures and provenance on one page."""

from __future__ import annotations

import base64
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from calibrate.derive.operating_points import OperatingPoint
from calibrate.derive.presets import published_audit
from calibrate.run.folder import Figure as Number
from calibrate.run.folder import atomic_path
from calibrate.validate.comparison import Cell
from paper_figs.draw import figures, png_bytes
from paper_figs.figures.estimators import LABELS
from paper_figs.figures.throughput_snr import chosen_rule
from paper_figs.loaded import LoadedRun, load_run, metric_label, metric_names
from paper_figs.report import audit_table
from paper_figs.report.page import DEFINITIONS, PAGE
from paper_figs.report.tables import (
    COLUMNS,
    QUALITY_COLUMNS,
    figures_of,
    quality_cells,
    reasons,
    short_text,
)
from paper_figs.style import number_text, styled, take_words

REPORT_NAME = "report.html"
SECTIONS = (
    ("settings", "Settings"),
    ("fit", "Fit"),
    ("thresholds", "Thresholds"),
    ("validation", "Predictions against reruns"),
    ("quality", "Texts"),
    ("figures", "Figures"),
    ("audit", "The papers' numbers"),
    ("provenance", "Provenance"),
)
FIT_ROWS = (
    ("slope", "slope a", "rejection probability gained per unit of uncertainty"),
    ("intercept", "intercept b", "predicted rejection probability at u = 0"),
    ("correlation", "correlation, token by token", "how well u tells single rejections"),
    ("correlation_binned", "correlation of binned means", "how linear the average is"),
    ("curvature", "quadratic term", "coefficient of u² beside the line; 0 if it is a line"),
    ("mean_rejection", "mean rejection", "share of drafts that hlm rejects"),
    ("delta", "Δ", "share of drafts that can be rejected at all, P(y_d < x_d)"),
)


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as the page holds it.

    Attributes
    ----------
    name, question, caption : str
    png : str
        Base64.
    width, height : int
        Pixels at which it is shown.
    """

    name: str
    question: str
    caption: str
    png: str
    width: int
    height: int


def write_report(run: Path) -> Path:
    """Write RUN/report.html, whole or not at all, and return its path.

    Raises
    ------
    UserError, UsageError
        If there is no such run, or it has no calibration.
    """
    loaded = load_run(run)
    path = run / REPORT_NAME
    text = render(loaded)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(loaded: LoadedRun) -> str:
    """The page of a loaded run."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    definitions = environment.from_string(DEFINITIONS)

    def definition_list(rows: list[tuple[str, str]]) -> Markup:
        return Markup(definitions.render(rows=rows))

    embedded, left_out = embedded_figures(loaded)
    levels = (
        []
        if not loaded.calibration["estimators"]
        else list(loaded.calibration["estimators"][0]["skip_rate_at_risk"])
    )
    metrics, shown = metric_names(loaded.cells), loaded.shown
    return environment.from_string(PAGE).render(
        definition_list=definition_list,
        title=f"When should the device ask? {loaded.pair_name}",
        subtitle=" ".join(part for part in (loaded.sample, loaded.validation_sample) if part),
        sections=SECTIONS,
        findings=findings(loaded),
        settings=settings_rows(loaded),
        interval_note=loaded.interval_note,
        fit=[
            {"name": name, "value": number_text(Number(**loaded.calibration["fit"][key])),
             "meaning": meaning}
            for key, name, meaning in FIT_ROWS
        ],
        estimators=[_estimator_row(entry, levels) for entry in loaded.calibration["estimators"]],
        estimator_levels=[f"{100 * float(level):g} %" for level in levels],
        points=[_point_row(loaded, point) for point in shown],
        more_points=[_point_row(loaded, point) for point in loaded.feasible
                     if point not in shown],
        points_note=_points_note(loaded),
        point_columns=[column.title for column in COLUMNS],
        notes=reasons([point for point in loaded.points if point.reason]),
        coverage=loaded.coverage_note,
        outdated=", ".join(f"{policy}/{rule}" for policy, rule in loaded.outdated),
        matrix=_matrix(loaded.cells, metrics),
        matrix_columns=[metric_label(metric) for metric in metrics],
        by_metric=_by_metric(loaded.cells, metrics),
        cells=[_cell_row(cell) for cell in loaded.cells],
        quality=_quality_rows(loaded),
        quality_columns=[column.title for column in QUALITY_COLUMNS],
        audit=[audit_table.audit_cells(row) for row in published_audit()[0]],
        audit_columns=audit_table.COLUMNS,
        audit_note=audit_table.INTRODUCTION,
        figures=embedded,
        left_out=", ".join(left_out),
        provenance=provenance_rows(loaded),
    )  # fmt: skip


def embedded_figures(loaded: LoadedRun) -> tuple[list[EmbeddedFigure], list[str]]:
    """Figures of the run without their words, for the page sets them; and those left out."""
    embedded: list[EmbeddedFigure] = []
    left_out: list[str] = []
    with styled():
        for name, drawn in figures(loaded):
            if drawn is None:
                left_out.append(name.replace("_", " "))
                continue
            question, caption = take_words(drawn)
            data = png_bytes(drawn)
            width, height = struct.unpack(">II", data[16:24])  # of the PNG header
            png = base64.b64encode(data).decode("ascii")
            embedded.append(EmbeddedFigure(name, question, caption, png, width, height))
    return embedded, left_out


def findings(loaded: LoadedRun) -> list[str]:
    """The run in three or four sentences."""
    fit = loaded.calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    sign = "−" if intercept < 0 else "+"
    lines = [
        f"Fitted line: β = {slope:.3f} u {sign} {abs(intercept):.3f}. Correlation "
        f"{number_text(Number(**fit['correlation']), 2)} token by token, "
        f"{number_text(Number(**fit['correlation_binned']), 2)} for binned means."
    ]
    rule = chosen_rule(loaded)
    for point in loaded.feasible:
        if point.rule == rule and point.policy in ("u-hlm", "r-hlm"):
            lines.append(_point_sentence(loaded, point))
    num_infeasible = len(loaded.points) - len(loaded.feasible)
    if num_infeasible:
        lines.append(
            f"Infeasible on this calibration: {num_infeasible} of {len(loaded.points)} derived "
            "settings; the reasons are below."
        )
    lines.append(loaded.coverage_note or "Nothing was rerun yet: `hlm validate` does.")
    return lines


def _point_sentence(loaded: LoadedRun, point: OperatingPoint) -> str:
    by_metric = {column.metric: column for column in COLUMNS}

    def pair(metric: str, unit: str) -> str:
        predicted, measured = figures_of(loaded, point, by_metric[metric])
        gap = "\N{NO-BREAK SPACE}"
        text = f"{short_text(predicted)}{gap}{unit} predicted"
        return text if measured is None else f"{text}, {short_text(measured)}{gap}{unit} measured"

    return (
        f"{point.policy} at {point.rule} (u_th = {point.uncertainty_threshold.value:.3f}): skips "
        f"{pair('skip_rate', '%')}; output bias {pair('tv_bias', '%')}; uplink "
        f"{pair('uplink_bits_per_token', 'bit/token')}."
    )


def settings_rows(loaded: LoadedRun) -> list[tuple[str, str]]:
    """What was run and under which assumptions."""
    pair, settings = loaded.calibration["pair"], loaded.calibration["settings"]
    rows = [
        ("pair", str(pair["name"])),
        ("device model", str(pair["slm"]["label"])),
        ("server model", str(pair["llm"]["label"])),
        ("vocabulary", f"{loaded.vocab_size:,} tokens"),
        ("temperature", f"{settings['temperature']:g}"),
        ("prompts", f"{settings['prompts']}, {loaded.trace.num_prompts:,} used"),
        ("tokens a prompt", f"at most {settings['max_new_tokens']:,}"),
        ("seed", str(settings["seed"])),
        ("arithmetic", f"{pair['dtype']} on {pair['device']}"),
    ]
    timings = loaded.calibration.get("timings") or {}
    rows += [
        (name, f"{number_text(Number(**timings[key]), 2)} ms a token")
        for key, name in (
            ("t_slm_ms", "device model, measured"),
            ("t_llm_ms", "server model, measured"),
            ("t_uncertainty_ms", "uncertainty, measured"),
        )
        if key in timings
    ]
    if loaded.derived is not None:
        rows += [
            ("link", _assumptions(loaded.derived["link"])),
            ("device profile", _assumptions(loaded.derived["profile"])),
            ("payload accounting", str(loaded.derived["accounting"])),
            ("confidence", f"{loaded.derived['confidence']:.0%}"),
        ]
    return rows


def _assumptions(entry: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return " and ".join(value) if isinstance(value, list) else str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in entry.items())


def provenance_rows(loaded: LoadedRun) -> list[tuple[str, str]]:
    """How the results came to be."""
    pair, info = loaded.calibration["pair"], loaded.info or {}
    rows = []
    for side, name in (("slm", "device model"), ("llm", "server model")):
        model = pair[side]
        rows.append((name, str(model["label"])))
        rows.append((f"{name}, sha256", str(model["sha256"] or "–")))
    rows += [
        ("calibrated by", shlex.join(info.get("command") or []) or "–"),
        ("revision", str(info.get("revision") or "–")),
        ("versions", ", ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items()) or "–"),
        ("decoding", f"{info['wall_s']:.0f} s" if "wall_s" in info else "–"),
    ]
    if loaded.validation is not None:
        rows += [
            ("validated by", shlex.join(loaded.validation.get("command") or []) or "–"),
            ("validation seed", str(loaded.validation["seed"])),
            ("validation revision", str(loaded.validation.get("revision") or "–")),
        ]
    return rows


def _estimator_row(entry: dict[str, Any], levels: list[str]) -> dict[str, Any]:
    numbers = [entry["correlation"], entry["auroc"]]
    numbers += [entry["skip_rate_at_risk"][level] for level in levels]
    name = LABELS.get(entry["name"], entry["name"].replace("_", " "))
    return {"name": name, "numbers": [number_text(Number(**number)) for number in numbers]}


def _point_row(loaded: LoadedRun, point: OperatingPoint) -> dict[str, Any]:
    threshold = point.uncertainty_threshold
    return {
        "policy": point.policy,
        "rule": point.rule,
        "threshold": "–" if threshold.value is None else number_text(threshold),
        "numbers": [short_text(figures_of(loaded, point, column)[0]) for column in COLUMNS],
    }


def _quality_rows(loaded: LoadedRun) -> list[dict[str, Any]]:
    """Text scores of the current points that have any."""
    rows = []
    for point in loaded.feasible:
        scores = quality_cells(loaded, point)
        if any(score is not None for score in scores):
            numbers = [short_text(score) for score in scores]
            rows.append({"policy": point.policy, "rule": point.rule, "numbers": numbers})
    return rows


def _points_note(loaded: LoadedRun) -> str:
    return (
        f"u_th with its interval, where its rule has one; ± is the half-width of "
        f"{loaded.derived_note}, for the calibration sampling alone."
    )


def _matrix(cells: tuple[Cell, ...], metrics: list[str]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.policy, cell.rule), {})[cell.metric] = cell
    return [
        {
            "policy": policy,
            "rule": rule,
            "cells": [_brief(found[m]) if m in found else None for m in metrics],
        }
        for (policy, rule), found in rows.items()
    ]


def _brief(cell: Cell) -> dict[str, Any]:
    return {
        "covered": cell.covered,
        "measured": _four(cell.measured.value),
        "predicted": _four(cell.predicted.value),
    }


def _four(value: float | None) -> str:
    """Four digits, or as many as it takes for a whole number."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("-", "−")


def _by_metric(cells: tuple[Cell, ...], metrics: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": metric_label(metric),
            "covered": sum(bool(cell.covered) for cell in cells if cell.metric == metric),
            "total": sum(cell.metric == metric for cell in cells),
        }
        for metric in metrics
    ]


def _cell_row(cell: Cell) -> dict[str, Any]:
    return {
        "policy": cell.policy,
        "rule": cell.rule,
        "metric": metric_label(cell.metric),
        "predicted": _with_interval(cell.predicted),
        "measured": _with_interval(cell.measured),
        "covered": cell.covered,
    }


def _with_interval(number: Number) -> str:
    if number.low is None or number.high is None:
        return _four(number.value)
    return f"{_four(number.value)} [{_four(number.low)}, {_four(number.high)}]"
