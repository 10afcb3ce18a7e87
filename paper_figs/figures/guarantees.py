"""How often does each rule break its risk budget?"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from calibrate.run.figure import NBSP
from calibrate.run.records import GuaranteeRow, GuaranteesRecord
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import percent

QUESTION = "How often does each rule break its risk budget?"
NEEDS, LACKS = "guarantees", "no rule was redrawn"
CAVEAT = (
    "The prompts are redrawn from the run's own: the promise is for prompts like them. What a "
    "policy adds to the gate's risk (truncation, shared or asked draws) is not certified."
)
SOURCES = {
    "all-prompts": "risk known: prompts redrawn",
    "halves": "risk from the other half",
}
RULES: dict[str, tuple[str, style.SeriesStyle]] = {
    "risk": ("plug-in: no guarantee", style.SeriesStyle(style.VERMILLION, (0, (6, 2)), "s")),
    "conformal": (
        "conformal: mean risk within budget",
        style.SeriesStyle(style.BLUE, "solid", "o"),
    ),
    "ltt": (
        "Learn-then-Test: breaks it at most in δ",
        style.SeriesStyle(style.GREEN, (0, (1, 1.4)), "D"),
    ),
    "ltt@cap": (
        "the same under an answer cap",
        style.SeriesStyle(style.BLACK, (0, (4, 2, 1, 2)), "^"),
    ),
}
"""Rules with a label and a look; a rule that is not among them is not drawn."""

ROW_SPACING = 0.22


def answer(loaded: LoadedRun) -> str:
    """How often the plug-in and the certified rule break the largest budget they were tried at."""
    if loaded.guarantees is None:
        return ""
    found = {rule: rows_of(loaded.guarantees, "all-prompts", rule)[-1:] for rule in ("risk", "ltt")}
    parts = [
        f"{name} in {percent(row.violation_share)} of calibrations, skipping "
        f"{percent(row.skip_rate)} of the tokens"
        for rule, name in (("risk", "the plug-in threshold"), ("ltt", "the certified one"))
        for row in found[rule]
    ]
    budgets = {row.budget for rows in found.values() for row in rows}
    level = ", ".join(f"{100 * budget:g}{NBSP}%" for budget in sorted(budgets))
    return f"A budget of {level} is broken by {'; by '.join(parts)}."


def rows_of(record: GuaranteesRecord, source: str, rule: str) -> list[GuaranteeRow]:
    """Stored rows of one rule, by rising budget."""
    found = [row for row in record.rows if (row.source, row.rule) == (source, rule)]
    return sorted(found, key=lambda row: row.budget)


def figure(loaded: LoadedRun) -> Figure | None:
    """Share of calibrations over budget, and the skip rate that each rule leaves, by budget."""
    record = loaded.guarantees
    if record is None or not record.rows:
        return None
    drawn, axes = style.new_figure(
        2, 2, 4.7, share_x=True, share_y="row", height_ratios=(1.25, 1.0)
    )
    budgets = sorted({row.budget for row in record.rows})
    for column, (source, title) in enumerate(SOURCES.items()):
        top, bottom = axes[:, column]
        for number, (rule, (label, look)) in enumerate(RULES.items()):
            rows = rows_of(record, source, rule)
            shift = (number - (len(RULES) - 1) / 2) * ROW_SPACING
            x = [budgets.index(row.budget) + shift for row in rows]
            _draw(top, rows, x, "violation_share", look)
            _draw(bottom, rows, x, "skip_rate", look)
            if column == 0:
                bottom.plot([], [], **look.filled_marker(), label=label)
        delta = 1 - record.confidence
        top.axhline(delta, color=style.BLACK, linewidth=0.9, linestyle=(0, (4, 2)))
        top.text(
            len(budgets) - 0.52, delta + 0.012, f"δ = {delta:.2g}", fontsize=7, ha="right",
            va="bottom",
        )  # fmt: skip
        style.panel_letter(top, "ab"[column], title)
        style.panel_letter(bottom, "cd"[column], "what is left to skip")
        bottom.set_xlabel("risk budget α (%)")
    axes[0, 0].set_ylabel("over budget\n(share of calibrations)")
    axes[1, 0].set_ylabel("mean skip rate\n(share of tokens)")
    axes[0, 0].set_ylim(-0.02, None)
    # Room above the points for the legend.
    highest = max(0.05, *(float(row.skip_rate.value or 0.0) for row in record.rows))
    axes[1, 0].set_ylim(-0.04 * highest, 2.0 * highest)
    for axis in axes[1]:
        axis.set_xticks(range(len(budgets)), [f"{100 * budget:g}" for budget in budgets])
        axis.set_xlim(-0.5, len(budgets) - 0.5)
        axis.grid(visible=False, axis="x")
    style.direct_legend(axes[1, 0], loc="upper left", fontsize=7)
    return style.finish(drawn, QUESTION, _caption(loaded, record))


def _draw(axes: Any, rows: list[GuaranteeRow], x: list[float], key: str, look: Any) -> None:
    for row, place in zip(rows, x, strict=True):
        # Hollow: no calibration had a threshold at all, so there was nothing to break.
        never = row.infeasible_share.value == 1
        marker = look.open_marker() if never else look.filled_marker()
        style.error_bars(axes, [place], style.parts([getattr(row, key)]), **marker)


def partly_infeasible(record: GuaranteesRecord, source: str) -> str:
    """Where some calibrations had a threshold and some had none, and how many had none."""
    gap = "\N{NO-BREAK SPACE}"
    return ", ".join(
        f"{rule} at {100 * row.budget:g}{gap}% in {row.infeasible_share.value:.0%}"
        for rule in RULES
        for row in rows_of(record, source, rule)
        if row.infeasible_share.value is not None and 0 < row.infeasible_share.value < 1
    )


def conformal_risks(record: GuaranteesRecord) -> str:
    """Mean true risk of the conformal rule at each budget, in %, where the risk is known."""
    return ", ".join(
        f"{100 * row.risk.value:.2g} at {100 * row.budget:g}"
        for row in rows_of(record, "all-prompts", "conformal")
        if row.risk.value is not None
    )


def _caption(loaded: LoadedRun, record: GuaranteesRecord) -> str:
    num, prompts = record.num_draws, record.num_prompts
    halves = [row.num_calibration_prompts for row in record.rows if row.source == "halves"]
    weightings = ", ".join(
        dict.fromkeys(
            f"{row.rule} over {row.weighting}" for row in record.rows if row.rule in RULES
        )
    )
    caps = ", ".join(
        f"{row.cap:g} at {100 * row.budget:g} %"
        for row in rows_of(record, "all-prompts", "ltt@cap")
    )
    text = (
        f"{loaded.sample} Gate on {loaded.score_label(record.score)}. Bars: "
        f"{record.confidence:.0%} intervals over the n = {num} "
        "calibrations of each panel (exact binomial; Student-t below), not clustered by prompt: "
        f"the {prompts} prompts stay the same. (a, c) The {prompts} prompts are the population; "
        f"calibrations are {prompts} prompts drawn from it with replacement, so each threshold's "
        "risk is known and the promises hold as stated. (b, d) Calibrated on "
        f"{halves[0] if halves else prompts // 2} prompts, risk taken as the mean of the others: "
        "an estimate that errs opposite to the calibration, so shares may lie above δ though the "
        "promise holds. Conformal promises a mean risk within budget, not a share; in (a) its mean "
        f"risk, in % by budget, is {conformal_risks(record)}. Budgets are about means: "
        f"{weightings}. Answer caps in (a, c), from budget, confidence and number of prompts: "
        f"{caps or 'none'}. Hollow: infeasible in every calibration, nothing is skipped."
    )
    for letter, source in zip("ab", SOURCES, strict=True):
        partly = partly_infeasible(record, source)
        if partly:
            text += f" Infeasible in some ({letter}): {partly} of them."
    return text
