"""Which device-side score should the gate look at?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import NBSP
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import percent

QUESTION = "Which score lets the device skip most at the same risk?"
NEEDS, LACKS = "calibration", "no score was compared"
CAVEAT = (
    "Scores are compared on the trace that they are computed from, and intervals that overlap do "
    "not tell scores apart."
)
MAX_RISK = 0.12


def answer(loaded: LoadedRun) -> str:
    """The score that skips most at the least budget, beside the exact uncertainty."""
    scores = loaded.calibration.estimators
    level = next(iter(scores[0].skip_rate_at_risk))
    best = max(scores, key=lambda one: one.skip_rate_at_risk[level].value or 0.0)
    told = [f"{best.label} skips most, {percent(best.skip_rate_at_risk[level])} of the tokens"]
    told += [
        f"{one.label} skips {percent(one.skip_rate_at_risk[level])}"
        for one in scores
        if one.name == "uncertainty" and one is not best
    ]
    return f"At a risk of {100 * float(level):g}{NBSP}%, {'; '.join(told)}."


def figure(loaded: LoadedRun) -> Figure | None:
    """Skip-risk curves of every estimator, and their skip rates at fixed risks with intervals."""
    estimators = loaded.calibration.estimators
    if not estimators:
        return None
    drawn, axes = style.new_figure(1, 2, 3.5, width_ratios=(1.15, 1.0))
    left, right = axes[0]
    levels = list(estimators[0].skip_rate_at_risk)
    offsets = np.linspace(-0.3, 0.3, len(estimators)) if len(estimators) > 1 else np.zeros(1)
    highest = 0.0
    for number, estimator in enumerate(estimators):
        look = style.SERIES[number % len(style.SERIES)]
        highest = max(highest, np.interp(MAX_RISK, estimator.risk, estimator.skip_rate))
        left.plot(
            100 * np.array(estimator.risk), 100 * np.array(estimator.skip_rate), **look.line(),
            marker=look.marker, markevery=(0.03 + 0.02 * number, 0.16), markersize=4.5,
            drawstyle="steps-post", label=estimator.label,
        )  # fmt: skip
        rates = style.parts((estimator.skip_rate_at_risk[level] for level in levels), 100)
        style.error_bars(
            right, np.arange(len(levels)) + offsets[number], rates, **look.filled_marker(),
            capsize=1.5,
        )  # fmt: skip
    mean_rejection = float(loaded.calibration.fit.mean_rejection.value or 0.0)
    if mean_rejection > 0:
        left.plot(
            [0, 100 * MAX_RISK], [0, 100 * MAX_RISK / mean_rejection], color=style.GREY,
            linewidth=0.9, linestyle=(0, (1, 1)), label="skipping at random",
        )  # fmt: skip
    left.set(xlim=(0, 100 * MAX_RISK), ylim=(0, min(102.0, 112 * highest + 2)))
    left.set_xlabel("rejection risk R (% probability per token)")
    left.set_ylabel("skip rate (% of tokens)")
    style.panel_letter(left, "a", "skipped at a risk; higher is better")
    right.set_xticks(np.arange(len(levels)), [f"{100 * float(level):g}" for level in levels])
    right.grid(visible=False, axis="x")
    right.set_ylim(bottom=0)
    right.set_xlabel("risk budget (% probability per token)")
    right.set_ylabel("skip rate at the budget (% of tokens)")
    style.panel_letter(right, "b", "at fixed budgets")
    style.outer_legend(right, left, fontsize=7)
    caption = (
        f"{loaded.sample} (a) Tokens are skipped in rising order of each score, ties together; "
        "R is the sum of β over the skipped tokens, divided by all tokens. "
        f"(b) Bars: {loaded.interval_note} (bootstrap over prompts). Scores are compared on the "
        "trace that they are computed from; learned ones are cross-fitted, each prompt scored by "
        "models fitted to others."
    )
    return style.finish(drawn, QUESTION, caption)
