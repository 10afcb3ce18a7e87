"""Uplink models: how long a payload takes under AWGN, Rayleigh fading, or a measured trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import exp1

from hlmtheory.domain import Array, check_nonnegative, check_positive

LOG2_E = float(np.log2(np.e))


def snr_from_db(snr_db: float) -> float:
    """Linear signal-to-noise ratio of a value in dB."""
    if not np.isfinite(snr_db):
        raise ValueError(f"snr_db = {snr_db}: must be finite")
    return float(10.0 ** (snr_db / 10.0))


def _check_snr(snr: float) -> None:
    if not (np.isfinite(snr) and snr > 0):
        raise ValueError(
            f"snr = {snr}: allowed is (0, inf), a linear ratio; a value in dB goes through "
            "snr_from_db(snr_db)"
        )


def awgn_rate_bps(bandwidth_hz: float, snr: float) -> float:
    r"""Capacity of the additive white Gaussian noise channel.

    .. math:: C = W \log_2(1 + \mathrm{SNR})

    docs/theory.md, (26).

    Parameters
    ----------
    bandwidth_hz : float
        W > 0.
    snr : float
        Linear ratio > 0, not dB.

    Raises
    ------
    ValueError
        If a value is out of range; a negative snr is most likely in dB.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    _check_snr(snr)
    return float(bandwidth_hz * np.log2(1.0 + snr))


def ergodic_rayleigh_rate_bps(bandwidth_hz: float, mean_snr: float) -> float:
    r"""Ergodic rate under Rayleigh fading, channel known at the receiver.

    .. math:: W \log_2(e)\, e^{1/\bar\gamma} E_1(1/\bar\gamma)

    docs/theory.md, (26). Below :func:`awgn_rate_bps` at the same mean SNR, by Jensen.

    Valid when a payload spans many fades, so that the rate averages out.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    _check_snr(mean_snr)
    inverse = 1.0 / mean_snr
    if inverse > 500.0:
        # e^a E1(a) -> (1 - 1/a + 2/a^2)/a: the exponential overflows long before E1 vanishes.
        scaled = (1.0 - mean_snr + 2.0 * mean_snr**2) * mean_snr
    else:
        scaled = float(np.exp(inverse) * exp1(inverse))
    return float(bandwidth_hz * LOG2_E * scaled)


def outage_probability(rate_bps: float, bandwidth_hz: float, mean_snr: float) -> float:
    r"""P(a Rayleigh block cannot carry the rate) = 1 - exp(-(2^{R/W} - 1)/mean_snr)."""
    check_positive(rate_bps, "rate_bps")
    check_positive(bandwidth_hz, "bandwidth_hz")
    _check_snr(mean_snr)
    return float(-np.expm1(-(2.0 ** (rate_bps / bandwidth_hz) - 1.0) / mean_snr))


class Link(Protocol):
    """A link turns bits into mean milliseconds."""

    @property
    def round_trip_ms(self) -> float:
        """Delay of one exchange besides the payload."""
        ...

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean time to send each payload, ms."""
        ...


@dataclass(frozen=True)
class AwgnLink:
    """Constant rate W log2(1 + SNR). Assumption: capacity is reached, no coding or framing loss."""

    bandwidth_hz: float
    snr_db: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.bandwidth_hz, "bandwidth_hz")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")
        snr_from_db(self.snr_db)

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return awgn_rate_bps(self.bandwidth_hz, snr_from_db(self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over rate."""
        return 1e3 * bits / self.rate_bps


@dataclass(frozen=True)
class ErgodicRayleighLink:
    """Rate averaged over fading. Assumption: each payload spans many fades."""

    bandwidth_hz: float
    snr_db: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.bandwidth_hz, "bandwidth_hz")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")
        snr_from_db(self.snr_db)

    @property
    def rate_bps(self) -> float:
        """Bits per second."""
        return ergodic_rayleigh_rate_bps(self.bandwidth_hz, snr_from_db(self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits over ergodic rate."""
        return 1e3 * bits / self.rate_bps


@dataclass(frozen=True)
class RayleighOutageLink:
    r"""Fixed rate over Rayleigh blocks; a block in outage is sent again.

    .. math:: E[T] = \frac{B/R}{1 - p_{out}(R)}

    Without a rate or an outage threshold E[B/C] diverges under block fading: the integrand behaves
    as 1/g at gain g -> 0. Assumption: each (re)transmission sees a fresh fade, feedback is free.
    """

    bandwidth_hz: float
    snr_db: float
    rate_bps: float
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self.bandwidth_hz, "bandwidth_hz")
        check_positive(self.rate_bps, "rate_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")
        snr_from_db(self.snr_db)

    @property
    def outage(self) -> float:
        """Probability that one block fails."""
        return outage_probability(self.rate_bps, self.bandwidth_hz, snr_from_db(self.snr_db))

    def uplink_time_ms(self, bits: Array) -> Array:
        """Mean over retransmissions."""
        return 1e3 * bits / self.rate_bps / (1.0 - self.outage)


@dataclass(frozen=True)
class TraceLink:
    """Mean over a measured trace of uplink rates; a payload is sent at the rate of its start.

    Assumption: payloads are short against the sampling interval and start at a uniformly random
    sample.
    """

    rates_bps: tuple[float, ...]
    round_trip_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.rates_bps:
            raise ValueError("rates_bps is empty: give at least one positive rate")
        for rate in self.rates_bps:
            check_positive(rate, "rates_bps")
        check_nonnegative(self.round_trip_ms, "round_trip_ms")

    def uplink_time_ms(self, bits: Array) -> Array:
        """Bits times the mean reciprocal rate."""
        return 1e3 * bits * float(np.mean(1.0 / np.array(self.rates_bps)))
