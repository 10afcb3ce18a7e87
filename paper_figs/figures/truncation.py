"""What does sending only k probabilities cost, and which k do the rules choose?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.decode.recording import BIAS_SIZE_GRID, SIZE_GRID
from calibrate.derive.operating_points import DeriveRequest
from calibrate.derive.policy_tokens import predicted_online_sizes
from hlmtheory.policies import FixedSize, OnlineSize
from hlmtheory.relation import linear_rejection
from hlmtheory.truncation import truncation_bias_bound, truncation_bound_soft
from paper_figs.figures.curves import Curve, column_means, error_lengths
from paper_figs.loaded import LoadedRun, Rerun
from paper_figs.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    direct_legend,
    finish,
    new_figure,
    panel_letter,
)

QUESTION = "What does sending k probabilities cost, and which k do the rules choose?"


def online_size(loaded: LoadedRun) -> OnlineSize:
    """Tolerance and line of the derived online rule; the defaults where it was not derived."""
    policy = loaded.policy_at("cu-hlm-online", 0.5)
    if policy is not None and isinstance(policy.size, OnlineSize):
        return policy.size
    fit = loaded.calibration["fit"]
    return OnlineSize(DeriveRequest(()).thetas[0], fit["slope"]["value"], fit["intercept"]["value"])


def bias_curves(loaded: LoadedRun) -> tuple[Curve, Curve, Curve]:
    """Means over contexts of bound (19), bound (22) and the exact bias, along k."""
    trace, size = loaded.trace, online_size(loaded)
    deviation = trace["tail_deviation"]
    predicted_beta = linear_rejection(trace["uncertainty"], size.slope, size.intercept)
    soft = truncation_bound_soft(
        deviation, trace["draft_prob"][:, None], predicted_beta[:, None], size.eta
    )

    def means(grid: tuple[int, ...], values: np.ndarray) -> Curve:
        sizes, first = np.unique(np.minimum(grid, loaded.vocab_size), return_index=True)
        return column_means(
            sizes, values[:, first], trace.prompt_index, trace.num_prompts, loaded.confidence
        )

    return (
        means(SIZE_GRID, soft),
        means(SIZE_GRID, truncation_bias_bound(deviation)),
        means(BIAS_SIZE_GRID, trace["truncation_bias"]),
    )


def figure(loaded: LoadedRun) -> Figure | None:
    """Bias against k with both bounds, and the distribution of the online k*."""
    if "tail_deviation" not in loaded.trace or "truncation_bias" not in loaded.trace:
        return None
    recorded = np.isfinite(loaded.trace["tail_deviation"]).all(axis=1)
    if not recorded.any():
        return None
    sampled = np.isfinite(loaded.trace["truncation_bias"]).all(axis=1)
    drawn, axes = new_figure(1, 2, 3.7, width_ratios=(1.2, 1.0))
    left, right = axes[0]
    size = online_size(loaded)
    _draw_bias(loaded, left, size)
    rerun = rerun_of(loaded, size)
    _draw_sizes(loaded, right, size, rerun)
    tolerance = f"θ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{size.theta:g}"
    caption = (
        f"{loaded.sample} N(k) was recorded at {recorded.sum():,} of these tokens, the exact bias "
        f"at {sampled.sum():,}. (a) Means over contexts; bands and bars: {loaded.interval_note}. "
        "The exact bias "
        "is of drafting from x and verifying against its truncation. A bound above 1 says nothing. "
        f"(b) k* is the smallest k whose bound (19) is within {tolerance}; "
        f"V = {loaded.vocab_size:,}; sizes beyond {max(SIZE_GRID):,} are drawn there."
        + (
            f" Of tokens above the threshold of {rerun.point.rule}, which are sent: predicted on "
            f"the calibration's, measured in its rerun. {loaded.validation_sample}"
            if rerun
            else " Of all tokens."
        )
    )
    return finish(drawn, QUESTION, caption)


def _draw_bias(loaded: LoadedRun, axes: Any, size: OnlineSize) -> None:
    soft, sharp, exact = bias_curves(loaded)
    floor = 0.3 * float(np.min(exact.value[exact.value > 0], initial=1e-2))
    for means, color, linestyle, label in (
        (soft, VERMILLION, (0, (6, 2)), "bound (19), CU-HLM"),
        (sharp, BLUE, "solid", "bound (22), N(k)/2"),
    ):
        axes.plot(means.grid, means.value, color=color, linestyle=linestyle, label=label)
        low = np.maximum(means.low, floor)
        axes.fill_between(means.grid, low, means.high, color=color, alpha=0.18, linewidth=0)
    axes.errorbar(
        exact.grid, exact.value, error_lengths(exact.value, exact.low, exact.high), fmt="o:",
        color=BLACK, linewidth=1.0, elinewidth=0.9, capsize=2, markersize=4.5, label="exact",
    )  # fmt: skip
    axes.axhline(size.theta, color=GREY, linewidth=0.9, linestyle=(0, (1, 1)))
    axes.text(
        0.98, size.theta * 1.08, f"tolerance θ = {size.theta:g}", color=GREY, fontsize=7,
        ha="right", va="bottom", transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    offline = loaded.policy_at("cu-hlm-offline", 0.5)
    if offline is not None and isinstance(offline.size, FixedSize):
        chosen = offline.size.num_entries
        axes.axvline(
            chosen, color=ORANGE, linewidth=1.3, linestyle=(0, (3, 1)),
            label=f"offline k* = {chosen:,}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("truncation size k (probabilities sent)")
    axes.set_ylabel("TV distance to the server's law (probability)")
    panel_letter(axes, "a", "bias of truncation")
    direct_legend(axes, loc="lower left", fontsize=7)


def rerun_of(loaded: LoadedRun, size: OnlineSize) -> Rerun | None:
    """The online rule's rerun at this tolerance that sends most tokens; None without any."""
    reran = [
        rerun
        for rerun in loaded.reruns
        if rerun.point.policy == "cu-hlm-online"
        and rerun.point.settings["theta"] == size.theta
        and not rerun.trace["skipped"].all()
    ]
    return min(reran, key=lambda r: float(r.trace["skipped"].mean()), default=None)


def _draw_sizes(loaded: LoadedRun, axes: Any, size: OnlineSize, rerun: Rerun | None) -> None:
    """Distribution functions of k*: predicted, and of the same rule in a rerun."""
    predicted = predicted_online_sizes(loaded.trace, size, loaded.vocab_size)
    known = np.isfinite(predicted)
    series: list[tuple[str, np.ndarray, str, Any]] = []
    if rerun is not None:
        known &= loaded.trace["uncertainty"] > float(rerun.point.uncertainty_threshold.value or 0)
        entries = rerun.trace["policy_entries"][~rerun.trace["skipped"].astype(bool)]
        series.append(("measured", entries.astype(float), VERMILLION, (0, (6, 2))))
    series.insert(0, ("predicted", predicted[known], BLUE, "solid"))
    for label, sizes, color, linestyle in series:
        ordered = np.sort(np.minimum(sizes, max(SIZE_GRID)))
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(
            np.concatenate([ordered[:1], ordered]), np.concatenate([[0.0], share]),
            color=color, linestyle=linestyle, drawstyle="steps-post",
            label=f"{label}:\nmedian {np.median(sizes):,.0f}\nmean {sizes.mean():,.0f}\n"
            f"n = {len(sizes):,} tokens",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("online size k* (probabilities sent)")
    axes.set_ylabel("cumulative share (of tokens)")
    panel_letter(axes, "b", "k* of the online rule")
    direct_legend(axes, loc="best", fontsize=7)
