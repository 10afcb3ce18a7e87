"""Does uncertainty predict rejection, and is the relation a line?"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from calibrate.run.figure import excludes_zero, number_text
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "Does the device's uncertainty predict rejection, and linearly?"
NEEDS, LACKS = "calibration", "the calibration has no tokens"
CAVEAT = (
    "The line is about averages: at one uncertainty some drafts are surely rejected and others "
    "surely not. It is a statement about these two models on these prompts."
)
MISFIT = 0.01
"""A p-value below which the line is said not to fit."""


def answer(loaded: LoadedRun) -> str:
    """Whether rejection rises with uncertainty, how closely, and whether along a line."""
    fit = loaded.calibration.fit
    if fit.slope.value is None:
        return f"There is no line: {fit.degenerate}."
    rises = fit.slope.value > 0 and excludes_zero(fit.slope)
    text = (
        f"{'Yes, on average' if rises else 'Not on these tokens'}: the rejection probability "
        f"changes by {number_text(fit.slope)} for a unit of uncertainty. The correlation is "
        f"{number_text(fit.correlation_binned)} for means of bins, and "
        f"{number_text(fit.correlation)} token by token."
    )
    test = fit.lack_of_fit
    if test is None:
        return text
    leave = "leave the line" if test.p_value < MISFIT else "do not leave the line"
    return f"{text} The bins {leave} (Wald test, p = {test.p_value:.1g})."


def figure(loaded: LoadedRun) -> Figure | None:
    """Rejection probability against uncertainty: tokens, bins, line, isotonic curve, residuals."""
    relation, fit = loaded.calibration.relation, loaded.calibration.fit
    slope, intercept = float(fit.slope.value or 0.0), float(fit.intercept.value or 0.0)
    drawn, axes = style.new_figure(2, 1, 5.2, height_ratios=(3.0, 1.0))
    top, bottom = axes[:, 0]

    counts = np.array(relation.tokens.counts, dtype=float)
    top.pcolormesh(
        relation.tokens.uncertainty_edges, relation.tokens.rejection_edges,
        np.where(counts > 0, counts, np.nan).T,
        # Even the darkest cell stays light, so that what is drawn over it can be read.
        cmap=LinearSegmentedColormap.from_list("light", ["#ececec", "#a8a8a8"]),
        norm=LogNorm(1, max(10.0, counts.max())), rasterized=True,
    )  # fmt: skip
    style.band(
        top, relation.line, style.BLUE,
        label=f"line: β = {slope:.3f} u {'−' if intercept < 0 else '+'} {abs(intercept):.3f}",
    )  # fmt: skip
    top.plot(
        relation.isotonic_uncertainty, relation.isotonic_rejection, color=style.VERMILLION,
        linewidth=1.3, linestyle=(0, (5, 1.6)), label="isotonic regression",
    )  # fmt: skip
    u = np.array([entry.uncertainty for entry in relation.bins])
    means = style.parts(entry.rejection_prob for entry in relation.bins)
    style.error_bars(
        top, u, means, fmt="o", color=style.BLACK,
        label=f"mean of {len(u)} bins of equal token count",
    )  # fmt: skip
    top.set(xlim=(-0.015, 1.015), ylim=(-0.02, 1.02))
    top.set_ylabel("rejection probability β (probability)")
    style.panel_letter(top, "a", "tokens (grey: darker = more), their means, and two fits")
    style.direct_legend(top, loc="upper left")
    top.set_xlabel("uncertainty u of the draft token (dimensionless, 0 to 1)")

    # By rank, for half of the bins crowd at u = 1 in (a).
    rank = np.arange(1, len(u) + 1)
    bottom.axhline(0.0, color=style.BLUE, linewidth=1.2)
    style.error_bars(
        bottom, rank, means - np.clip(slope * u + intercept, 0, 1), fmt="o", color=style.BLACK
    )
    bottom.set_xticks(
        rank, [f"{x:.2f}" if x < 0.95 else f"{x:.3f}" for x in u], fontsize=6.5,
        rotation=90 if style.is_narrow() else 0,
    )  # fmt: skip
    bottom.set_ylabel("mean β − line\n(probability)")
    bottom.set_xlabel("bin, by its mean uncertainty (dimensionless)")
    style.panel_letter(bottom, "b", "what the line leaves over, bin by bin")
    caption = (
        f"{loaded.sample} Bars and band: {loaded.interval_note}. "
        f"Slope {number_text(fit.slope)}, intercept {number_text(fit.intercept)}; correlation "
        f"r = {number_text(fit.correlation)} token by token, "
        f"{number_text(fit.correlation_binned)} for the binned means: the line describes averages, "
        f"single tokens scatter widely. Quadratic term {number_text(fit.curvature)} (0 if the "
        "relation is a line). Isotonic regression is the best rising curve; no interval. Line and "
        "curves are clipped to [0,\N{NO-BREAK SPACE}1]."
    )
    return style.finish(drawn, QUESTION, caption)
