"""Which policy is fastest on which link?"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from calibrate.derive.operating_points import OperatingPoint
from calibrate.derive.policy_tokens import Economics, PolicyTokens, metrics, predicted_tokens
from hlmtheory.clusters import RatioEstimate
from hlmtheory.link import AwgnLink
from hlmtheory.policies import GATED_POLICIES
from paper_figs.figures.curves import Curve, curve, error_lengths
from paper_figs.loaded import LoadedRun
from paper_figs.style import GREY, direct_legend, finish, new_figure, panel_letter, policy_style

QUESTION = "How does each policy's throughput depend on the uplink?"
SNR_DB = np.linspace(-15.0, 35.0, 51)
NUM_MARKERS = 4
DEFAULT_BANDWIDTH_HZ = 20e6
PANELS = (
    ("throughput_tok_s", "1 / mean token time"),
    ("mean_throughput_tok_s", "mean of 1 / token time"),
)


def chosen_rule(loaded: LoadedRun) -> str | None:
    """The rule to compare at: the risk budget of most gated policies that were rerun, nearest 1 %.

    Where none was, of most that could be; without a budget, the first rule that neither skips all
    nor nothing.
    """
    return _commonest_rule(loaded.shown) or _commonest_rule(loaded.feasible)


def _commonest_rule(points: tuple[OperatingPoint, ...]) -> str | None:
    usable: dict[str, int] = {}
    for point in points:
        rate = point.predicted["skip_rate"].value
        if point.policy in GATED_POLICIES and rate is not None and 0 < rate < 1:
            usable[point.rule] = usable.get(point.rule, 0) + 1
    if not usable:
        return None
    budgets = [rule for rule in usable if re.fullmatch(r"risk-[\d.e-]+", rule)]
    if budgets:
        return min(budgets, key=lambda rule: (-usable[rule], abs(np.log(float(rule[5:]) / 0.01))))
    return max(usable, key=lambda rule: usable[rule])


def points_at(loaded: LoadedRun, rule: str) -> list[OperatingPoint]:
    """One feasible point a policy: at the rule, or the only one of a policy without a gate."""
    return [point for point in loaded.feasible if point.rule in (rule, "none")]


def economics_at(loaded: LoadedRun, snr_db: float) -> Economics:
    """The run's economics over an AWGN link of that SNR, its own bandwidth and round trip kept."""
    economics = loaded.economics()
    bandwidth = getattr(economics.link, "bandwidth_hz", DEFAULT_BANDWIDTH_HZ)
    return replace(economics, link=AwgnLink(bandwidth, float(snr_db), economics.link.round_trip_ms))


def along_snr(loaded: LoadedRun, tokens: PolicyTokens, metric: str, snr_db: np.ndarray) -> Curve:
    """A throughput metric of given tokens at every SNR."""
    estimates: list[RatioEstimate] = [
        metrics(tokens, economics_at(loaded, snr))[metric] for snr in snr_db
    ]
    return curve(snr_db, estimates, loaded.derived_confidence)


def figure(loaded: LoadedRun) -> Figure | None:
    """Both throughputs against SNR: predicted lines, measured markers."""
    rule = chosen_rule(loaded)
    if rule is None or "skip_set_bias" not in loaded.trace:
        return None
    points = points_at(loaded, rule)
    reruns = {(rerun.point.policy, rerun.point.rule): rerun for rerun in loaded.reruns}
    drawn, axes = new_figure(1, 2, 3.9, share_y=True)
    measured = False
    for number, point in enumerate(points):
        style = policy_style(point.policy)
        predicted = predicted_tokens(loaded.trace, point.to_policy(), loaded.vocab_size)
        rerun = reruns.get((point.policy, point.rule))
        shift = 50.0 / NUM_MARKERS * (number / max(len(points), 1))
        at = SNR_DB[0] + 1.0 + shift + 50.0 / NUM_MARKERS * np.arange(NUM_MARKERS)
        for axis, (metric, _) in zip(axes[0], PANELS, strict=True):
            line = along_snr(loaded, predicted, metric, SNR_DB)
            axis.plot(line.grid, line.value, **style.line(), linewidth=1.2)
            if rerun is not None:
                measured = True
                found = along_snr(loaded, rerun.tokens(), metric, at[at <= SNR_DB[-1]])
                axis.errorbar(
                    found.grid, found.value, error_lengths(found.value, found.low, found.high),
                    **style.filled_marker(), markersize=4.5, elinewidth=0.9, capsize=1.5,
                )  # fmt: skip
        combined = style.filled_marker() | {"linestyle": style.linestyle}
        axes[0, 1].plot([], [], **combined, label=point.policy)
    derived_link = loaded.economics().link
    for axis, letter, (_, name) in zip(axes[0], "ab", PANELS, strict=True):
        axis.set_ylim(bottom=0)
        axis.set_xlim(SNR_DB[0], SNR_DB[-1])
        axis.set_xlabel("uplink SNR (dB)")
        if isinstance(derived_link, AwgnLink):
            axis.axvline(derived_link.snr_db, color=GREY, linewidth=0.9, linestyle=(0, (1, 1)))
        axis.set_ylabel("throughput (token/s)")
        panel_letter(axis, letter, name)
    direct_legend(axes[0, 1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(drawn, QUESTION, _caption(loaded, rule, measured))


def _caption(loaded: LoadedRun, rule: str, measured: bool) -> str:
    economics = economics_at(loaded, 0.0)
    profile, link = economics.profile, economics.link
    derived_link = loaded.economics().link
    return (
        f"{loaded.sample} Gated policies at the rule {rule}. Lines: predicted"
        + (
            f"; markers: the reruns' tokens priced at that SNR, {loaded.derived_note}. "
            f"{loaded.validation_sample}"
            if measured
            else ". No rerun at this rule is stored."
        )
        + f" AWGN link of {getattr(link, 'bandwidth_hz', 0.0) / 1e6:g} MHz at capacity, round trip "
        f"{link.round_trip_ms:g} ms; token times in ms: device {profile.t_slm_ms:.3g}, uncertainty "
        f"{profile.t_uncertainty_ms:.3g}, server {profile.t_llm_ms:.3g}. '{economics.accounting}' "
        "accounting. "
        + (
            f"Grey line: {derived_link.snr_db:g} dB, the link of the derivation. "
            if isinstance(derived_link, AwgnLink)
            else ""
        )
        + "slm sends nothing; llm streams its answer down and sends nothing up."
    )
