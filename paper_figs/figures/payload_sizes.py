"""How many bits does one asked token take?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import PayloadDistribution, SizeDistribution
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "How many uplink bits does one asked token take?"
NEEDS, LACKS = "derivation", "no policy that can be compared sends anything"
CAVEAT = (
    "A mean hides this: a link that carries the mean may be too slow for the tokens at the right. "
    "Skipped tokens, which send nothing, are not among them."
)
MEDIAN = 0.5


def measured_bits(loaded: LoadedRun, predicted: PayloadDistribution) -> SizeDistribution | None:
    """The same of the rerun of that point; None without one."""
    key = (predicted.policy, predicted.rule)
    points = (point for point in loaded.feasible if (point.policy, point.rule) == key)
    reruns = (loaded.rerun_of(point) for point in points)
    return next((rerun.payload for rerun in reruns if rerun is not None), None)


def answer(loaded: LoadedRun) -> str:
    """The policy whose asked tokens differ most, from the least to the largest of them."""
    payloads = () if loaded.derivation is None else loaded.derivation.payloads
    widest = max(payloads, key=lambda one: one.bits.quantiles[-1] - one.bits.quantiles[0])
    low, high = widest.bits.quantiles[0], widest.bits.quantiles[-1]
    if high == low:
        return f"Always the same: {number_text(high)} bit with {loaded.label(widest.policy)}."
    return (
        f"It differs most with {loaded.label(widest.policy)}: from {number_text(low)} to "
        f"{number_text(high)} bit, and {number_text(widest.bits.mean)} in the mean of "
        f"{widest.bits.num_tokens:,} asked tokens."
    )


def figure(loaded: LoadedRun) -> Figure | None:
    """Distribution functions of the bits of sent tokens, one line a policy."""
    derivation = loaded.derivation
    if derivation is None or not derivation.payloads:
        return None
    payloads = derivation.payloads
    drawn, axes = style.new_figure(1, 1, 3.4)
    plane = axes[0, 0]
    greatest = max(one.bits.quantiles[-1] for one in payloads)
    style.zero_and_log(plane, "x", 1.0, 3 * max(greatest, 10.0))
    plane.set_ylim(-0.02, 1.02)
    lines = [_draw(plane, one.bits, **loaded.style(one.policy).line()) for one in payloads]
    reruns = {one.policy: measured_bits(loaded, one) for one in payloads}
    for policy, found in reruns.items():
        if found is not None:
            median = np.interp(MEDIAN, found.levels, found.quantiles)
            plane.plot([median], [MEDIAN], **loaded.style(policy).filled_marker())
    for group in style.coinciding(lines):
        names = [payloads[place].policy for place in group]
        for place in group[1:]:
            lines[place].remove()
        loaded.label_lines(plane, names, any(reruns[name] is not None for name in names))
    plane.set_xlabel(
        f"uplink payload of an asked token, '{derivation.accounting}' accounting (bit; log, 0 at "
        "the left)"
    )
    plane.set_ylabel("cumulative share (of asked tokens)")
    style.outer_legend(plane)
    measured = any(found is not None for found in reruns.values())
    told = f" Markers: the reruns' medians. {loaded.validation_sample}" if measured else ""
    rule = next((p.rule for p in loaded.gates), "")
    caption = (
        f"{loaded.sample} Gated policies at the rule {rule}, with the drafts that the calibration "
        f"drew; lines that coincide are drawn as one. No interval: every asked token is counted."
        f"{told} Intervals of the means, clustered by prompt, stand in the tables."
    )
    return style.finish(drawn, QUESTION, caption)


def _draw(axes: Any, sizes: SizeDistribution, **look: Any) -> Any:
    """From 0 at the least size to 1 at the largest, so that one size is an upright line."""
    quantiles = (sizes.quantiles[0], *sizes.quantiles)
    (line,) = axes.plot(quantiles, (0.0, *sizes.levels), **look, linewidth=1.3)
    return line
