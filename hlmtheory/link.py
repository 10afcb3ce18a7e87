"""Uplink models: how long a payload takes under AWGN, Rayleigh fading, or a measured trace.

Every model here idealises: capacity-reaching codes, no framing, no queueing, no other user. Each
class names what it adds to that under Assumption. Times are of the payload alone; the round trip
of an exchange is kept beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.channel import (
    capacity_bps,
    ergodic_rayleigh_rate_bps,
    linear_snr,
    outage_probability,
)
from hlmtheory.domain import Array, check_nonnegative, check_positive


class Link(Protocol):
    """A link turns bits into milliseconds of upload."""

    @property
    def round_trip_ms(self) -> float:
        """Delay of one exchange besides the payload."""
        ...

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean time to send each payload, ms."""
        ...

    def downlink_time_ms(self, bits: Array) -> Array:
        """Mean time of a payload that comes back, ms."""
        ...


class _BothWaysAlike:
    """Assumption: the downlink is as the uplink."""

    def downlink_time_ms(self: Link, bits: Array) -> Array:
        """As :meth:`uplink_time_ms`."""
        return self.uplink_time_ms(bits)


@dataclass(frozen=True)
class _Channel(_BothWaysAlike):
    bandwidth_hz: float
    snr_db: float

    def _check(self, round_trip_ms: float) -> None:
        check_positive(self.bandwidth_hz, "bandwidth_hz")
        check_nonnegative(round_trip_ms, "round_trip_ms")
        linear_snr(snr_db=self.snr_db)


