"""Uplink models: how long a payload takes under AWGN, Rayleigh fading, or a measured trace.

Every model here idealises: capacity-reaching codes, no framing, no queueing, no other user. Each
class names what it adds to that under Assumption. Times are of the payload alone; the round trip
of an exchange is kept beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from array_api_compat import array_namespace, device

from hlmtheory.channel import (
    as_array,
    capacity_bps,
    ergodic_rayleigh_rate_bps,
    float_if_floats,
    linear_snr,
    outage_probability,
)
from hlmtheory.domain import Array, check_nonnegative, check_positive, check_unit_interval

LARGEST_UNIFORM = 1.0 - 2.0**-53
"""A uniform of exactly 1 would retransmit for ever; it is read as the largest float below 1."""


class Link(Protocol):
    """A link turns bits into milliseconds of upload."""

    @property
    def round_trip_ms(self) -> float:
        """Delay of one exchange besides the payload."""
        ...

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean time to send each payload, ms."""
        ...

    def sample_uplink_time_ms(self, bits: Array, uniforms: Array) -> Array:
        """Time to send each payload over one realisation of the channel, ms."""
        ...


def _check_channel(bandwidth_hz: float, snr_db: float, round_trip_ms: float) -> None:
    check_positive(bandwidth_hz, "bandwidth_hz")
    check_nonnegative(round_trip_ms, "round_trip_ms")
    linear_snr(snr_db=snr_db)


def _constant_time_ms(bits: Array, uniforms: Array, rate_bps: float) -> Array:
    """A link without randomness still takes its uniforms: they fix the shape of the answer."""
    check_nonnegative(bits, "bits")
    check_unit_interval(uniforms, "uniforms")
    return 1e3 * bits / rate_bps + 0 * uniforms


