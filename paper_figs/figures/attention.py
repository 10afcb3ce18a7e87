"""Does attention collapse along an answer, and what does the importance threshold do?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import ImportanceExample
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "Does the device's attention tell which tokens may be skipped whatever their u?"
NEEDS, LACKS = "calibration", "attention was not recorded; `hlm calibrate --trace full` does"
CAVEAT = (
    "Importance, and the reading of k and gamma, are our assumption; one answer stands for no "
    "other. That importance adds skips says nothing of their risk: see the plane."
)


def answer(loaded: LoadedRun) -> str:
    """How entropy moves along answers, and what importance would let skip in the longest one."""
    attention = loaded.calibration.attention
    if attention is None:
        return ""
    means = attention.normalised_entropy_by_step.figures()
    text = (
        f"The entropy of attention goes from {number_text(means[0])} at the first token to "
        f"{number_text(means[-1])} at the last, of 1 for uniform."
    )
    example = None if loaded.derivation is None else loaded.derivation.importance_example
    if example is None:
        return text
    num, total = sum(example.important), len(example.important)
    skips = (
        "importance lets nothing be skipped that uncertainty would not"
        if num == total
        else f"the other {total - num} may be skipped whatever their uncertainty"
    )
    return (
        f"{text} With {example.setting}, {num} of the {total} tokens of the longest answer count "
        f"as important: {skips}."
    )


def figure(loaded: LoadedRun) -> Figure | None:
    """Entropy and sink mass by position, and importance along one answer where it was derived."""
    attention = loaded.calibration.attention
    if attention is None:
        return None
    example = None if loaded.derivation is None else loaded.derivation.importance_example
    heights = (1.0, 1.0) if example is None else (1.0, 1.0, 1.3)
    drawn, axes = style.new_figure(len(heights), 1, 2.1 * sum(heights), height_ratios=heights)
    for axis, means, color, label, letter, title in (
        (axes[0, 0], attention.normalised_entropy_by_step, style.BLUE,
         "H / ln n\n(dimensionless)", "a",
         "entropy of the attention row: 0 is one token, 1 is uniform"),
        (axes[1, 0], attention.sink_by_step, style.GREEN,
         "sink mass\n(share of attention)", "b", "attention on position 0, the sink"),
    ):  # fmt: skip
        position = tuple(step + 1 for step in means.grid)
        style.band(
            axis, means.model_copy(update={"grid": position}), color, marker="o",
            markersize=2.5,
        )  # fmt: skip
        axis.set_ylabel(label)
        axis.set_xlabel("position in the answer (token)")
        style.panel_letter(axis, letter, title)
    caption = (
        f"{loaded.sample} Mean over heads and layers of the device model; the row of the query "
        f"that makes the draft, position 0 taken out of H. (a, b) Means over prompts; bands: "
        f"{loaded.interval_note}."
    )
    if example is not None:
        _draw_example(axes[2, 0], example)
        caption += (
            f" (c) The longest answer, prompt {example.prompt_id}; one answer, so no interval. "
            f"Importance is our assumption; variant, k and gamma: {example.setting}."
        )
    return style.finish(drawn, QUESTION, caption)


def _draw_example(axes: Any, example: ImportanceExample) -> None:
    position, importance = np.array(example.step) + 1, np.array(example.importance)
    important = np.array(example.important, dtype=bool)
    axes.plot(
        position, np.array(example.threshold, dtype=float), color=style.VERMILLION,
        linestyle=(0, (5, 1.6)), label="threshold I_th",
    )  # fmt: skip
    axes.plot(position, importance, color=style.BLACK, linewidth=1.0, label="importance I_t")
    for chosen, face, label in (
        (
            important,
            style.BLACK,
            f"important: I_t ≥ I_th ({np.mean(important):.0%} of this answer)",
        ),
        (~important, "white", "not important: skipped whatever u is"),
    ):
        axes.plot(
            position[chosen], importance[chosen], linestyle="none", marker="o", color=style.BLACK,
            markerfacecolor=face, markersize=4.5, label=label,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the answer (token)")
    axes.set_ylabel("attention weight\n(share of attention)")
    style.panel_letter(axes, "c", "importance and its threshold along one answer")
    style.outer_legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