@dataclass(frozen=True)
class AwgnLink(_Channel):
    """Constant rate W log2(1 + SNR); docs/theory.md, (26).

    Assumption: capacity is reached and the channel never changes.
    """

    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        self._check(self.round_trip_ms)

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return float(capacity_bps(self.bandwidth_hz, snr_db=self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over rate."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / self.rate_bps


@dataclass(frozen=True)
class ErgodicRayleighLink(AwgnLink):
    """Rate averaged over fading; docs/theory.md, (26). `snr_db` is the mean SNR.

    Assumption: each payload spans so many fades that its rate is the ergodic one.
    """

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return float(ergodic_rayleigh_rate_bps(self.bandwidth_hz, snr_db=self.snr_db))


@dataclass(frozen=True)
class RayleighOutageLink(_Channel):
    r"""Fixed rate over Rayleigh blocks; a payload whose block is in outage is sent again.

    .. math:: E[T] = \frac{B}{R\,(1 - p_{out}(R))}, \qquad
              T = \frac{B}{R} G, \quad G \sim \mathrm{Geometric}(1 - p_{out})

    docs/theory.md, (26). The trap it avoids: with the rate following the fade and no outage
    threshold, E[B/C] is infinite (hlmtheory.symbolic.rayleigh_block_time). `snr_db` is the mean
    SNR; hlmtheory.channel.best_outage_rate_bps gives the rate with the least mean time.

    Assumption: one payload lies in one block, each transmission sees a fresh fade, and the request
    to send again is free.
    """

    rate_bps: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        self._check(self.round_trip_ms)
        check_positive(self.rate_bps, "rate_bps")
        if self.outage >= 1.0 - 2.0**-53:  # the largest float below 1
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


@dataclass(frozen=True)
class RateLink:
    """Constant rates, in bits a second each way.

    Assumption: the rates are what is left for payloads, and never change. Without `downlink_bps`
    both ways are alike.
    """

    rate_bps: float
    downlink_bps: float | None = None
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.rate_bps, "rate_bps")
        if self.downlink_bps is not None:
            check_positive(self.downlink_bps, "downlink_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over rate."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / self.rate_bps

    def downlink_time_ms(self, bits: Array) -> Array:
        """Bits over its own rate."""
        check_nonnegative(bits, "bits")
        return 1e3 * bits / (self.downlink_bps or self.rate_bps)


@dataclass(frozen=True)
class TraceLink(_BothWaysAlike):
    r"""A measured trace of uplink rates, repeated for ever; payloads start at a random moment.

    .. math:: E[T(B)] = \frac1P \int_0^P \big(F^{-1}(F(s) + B) - s\big)\,ds

    with F(t) the bits that the trace has carried by time t and P its length: exact, since the
    integrand is linear between finitely many breaks. A rate of zero is a gap, and is waited out. A
    payload short against the sampling interval takes B E[1/rate] on a trace without gaps.

    Assumption: start times are uniform over the trace and do not depend on its rate, and each of
    the n rates, >= 0 and not all 0, holds for a whole sampling interval. One second is what
    measured traces usually have.
    """

    rates_bps: tuple[float, ...]
    round_trip_ms: float = 0.0
    sample_interval_ms: float = 1000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates_bps", tuple(float(rate) for rate in self.rates_bps))
        if not any(rate > 0 for rate in self.rates_bps):
            raise ValueError("rates_bps holds no positive rate: give at least one, in bits/s")
        check_nonnegative(np.array(self.rates_bps), "rates_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")
        check_positive(self.sample_interval_ms, "sample_interval_ms")

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean over a uniformly random start; one pass of the trace for each distinct payload."""
        check_nonnegative(bits, "bits")
        # A trace is a table, looked up in numpy and given back as `bits` came.
        host = np.asarray(bits.cpu() if is_torch_array(bits) else bits, dtype=np.float64)
        distinct, inverse = np.unique(host, return_inverse=True)
        times = np.array([self._mean_time_ms(payload) for payload in distinct])[inverse]
        if not hasattr(bits, "shape"):
            return float(times)
        xp = array_namespace(bits)
        dtype = bits.dtype if xp.isdtype(bits.dtype, "real floating") else xp.float64
        return xp.asarray(times, dtype=dtype, device=device(bits))

    @cached_property
    def _edges_ms(self) -> np.ndarray:
        """Where each rate begins and the last one ends, (n + 1,)."""
        return self.sample_interval_ms * np.arange(len(self.rates_bps) + 1)

    @cached_property
    def _bits_at_edge(self) -> np.ndarray:
        """F at the edges, (n + 1,)."""
        return np.cumsum([0.0, *self.rates_bps]) * (1e-3 * self.sample_interval_ms)

    def _moment_ms(self, level: np.ndarray) -> np.ndarray:
        """First moment at which F reaches a level in (0, F(P)]: before a gap, not behind it."""
        # Of equal levels np.interp takes the last one; backwards that is the first.
        moment: np.ndarray = np.interp(-level, -self._bits_at_edge[::-1], self._edges_ms[::-1])
        return moment

    def _time_ms(self, start_ms: np.ndarray, bits: float) -> np.ndarray:
        """Upload time of a payload that begins at `start_ms` in [0, P)."""
        total = self._bits_at_edge[-1]
        # Whole rounds first; what is left lies in (0, total], so that its end is a first moment.
        rounds = np.clip(np.ceil(bits / total) - 1.0, 0.0, None)
        level = np.interp(start_ms, self._edges_ms, self._bits_at_edge) + bits - rounds * total
        over = level > total
        moment = self._moment_ms(np.where(over, level - total, level))
        times = (rounds + over) * self._edges_ms[-1] + moment - start_ms
        return np.where(bits > 0, np.clip(times, 0.0, None), 0.0)

    def _mean_time_ms(self, bits: float) -> float:
        """Exact mean over uniform starts: the midpoint rule between the breaks of a line."""
        ends = self._bits_at_edge - bits % self._bits_at_edge[-1]
        ends = np.where(ends <= 0, ends + self._bits_at_edge[-1], ends)
        breaks = np.sort(np.concatenate([self._edges_ms, self._moment_ms(ends)]))
        times = self._time_ms((breaks[1:] + breaks[:-1]) / 2, bits)
        return float(np.sum(times * np.diff(breaks)) / self._edges_ms[-1])
