"""How much of the correlation does drawing K tokens cost, and does (6) predict it?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import excludes_zero, number_text
from calibrate.run.records import AttenuationRow
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "Does theory predict how K drawn tokens weaken the correlation?"
NEEDS, LACKS = "attenuation", "no K was compared"
CAVEAT = (
    "Draws of different K share their random numbers, and the prompts are fewer than those of the "
    "calibration."
)
MEASURED = {
    "fmt": "s",
    "color": style.VERMILLION,
    "markeredgecolor": style.BLACK,
    "markeredgewidth": 0.4,
}


def answer(loaded: LoadedRun) -> str:
    """How many differences are none, and what the fewest draws cost."""
    rows = () if loaded.attenuation is None else loaded.attenuation.rows
    least = min(rows, key=lambda row: row.num_temperatures)
    known = [row.correlation_gap for row in rows if row.correlation_gap.low is not None]
    agree = sum(not excludes_zero(gap) for gap in known)
    return (
        f"In {agree} of {len(known)} cases the measured correlation is the predicted one, within "
        f"its interval. At K = {least.num_temperatures} it is "
        f"{number_text(least.measured_correlation)}, where the exact uncertainty has "
        f"{number_text(least.exact_correlation)}."
    )


def figure(loaded: LoadedRun) -> Figure | None:
    """Correlation of beta with u_K against K, predicted and measured, and their difference."""
    if loaded.attenuation is None or not loaded.attenuation.rows:
        return None
    rows = sorted(loaded.attenuation.rows, key=lambda row: row.num_temperatures)
    drawn, axes = style.new_figure(1, 2, 3.1, width_ratios=(1.25, 1.0))
    left, right = axes[0]
    ks = np.array([row.num_temperatures for row in rows])
    left.plot(
        ks, [row.exact_correlation for row in rows], color=style.GREY, linestyle=(0, (1, 1.4)),
        marker="^", markersize=4, label="exact u: nothing is drawn",
    )  # fmt: skip
    left.plot(
        ks, [row.predicted_correlation for row in rows], color=style.BLUE, marker="o",
        markerfacecolor="white", markersize=6, label="predicted: √λ_K · r",
    )  # fmt: skip
    measured = style.parts(row.measured_correlation for row in rows)
    style.error_bars(left, ks * 1.06, measured, label="measured", **MEASURED)
    left.set_ylabel("correlation r(K) with β\n(dimensionless)")
    style.panel_letter(left, "a", "correlation, token by token")
    low, high = left.get_ylim()
    left.set_ylim(low - 0.5 * (high - low), high)  # room for the legend below the bars
    style.direct_legend(left, loc="lower right", fontsize=7.5)
    right.axhline(0.0, color=style.BLUE, linewidth=1.2)
    style.error_bars(right, ks, style.parts(row.correlation_gap for row in rows), **MEASURED)
    right.set_ylabel("measured − predicted r(K)\n(dimensionless)")
    style.panel_letter(right, "b", "what the theory leaves over")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xticks([], minor=True)
        axis.set_xlim(ks.min() / 1.25, ks.max() * 1.35)
        axis.set_xlabel("drawn tokens K (count; log scale)")
    return style.finish(drawn, QUESTION, _caption(loaded, rows))


def _caption(loaded: LoadedRun, rows: list[AttenuationRow]) -> str:
    known = [row.correlation_gap for row in rows if row.correlation_gap.low is not None]
    worst = min(rows, key=lambda row: row.reliability)
    return (
        f"{loaded.sample} Here: n = {rows[0].num_prompts:,} prompts, {rows[0].num_tokens:,} "
        f"tokens of one trace that recorded every K. Bars: {loaded.interval_note}. Predicted from "
        "exact u alone, docs/theory.md (6); no drawn u_K enters it. (a) Measured bars are drawn a "
        "little to the right; they hold the choice of prompts, which the prediction shares. (b) "
        "The same difference with one prompt left out at a time in both, so that this choice "
        f"cancels; {sum(not excludes_zero(gap) for gap in known)} of {len(known)} intervals "
        "contain 0. Draws of different K share their random numbers. Reliability λ_K is "
        f"{worst.reliability:.2f} at K = {worst.num_temperatures}."
    )
