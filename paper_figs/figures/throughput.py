"""Which policy is fastest on which link?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from calibrate.run.figure import NBSP, number_text
from calibrate.run.records import DerivationRecord, LinkSweep, ThroughputCurves
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "How does each policy's throughput depend on the link?"
NEEDS, LACKS = "derivation", "no rule has gated policies to compare"
LINKS = {
    "awgn": "AWGN link of {bandwidth}, at capacity",
    "ergodic-rayleigh": "Rayleigh link of {bandwidth}, at its ergodic rate",
    "rayleigh-outage": "Rayleigh link of {bandwidth} with outage, at a fixed {rate}",
    "rate": "Link of a constant rate",
    "trace": "Link along a trace of {num_rates:,} rates, all scaled alike",
}
"""What is kept of a link of each model while it is swept."""
CAVEAT = (
    "Links are ideal: nothing is lost to coding or framing, nothing queues, and the server has no "
    "other user. Token times are of the machine that measured them, or of the named profile."
)
NUM_MARKERS = 4
PANELS = {
    "throughput_tok_s": "1 / mean token time",
    "mean_throughput_tok_s": "mean of 1 / token time",
}


def answer(loaded: LoadedRun) -> str:
    """The fastest gated policy at the worst and the best of the drawn links."""
    sweep = None if loaded.derivation is None else loaded.derivation.sweep
    if sweep is None:
        return "No gated policies can be compared at one rule."
    gated = [one for one in sweep.series if loaded.policies[one.policy].gated]
    told = []
    for place in (0, -1):
        best = max(gated, key=lambda one: one.throughput_tok_s.value[place] or 0.0)
        told.append(
            f"{number_text(best.throughput_tok_s.figures()[place])} token/s at "
            f"{_amount_text(sweep.grid[place], sweep.unit)} ({loaded.label(best.policy)})"
        )
    return f"The fastest gated policy has {' and '.join(told)}."


def measured_series(loaded: LoadedRun, predicted: ThroughputCurves) -> ThroughputCurves | None:
    """The rerun of a predicted series, priced along the same sweep; None without one."""
    key = (predicted.policy, predicted.rule)
    points = (point for point in loaded.feasible if (point.policy, point.rule) == key)
    reruns = (loaded.rerun_of(point) for point in points)
    return next((rerun.throughput for rerun in reruns if rerun is not None), None)


def figure(loaded: LoadedRun) -> Figure | None:
    """Both throughputs along the link's sweep: predicted lines, measured markers."""
    derivation = loaded.derivation
    if derivation is None or derivation.sweep is None:
        return None
    sweep = derivation.sweep
    drawn, axes = style.new_figure(1, 2, 3.9, share_y=True)
    lines = [_draw_lines(loaded, axis, sweep, metric)
             for axis, metric in zip(axes[0], PANELS, strict=True)]  # fmt: skip
    axes[0, 0].set_ylim(bottom=0)
    reruns = {series.policy: measured_series(loaded, series) for series in sweep.series}
    for place, series in enumerate(sweep.series):
        found = reruns[series.policy]
        at = marker_places(len(sweep.grid), place / len(sweep.series))
        for axis, metric in zip(axes[0], PANELS, strict=True) if found is not None else ():
            means = getattr(found, metric)
            style.error_bars(
                axis, np.array(means.grid)[at], style.parts(means)[:, at], capsize=1.5,
                **loaded.style(series.policy).filled_marker(),
            )  # fmt: skip
    for group in style.coinciding(*lines):
        names = [sweep.series[place].policy for place in group]
        for panel in lines:
            for place in group[1:]:
                panel[place].remove()
        loaded.label_lines(axes[0, 1], names, any(reruns[name] is not None for name in names))
    measured = any(found is not None for found in reruns.values())
    for axis, letter, name in zip(axes[0], "ab", PANELS.values(), strict=True):
        axis.set_xlabel(f"{sweep.quantity} ({sweep.unit})")
        axis.axvline(sweep.own, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 1)))
        axis.set_ylabel("throughput (token/s)")
        style.panel_letter(axis, letter, name)
    style.outer_legend(axes[0, 1])
    return style.finish(drawn, QUESTION, _caption(loaded, derivation, sweep, measured))


def _draw_lines(loaded: LoadedRun, axis: Any, sweep: LinkSweep, metric: str) -> list[Any]:
    axis.set_xscale(sweep.spacing)
    axis.set_xlim(sweep.grid[0], sweep.grid[-1])
    if sweep.spacing == "log":
        axis.xaxis.set_major_formatter(EngFormatter(sep=NBSP))
    lines = []
    for series in sweep.series:
        means = getattr(series, metric)
        look = loaded.style(series.policy).line()
        lines += axis.plot(means.grid, style.parts(means)[0], **look, linewidth=1.2)
    return lines


def marker_places(num: int, share: float) -> np.ndarray:
    """Where on a grid of `num` a series is marked; `share` moves it away from the others."""
    return ((np.arange(NUM_MARKERS) + 0.1 + 0.9 * share) * (num - 1) / NUM_MARKERS).astype(int)


def _amount_text(amount: float, unit: str) -> str:
    """An amount with its unit: -15 dB, 333 kbit/s."""
    if unit == "dB":
        return f"{number_text(amount)}{NBSP}{unit}"
    return str(EngFormatter(unit, sep=NBSP)(float(f"{amount:.3g}")))


def link_text(link: dict[str, Any]) -> str:
    """What of a derivation's link is kept while it is swept, in words."""
    kept = {
        name: _amount_text(link[key], unit)
        for name, key, unit in (("bandwidth", "bandwidth_hz", "Hz"), ("rate", "rate_bps", "bit/s"))
        if key in link
    }
    text = LINKS[link["model"]].format(num_rates=len(link.get("rates_bps", ())), **kept)
    own_downlink = link.get("downlink_bps")
    downlink = (
        "the downlink as the uplink"
        if own_downlink is None
        else f"the downlink at {_amount_text(own_downlink, 'bit/s')} throughout"
    )
    return f"{text}, {downlink}, round trip {link['round_trip_ms']:g}{NBSP}ms"


def _caption(
    loaded: LoadedRun, derivation: DerivationRecord, sweep: LinkSweep, measured: bool
) -> str:
    times = ", ".join(
        f"{name} {number_text(derivation.profile[key])}"
        for key, name in (
            ("t_slm_ms", "device"), ("t_uncertainty_ms", "uncertainty"), ("t_llm_ms", "server")
        )
        if key in derivation.profile
    )  # fmt: skip
    reruns = (
        f"; markers: the reruns' tokens priced on that link, {loaded.derived_note}. "
        f"{loaded.validation_sample}"
        if measured
        else ". No rerun at this rule is stored."
    )
    return (
        f"{loaded.sample} Gated policies at the rule {sweep.rule}; lines that coincide are drawn "
        f"as one. Lines: predicted{reruns} {link_text(derivation.link)}; token times in ms: "
        f"{times}. '{derivation.accounting}' accounting. Grey line: "
        f"{_amount_text(sweep.own, sweep.unit)}, the link of the derivation. What sends nothing "
        "up does not depend on the link."
    )
