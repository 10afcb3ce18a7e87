"""Does attention collapse along an answer, and what does the importance threshold do?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.decode.recording import topk_column
from hlmtheory.importance import RunningThreshold, topk_importance_threshold
from hlmtheory.policies import ImportanceSettings
from paper_figs.figures.curves import Curve, group_means
from paper_figs.loaded import LoadedRun
from paper_figs.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILLION,
    direct_legend,
    finish,
    new_figure,
    panel_letter,
)

QUESTION = "Does attention collapse along an answer, and which tokens count as important?"
COLUMNS = (
    "attention_entropy",
    "attention_sink",
    "context_attention",
    "num_attended",
    "topk_attention",
)


def importance_settings(loaded: LoadedRun) -> ImportanceSettings:
    """Those of the derived ui-hlm; the defaults where it was not derived."""
    policy = loaded.policy_at("ui-hlm", 0.5)
    if policy is None or policy.importance is None:
        return ImportanceSettings()
    return policy.importance


def normalised_entropy(loaded: LoadedRun) -> np.ndarray:
    """H / ln n of every token, n attended positions without the sink; NaN where n < 2."""
    trace = loaded.trace
    num_positions = trace["num_attended"].astype(np.float64) - 1.0
    wide = num_positions >= 2
    return np.where(
        wide, trace["attention_entropy"] / np.log(np.where(wide, num_positions, 2.0)), np.nan
    )


def example_rows(loaded: LoadedRun) -> np.ndarray:
    """Rows of the answer shown: the longest one, the first by id among equals."""
    lengths = np.bincount(loaded.trace.prompt_index, minlength=loaded.trace.num_prompts)
    return np.flatnonzero(loaded.trace.prompt_index == int(np.argmax(lengths)))


def importance_and_threshold(
    loaded: LoadedRun, rows: np.ndarray, settings: ImportanceSettings
) -> tuple[np.ndarray, np.ndarray]:
    """I_t and I_th along the rows of one answer; docs/theory.md, (31) and (32)."""
    trace = loaded.trace
    if settings.variant == "topk":
        importance = trace["topk_attention"][rows, topk_column(settings)]
        return importance, topk_importance_threshold(
            trace["attention_entropy"][rows], settings.gamma
        )
    importance = trace["context_attention"][rows]
    thresholds = np.full(len(rows), np.nan)  # none at the first step: every context counts
    running = RunningThreshold.start(importance[:1])
    for step in range(1, len(rows)):
        thresholds[step] = running.threshold(settings.k)[0]
        running = running.update(importance[step : step + 1], settings.gamma)
    return importance, thresholds


def figure(loaded: LoadedRun) -> Figure | None:
    """Entropy and sink mass by position, and importance along one answer."""
    if any(name not in loaded.trace for name in COLUMNS):
        return None
    drawn, axes = new_figure(3, 1, 6.9, height_ratios=(1.0, 1.0, 1.3))
    trace = loaded.trace
    for axis, values, color, label, letter, title in (
        (axes[0, 0], normalised_entropy(loaded), BLUE, "H / ln n\n(dimensionless)", "a",
         "entropy of the attention row: 0 is one token, 1 is uniform"),
        (axes[1, 0], trace["attention_sink"], GREEN, "sink mass\n(share of attention)", "b",
         "attention on position 0, the sink"),
    ):  # fmt: skip
        means = by_step(loaded, values)
        axis.fill_between(
            means.grid + 1, np.clip(means.low, 0, 1), np.clip(means.high, 0, 1), color=color,
            alpha=0.2, linewidth=0,
        )  # fmt: skip
        axis.plot(means.grid + 1, means.value, color=color, marker="o", markersize=2.5)
        axis.set_ylabel(label)
        axis.set_xlabel("position in the answer (token)")
        panel_letter(axis, letter, title)
    rows = example_rows(loaded)
    settings = importance_settings(loaded)
    _draw_example(loaded, axes[2, 0], rows, settings)
    name = trace.prompt_ids[int(trace.prompt_index[rows[0]])]
    caption = (
        f"{loaded.sample} Mean over heads and layers of the device model; the row of the query "
        f"that makes the draft, position 0 taken out of H. (a, b) Means over prompts; bands: "
        f"{loaded.interval_note}. (c) The longest answer, prompt {name}; one answer, so no "
        f"interval. Importance is our assumption; variant, k and gamma: {settings.variant}, "
        f"{settings.k:g}, {settings.gamma:g}."
    )
    return finish(drawn, QUESTION, caption)


def by_step(loaded: LoadedRun, values: np.ndarray) -> Curve:
    """Means by position in the answer."""
    trace = loaded.trace
    steps = trace["step"].astype(int)
    return group_means(
        values, steps, int(steps.max()) + 1, trace.prompt_index, trace.num_prompts,
        loaded.confidence,
    )  # fmt: skip


def _draw_example(
    loaded: LoadedRun, axes: Any, rows: np.ndarray, settings: ImportanceSettings
) -> None:
    importance, threshold = importance_and_threshold(loaded, rows, settings)
    position = loaded.trace["step"][rows].astype(int) + 1
    important = ~(importance < threshold)  # a step without a threshold is important
    share = f"{np.mean(important):.0%}"
    axes.plot(
        position, threshold, color=VERMILLION, linestyle=(0, (5, 1.6)), label="threshold I_th"
    )
    axes.plot(position, importance, color=BLACK, linewidth=1.0, label="importance I_t")
    axes.plot(
        position[important], importance[important], linestyle="none", marker="o", color=BLACK,
        markersize=4.5, label=f"important: I_t ≥ I_th ({share} of this answer)",
    )  # fmt: skip
    axes.plot(
        position[~important], importance[~important], linestyle="none", marker="o", color=BLACK,
        markerfacecolor="white", markersize=4.5, label="not important: skipped whatever u is",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the answer (token)")
    axes.set_ylabel("attention weight\n(share of attention)")
    panel_letter(axes, "c", "importance and its threshold along one answer")
    direct_legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