@dataclass(frozen=True)
class AwgnLink:
    """Constant rate W log2(1 + SNR); docs/theory.md, (26).

    Assumption: capacity is reached and the channel never changes.
    """

    bandwidth_hz: float
    snr_db: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_channel(self.bandwidth_hz, self.snr_db, self.round_trip_ms)

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return float(capacity_bps(self.bandwidth_hz, snr_db=self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over rate."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / self.rate_bps

    def sample_uplink_time_ms(self, bits: Array, uniforms: Array) -> Array:
        """The mean, whatever the uniforms: nothing is random here."""
        return _constant_time_ms(bits, uniforms, self.rate_bps)


@dataclass(frozen=True)
class ErgodicRayleighLink:
    """Rate averaged over fading; docs/theory.md, (26). `snr_db` is the mean SNR.

    Assumption: each payload spans so many fades that its rate is the ergodic one.
    """

    bandwidth_hz: float
    snr_db: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_channel(self.bandwidth_hz, self.snr_db, self.round_trip_ms)

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return float(ergodic_rayleigh_rate_bps(self.bandwidth_hz, snr_db=self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over ergodic rate."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / self.rate_bps

    def sample_uplink_time_ms(self, bits: Array, uniforms: Array) -> Array:
        """The mean, whatever the uniforms: the payload itself averages over the fades."""
        return _constant_time_ms(bits, uniforms, self.rate_bps)


@dataclass(frozen=True)
class RayleighOutageLink:
    r"""Fixed rate over Rayleigh blocks; a payload whose block is in outage is sent again.

    .. math:: E[T] = \frac{B}{R\,(1 - p_{out}(R))}, \qquad
              T = \frac{B}{R} G, \quad G \sim \mathrm{Geometric}(1 - p_{out})

    docs/theory.md, (26). The trap it avoids: with the rate following the fade and no outage
    threshold, E[B/C] is infinite (hlmtheory.channel.mean_inverse_rate_s_per_bit). `snr_db` is the
    mean SNR; hlmtheory.channel.best_outage_rate_bps gives the rate with the least mean time.

    Assumption: one payload lies in one block, each transmission sees a fresh fade, and the request
    to send again is free.
    """

    bandwidth_hz: float
    snr_db: float
    rate_bps: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_channel(self.bandwidth_hz, self.snr_db, self.round_trip_ms)
        check_positive(self.rate_bps, "rate_bps")
        if self.outage >= LARGEST_UNIFORM:
            raise ValueError(
                f"rate_bps = {self.rate_bps:.6g}: every block fails at {self.snr_db:g} dB; allowed "
                "is a rate that some block carries, best_outage_rate_bps gives the fastest"
            )

    @property
    def outage(self) -> float:
        """Probability that one block fails."""
        return float(outage_probability(self.rate_bps, self.bandwidth_hz, snr_db=self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean over retransmissions."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / (self.rate_bps * (1.0 - self.outage))

    def sample_uplink_time_ms(self, bits: Array, uniforms: Array) -> Array:
        """One number of transmissions for each uniform, by inverting the geometric law."""
        check_nonnegative(bits, "bits")
        check_unit_interval(uniforms, "uniforms")
        values = as_array(uniforms)
        xp = array_namespace(values)
        num_sent = xp.ones_like(values)
        if self.outage > 0:
            log_rest = xp.log1p(-xp.clip(values, 0.0, LARGEST_UNIFORM))
            num_sent = num_sent + xp.floor(log_rest / math.log(self.outage))
        return float_if_floats(1e3 * bits / self.rate_bps * num_sent, bits, uniforms)


@dataclass(frozen=True)
class TraceLink:
    r"""A measured trace of uplink rates, repeated for ever; payloads start at a random moment.

    .. math:: E[T(B)] = \frac1P \int_0^P \big(F^{-1}(F(s) + B) - s\big)\,ds

    with F(t) the bits that the trace has carried by time t and P its length: exact, since the
    integrand is linear between finitely many breaks. A rate of zero is a gap, and is waited out. A
    payload short against the sampling interval takes B E[1/rate] on a trace without gaps.

    Assumption: start times are uniform over the trace and do not depend on its rate, and the rate
    holds for a whole sampling interval.

    Attributes
    ----------
    rates_bps : tuple of float (n,)
        Bits per second, >= 0, not all 0.
    round_trip_ms : float
    sample_interval_ms : float
        How long each rate holds; one second is what measured traces usually have.
    """

    rates_bps: tuple[float, ...]
    round_trip_ms: float = 0.0
    sample_interval_ms: float = 1000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates_bps", tuple(float(rate) for rate in self.rates_bps))
        if not any(rate > 0 for rate in self.rates_bps):
            raise ValueError("rates_bps holds no positive rate: give at least one, in bits/s")
        for rate in self.rates_bps:
            check_nonnegative(rate, "rates_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")
        check_positive(self.sample_interval_ms, "sample_interval_ms")

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean over a uniformly random start; one pass of the trace for each distinct payload."""
        check_nonnegative(bits, "bits")
        values = as_array(bits)
        xp = array_namespace(values)
        flat = xp.reshape(values, (-1,))
        distinct, inverse = xp.unique_inverse(flat)
        carried = _CarriedBits(self, values)
        means = xp.stack([carried.mean_time_ms(payload) for payload in distinct])
        out = xp.astype(means, values.dtype) if xp.isdtype(values.dtype, "real floating") else means
        return float_if_floats(xp.reshape(out[xp.reshape(inverse, (-1,))], values.shape), bits)

    def sample_uplink_time_ms(self, bits: Array, uniforms: Array) -> Array:
        """Time from the moment uniform * trace length, for each payload."""
        check_nonnegative(bits, "bits")
        check_unit_interval(uniforms, "uniforms")
        starts = as_array(uniforms)
        xp = array_namespace(starts)
        payloads, starts = xp.broadcast_arrays(bits + 0 * starts, starts)
        carried = _CarriedBits(self, starts)
        # A start at the very end of the trace is the start of the next round.
        fraction = xp.where(starts < 1, starts, xp.zeros_like(starts))
        times = carried.time_ms(
            xp.reshape(fraction * carried.period_ms, (-1,)), xp.reshape(payloads, (-1,))
        )
        return float_if_floats(xp.reshape(times, starts.shape), bits, uniforms)


class _CarriedBits:
    """F(t) of a trace and its inverse, as arrays of the caller's kind."""

    def __init__(self, link: TraceLink, like: Array) -> None:
        self.xp: Any = array_namespace(like)
        xp = self.xp
        place = {"dtype": xp.float64, "device": device(like)}
        self.interval_ms = link.sample_interval_ms
        self.rates = xp.asarray(link.rates_bps, **place) * 1e-3  # bits per ms, (n,)
        self.period_ms = link.sample_interval_ms * len(link.rates_bps)
        self.edges_ms = xp.arange(len(link.rates_bps) + 1, **place) * self.interval_ms
        zero = xp.zeros((1,), **place)
        summed = xp.cumulative_sum(self.rates * self.interval_ms)
        self.bits_at_edge = xp.concat([zero, summed])  # F at the edges, (n + 1,)
        self.total_bits = float(self.bits_at_edge[-1])

    def level(self, start_ms: Array) -> Array:
        """F(s) for s in [0, P)."""
        xp = self.xp
        slot = xp.astype(xp.floor(start_ms / self.interval_ms), xp.int64)
        slot = xp.clip(slot, 0, self.rates.shape[0] - 1)
        inside_ms = start_ms - self.edges_ms[slot]
        return self.bits_at_edge[slot] + self.rates[slot] * inside_ms

    def moment_ms(self, level: Array) -> Array:
        """First moment at which F reaches a level in (0, F(P)]."""
        xp = self.xp
        upper = xp.searchsorted(self.bits_at_edge, level, side="left")
        slot = xp.clip(upper - 1, 0, self.rates.shape[0] - 1)
        rate = self.rates[slot]
        missing = level - self.bits_at_edge[slot]
        return self.edges_ms[slot] + missing / xp.where(rate > 0, rate, xp.ones_like(rate))

    def time_ms(self, start_ms: Array, bits: Array) -> Array:
        """Upload time of payloads (M,) that begin at `start_ms` (M,)."""
        xp = self.xp
        payload = xp.astype(bits, xp.float64)
        # Whole rounds first; what is left lies in (0, total], so that its end is a first moment.
        rounds = xp.clip(xp.ceil(payload / self.total_bits) - 1.0, 0.0, None)
        rest = payload - rounds * self.total_bits
        level = self.level(start_ms) + rest
        over = level > self.total_bits
        rounds = xp.where(over, rounds + 1.0, rounds)
        level = xp.where(over, level - self.total_bits, level)
        times = rounds * self.period_ms + self.moment_ms(level) - start_ms
        return xp.where(payload > 0, xp.clip(times, 0.0, None), xp.zeros_like(times))

    def mean_time_ms(self, bits: Array) -> Array:
        """Exact mean over uniform starts: the midpoint rule between the breaks of a line."""
        xp = self.xp
        payload = xp.astype(bits, xp.float64)
        rest = xp.remainder(payload, xp.full_like(payload, self.total_bits))
        ends = self.bits_at_edge - rest
        ends = xp.where(ends <= 0, ends + self.total_bits, ends)
        breaks = xp.sort(xp.concat([self.edges_ms, self.moment_ms(ends)]))
        middles = (breaks[1:] + breaks[:-1]) / 2
        widths = breaks[1:] - breaks[:-1]
        times = self.time_ms(middles, payload + 0 * middles)
        return xp.sum(times * widths) / self.period_ms
