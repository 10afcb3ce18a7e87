"""Do the outputs of a policy lead it into contexts unlike those it was predicted on?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import excludes_zero
from calibrate.run.records import ContextShift, ValidationRecord
from calibrate.run.records import Figure as Number
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "Do skipped tokens lead a policy into other contexts than the server's?"
NEEDS, LACKS = "validation", "no rerun has contexts that could differ from the server's"
PANELS = {
    "below_threshold": ("tokens below\nthe threshold", 100.0, "points"),
    "risk_below_threshold": ("rejection risk\nof those tokens", 100.0, "points"),
    "score": ("", 1.0, ""),
}
"""Title, scale and unit; those of a score are its own."""


def shift_rows(loaded: LoadedRun) -> list[ContextShift]:
    """Reruns with a shift that could be anything but 0, in the order they were validated."""
    rows = () if loaded.validation is None else loaded.validation.context_shift
    return [row for row in rows if any(_varies(getattr(row, key)) for key in PANELS)]


def _varies(number: Number) -> bool:
    return number.low is not None and number.high is not None and number.high > number.low


def figure(loaded: LoadedRun) -> Figure | None:
    """One row a rerun: what its contexts are like, less what those of the server's law are."""
    rows = shift_rows(loaded)
    if loaded.validation is None or not rows:
        return None
    drawn, axes = style.new_figure(1, len(PANELS), 1.0 + 0.19 * len(rows), share_y=True)
    height = np.arange(len(rows))
    for axis, (key, (label, scale, unit)), letter in zip(
        axes[0], PANELS.items(), "abc", strict=True
    ):
        numbers = [getattr(row, key) for row in rows]
        found = style.parts(numbers, scale)
        outside = np.array([excludes_zero(number) for number in numbers])
        axis.axvline(0, color="#9a9a9a", linewidth=0.8)
        for chosen, color, marker in (
            (~outside, style.BLUE, "o"),
            (outside, style.VERMILLION, "X"),
        ):
            if chosen.any():
                axis.errorbar(
                    found[0, chosen], height[chosen], xerr=style.error_lengths(found[:, chosen]),
                    fmt=marker, color=color, markersize=4.5, elinewidth=1.0,
                )  # fmt: skip
        if key == "score":
            label = f"mean of\n{_score(loaded)}"
        axis.set_xlabel(f"change ({unit or numbers[0].unit or 'dimensionless'})")
        axis.grid(visible=False, axis="y")
        style.panel_letter(axis, letter, label)
    axes[0, 0].set_yticks(height, [f"{row.policy}/{row.rule}" for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 0].set_ylabel("policy")
    return style.finish(drawn, QUESTION, _caption(loaded, loaded.validation, rows))


def _score(loaded: LoadedRun) -> str:
    derived = loaded.derivation
    return "the score" if derived is None else loaded.score_label(derived.request.score)


def _caption(loaded: LoadedRun, validation: ValidationRecord, rows: list[ContextShift]) -> str:
    away = [sum(excludes_zero(getattr(row, key)) for row in rows) for key in PANELS]
    return (
        f"{loaded.sample} {loaded.validation_sample} Each rerun's figure at its threshold, less "
        "that of the same threshold along a rerun whose outputs follow the server's law, as those "
        "of the calibration do; (a, b) in percentage points; docs/theory.md (37). Where the score "
        f"({_score(loaded)}) alone decides, (a) is the skip rate and (b) the risk "
        f"taken. Bars: {validation.confidence:.0%} intervals, paired and clustered by prompt"
        f"{', prompts by category' if validation.strata else ''}. Crosses: 0 is outside; of "
        f"{len(rows)} reruns (a) {away[0]}, (b) {away[1]}, (c) {away[2]}. All reruns share "
        "prompts, random numbers and the rerun they are held against, so their bars move "
        "together, and one in twenty leaves 0 by chance."
    )
