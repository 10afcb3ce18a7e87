"""How often does each rule break its risk budget?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.folder import Figure as Number
from paper_figs.figures.curves import error_lengths
from paper_figs.loaded import LoadedRun
from paper_figs.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILLION,
    SeriesStyle,
    direct_legend,
    finish,
    new_figure,
    panel_letter,
)

QUESTION = "How often does each rule break its risk budget?"
SOURCES = {
    "all-prompts": "risk known: prompts redrawn",
    "halves": "risk from the other half",
}
RULES: dict[str, tuple[str, SeriesStyle]] = {
    "risk": ("plug-in: no guarantee", SeriesStyle(VERMILLION, (0, (6, 2)), "s")),
    "conformal": ("conformal: mean risk within budget", SeriesStyle(BLUE, "solid", "o")),
    "ltt": ("Learn-then-Test: breaks it at most in δ", SeriesStyle(GREEN, (0, (1, 1.4)), "D")),
}
"""Rules with a label and a look; a rule that is not among them is not drawn."""

ROW_SPACING = 0.22


def rows_of(loaded: LoadedRun, source: str, rule: str) -> list[dict[str, Any]]:
    """Stored rows of one rule, by rising budget."""
    if loaded.splits is None:
        return []
    found = [row for row in loaded.splits["rows"] if (row["source"], row["rule"]) == (source, rule)]
    return sorted(found, key=lambda row: row["budget"])


def figure(loaded: LoadedRun) -> Figure | None:
    """Share of calibrations over budget, and the skip rate that each rule leaves, by budget."""
    if loaded.splits is None:
        return None
    drawn, axes = new_figure(2, 2, 4.7, share_x=True, share_y="row", height_ratios=(1.25, 1.0))
    budgets = sorted({row["budget"] for row in loaded.splits["rows"]})
    for column, (source, title) in enumerate(SOURCES.items()):
        top, bottom = axes[:, column]
        for number, (rule, (label, style)) in enumerate(RULES.items()):
            rows = rows_of(loaded, source, rule)
            shift = (number - (len(RULES) - 1) / 2) * ROW_SPACING
            for axis, key in ((top, "violation_share"), (bottom, "skip_rate")):
                _draw(axis, rows, budgets, shift, key, style, "" if column else label)
        delta = 1 - loaded.splits["confidence"]
        top.axhline(delta, color=BLACK, linewidth=0.9, linestyle=(0, (4, 2)))
        top.text(
            len(budgets) - 0.52, delta + 0.012, f"δ = {delta:.2g}", fontsize=7, ha="right",
            va="bottom",
        )  # fmt: skip
        panel_letter(top, "ab"[column], title)
        panel_letter(bottom, "cd"[column], "what is left to skip")
        bottom.set_xlabel("risk budget α (%)")
    axes[0, 0].set_ylabel("over budget\n(share of calibrations)")
    axes[1, 0].set_ylabel("mean skip rate\n(share of tokens)")
    axes[0, 0].set_ylim(-0.02, None)
    # Room above the points for the legend.
    rates = [row["skip_rate"]["value"] for row in loaded.splits["rows"]]
    axes[1, 0].set_ylim(-0.04 * max(*rates, 0.05), 1.75 * max(*rates, 0.05))
    for axis in axes[1]:
        axis.set_xticks(range(len(budgets)), [f"{100 * budget:g}" for budget in budgets])
        axis.set_xlim(-0.5, len(budgets) - 0.5)
        axis.grid(visible=False, axis="x")
    direct_legend(axes[1, 0], loc="upper left", fontsize=7)
    return finish(drawn, QUESTION, _caption(loaded))


def _draw(
    axis: Any,
    rows: list[dict[str, Any]],
    budgets: list[float],
    shift: float,
    key: str,
    style: SeriesStyle,
    label: str,
) -> None:
    if label:
        axis.plot([], [], **style.filled_marker(), markersize=5, label=label)
    for row in rows:
        number = Number(**row[key])
        value = np.array([number.value], dtype=float)
        low, high = (np.array([part], dtype=float) for part in (number.low, number.high))
        # Hollow: no calibration had a threshold at all, so there was nothing to break.
        never = row["infeasible_share"]["value"] == 1
        marker = style.open_marker() if never else style.filled_marker()
        axis.errorbar(
            [budgets.index(row["budget"]) + shift], value, error_lengths(value, low, high),
            **marker, markersize=4.5, elinewidth=1.0, capsize=2,
        )  # fmt: skip


def partly_infeasible(loaded: LoadedRun, source: str) -> str:
    """Where some calibrations had a threshold and some had none, and how many had none."""
    gap = "\N{NO-BREAK SPACE}"
    return ", ".join(
        f"{rule} at {100 * row['budget']:g}{gap}% in {row['infeasible_share']['value']:.0%}"
        for rule in RULES
        for row in rows_of(loaded, source, rule)
        if 0 < row["infeasible_share"]["value"] < 1
    )


def conformal_risks(loaded: LoadedRun) -> str:
    """Mean true risk of the conformal rule at each budget, in %, where the risk is known."""
    rows = rows_of(loaded, "all-prompts", "conformal")
    return ", ".join(f"{100 * row['risk']['value']:.2g} at {100 * row['budget']:g}" for row in rows)


def _caption(loaded: LoadedRun) -> str:
    splits = loaded.splits
    if splits is None:
        raise ValueError("splits is None: this figure needs splits.json")
    num, prompts = splits["num_splits"], splits["num_prompts"]
    halves = rows_of(loaded, "halves", "risk")
    num_half = halves[0]["num_calibration_prompts"] if halves else prompts // 2
    text = (
        f"{loaded.sample} Bars: {splits['confidence']:.0%} intervals over the n = {num} "
        "calibrations of each panel (exact binomial; Student-t below), not clustered by prompt: "
        f"the {prompts} prompts stay the same. (a, c) The {prompts} prompts are the population; "
        f"calibrations are {prompts} prompts drawn from it with replacement, so each threshold's "
        f"risk is known and the promises hold as stated. (b, d) Calibrated on {num_half} prompts, "
        "risk taken as the mean of the others: an estimate that errs opposite to the calibration, "
        "so shares may lie above δ though the promise holds. Conformal promises a mean risk within "
        "budget, not a share; in (a) its mean risk, in % by budget, is "
        f"{conformal_risks(loaded)}. plug-in is about the mean over tokens, the others about that "
        "over prompts. Hollow: infeasible in every calibration, "
        "nothing is skipped."
    )
    for letter, source in zip("ab", SOURCES, strict=True):
        partly = partly_infeasible(loaded, source)
        if partly:
            text += f" Infeasible in some ({letter}): {partly} of them."
    return text
