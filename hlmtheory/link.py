"""Uplink models: how long a payload takes at a rate, under fading, or along a measured trace.

Every model here idealises: capacity-reaching codes, no framing, no queueing, no other user. Each
class names what it adds to that under Assumption. Times are of the payload alone; the round trip
of an exchange is kept beside it. Each class also names the quantity that makes its links better or
worse, and gives the same link with another amount of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from array_api_compat import array_namespace, device, is_torch_array

from hlmtheory.channel import (
    capacity_bps,
    ergodic_rayleigh_rate_bps,
    linear_snr,
    outage_probability,
)
from hlmtheory.domain import Array, check_nonnegative, check_positive


@dataclass(frozen=True)
class LinkQuantity:
    """A quantity of links: the more a link has of it, the better it is, all else of it kept.

    Attributes
    ----------
    name, unit : str
    spacing : {"linear", "log"}
        Of values to look at, and of an axis.
    """

    name: str
    unit: str
    spacing: Literal["linear", "log"]


SNR = LinkQuantity("uplink SNR", "dB", "linear")
MEAN_SNR = LinkQuantity("mean uplink SNR", "dB", "linear")
RATE = LinkQuantity("uplink rate", "bit/s", "log")
MEAN_RATE = LinkQuantity("mean uplink rate", "bit/s", "log")

SNR_DB = tuple(float(snr) for snr in range(-15, 36))
"""SNRs that every channel is looked at, dB."""
RATE_FACTORS = tuple(30.0 ** (step / 15) for step in range(-15, 16))
"""From a thirtieth of a rate to thirty times it, in equal ratios: the one in the middle is 1."""
CHUNK = 2**14
"""Payloads times rates of a trace that are worked on at a time: what a processor's cache holds."""


class Link(Protocol):
    """A link turns bits into milliseconds of upload."""

    quantity: ClassVar[LinkQuantity]
    """What links of this kind are swept along."""

    @property
    def amount(self) -> float:
        """How much of it this link has."""
        ...

    def at(self, amount: float) -> Self:
        """The same link with another amount of it."""
        ...

    def sweep(self) -> tuple[float, ...]:
        """Amounts to look at, rising: its own among them, none that a link cannot have."""
        ...

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
    quantity: ClassVar[LinkQuantity] = MEAN_SNR

    bandwidth_hz: float
    snr_db: float

    @property
    def amount(self) -> float:
        """Its SNR, dB."""
        return self.snr_db

    def at(self, amount: float) -> Self:
        """The channel at that SNR, dB."""
        return replace(self, snr_db=amount)

    def sweep(self) -> tuple[float, ...]:
        """SNR_DB and its own SNR, dB."""
        return tuple(sorted({*SNR_DB, float(self.snr_db)}))

    def _check(self, round_trip_ms: float) -> None:
        check_positive(self.bandwidth_hz, "bandwidth_hz")
        check_nonnegative(round_trip_ms, "round_trip_ms")
        linear_snr(snr_db=self.snr_db)


