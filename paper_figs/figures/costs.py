"""What does each policy cost on the derivation's own link and device?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import NBSP, NO_VALUE, number_text
from calibrate.run.records import OperatingPoint
from paper_figs import style
from paper_figs.loaded import LoadedRun, metric_label

QUESTION = "How fast and how frugal is each policy on this link and device?"
NEEDS, LACKS = "derivation", "no rule has gated policies to compare"
CAVEAT = (
    "Times and energies follow from counts, the link's model and the profile; no clock and no "
    "meter was read. Each policy has the server to itself here: how many devices one server "
    "carries stands in the tables."
)
THROUGHPUT, ENERGY = "throughput_tok_s", "energy_j_per_token"


def answer(loaded: LoadedRun) -> str:
    """The fastest gate and the most frugal one, beside the policies without a gate."""
    if not loaded.gates:
        return "No gated policies can be compared at one rule."

    def value(point: OperatingPoint, metric: str) -> float:
        return loaded.figure_of(point, metric).value or 0.0

    def told(best: OperatingPoint, metric: str, unit: str) -> str:
        alone = ", ".join(
            f"{loaded.label(p.policy)} {number_text(value(p, metric))}"
            for p in loaded.compared
            if p.score is None
        )
        number = number_text(loaded.figure_of(best, metric))
        return f"{loaded.label(best.policy)}, {number}{NBSP}{unit}; without a gate: {alone}"

    fast = max(loaded.gates, key=lambda point: value(point, THROUGHPUT))
    frugal = min(loaded.gates, key=lambda point: value(point, ENERGY))
    return (
        f"{_where(loaded)}: the fastest gated policy is {told(fast, THROUGHPUT, 'token/s')}. The "
        f"most frugal, device and server together, is {told(frugal, ENERGY, 'J/token')}."
    )


def _where(loaded: LoadedRun) -> str:
    """Link and profile by their names, files without their folders."""
    derivation = loaded.derivation
    if derivation is None:
        return ""
    link, profile = (
        Path(one.get("name", NO_VALUE)).name for one in (derivation.link, derivation.profile)
    )
    return f"Link {link}, profile {profile}"


def figure(loaded: LoadedRun) -> Figure | None:
    """Bars of throughput and energy, one a policy: predicted, with markers of reruns."""
    points = loaded.compared
    if loaded.derivation is None or not loaded.gates:
        return None
    drawn, axes = style.new_figure(1, 2, 1.0 + 0.26 * len(points), share_y=True)
    for axis, metric, letter in zip(axes[0], (THROUGHPUT, ENERGY), "ab", strict=True):
        _draw_bars(loaded, axis, points, metric)
        axis.set_xlabel(metric_label(metric))
        style.panel_letter(axis, letter, "faster is right" if letter == "a" else "less is left")
    axes[0, 0].set_yticks(range(len(points)), [loaded.label(p.policy) for p in points])
    axes[0, 0].set_ylim(len(points) - 0.5, -0.5)
    axes[0, 0].set_ylabel("policy")
    return style.finish(drawn, QUESTION, _caption(loaded))


def _draw_bars(
    loaded: LoadedRun, axis: Any, points: tuple[OperatingPoint, ...], metric: str
) -> None:
    place = np.arange(len(points))
    found = style.parts(point.predicted[metric] for point in points)
    colors = [loaded.style(point.policy).color for point in points]
    axis.barh(
        place, found[0], xerr=style.error_lengths(found), height=0.62, color=colors, alpha=0.45,
        error_kw={"elinewidth": 0.9, "capsize": 2},
    )  # fmt: skip
    for height, point in enumerate(points):
        cell = loaded.measured(point).get(metric)
        if cell is None:
            continue
        measured = style.parts([cell.measured])
        axis.errorbar(
            measured[0], [height], xerr=style.error_lengths(measured), elinewidth=0.9, capsize=1.5,
            markersize=4.5, zorder=4, **loaded.style(point.policy).filled_marker(),
        )  # fmt: skip
    axis.set_xlim(left=0)
    axis.grid(visible=False, axis="y")


def _caption(loaded: LoadedRun) -> str:
    derivation = loaded.derivation
    assumed = () if derivation is None else derivation.profile.get("assumed", ())
    reruns = (
        f" Markers: from the reruns' counts. {loaded.validation_sample}"
        if any(loaded.measured(point) for point in loaded.compared)
        else " No rerun of these points is stored."
    )
    told = f" Assumed, not measured: {', '.join(assumed)}." if assumed else ""
    accounting = "" if derivation is None else f" '{derivation.accounting}' accounting."
    return (
        f"{loaded.sample} {_where(loaded)}; gated policies at the rule {loaded.gates[0].rule}. "
        f"Bars: predicted, with {loaded.derived_note}.{reruns}{accounting}{told} Throughput is "
        "1 / mean token time."
    )
