"""Token times by the clock, link by link, beside what was predicted of them."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from calibrate.run.figure import NBSP, number_text
from calibrate.run.records import WireLinkRuns, WireRun
from paper_figs import style
from paper_figs.loaded import LoadedRun
from paper_figs.words import link_text

QUESTION = "Does the predicted token time hold by the clock?"
NEEDS, LACKS = "wire", "nothing was run over a link"
CAVEAT = (
    "Server and device are two processes of one machine, and the link is a relay between them: "
    "radio scheduling, TCP's slow start and other users are not in it. Times are of tokens behind "
    "the first of an answer."
)
TICKS_MS = tuple(step * 10**power for power in range(5) for step in (1, 2, 5))


def answer(loaded: LoadedRun) -> str:
    """How far off the prediction is, and which policy is fastest on which link."""
    record = loaded.wire
    if record is None:
        return "Nothing was run over a link."
    fastest = ", ".join(
        f"{one.link_name}: {loaded.label(_fastest(one).policy)} "
        f"({number_text(_fastest(one).token_time.measured)}{NBSP}ms/token)"
        for one in record.links
    )
    return (
        f"Token times are off their prediction by {record.mean_time_error:.1%} in the mean, "
        f"{record.mean_time_error_before:.1%} without what the machines add to the models' own "
        f"times, and {record.mean_time_error_replayed:.1%} once it is known which tokens were "
        f"skipped; {record.coverage.covered} of {record.coverage.total} figures of the clock lie "
        f"inside their intervals. Fastest gated policy: {fastest}."
    )


def _fastest(link: WireLinkRuns) -> WireRun:
    """Of the gated policies, if one was run."""
    return next((run for run in link.by_time if run.gated), link.by_time[0])


def figure(loaded: LoadedRun) -> Figure | None:
    """One panel a link, below each other on one axis of time: bars of the prediction's interval,
    markers of the clock."""
    record = loaded.wire
    if record is None or not record.links:
        return None
    counts = tuple(float(len(one.runs)) for one in record.links)
    drawn, axes = style.new_figure(
        len(counts), 1, 0.9 + 0.45 * len(counts) + 0.2 * sum(counts), share_x=True,
        height_ratios=counts,
    )  # fmt: skip
    for axis, one, letter in zip(axes[:, 0], record.links, "abcdefgh", strict=False):
        _draw_link(loaded, axis, one)
        style.panel_letter(axis, letter, _title(one))
        axis.set_ylabel("policy")
    last = axes[-1, 0]
    last.set_xscale("log")
    low, high = last.get_xlim()
    ticks = [one for one in TICKS_MS if low <= one <= high]
    last.set_xticks(ticks, [f"{one:,}" for one in ticks])
    last.set_xticks([], minor=True)
    last.set_xlabel("token time (ms; log)")
    return style.finish(drawn, QUESTION, _caption(loaded))


def _title(link: WireLinkRuns) -> str:
    text = link_text(link)
    return text if text == link.link_name else f"{link.link_name}: {text} round trip"


def _draw_link(loaded: LoadedRun, axis: Any, link: WireLinkRuns) -> None:
    runs = link.by_time
    for height, run in enumerate(runs):
        cell = run.token_time
        low, high = cell.predicted.low, cell.predicted.high
        if low is not None and high is not None:
            axis.plot([low, high], [height, height], color=style.GREY, linewidth=5, alpha=0.45,
                      solid_capstyle="butt")  # fmt: skip
        axis.plot(cell.predicted.value, height, "|", color=style.BLACK, markersize=9)
        measured = style.parts([cell.measured])
        axis.errorbar(
            measured[0], [height], xerr=style.error_lengths(measured), elinewidth=0.9, capsize=1.5,
            markersize=4.5, zorder=4, **loaded.style(run.policy).filled_marker(),
        )  # fmt: skip
    axis.set_yticks(range(len(runs)), [loaded.label(run.policy) for run in runs])
    axis.set_ylim(len(runs) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def _caption(loaded: LoadedRun) -> str:
    record = loaded.wire
    if record is None:
        return ""
    rules = ", ".join(dict.fromkeys(
        run.rule for one in record.links for run in one.runs if run.rule != "none"
    ))  # fmt: skip
    return (
        f"{loaded.sample} Clock: {len(record.prompt_ids)} fresh prompts, one at a time, up to "
        f"{record.max_new_tokens} tokens each; gated policies at {rules}. Grey bars and ticks: "
        f"predicted, docs/theory.md (63), with {record.confidence:.0%} prediction intervals. "
        "Markers: the clock, with intervals clustered by prompt."
    )
