"""What does sending only k probabilities cost, and which k do the rules choose?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import SizeDistribution, TruncationCurves
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "What does sending k probabilities cost, and which k do the rules choose?"
NEEDS, LACKS = "derivation", "N(k) was not recorded; `hlm calibrate --trace full` does"
CAVEAT = (
    "The bias is of truncation alone: a gate adds its own. Which of the papers' k this is, is an "
    "assumption (docs/theory.md, section 6)."
)


def answer(loaded: LoadedRun) -> str:
    """Exact bias and bound at a recorded size: the offline rule's, or the nearest below."""
    truncation = None if loaded.derivation is None else loaded.derivation.truncation
    if truncation is None:
        return ""
    chosen = truncation.chosen_size or truncation.exact.grid[-1]
    place = max(i for i, size in enumerate(truncation.exact.grid) if i == 0 or size <= chosen)
    exact, soft, sharp = (
        means.figures()[place]
        for means in (truncation.exact, truncation.soft_bound, truncation.sharp_bound)
    )
    return (
        f"Sending the {truncation.exact.grid[place]:,.0f} likeliest of "
        f"{loaded.calibration.pair.vocab_size:,} probabilities moves the output law by "
        f"{number_text(exact)}; bound (22) allows {number_text(sharp)}, CU-HLM's bound (19) "
        f"{number_text(soft)}."
    )


def measured_sizes(loaded: LoadedRun, truncation: TruncationCurves) -> SizeDistribution | None:
    """Sizes of the sent tokens in the rerun of the online point; None without one."""
    points = (point for point in loaded.feasible if point.key == truncation.online_point)
    reruns = (loaded.rerun_of(point) for point in points)
    return next((rerun.sizes for rerun in reruns if rerun is not None), None)


def figure(loaded: LoadedRun) -> Figure | None:
    """Bias against k with both bounds, and the distribution of the online k*."""
    truncation = None if loaded.derivation is None else loaded.derivation.truncation
    if truncation is None:
        return None
    online = truncation.online is not None
    drawn, axes = style.new_figure(1, 1 + online, 3.7, width_ratios=(1.2, 1.0)[: 1 + online])
    _draw_bias(axes[0, 0], truncation)
    caption = (
        f"{loaded.sample} N(k) was recorded at {truncation.num_tokens:,} of these tokens, the "
        f"exact bias at {truncation.num_exact:,}. (a) Means over contexts; bands and bars: "
        f"{loaded.derived_note}. The exact bias is of drafting from x and verifying against its "
        "truncation. A bound above 1 says nothing."
    )
    if truncation.online is not None:
        found = measured_sizes(loaded, truncation)
        _draw_sizes(axes[0, 1], truncation.online, found)
        reruns = (
            f", predicted on the calibration, measured in its rerun. {loaded.validation_sample}"
            if found is not None
            else "; no rerun of it is stored."
        )
        tolerance = f"θ = {truncation.theta:g}".replace(" ", "\N{NO-BREAK SPACE}")
        caption += (
            f" (b) k* is the smallest k whose bound (19) is within {tolerance}; "
            f"V = {loaded.calibration.pair.vocab_size:,}. Of the tokens that "
            f"{truncation.online_point} sends{reruns}"
        )
    return style.finish(drawn, QUESTION, caption)


def _draw_bias(axes: Any, truncation: TruncationCurves) -> None:
    exact = style.parts(truncation.exact)
    floor = 0.3 * float(np.min(exact[0][exact[0] > 0], initial=1e-2))
    for means, color, linestyle, label in (
        (truncation.soft_bound, style.VERMILLION, (0, (6, 2)), "bound (19), CU-HLM"),
        (truncation.sharp_bound, style.BLUE, "solid", "bound (22), N(k)/2"),
    ):
        value, low, high = style.parts(means)
        low, high = np.maximum([low, high], floor)
        axes.plot(means.grid, value, color=color, linestyle=linestyle, label=label)
        axes.fill_between(means.grid, low, high, color=color, alpha=0.18, linewidth=0)
    style.error_bars(
        axes, truncation.exact.grid, exact, fmt="o:", color=style.BLACK, linewidth=1.0,
        label="exact",
    )  # fmt: skip
    axes.axhline(
        truncation.theta, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 1)),
        label=f"tolerance θ = {truncation.theta:g}",
    )  # fmt: skip
    if truncation.chosen_size is not None:
        axes.axvline(
            truncation.chosen_size, color=style.ORANGE, linewidth=1.3, linestyle=(0, (3, 1)),
            label=f"offline k* = {truncation.chosen_size:,}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("truncation size k (probabilities sent)")
    axes.set_ylabel("TV distance to the server's law (probability)")
    style.panel_letter(axes, "a", "bias of truncation")
    style.direct_legend(axes, loc="lower left", fontsize=7)


def _draw_sizes(axes: Any, predicted: SizeDistribution, found: SizeDistribution | None) -> None:
    """Distribution functions of k*: predicted, and of the same rule in a rerun."""
    for label, sizes, color, linestyle in (
        ("predicted", predicted, style.BLUE, "solid"),
        ("measured", found, style.VERMILLION, (0, (6, 2))),
    ):
        if sizes is None:
            continue
        median = float(np.interp(0.5, sizes.levels, sizes.quantiles))
        axes.plot(
            sizes.quantiles, sizes.levels, color=color, linestyle=linestyle,
            label=f"{label}:\nmedian {number_text(median)}\nmean {number_text(sizes.mean)}\n"
            f"n = {sizes.num_tokens:,} tokens",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("online size k* (probabilities sent)")
    axes.set_ylabel("cumulative share (of tokens)")
    style.panel_letter(axes, "b", "k* of the online rule")
    style.direct_legend(axes, loc="best", fontsize=7)
