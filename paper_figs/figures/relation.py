"""Does uncertainty predict rejection, and is the relation a line?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from scipy import stats

from calibrate.run.folder import Figure as Number
from hlmtheory.relation import binned_means, linear_rejection
from paper_figs.figures.curves import Curve, error_lengths, group_means
from paper_figs.loaded import LoadedRun
from paper_figs.style import (
    BLACK,
    BLUE,
    VERMILLION,
    direct_legend,
    finish,
    new_figure,
    number_text,
    panel_letter,
)

QUESTION = "Does the device's uncertainty predict rejection, and linearly?"
NUM_LINE_POINTS = 201


def binned_relation(loaded: LoadedRun) -> tuple[np.ndarray, Curve]:
    """Mean uncertainty of each bin, and its mean rejection probability with interval."""
    trace = loaded.trace
    # As many bins as the fit asked for: fewer come back where tokens tie, here as there.
    bins = binned_means(trace["uncertainty"], trace["rejection_prob"])
    means = group_means(
        trace["rejection_prob"],
        bins.bin_of_token,
        len(bins.num_tokens),
        trace.prompt_index,
        trace.num_prompts,
        loaded.confidence,
    )
    return bins.uncertainty, means


def line_band(loaded: LoadedRun, u: np.ndarray) -> Curve:
    """The fitted line along u with the interval that the stored covariance implies."""
    fit = loaded.calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    value = slope * u + intercept
    design = np.stack([u, np.ones_like(u)], axis=-1)
    variance = np.einsum("gi,ij,gj->g", design, np.asarray(fit["covariance"]), design)
    freedom = max(int(loaded.calibration["num_prompts"]) - 1, 1)
    quantile = float(stats.t.ppf(0.5 + loaded.confidence / 2, freedom))
    half = quantile * np.sqrt(np.maximum(variance, 0.0))
    return curve_of(u, value, value - half, value + half)


def curve_of(grid: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Curve:
    """A curve whose values are already clipped probabilities."""
    return Curve(grid, *(np.clip(part, 0.0, 1.0) for part in (value, low, high)))


def figure(loaded: LoadedRun) -> Figure | None:
    """Rejection probability against uncertainty: tokens, bins, line, isotonic curve, residuals."""
    from sklearn.isotonic import IsotonicRegression

    trace, fit = loaded.trace, loaded.calibration["fit"]
    u, beta = trace["uncertainty"], trace["rejection_prob"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    drawn, axes = new_figure(2, 1, 5.2, height_ratios=(3.0, 1.0))
    top, bottom = axes[:, 0]

    counts, u_edges, beta_edges = np.histogram2d(u, beta, bins=(40, 32), range=((0, 1), (0, 1)))
    top.pcolormesh(
        u_edges,
        beta_edges,
        np.where(counts > 0, counts, np.nan).T,
        # Even the darkest cell stays light, so that what is drawn over it can be read.
        cmap=LinearSegmentedColormap.from_list("light", ["#ececec", "#a8a8a8"]),
        norm=LogNorm(1, max(10.0, counts.max())),
        rasterized=True,
    )

    grid = np.linspace(0.0, 1.0, NUM_LINE_POINTS)
    line = line_band(loaded, grid)
    top.fill_between(grid, line.low, line.high, color=BLUE, alpha=0.18, linewidth=0)
    top.plot(
        grid,
        linear_rejection(grid, slope, intercept),
        color=BLUE,
        label=f"line: β = {slope:.3f} u {'−' if intercept < 0 else '+'} {abs(intercept):.3f}",
    )
    isotonic = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(u, beta)
    top.plot(
        isotonic.X_thresholds_, isotonic.y_thresholds_, color=VERMILLION, linewidth=1.3,
        linestyle=(0, (5, 1.6)), label="isotonic regression",
    )  # fmt: skip
    u_means, means = binned_relation(loaded)
    top.errorbar(
        u_means, means.value, error_lengths(means.value, means.low, means.high),
        fmt="o", color=BLACK, markersize=4.2, elinewidth=0.9, capsize=2,
        label=f"mean of {len(u_means)} bins of equal token count",
    )  # fmt: skip
    top.set(xlim=(-0.015, 1.015), ylim=(-0.02, 1.02))
    top.set_ylabel("rejection probability β (probability)")
    panel_letter(top, "a", "tokens (grey: darker = more), their means, and two fits")
    direct_legend(top, loc="upper left")

    top.set_xlabel("uncertainty u of the draft token (dimensionless, 0 to 1)")

    # By rank, for half of the bins crowd at u = 1 in (a).
    rank = np.arange(1, len(u_means) + 1)
    residual = means.value - linear_rejection(u_means, slope, intercept)
    bottom.axhline(0.0, color=BLUE, linewidth=1.2)
    bottom.errorbar(
        rank, residual, error_lengths(means.value, means.low, means.high),
        fmt="o", color=BLACK, markersize=4.2, elinewidth=0.9, capsize=2,
    )  # fmt: skip
    bottom.set_xticks(rank, [_mean_u(value) for value in u_means], fontsize=6.5)
    bottom.set_ylabel("mean β − line\n(probability)")
    bottom.set_xlabel("bin, by its mean uncertainty (dimensionless)")
    panel_letter(bottom, "b", "what the line leaves over, bin by bin")
    return finish(drawn, QUESTION, _caption(loaded, fit))


def _caption(loaded: LoadedRun, fit: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return number_text(Number(**fit[key]))

    return (
        f"{loaded.sample} Bars and band: {loaded.interval_note}. "
        f"Slope {number('slope')}, intercept {number('intercept')}; "
        f"correlation r = {number('correlation')} token by token, {number('correlation_binned')} "
        "for the binned means: the line describes averages, single tokens scatter widely. "
        f"Quadratic term {number('curvature')} (0 if the relation is a line). "
        f"Isotonic regression is the best rising curve; no interval. Line and curves are clipped "
        "to [0,\N{NO-BREAK SPACE}1]."
    )


def _mean_u(value: float) -> str:
    return f"{value:.2f}" if value < 0.95 else f"{value:.3f}"