@dataclass(frozen=True)
class AwgnLink(_Channel):
    """Constant rate W log2(1 + SNR); docs/theory.md, (26).

    Assumption: capacity is reached and the channel never changes.
    """

    quantity: ClassVar[LinkQuantity] = SNR

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

    quantity: ClassVar[LinkQuantity] = MEAN_SNR

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
        if not self._gets_through(self.snr_db):
            raise ValueError(
                f"rate_bps = {self.rate_bps:.6g}: every block fails at {self.snr_db:g} dB; allowed "
                "is a rate that some block carries, best_outage_rate_bps gives the fastest"
            )

    @property
    def outage(self) -> float:
        """Probability that one block fails."""
        return self._outage_at(self.snr_db)

    def sweep(self) -> tuple[float, ...]:
        """Of SNR_DB and its own SNR, dB, those at which some block carries its rate."""
        return tuple(snr for snr in super().sweep() if self._gets_through(snr))

    def _outage_at(self, snr_db: float) -> float:
        return float(outage_probability(self.rate_bps, self.bandwidth_hz, snr_db=snr_db))

    def _gets_through(self, snr_db: float) -> bool:
        return self._outage_at(snr_db) < 1.0 - 2.0**-53  # the largest float below 1

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

    quantity: ClassVar[LinkQuantity] = RATE

    rate_bps: float
    downlink_bps: float | None = None
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.rate_bps, "rate_bps")
        if self.downlink_bps is not None:
            check_positive(self.downlink_bps, "downlink_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")

    @property
    def amount(self) -> float:
        """Its uplink rate, bit/s."""
        return self.rate_bps

    def at(self, amount: float) -> Self:
        """The link at that uplink rate, bit/s; a downlink of its own stays as it is."""
        return replace(self, rate_bps=amount)

    def sweep(self) -> tuple[float, ...]:
        """RATE_FACTORS times its uplink rate, bit/s."""
        return tuple(factor * self.rate_bps for factor in RATE_FACTORS)

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

    quantity: ClassVar[LinkQuantity] = MEAN_RATE

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

    @property
    def amount(self) -> float:
        """Mean of its rates over time, bit/s."""
        return float(np.mean(self.rates_bps))

    def at(self, amount: float) -> Self:
        r"""The trace with every rate scaled alike, to that mean, bit/s; gaps stay as they are.

        .. math:: T_c(B) = T(B / c)

        with c the scale: more of a payload gets through in the same time.
        """
        check_positive(amount, "amount")
        scale = amount / self.amount
        return replace(self, rates_bps=tuple(scale * rate for rate in self.rates_bps))

    def sweep(self) -> tuple[float, ...]:
        """RATE_FACTORS times its mean rate, bit/s."""
        mean_bps = self.amount
        return tuple(factor * mean_bps for factor in RATE_FACTORS)

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean over a uniformly random start; one pass of the trace for each distinct payload."""
        check_nonnegative(bits, "bits")
        # A trace is a table, looked up in numpy and given back as `bits` came.
        host = np.asarray(bits.cpu() if is_torch_array(bits) else bits, dtype=np.float64)
        distinct, inverse = np.unique(host, return_inverse=True)
        chunk = max(1, CHUNK // len(self._edges_ms))
        parts = [distinct[begin : begin + chunk] for begin in range(0, len(distinct), chunk)]
        times = np.concatenate([np.zeros(0), *map(self._mean_time_ms, parts)])[inverse]
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

    def _time_ms(self, start_ms: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Upload times of payloads (B, 1) that begin at `start_ms` (B, S) in [0, P)."""
        total = self._bits_at_edge[-1]
        # Whole rounds first; what is left lies in (0, total], so that its end is a first moment.
        rounds = np.clip(np.ceil(bits / total) - 1.0, 0.0, None)
        level = np.interp(start_ms, self._edges_ms, self._bits_at_edge) + bits - rounds * total
        over = level > total
        moment = self._moment_ms(np.where(over, level - total, level))
        times = (rounds + over) * self._edges_ms[-1] + moment - start_ms
        return np.where(bits > 0, np.clip(times, 0.0, None), 0.0)

    def _mean_time_ms(self, bits: np.ndarray) -> np.ndarray:
        """Exact means of payloads (B,) over uniform starts: midpoints between a line's breaks."""
        bits = bits[:, None]  # (B, 1)
        ends = self._bits_at_edge - bits % self._bits_at_edge[-1]  # (B, n + 1)
        ends = np.where(ends <= 0, ends + self._bits_at_edge[-1], ends)
        edges = np.broadcast_to(self._edges_ms, ends.shape)
        breaks = np.concatenate([edges, self._moment_ms(ends)], axis=1)  # (B, 2n + 2)
        breaks.sort(axis=1, kind="stable")  # a merge, for both parts rise but for one step back
        times = self._time_ms((breaks[:, 1:] + breaks[:, :-1]) / 2, bits)
        mean: np.ndarray = np.sum(times * np.diff(breaks), axis=1) / self._edges_ms[-1]
        return mean
