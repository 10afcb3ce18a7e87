"""Which policy is fastest on which link?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from calibrate.run.records import DerivationRecord, SnrSweep, ThroughputCurves
from paper_figs import style
from paper_figs.loaded import LoadedRun

QUESTION = "How does each policy's throughput depend on the uplink?"
NEEDS, LACKS = "derivation", "the link has no SNR, or no rule has gated policies to compare"
LINKS = {
    "awgn": "AWGN link at capacity",
    "ergodic-rayleigh": "Rayleigh link at its ergodic rate, by mean SNR",
    "rayleigh-outage": "Rayleigh link at a fixed rate with outage, by mean SNR",
}
CAVEAT = (
    "Capacity is reached, nothing queues, and the server has no other user; token times are of the "
    "machine that measured them, or of the named profile."
)
NUM_MARKERS = 4
PANELS = {
    "throughput_tok_s": "1 / mean token time",
    "mean_throughput_tok_s": "mean of 1 / token time",
}


def answer(loaded: LoadedRun) -> str:
    """The fastest gated policy at the worst and the best of the drawn links."""
    series = () if loaded.derivation is None or loaded.derivation.snr is None else (
        loaded.derivation.snr.series
    )  # fmt: skip
    gated = [one for one in series if loaded.policies[one.policy].gated]
    told = []
    for place in (0, -1):
        best = max(gated, key=lambda one: one.throughput_tok_s.value[place] or 0.0)
        told.append(
            f"{number_text(best.throughput_tok_s.figures()[place])} token/s at "
            f"{best.throughput_tok_s.grid[place]:g} dB ({loaded.label(best.policy)})"
        )
    return f"The fastest gated policy has {' and '.join(told)}."


def measured_series(loaded: LoadedRun, predicted: ThroughputCurves) -> ThroughputCurves | None:
    """The rerun of a predicted series, priced along the same SNRs; None without one."""
    key = (predicted.policy, predicted.rule)
    points = (point for point in loaded.feasible if (point.policy, point.rule) == key)
    reruns = (loaded.rerun_of(point) for point in points)
    return next((rerun.throughput for rerun in reruns if rerun is not None), None)


def figure(loaded: LoadedRun) -> Figure | None:
    """Both throughputs along the link's SNR: predicted lines, measured markers."""
    derivation = loaded.derivation
    if derivation is None or derivation.snr is None or not derivation.snr.series:
        return None
    snr = derivation.snr
    drawn, axes = style.new_figure(1, 2, 3.9, share_y=True)
    lines = [_draw_lines(loaded, axis, snr, metric)
             for axis, metric in zip(axes[0], PANELS, strict=True)]  # fmt: skip
    axes[0, 0].set_ylim(bottom=0)
    reruns = {series.policy: measured_series(loaded, series) for series in snr.series}
    for place, series in enumerate(snr.series):
        found = reruns[series.policy]
        at = marker_places(len(snr.snr_db), place / len(snr.series))
        for axis, metric in zip(axes[0], PANELS, strict=True) if found is not None else ():
            means = getattr(found, metric)
            style.error_bars(
                axis, np.array(means.grid)[at], style.parts(means)[:, at], capsize=1.5,
                **loaded.style(series.policy).filled_marker(),
            )  # fmt: skip
    for group in style.coinciding(*lines):
        names = [snr.series[place].policy for place in group]
        for panel in lines:
            for place in group[1:]:
                panel[place].remove()
        loaded.label_lines(axes[0, 1], names, any(reruns[name] is not None for name in names))
    measured = any(found is not None for found in reruns.values())
    for axis, letter, name in zip(axes[0], "ab", PANELS.values(), strict=True):
        axis.set_xlabel("uplink SNR (dB)")
        axis.axvline(derivation.link["snr_db"], color=style.GREY, linewidth=0.9,
                     linestyle=(0, (1, 1)))  # fmt: skip
        axis.set_ylabel("throughput (token/s)")
        style.panel_letter(axis, letter, name)
    style.outer_legend(axes[0, 1])
    return style.finish(drawn, QUESTION, _caption(loaded, derivation, snr, measured))


def _draw_lines(loaded: LoadedRun, axis: Any, snr: SnrSweep, metric: str) -> list[Any]:
    axis.set_xlim(snr.snr_db[0], snr.snr_db[-1])
    lines = []
    for series in snr.series:
        means = getattr(series, metric)
        look = loaded.style(series.policy).line()
        lines += axis.plot(means.grid, style.parts(means)[0], **look, linewidth=1.2)
    return lines


def marker_places(num: int, share: float) -> np.ndarray:
    """Where on a grid of `num` a series is marked; `share` moves it away from the others."""
    return ((np.arange(NUM_MARKERS) + 0.1 + 0.9 * share) * (num - 1) / NUM_MARKERS).astype(int)


def _caption(loaded: LoadedRun, derivation: DerivationRecord, snr: SnrSweep, measured: bool) -> str:
    times = ", ".join(
        f"{name} {number_text(derivation.profile[key])}"
        for key, name in (
            ("t_slm_ms", "device"), ("t_uncertainty_ms", "uncertainty"), ("t_llm_ms", "server")
        )
        if key in derivation.profile
    )  # fmt: skip
    reruns = (
        f"; markers: the reruns' tokens priced at that SNR, {loaded.derived_note}. "
        f"{loaded.validation_sample}"
        if measured
        else ". No rerun at this rule is stored."
    )
    width = "" if snr.bandwidth_hz is None else f" of {snr.bandwidth_hz / 1e6:g} MHz"
    return (
        f"{loaded.sample} Gated policies at the rule {snr.rule}; lines that coincide are drawn as "
        f"one. Lines: predicted{reruns} {LINKS.get(snr.model, snr.model)}{width}, round trip "
        f"{snr.round_trip_ms:g} ms; token times in ms: {times}. '{derivation.accounting}' "
        f"accounting. Grey line: {derivation.link['snr_db']:g} dB, the link of the derivation. "
        "What sends nothing up does not depend on the link."
    )
