"""Which times of device, uplink and server make a published speed-up come out.

docs/theory.md, section 10. Everything here is in multiples of the device model's time a token:
q = t_up / t_slm for the baseline's full payload, l = t_llm / t_slm (any round trip with it),
e = t_uncertainty / t_slm. The baseline is HLM, which sends the full distribution of every token.
Times are constant; where the uplink fades, q stands for its harmonic mean under
``mean-of-throughputs`` and for its mean under ``ratio-of-means``. Averaging each answer's own
throughput over answers lies between the two: it is the first where every answer skips alike, and
the second where answers skip all or nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from hlmtheory.cost import (
    mean_throughput_at_skip_rate_tok_s,
    speedup_ceiling,
    throughput_at_skip_rate_tok_s,
)
from hlmtheory.domain import check_nonnegative, check_positive, check_unit_interval
from hlmtheory.published import Implied, PublishedNumber, PublishedTable, imply

Averaging: TypeAlias = Literal["ratio-of-means", "mean-of-throughputs"]
AVERAGINGS: tuple[Averaging, ...] = get_args(Averaging)
"""How a throughput ratio was taken: of 1/E[token time], or of E[1/token time]."""

THROUGHPUT = {
    "ratio-of-means": throughput_at_skip_rate_tok_s,
    "mean-of-throughputs": mean_throughput_at_skip_rate_tok_s,
}
"""tokens/s from skip rate and the two token times in ms, by averaging."""

Values: TypeAlias = np.ndarray | float

LLM_RATIOS = (0.0, 0.5, 2.0)
"""t_llm / t_slm at which the reconciling uplink time is tabulated."""


def _check(
    averaging: str, skip_rate: Values, llm_ratio: Values, payload_ratio: Values, extra: Values
) -> None:
    if averaging not in AVERAGINGS:
        raise ValueError(f"averaging = {averaging!r}: allowed are {', '.join(AVERAGINGS)}")
    check_unit_interval(skip_rate, "skip_rate")
    check_nonnegative(llm_ratio, "llm_ratio")
    check_positive(payload_ratio, "payload_ratio")
    check_unit_interval(payload_ratio, "payload_ratio")
    check_nonnegative(extra, "uncertainty_ratio")


def throughput_gain(
    skip_rate: Values,
    uplink_ratio: Values,
    llm_ratio: Values = 0.0,
    payload_ratio: Values = 1.0,
    averaging: Averaging = "ratio-of-means",
    uncertainty_ratio: Values = 0.0,
) -> Values:
    r"""Throughput of a skipping, truncating policy over that of HLM.

    .. math:: \frac{1 + q + l}{1 + e + (1 - p)(c q + l)} \quad \text{(ratio-of-means)}

    .. math:: (1 + q + l)\Big(\frac{p}{1 + e} + \frac{1 - p}{1 + e + c q + l}\Big)
              \quad \text{(mean-of-throughputs)}

    docs/theory.md, section 10, each (...) or a float: p in [0, 1], q, l, e >= 0, and c in (0, 1],
    the payload of a sent token over HLM's. The first never exceeds 1/((1 - p) c); the second has no
    ceiling for p > 0, and is never below the first. Both rise with q.
    """
    _check(averaging, skip_rate, llm_ratio, payload_ratio, uncertainty_ratio)
    check_nonnegative(uplink_ratio, "uplink_ratio")
    baseline = 1.0 + uplink_ratio + llm_ratio
    skipped = 1.0 + uncertainty_ratio
    extra = payload_ratio * uplink_ratio + llm_ratio
    return baseline * THROUGHPUT[averaging](skip_rate, skipped, skipped + extra) / 1e3


def uplink_ratio_for_gain(
    gain: float,
    skip_rate: float,
    llm_ratio: float = 0.0,
    payload_ratio: float = 1.0,
    averaging: Averaging = "ratio-of-means",
    uncertainty_ratio: float = 0.0,
) -> float:
    r"""The q at which :func:`throughput_gain` equals a given gain: one line of solutions over l.

    Linear in q for ``ratio-of-means``; for ``mean-of-throughputs`` the positive root of

    .. math:: p c\, q^2 + \big[p(s + c a) + u(1 - p) - G u c\big] q
              + \big[p s + u(1 - p)\big] a - G u s = 0,

    a = 1 + l, u = 1 + e, s = u + l, which is unique since the gain G > 0 rises with q; all else as
    for :func:`throughput_gain`. NaN where no q >= 0 gives this gain: it lies above the ceiling, or
    below what q = 0 gives already.
    """
    _check(averaging, skip_rate, llm_ratio, payload_ratio, uncertainty_ratio)
    check_positive(gain, "gain")
    g, p, c, u = gain, skip_rate, payload_ratio, 1.0 + uncertainty_ratio
    a, s = 1.0 + llm_ratio, u + llm_ratio
    if averaging == "ratio-of-means":
        leading, middle = 0.0, 1.0 - g * (1.0 - p) * c
        constant = a - g * (u + (1.0 - p) * llm_ratio)
    else:
        leading, middle = p * c, p * (s + c * a) + u * (1.0 - p) - g * u * c
        constant = (p * s + u * (1.0 - p)) * a - g * u * s
    if constant > 0:
        return math.nan
    root = math.sqrt(max(middle**2 - 4.0 * leading * constant, 0.0))
    # Two forms of the positive root; each keeps the digits that the other cancels.
    if middle > 0:
        return -2.0 * constant / (middle + root)
    return (root - middle) / (2.0 * leading) if leading > 0 else math.nan


def sent_ratio_for_step(
    step: float, skip_rate: float, higher_skip_rate: float, averaging: Averaging = "ratio-of-means"
) -> float:
    r"""The sent cost r = (t_up + t_llm)/t_slm at which skipping more speeds up by a given factor.

    .. math:: \kappa = \frac{1 + (1-p) r}{1 + (1-p') r} \;\Rightarrow\;
              r = \frac{\kappa - 1}{(1-p) - \kappa(1-p')} \quad \text{(ratio-of-means)}

    .. math:: \kappa = \frac{1 + p' r}{1 + p r} \;\Rightarrow\; r = \frac{\kappa - 1}{p' - \kappa p}
              \quad \text{(mean-of-throughputs)}

    docs/theory.md, section 10: two policies of one setting and one payload a sent token, with
    kappa >= 1 the throughput of the one that skips more, p' > p, over the other's. NaN where even a
    free device could not reach the step.
    """
    _check(averaging, skip_rate, 0.0, 1.0, 0.0)
    check_unit_interval(higher_skip_rate, "higher_skip_rate")
    if not step >= 1:
        raise ValueError(f"step = {step}: allowed is [1, inf); swap the two policies")
    if not higher_skip_rate > skip_rate:
        raise ValueError(
            f"higher_skip_rate = {higher_skip_rate:g}: allowed is above skip_rate = {skip_rate:g}"
        )
    if averaging == "ratio-of-means":
        denominator = (1.0 - skip_rate) - step * (1.0 - higher_skip_rate)
    else:
        denominator = higher_skip_rate - step * skip_rate
    return (step - 1.0) / denominator if denominator > 0 else float("nan")


def device_time_ms(
    throughput_tok_s: float,
    skip_rate: float,
    sent_ratio: float,
    averaging: Averaging = "ratio-of-means",
) -> float:
    r"""t_slm of a policy from its throughput, skip rate and r = (t_up + t_llm)/t_slm, ms.

    .. math:: t_{slm} = \frac{1}{\tau\,(1 + (1-p) r)} \quad \text{or} \quad
              \frac{1}{\tau}\Big(p + \frac{1-p}{1+r}\Big)

    with tau the throughput, as 1/E[token time] or as E[1/token time]; docs/theory.md, (28).
    """
    _check(averaging, skip_rate, 0.0, 1.0, 0.0)
    check_positive(throughput_tok_s, "throughput_tok_s")
    check_nonnegative(sent_ratio, "sent_ratio")
    return float(THROUGHPUT[averaging](skip_rate, 1.0, 1.0 + sent_ratio)) / throughput_tok_s


@dataclass(frozen=True)
class Reconciliation:
    """Times that make a published figure, the `target` of a system, come out, or why none do.

    Times are in `unit`: "t_slm" where only ratios are determined, else "ms". `t_llm` is given, not
    solved for. `t_up` is the uplink time of HLM's full payload that solves the equation, with its
    interval from rounding, whose upper end is None where rounding reaches the ceiling. At these
    times `ratio_of_means` is the speed-up over HLM in mean token time. `payload_ratio` is that of a
    sent token over HLM's; `reason` says why there is no solution, and is empty otherwise.
    """

    system: str
    target: str
    averaging: Averaging
    payload_ratio: float
    t_slm: float
    t_llm: float
    t_up: float | None = None
    t_up_low: float | None = None
    t_up_high: float | None = None
    ratio_of_means: float | None = None
    unit: str = "t_slm"
    reason: str = ""

    def solved(self, t_up: Implied, ratio_of_means: Values) -> Reconciliation:
        """With its solution."""
        low, high = t_up.bounds
        means = float(ratio_of_means)
        return replace(self, t_up=t_up.value, t_up_low=low, t_up_high=high, ratio_of_means=means)


class ComparedPair(NamedTuple):
    """U-HLM and UI-HLM as compared in UI-HLM's paper."""

    skip: PublishedNumber
    saved: PublishedNumber
    higher_saved: PublishedNumber
    speed: PublishedNumber
    higher_speed: PublishedNumber

    @classmethod
    def of(cls, numbers: PublishedTable) -> ComparedPair:
        """The five among the published numbers."""
        kinds = ("energy_saved", "throughput_tok_s")
        names = (f"{system}_{kind}" for kind in kinds for system in ("baseline", "compared"))
        return cls(numbers("U-HLM", "skip_rate"), *numbers.several("UI-HLM", *names))


def pair_sent_ratio(
    averaging: Averaging, p: float, saved: float, more_saved: float, speed: float, more: float
) -> float:
    """r from the step in throughput; energy saved is proportional to the tokens skipped."""
    return sent_ratio_for_step(more / speed, p, min(p * more_saved / saved, 1.0), averaging)


def reconciliations(
    published: Sequence[PublishedNumber], llm_ratios: Sequence[float] = LLM_RATIOS
) -> tuple[Reconciliation, ...]:
    """Which (t_slm, t_up, t_llm) make each paper's throughput come out, under both averagings.

    docs/theory.md, section 10. U-HLM and CU-HLM publish ratios, so times are in multiples of t_slm;
    UI-HLM publishes token/s, so they are in ms. Each set of figures leaves a line of solutions,
    which is solved at the given t_llm / t_slm >= 0.
    """
    numbers = PublishedTable(published)
    u_hlm, cu_hlm = (
        numbers.several(system, "throughput_ratio", "skip_rate") for system in ("U-HLM", "CU-HLM")
    )
    compression = numbers("CU-HLM", "vocabulary_compression")
    k, vocab = numbers("CU-HLM", "num_entries"), numbers("CU-HLM", "vocab_size").value
    best = f"CU-HLM at k* = {k.value:g}"
    out: list[Reconciliation] = []
    for averaging, llm in itertools.product(AVERAGINGS, llm_ratios):
        out += [
            _solve("U-HLM", u_hlm, lambda: 1.0, averaging, llm),
            _solve("CU-HLM", (*cu_hlm, compression), lambda c: 1.0 - c, averaging, llm),
            _solve(best, (*cu_hlm, k), lambda n: n / vocab, averaging, llm),
            _solve_pair(ComparedPair.of(numbers), averaging, llm),
        ]
    return tuple(sorted(out, key=lambda entry: entry.system))


def _solve(
    system: str,
    given: tuple[PublishedNumber, ...],
    payload_ratio: Callable[..., float],
    averaging: Averaging,
    llm: float,
) -> Reconciliation:
    """The line of q over l of one published speed-up, at one l."""

    def uplink(gain: float, p: float, *payload: float) -> float:
        return uplink_ratio_for_gain(gain, p, llm, payload_ratio(*payload), averaging)

    gain, p, *payload = (number.value for number in given)
    c = payload_ratio(*payload)
    entry = Reconciliation(system, f"{gain:g}x HLM's throughput", averaging, c, 1.0, llm)
    solved = imply(uplink, *given)
    if math.isfinite(solved.value):
        return entry.solved(solved, throughput_gain(p, solved.value, llm, c))
    least = float(throughput_gain(p, 0.0, llm, c, averaging))
    if least > gain:
        return replace(entry, reason=f"t_llm alone gives {least:.3g}x already: t_llm must be less")
    return replace(entry, reason=f"above the ceiling {speedup_ceiling(p, c):.4g}x")


def _solve_pair(pair: ComparedPair, averaging: Averaging, llm: float) -> Reconciliation:
    """Absolute times from two throughputs and two energy savings of one setting."""

    def sent_ms(*values: float) -> float:
        r = pair_sent_ratio(averaging, *values)
        return (r - llm) * device_time_ms(values[3], values[0], r, averaging)

    r = pair_sent_ratio(averaging, *(number.value for number in pair))
    slm = device_time_ms(pair.speed.value, pair.skip.value, r, averaging)
    target = f"{pair.speed.value:g} and {pair.higher_speed.value:g} token/s"
    entry = Reconciliation("UI-HLM", target, averaging, 1.0, slm, llm * slm, unit="ms")
    solved = imply(sent_ms, *pair)
    if solved.value < 0:
        reason = f"t_up + t_llm = {r * slm:,.0f} ms in all: t_llm must be less"
        return replace(entry, reason=reason)
    solved = replace(solved, low=max(solved.low, 0.0))
    return entry.solved(solved, throughput_gain(pair.skip.value, r))
