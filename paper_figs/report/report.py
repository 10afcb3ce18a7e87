"""`hlm report`: a run's settings, fit, predictions, reruns, figures and provenance on one page."""

from __future__ import annotations

import base64
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from calibrate.derive.presets import published_audit
from calibrate.run.figure import NBSP, NO_VALUE, number_text
from calibrate.run.folder import DEFAULT_NAME, write_text
from calibrate.run.records import OperatingPoint, Provenance
from paper_figs.draw import figures, png_bytes
from paper_figs.loaded import LoadedRun, load_run, metric_label, metric_names
from paper_figs.report import audit_table, tables
from paper_figs.style import styled, take_words


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as the page holds it: words apart, the PNG in base64, its size in pixels."""

    name: str
    question: str
    caption: str
    png: str
    width: int
    height: int


def write_report(run: Path, name: str = DEFAULT_NAME) -> Path:
    """Write RUN/report.html, or RUN/report.NAME.html of a named derivation; return its path.

    Raises
    ------
    UserError, UsageError
        If there is no such run or derivation, or it has no calibration.
    """
    path = run / ("report.html" if name == DEFAULT_NAME else f"report.{name}.html")
    write_text(path, render(load_run(run, name)))
    return path


def render(loaded: LoadedRun) -> str:
    """The page of a loaded run."""
    environment = Environment(  # escaping, so that no name of a prompt or file becomes markup
        loader=PackageLoader("paper_figs", "report"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": number_text, "metric": metric_label}
    embedded, left_out = embedded_figures(loaded)
    estimators = loaded.calibration.estimators
    quality = [(point, tables.quality_texts(loaded, point)) for point in loaded.feasible]
    return environment.get_template("page.html").render(
        title=f"When should the device ask? {loaded.pair_name}",
        subtitle=" ".join(part for part in (loaded.sample, loaded.validation_sample) if part),
        findings=findings(loaded),
        loaded=loaded,
        settings=settings_rows(loaded),
        levels=list(estimators[0].skip_rate_at_risk) if estimators else [],
        more_points=[point for point in loaded.feasible if point not in loaded.shown],
        point_columns=[column.title for column in tables.COLUMNS],
        predicted_texts=tables.predicted_texts,
        notes=tables.reasons(point for point in loaded.points if point.reason),
        metrics=metric_names(loaded.cells),
        quality=[(point, texts) for point, texts in quality if set(texts) != {NO_VALUE}],
        quality_columns=[column.title for column in tables.QUALITY_COLUMNS],
        audit=[audit_table.audit_cells(row) for row in published_audit()[0]],
        audit_columns=audit_table.COLUMNS,
        audit_note=audit_table.INTRODUCTION,
        figures=embedded,
        left_out=left_out,
        provenance=provenance_rows(loaded),
    )


def embedded_figures(loaded: LoadedRun) -> tuple[list[EmbeddedFigure], dict[str, str]]:
    """Figures of the run without their words, for the page sets them; and why others are left out.

    The width and height of a PNG stand at a fixed place in its header.
    """
    embedded: list[EmbeddedFigure] = []
    left_out: dict[str, str] = {}
    with styled():
        for name, drawn in figures(loaded):
            if isinstance(drawn, str):
                left_out[name.replace("_", " ")] = drawn
                continue
            words = take_words(drawn)
            data = png_bytes(drawn)
            png = base64.b64encode(data).decode("ascii")
            embedded.append(EmbeddedFigure(name, *words, png, *struct.unpack(">II", data[16:24])))
    return embedded, left_out


def findings(loaded: LoadedRun) -> list[str]:
    """The run in a few sentences: the line, what sends most and least, and how reruns went."""
    fit = loaded.calibration.fit
    slope, intercept = float(fit.slope.value or 0.0), float(fit.intercept.value or 0.0)
    lines = [
        f"Fitted line: β = {slope:.3f} u {'−' if intercept < 0 else '+'} {abs(intercept):.3f}. "
        f"Correlation {number_text(fit.correlation, 2)} token by token, "
        f"{number_text(fit.correlation_binned, 2)} for binned means."
    ]
    snr = None if loaded.derivation is None else loaded.derivation.snr
    compared = [point for point in loaded.feasible if snr and point.rule == snr.rule]
    compared.sort(key=lambda point: point.predicted["uplink_bits_per_token"].value or 0.0)
    told = compared[:2] + compared[2:][-1:]  # the two that send least, and the most
    lines += [_point_sentence(loaded, point) for point in told]
    num_infeasible = len(loaded.points) - len(loaded.feasible)
    if num_infeasible:
        lines.append(
            f"Infeasible on this calibration: {num_infeasible} of {len(loaded.points)} derived "
            "settings; the tables.reasons are below."
        )
    lines.append(loaded.coverage_note or "Nothing was rerun yet: `hlm validate` does.")
    return lines


def _point_sentence(loaded: LoadedRun, point: OperatingPoint) -> str:
    by_metric = {column.metric: column for column in tables.COLUMNS}
    cells = loaded.measured(point)

    def pair(metric: str, unit: str) -> str:
        text = f"{by_metric[metric].text(point.predicted[metric])}{NBSP}{unit} predicted"
        if metric not in cells:
            return text
        return f"{text}, {by_metric[metric].text(cells[metric].measured)}{NBSP}{unit} measured"

    threshold = number_text(point.uncertainty_threshold, interval=False)
    return (
        f"{point.policy} at {point.rule} (u_th = {threshold}): skips {pair('skip_rate', '%')}; "
        f"output bias {pair('tv_bias', '%')}; uplink {pair('uplink_bits_per_token', 'bit/token')}."
    )


def settings_rows(loaded: LoadedRun) -> list[tuple[str, str]]:
    """What was run and under which assumptions."""
    pair, settings = loaded.calibration.pair, loaded.calibration.settings
    timings = loaded.calibration.timings
    rows = [
        ("pair", pair.name),
        ("device model", pair.slm.label),
        ("server model", pair.llm.label),
        ("vocabulary", f"{pair.vocab_size:,} tokens"),
        ("sampling", str(settings.sampling)),
        ("prompts", f"{settings.prompts}, {loaded.calibration.num_prompts:,} used, "
                    f"{'drawn at random' if settings.order == 'random' else 'in file order'}"),
        ("tokens a prompt", f"at most {settings.max_new_tokens:,}"),
        ("seed", str(settings.seed)),
        ("arithmetic", f"{pair.dtype} on {pair.device}"),
        ("device model, measured", f"{number_text(timings.t_slm_ms)} ms a token"),
        ("server model, measured", f"{number_text(timings.t_llm_ms)} ms a token"),
        ("uncertainty, measured", f"{number_text(timings.t_uncertainty_ms)} ms a token"),
    ]  # fmt: skip
    if loaded.derivation is not None:
        derivation = loaded.derivation
        rows += [
            ("derivation", derivation.name),
            ("gate on", loaded.score_label(derivation.request.score)),
            ("link", _assumptions(derivation.link)),
            ("device profile", _assumptions(derivation.profile)),
            ("payload accounting", derivation.accounting),
            ("confidence", f"{derivation.confidence:.0%}"),
        ]
    if loaded.validation is not None:
        rows += [
            (
                "validation",
                f"{loaded.validation_name}, of derivation {loaded.validation.derivation}",
            ),
            ("validation seed", str(loaded.validation.seed)),
        ]
    return rows


def _assumptions(entry: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return number_text(value, 4)
        return " and ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in entry.items())


def provenance_rows(loaded: LoadedRun) -> list[tuple[str, str]]:
    """How the results came to be: every stage's command, revision, and what it ran on."""
    pair, info = loaded.calibration.pair, loaded.info
    rows = [
        (f"{side}, sha256", f"{model.label}: {model.sha256 or NO_VALUE}")
        for side, model in (("device model", pair.slm), ("server model", pair.llm))
    ]
    if info is not None:
        versions = ", ".join(f"{k} {v}" for k, v in info.provenance.versions.items())
        rows += [("versions", versions), ("decoding", f"{number_text(info.wall_s)} s")]
    made: dict[str, Provenance | None] = {
        stage: None if record is None else record.provenance
        for stage, record in (
            ("calibrated", info), ("derived", loaded.derivation),
            ("validated", loaded.validation), ("guarantees", loaded.guarantees),
            ("attenuation", loaded.attenuation), ("texts scored", loaded.quality),
        )
    }  # fmt: skip
    return rows + [
        (stage, f"{shlex.join(own.command) or NO_VALUE} (revision {own.revision or NO_VALUE})")
        for stage, own in made.items()
        if own is not None
    ]
