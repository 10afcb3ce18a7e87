"""`hlm report`: a run as an article on one page: questions, answers, figures and their limits."""

from __future__ import annotations

import base64
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from calibrate.derive.presets import published_audit
from calibrate.run.figure import NO_VALUE, number_text
from calibrate.run.folder import DEFAULT_NAME, write_text
from calibrate.run.records import Provenance
from paper_figs.draw import SECTIONS, figure_names, figures, png_bytes
from paper_figs.loaded import LoadedRun, load_run
from paper_figs.report import audit_table
from paper_figs.report.page_tables import PageTable, section_tables
from paper_figs.report.verdict import headline, verdict
from paper_figs.style import styled, take_words
from paper_figs.words import GLOSSARY


@dataclass(frozen=True)
class Image:
    """A PNG in base64, and its size in pixels."""

    png: str
    width: int
    height: int


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as the page holds it: its words, and images for a page and for a phone."""

    name: str
    question: str
    answer: str
    caption: str
    caveat: str
    wide: Image
    narrow: Image


@dataclass(frozen=True)
class Section:
    """What a reader asks, and what answers."""

    anchor: str
    title: str
    figures: tuple[EmbeddedFigure, ...]
    tables: tuple[PageTable, ...]
    left_out: dict[str, str]


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
    environment.filters["code"] = with_code
    return environment.get_template("page.html").render(
        title=f"When should the device ask? {loaded.pair_name}",
        subtitle=" ".join(part for part in (loaded.sample, loaded.validation_sample) if part),
        headline=headline(loaded),
        verdict=verdict(loaded),
        sections=sections(loaded),
        outdated=", ".join("/".join(key) for key in loaded.outdated),
        settings=settings_rows(loaded),
        audit=PageTable.of(
            "", audit_table.COLUMNS, map(audit_table.audit_cells, published_audit()[0]), num_text=6
        ),
        audit_note=audit_table.INTRODUCTION,
        glossary=GLOSSARY,
        provenance=provenance_rows(loaded),
    )


def with_code(text: str) -> Markup:
    """Text, escaped, with what stands between backticks as code."""
    parts = re.split("`([^`]+)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


def sections(loaded: LoadedRun) -> list[Section]:
    """Every section with its figures and tables, and why others of its figures are left out."""
    modules = dict(zip(figure_names(), (m for own in SECTIONS.values() for m in own), strict=True))
    wide, narrow = _drawn(loaded, 2), _drawn(loaded, 1)
    own_tables = section_tables(loaded)
    found = []
    for number, (title, members) in enumerate(SECTIONS.items(), 1):
        names = [name for name, module in modules.items() if module in members]
        embedded, left_out = [], {}
        for name in names:
            drawn = wide[name]
            if isinstance(drawn, str):
                left_out[name.replace("_", " ")] = drawn
                continue
            (question, caption), image = drawn
            embedded.append(
                EmbeddedFigure(
                    name=name, question=question, answer=modules[name].answer(loaded),
                    caption=caption, caveat=modules[name].CAVEAT, wide=image,
                    narrow=narrow[name][1],  # type: ignore[arg-type]
                )
            )  # fmt: skip
        tables = tuple(own_tables.get(title, ()))
        found.append(Section(f"part-{number}", title, tuple(embedded), tables, left_out))
    return found


def _drawn(loaded: LoadedRun, num_columns: int) -> dict[str, str | tuple[tuple[str, str], Image]]:
    """Words and image of every figure by its name, or why there is none.

    The width and height of a PNG stand at a fixed place in its header.
    """
    found: dict[str, str | tuple[tuple[str, str], Image]] = {}
    with styled(num_columns):
        for name, drawn in figures(loaded):
            if isinstance(drawn, str):
                found[name] = drawn
                continue
            words, data = take_words(drawn), png_bytes(drawn)
            png = base64.b64encode(data).decode("ascii")
            found[name] = words, Image(png, *struct.unpack(">II", data[16:24]))
    return found


def _used(loaded: LoadedRun) -> str:
    """How many prompts everything rests on, and of how many if not of all."""
    num, info = loaded.calibration.num_prompts, loaded.info
    more = "" if info is None or info.num_prompts <= num else f" of {info.num_prompts:,} decoded"
    return f"{num:,} used{more}"


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
        ("prompts", f"{settings.prompts}, {_used(loaded)}, "
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
        if not isinstance(value, list):
            return str(value)
        named = all(isinstance(one, str) for one in value)
        return " and ".join(value) if named else f"{len(value):,} values"

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
