"""Which device-side score should the gate look at?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from calibrate.fit.line import estimator_scores
from calibrate.run.folder import Figure as Number
from paper_figs.figures.curves import error_lengths, skip_risk_curve
from paper_figs.loaded import LoadedRun
from paper_figs.style import GREY, SERIES, direct_legend, finish, new_figure, panel_letter

QUESTION = "Which score lets the device skip most at the same risk?"
MAX_RISK = 0.12
LABELS = {
    "uncertainty": "uncertainty u, exact",
    "uncertainty_sampled": "uncertainty, 20 samples",
    "entropy": "entropy",
    "one_minus_max_prob": "1 − max probability",
    "margin": "1 − margin of the top two",
    "learned_boosting": "learned, boosting",
    "learned_logistic": "learned, logistic",
}


def figure(loaded: LoadedRun) -> Figure | None:
    """Skip-risk curves of every estimator, and their skip rates at fixed risks with intervals."""
    estimators = loaded.calibration["estimators"]
    if not estimators:
        return None
    beta = loaded.trace["rejection_prob"]
    drawn, axes = new_figure(1, 2, 3.5, width_ratios=(1.15, 1.0))
    left, right = axes[0]
    highest = 0.0
    scores = estimator_scores(loaded.trace)
    for number, estimator in enumerate(estimators):
        name, style = estimator["name"], SERIES[number % len(SERIES)]
        if name not in scores:  # scored at calibration, by a version that knew it
            continue
        score = scores[name]
        risk, rate = skip_risk_curve(score, beta)
        highest = max(highest, float(np.interp(MAX_RISK, risk, rate)))
        left.plot(
            100 * risk, 100 * rate, color=style.color, linestyle=style.linestyle,
            marker=style.marker, markevery=(0.03 + 0.02 * number, 0.16), markersize=4.5,
            drawstyle="steps-post",
            label=LABELS.get(name, name.replace("_", " ")),
        )  # fmt: skip
    mean_rejection = loaded.calibration["fit"]["mean_rejection"]["value"]
    if mean_rejection > 0:
        left.plot(
            [0, 100 * MAX_RISK], [0, 100 * MAX_RISK / mean_rejection], color=GREY, linewidth=0.9,
            linestyle=(0, (1, 1)), label="skipping at random",
        )  # fmt: skip
    left.set(xlim=(0, 100 * MAX_RISK), ylim=(0, min(102.0, 112 * highest + 2)))
    left.set_xlabel("rejection risk R (% probability per token)")
    left.set_ylabel("skip rate (% of tokens)")
    panel_letter(left, "a", "skip rate against risk; higher is better")

    levels = list(estimators[0]["skip_rate_at_risk"])
    offsets = np.linspace(-0.3, 0.3, len(estimators)) if len(estimators) > 1 else np.zeros(1)
    for number, estimator in enumerate(estimators):
        style = SERIES[number % len(SERIES)]
        figures = [Number(**estimator["skip_rate_at_risk"][level]) for level in levels]
        values, low, high = (
            100 * np.array([getattr(f, part) for f in figures], dtype=float)
            for part in ("value", "low", "high")
        )
        right.errorbar(
            np.arange(len(levels)) + offsets[number], values, error_lengths(values, low, high),
            **style.filled_marker(), elinewidth=0.9, capsize=1.5, markersize=4.5,
        )  # fmt: skip
    right.set_xticks(np.arange(len(levels)), [f"{100 * float(level):g}" for level in levels])
    right.grid(visible=False, axis="x")
    right.set_ylim(bottom=0)
    right.set_xlabel("risk budget (% probability per token)")
    right.set_ylabel("skip rate at the budget (% of tokens)")
    panel_letter(right, "b", "at fixed budgets, with intervals")
    direct_legend(left, loc="best", fontsize=7)
    caption = (
        f"{loaded.sample} (a) Tokens are skipped in rising order of each score, ties together; "
        "R is the sum of β over the skipped tokens, divided by all tokens. "
        f"(b) Bars: {loaded.interval_note} (bootstrap over prompts). Scores are compared on the "
        "trace that they are computed from; learned ones are cross-fitted, each prompt scored by "
        "models fitted to others."
    )
    return finish(drawn, QUESTION, caption)
