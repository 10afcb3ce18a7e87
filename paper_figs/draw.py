"""`hlm figures`: draw every figure and table that a run's results allow."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure

from calibrate.run.folder import DEFAULT_NAME, atomic_path, write_text
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
    wire,
)
from paper_figs.loaded import RECORDS, LoadedRun, load_run
from paper_figs.report.audit_table import write_audit
from paper_figs.report.tables import write_tables
from paper_figs.style import PNG_DPI, styled, take_words

SECTIONS: dict[str, tuple[ModuleType, ...]] = {
    "When does the device know that it should ask?": (relation, estimators, attenuation),
    "How much may be skipped?": (thresholds, guarantees, answers, skipping),
    "What does asking cost?": (
        payload_bias,
        payload_sizes,
        costs,
        throughput,
        truncation,
    ),
    "Does attention help?": (attention, importance_plane),
    "Did the predictions hold?": (validation, context_shift, wire),
}
"""What a reader asks, and the figures that answer, one a module."""
MODULES = tuple(module for modules in SECTIONS.values() for module in modules)

METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "ModDate": None}}


def figure_names() -> list[str]:
    """File names of the figures, without ending."""
    return [module.__name__.rpartition(".")[2] for module in MODULES]


def figures(loaded: LoadedRun) -> Iterator[tuple[str, Figure | str]]:
    """Every figure by name, or what the run lacks for it. Consume inside `styled()`."""
    for name, module in zip(figure_names(), MODULES, strict=True):
        yield name, module.figure(loaded) or lack(loaded, module)


def lack(loaded: LoadedRun, module: ModuleType) -> str:
    """Why a figure cannot be drawn, and the command that makes it possible, in one line."""
    kind = RECORDS[module.NEEDS]
    if getattr(loaded, module.NEEDS) is not None:
        return str(module.LACKS)
    of = "" if loaded.name == DEFAULT_NAME else f" of derivation {loaded.name}"
    return f"the run has no {kind.file_name}{of}; make it with `{kind.made_by} {loaded.run}`"


def draw_run(
    run: Path,
    output: Path,
    on_figure: Callable[[str], None] | None = None,
    name: str = DEFAULT_NAME,
    paper: int | None = None,
) -> list[Path]:
    """Draw a run's figures as PNG and PDF, and its tables as Markdown and CSV.

    The audit of the published numbers is among the tables; it is the same for every run.

    Parameters
    ----------
    run : Path
        A calibrated run; what was not derived or validated yet leaves its figures out.
    output : Path
        Folder for the files, made if need be. A figure of an earlier drawing that the run no
        longer allows is removed from it, so that nothing outdated stays among the new ones.
    on_figure : callable, optional
        Told one line about each figure.
    name : str
        Of the derivation to draw.
    paper : int, optional
        Columns of a paper that a figure is wide, 1 (3.5 inches) or 2 (7 inches). Then nothing but
        the axes is drawn, and title and caption stand in a text file beside each figure.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        If the run has no calibration, or no derivation of that name.
    """
    tell = on_figure or (lambda line: None)
    loaded = load_run(run, name)
    written: list[Path] = []
    with styled(paper or 2):
        for title, drawn in figures(loaded):
            paths = [output / f"{title}.{kind}" for kind in METADATA]
            words = output / f"{title}.txt"
            if isinstance(drawn, str):
                for path in (*paths, words):
                    path.unlink(missing_ok=True)
                tell(f"{title}: left out, {drawn}")
                continue
            if paper is not None:
                write_text(words, "\n\n".join(take_words(drawn)) + "\n")
                written.append(words)
            for path in paths:
                save(drawn, path)
                drawn.set_layout_engine("none")  # it was laid out once, for all formats
            written += paths
            tell(f"{title}: drawn")
    return [*written, *write_tables(loaded, output), write_audit(output)]


def save(drawn: Figure, path: Path) -> None:
    """Write a figure whole or not at all; the ending says in which format."""
    kind = path.suffix.removeprefix(".")
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=METADATA[kind])


def png_bytes(drawn: Figure) -> bytes:
    """A figure as PNG, for the report."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=PNG_DPI, metadata=METADATA["png"])
    return buffer.getvalue()
