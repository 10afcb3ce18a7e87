"""The papers' published numbers held against what the theory says they imply.

docs/theory.md, section 10. A published number stands for an interval, half a unit of its last digit
to either side; what follows from it is carried through as an interval too, and a row is consistent
where the two can meet. Inconsistent does not mean wrong: it means that the numbers cannot come from
one setting under that reading, and the row says which reading or setting they need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hlmtheory.cost import payload_bits, speedup_ceiling
from hlmtheory.published import Implied, PublishedNumber, PublishedTable, imply
from hlmtheory.reconcile import (
    AVERAGINGS,
    ComparedPair,
    device_time_ms,
    pair_sent_ratio,
    throughput_gain,
    uplink_ratio_for_gain,
)
from hlmtheory.thresholds import risk_averse_threshold, risk_prone_threshold


@dataclass(frozen=True)
class AuditRow:
    """One published number and what the theory says of it.

    `quantity` is what is compared, "A -> B" where the implied figure B is another than the
    published A. `consistent` says whether the two can meet within rounding; the interval of the
    implied figure is from the rounding of everything it was worked out from (a ceiling has its own
    lowest and highest value here), None where rounding leaves no bound. `unit` is of the implied
    figure, `mark` of the published number, one of published.MARKS.
    """

    system: str
    quantity: str
    published: float
    implied: float
    explanation: str
    consistent: bool
    implied_low: float | None
    implied_high: float | None
    unit: str = ""
    mark: str = "abstract"


def _row(
    system: str,
    quantity: str,
    number: PublishedNumber,
    implied: Implied,
    explanation: str,
    consistent: bool | None = None,
    unit: str | None = None,
) -> AuditRow:
    meets = implied.meets(number) if consistent is None else consistent
    return AuditRow(
        system, quantity, number.value, implied.value, explanation, meets, *implied.bounds,
        number.unit if unit is None else unit, number.mark,
    )  # fmt: skip


def audit(published: Sequence[PublishedNumber]) -> tuple[AuditRow, ...]:
    """Every published number against the theory, one row for each comparison.

    docs/theory.md, section 10. `published` are the numbers of data/published.json.

    Raises
    ------
    ValueError
        If a number is missing or given twice.
    """
    numbers = PublishedTable(published)
    systems = (_threshold_rows, _payload_rows, _u_hlm_rows, _cu_hlm_rows, _ui_hlm_rows)
    return tuple(row for rows in systems for row in rows(numbers))


def _threshold_rows(numbers: PublishedTable) -> list[AuditRow]:
    a, b, averse, prone = numbers.several(
        "U-HLM", "slope", "intercept", "risk_averse_threshold", "risk_prone_threshold"
    )

    def averse_at(slope: float, intercept: float) -> float:
        return risk_averse_threshold(slope, intercept).value

    delta = imply(lambda u, slope, intercept: slope * u + intercept, prone, a, b)
    again = risk_prone_threshold(a.value, b.value, delta.value).value
    return [
        _row(
            "U-HLM", "risk-averse threshold -b/a", averse, imply(averse_at, a, b),
            "where the line predicts no rejection",
        ),
        _row(
            "U-HLM", "risk-prone threshold -> Delta = P(y_d < x_d)", prone, delta,
            f"Delta = a u_th + b; (Delta - b)/a gives {again:.3g} back. A pair whose Delta is at "
            "least a + b skips everything under this rule",
            consistent=delta.low >= 0 and delta.high <= 1,
        ),
        _row(
            "CU-HLM", "U-HLM's risk-averse threshold as -b/a of this fit", averse,
            imply(averse_at, *numbers.several("CU-HLM", "slope", "intercept")),
            "the two papers' fits give different thresholds: quote the fit with the threshold",
        ),
    ]  # fmt: skip


def _payload_rows(numbers: PublishedTable) -> list[AuditRow]:
    vocab, k, compression, full, best = numbers.several(
        "CU-HLM", "vocab_size", "num_entries", "vocabulary_compression", "payload_full_bytes",
        "payload_best_bytes",
    )  # fmt: skip

    def payload_bytes(num_entries: float, vocab_size: float) -> float:
        return float(payload_bits(num_entries, int(vocab_size), accounting="paper")) / 8

    def compression_at(num_entries: float, vocab_size: float) -> float:
        return 1 - payload_bytes(num_entries, vocab_size) / payload_bytes(vocab_size, vocab_size)

    # If the full distribution goes in vocabulary order, its indices need not be sent.
    unindexed = (1 - compression.value) * vocab.value * 8 / (payload_bytes(1, vocab.value) * 8)
    return [
        _row(
            "CU-HLM", "payload of the full vocabulary", full,
            imply(payload_bytes, vocab, vocab), "V (8 + ceil(log2 V)) bit",
        ),
        _row(
            "CU-HLM", "payload of the optimal k", best, imply(payload_bytes, k, vocab),
            "k (8 + ceil(log2 V)) bit",
        ),
        _row(
            "CU-HLM", f"vocabulary compression, at k* = {k.value:g}", compression,
            imply(compression_at, k, vocab),
            "the optimal k compresses far more than the abstract says: another k, or another mean",
        ),
        _row(
            "CU-HLM", "optimal k, from the compression", k,
            imply(lambda share, vocab_size: (1 - share) * vocab_size, compression, vocab),
            f"{compression.value:.1%} leaves {1 - compression.value:.1%} of V; {unindexed:.0f} if "
            "the full vocabulary is billed without indices",
        ),
    ]  # fmt: skip


def _u_hlm_rows(numbers: PublishedTable) -> list[AuditRow]:
    skip, gain = numbers.several("U-HLM", "skip_rate", "throughput_ratio")
    ceiling = imply(speedup_ceiling, skip)
    sent = imply(_gain_to_sent_ratio, gain, skip)
    return [
        _row(
            "U-HLM", "speed-up over HLM in mean token time (ceiling)", gain, ceiling,
            f"1/(1 - p), reached only if device time is free; {gain.value:g}x needs p of at least "
            f"{1 - 1 / gain.value:.1%}, so no (t_slm, t_up, t_llm) gives it",
            consistent=gain.low <= ceiling.high,
        ),
        _row(
            "U-HLM", "speed-up over HLM as mean of throughputs -> (t_up + t_llm)/t_slm", gain, sent,
            "1 + p r: reconciled at this r; the speed-up in mean token time is then only "
            f"{throughput_gain(skip.value, sent.value):.2f}x",
            consistent=math.isfinite(sent.value), unit="t_slm",
        ),
    ]  # fmt: skip


def _gain_to_sent_ratio(gain: float, skip_rate: float) -> float:
    """r = t_up + t_llm in t_slm: without truncation only the sum counts, so l = 0 will do."""
    return uplink_ratio_for_gain(gain, skip_rate, averaging="mean-of-throughputs")


def _cu_hlm_rows(numbers: PublishedTable) -> list[AuditRow]:
    skip, gain, compression, k, vocab = numbers.several(
        "CU-HLM", "skip_rate", "throughput_ratio", "vocabulary_compression", "num_entries",
        "vocab_size",
    )  # fmt: skip
    other = numbers.several("U-HLM", "throughput_ratio", "skip_rate")
    best_ratio = k.value / vocab.value

    def mean_of_throughputs(g: float, p: float, share: float) -> float:
        return uplink_ratio_for_gain(g, p, 0.0, 1 - share, "mean-of-throughputs")

    def ratio_of_means(g: float, p: float, entries: float) -> float:
        return uplink_ratio_for_gain(g, p, 0.0, entries / vocab.value)

    def best_in_other_setting(g: float, p: float, share: float, own_p: float) -> float:
        q = _gain_to_sent_ratio(g, p)
        return float(throughput_gain(own_p, q, 0.0, 1 - share, "mean-of-throughputs"))

    ceiling = imply(lambda p, share: speedup_ceiling(p, 1 - share), skip, compression)
    uplink = imply(mean_of_throughputs, gain, skip, compression)
    at_best = imply(ratio_of_means, gain, skip, k)
    elsewhere = imply(best_in_other_setting, *other, compression, skip)
    mean_time = throughput_gain(skip.value, uplink.value, 0.0, 1 - compression.value)
    full_bits = float(payload_bits(vocab.value, int(vocab.value), accounting="paper"))
    return [
        _row(
            "CU-HLM", "speed-up over HLM in mean token time, at the stated compression (ceiling)",
            gain, ceiling,
            "1/((1 - p) c), reached only if device and server time are free: no times give the "
            "published figure",
            consistent=gain.low <= ceiling.high,
        ),
        _row(
            "CU-HLM", f"speed-up over HLM in mean token time, at k* = {k.value:g} -> t_up/t_slm",
            gain, at_best,
            f"the ceiling is {speedup_ceiling(skip.value, best_ratio):,.0f}x at c = "
            f"{best_ratio:.4%}: reconciled with t_llm = 0, more uplink with more t_llm; an uplink "
            f"of {full_bits / at_best.value:,.0f} bit per device token",
            consistent=math.isfinite(at_best.value), unit="t_slm",
        ),
        _row(
            "CU-HLM", "speed-up over HLM as mean of throughputs, at the stated compression -> "
            "t_up/t_slm", gain, uplink,
            "reconciled with t_llm = 0; the speed-up in mean token time is then only "
            f"{mean_time:.0f}x",
            consistent=math.isfinite(uplink.value), unit="t_slm",
        ),
        _row(
            "CU-HLM", "speed-up over HLM in the setting that reconciles U-HLM's (ceiling)", gain,
            elsewhere,
            "at U-HLM's (t_up + t_llm)/t_slm, all of it uplink, as mean of throughputs: the two "
            "papers' figures come from different channels",
            consistent=gain.low <= elsewhere.high,
        ),
    ]  # fmt: skip


def _ui_hlm_rows(numbers: PublishedTable) -> list[AuditRow]:
    pair = ComparedPair.of(numbers)
    headline, headline_saved = numbers.several("UI-HLM", "throughput_tok_s", "energy_saved")

    def between(saved: float, more_saved: float, speed: float, more: float, own: float) -> float:
        weight = (own - saved) / (more_saved - saved)
        return 1 / ((1 - weight) / speed + weight / more)

    def gain_here(*values: float) -> float:
        r = pair_sent_ratio("mean-of-throughputs", *values)
        return float(throughput_gain(values[0], r, averaging="mean-of-throughputs"))

    skip = imply(lambda p, saved, more: p * more / saved, *pair[:3])
    line = imply(between, *pair[1:], headline_saved)
    gain = imply(gain_here, *pair)
    rows = [
        _row(
            "U-HLM in UI-HLM", "energy saved against HLM (ceiling: the skip rate)", pair.saved,
            Implied(pair.skip.value, pair.skip.low, pair.skip.high),
            "skipping saves at most the share of tokens skipped; here the skipped part is "
            f"{pair.saved.value / pair.skip.value:.0%} of HLM's energy, if U-HLM skips as in its "
            "own paper (assumption)",
            consistent=pair.saved.low <= pair.skip.high,
        ),
        _row(
            "UI-HLM", "energy saved against HLM -> skip rate", pair.higher_saved, skip,
            "energy falls by the same amount for every token skipped; same assumption",
            consistent=skip.low >= 0 and skip.high <= 1, unit="",
        ),
    ]  # fmt: skip
    for averaging in AVERAGINGS:
        r = imply(lambda *values, kind=averaging: pair_sent_ratio(kind, *values), *pair)
        slm = device_time_ms(pair.speed.value, pair.skip.value, r.value, averaging)
        # Nobody publishes U-HLM's skip rate here; these are the least and largest it can be.
        least, most = pair.saved.value, pair.saved.value / pair.higher_saved.value
        ends = [pair_sent_ratio(averaging, p, *(n.value for n in pair[1:])) for p in (most, least)]
        rows.append(
            _row(
                "UI-HLM", f"throughput beside U-HLM's, {averaging} -> (t_up + t_llm)/t_slm",
                pair.higher_speed, r,
                f"reconciled: t_slm = {slm:,.0f} ms, t_up + t_llm = {r.value * slm:,.0f} ms, HLM "
                f"at {1e3 / (slm * (1 + r.value)):.2f} token/s; same assumption, without it p lies "
                f"between {least:.0%} and {most:.0%} and this between {ends[0]:.2f} and "
                f"{ends[1]:.2f}",
                consistent=math.isfinite(r.value), unit="t_slm",
            )
        )  # fmt: skip
    rows += [
        _row(
            "UI-HLM", "headline throughput, from the headline energy saving", headline, line,
            "mean token time and energy are both linear in the skip rate, so three points of one "
            "setting lie on a line; this one does not: another setting",
        ),
        _row(
            "U-HLM in UI-HLM", "U-HLM's published speed-up over HLM, as mean of throughputs",
            numbers("U-HLM", "throughput_ratio"), gain,
            "1 + p r at the r above: the same system in another setting",
        ),
    ]  # fmt: skip
    return rows
