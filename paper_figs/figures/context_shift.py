"""Do the outputs of a policy lead it into contexts unlike those it was predicted on?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import excludes_zero, number_text, scaled
from calibrate.run.records import ContextShift, ValidationRecord
from calibrate.run.records import Figure as Number
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "Do skipped tokens lead a policy into other contexts than the server's?"
NEEDS, LACKS = "validation", "no rerun has contexts that could differ from the server's"
CAVEAT = (
    "Only the pilot's policy was decoded to predict the shift; for the others the prediction is an "
    "assumption, which these reruns test."
)
PANELS = {"below_threshold": "tokens below\nthe threshold", "risk": "risk of\nthose tokens"}


def answer(loaded: LoadedRun) -> str:
    """The mean change of all gated reruns, beside the pilot's word."""
    pooled = None if loaded.validation is None else loaded.validation.pooled_shift
    if pooled is None:
        return "No rerun of a lossless policy is there to compare with."
    mean, said = (scaled(n, 100) for n in (pooled.below_threshold, pooled.predicted))
    text = (
        f"Over {pooled.num_reruns} gated reruns the share of tokens below the threshold changes by "
        f"{number_text(mean, 2)} points"
    )
    if pooled.p_value is not None:
        text += f" (no change: p = {pooled.p_value:.2g})"
    return text + ("." if said.value is None else f"; predicted was {number_text(said, 2)}.")


def shift_rows(loaded: LoadedRun) -> list[ContextShift]:
    """Reruns with a shift that could be anything but 0, in the order they were validated."""
    rows = () if loaded.validation is None else loaded.validation.context_shift
    return [row for row in rows if any(_varies(getattr(row, key)) for key in PANELS)]


def _varies(number: Number) -> bool:
    return number.low is not None and number.high is not None and number.high > number.low


def figure(loaded: LoadedRun) -> Figure | None:
    """One row a rerun, measured and as the pilot says; and all of them along the answer."""
    rows = shift_rows(loaded)
    if loaded.validation is None or not rows:
        return None
    drawn, axes = style.new_figure(1, 3, max(2.2, 1.0 + 0.19 * len(rows)))
    height = np.arange(len(rows))
    for axis, (key, label), letter in zip(axes[0], PANELS.items(), "ab", strict=False):
        axis.axvline(0, color="#9a9a9a", linewidth=0.8)
        _draw_rows(axis, [getattr(row, key) for row in rows], height)
        axis.set_xlabel("change (points)")
        axis.grid(visible=False, axis="y")
        axis.set_yticks(height, [f"{row.policy}/{row.rule}" for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        style.panel_letter(axis, letter, label)
    axes[0, 1].sharey(axes[0, 0])
    axes[0, 1].tick_params(labelleft=style.is_narrow())
    axes[0, 0].set_ylabel("policy")
    said = [row.predicted.value for row in rows]
    if all(value is not None for value in said):
        axes[0, 0].plot(
            100 * np.array(said, dtype=float), height, linestyle="none", marker="D", markersize=3.5,
            markerfacecolor="white", markeredgecolor="#333333",
        )  # fmt: skip
    _draw_steps(axes[0, 2], loaded.validation)
    return style.finish(drawn, QUESTION, _caption(loaded, loaded.validation, rows))


def _draw_rows(axis: Any, numbers: list[Number], height: np.ndarray) -> None:
    found = style.parts(numbers, 100.0)
    outside = np.array([excludes_zero(number) for number in numbers])
    for chosen, color, marker in ((~outside, style.BLUE, "o"), (outside, style.VERMILLION, "X")):
        if chosen.any():
            axis.errorbar(
                found[0, chosen], height[chosen], xerr=style.error_lengths(found[:, chosen]),
                fmt=marker, color=color, markersize=4.5, elinewidth=1.0,
            )  # fmt: skip


def _draw_steps(axis: Any, validation: ValidationRecord) -> None:
    """The mean shift of all reruns, by the part of the answer."""
    pooled = validation.pooled_shift
    axis.axhline(0, color="#9a9a9a", linewidth=0.8)
    if pooled is not None:
        found = style.parts(pooled.by_step.figures(), 100.0)
        axis.errorbar(
            pooled.by_step.grid, found[0], yerr=style.error_lengths(found),
            fmt="o-", color=style.BLUE, markersize=4.5, elinewidth=1.0,
        )  # fmt: skip
    axis.set_xlabel("from (token)")
    axis.set_ylabel("change (points)")
    style.panel_letter(axis, "c", "(a), along\nthe answer")


def _caption(loaded: LoadedRun, validation: ValidationRecord, rows: list[ContextShift]) -> str:
    away = [sum(excludes_zero(getattr(row, key)) for row in rows) for key in PANELS]
    pooled = validation.pooled_shift
    test = ""
    if pooled is not None and pooled.p_value is not None:
        mean = number_text(scaled(pooled.below_threshold, 100), 2)
        test = f" Mean of all {pooled.num_reruns}: {mean} points, p = {pooled.p_value:.2g}."
    return (
        f"{loaded.sample} {loaded.validation_sample} Tokens below each policy's threshold (where "
        "the score alone decides, those that it skips) on its own road, less those of the same "
        "threshold along outputs that follow the server's law, the mean of "
        f"{max(row.num_references for row in rows)} reruns of them on the same prompts; in "
        f"percentage points; docs/theory.md (37). Bars: {validation.confidence:.0%} intervals, "
        f"paired and clustered by prompt{', prompts by category' if validation.strata else ''}. "
        f"Crosses: 0 is outside; of {len(rows)} reruns (a) {away[0]}, (b) {away[1]}. Diamonds: the "
        f"shift that predictions count with, from the calibration's pilot.{test}"
    )
