"""What a channel carries: capacity, ergodic and outage rates under Rayleigh fading.

Every rate here is in bits per second and assumes capacity-reaching codes; docs/theory.md, (26). An
SNR is given in exactly one of two scales, by name: `snr`, a linear ratio > 0, or `snr_db`.
Arguments are floats or numpy arrays; bandwidths are > 0.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from scipy.special import exp1, lambertw

from hlmtheory.domain import check_finite, check_positive

Values: TypeAlias = np.ndarray | float

# e^a E_1(a) a = sum of (-1)^n n!/a^n: from a = 100 on its first 17 terms are exact in float64, and
# exp(a) does not overflow before that.
ASYMPTOTIC_FROM = 100.0
ASYMPTOTIC_TERMS = [float((-1) ** n * math.factorial(n)) for n in range(16, -1, -1)]


def linear_snr(snr: Values | None = None, snr_db: Values | None = None) -> Values:
    r"""Signal-to-noise ratio as a linear ratio, from exactly one of its two scales.

    .. math:: \mathrm{SNR} = 10^{\mathrm{SNR_{dB}}/10}

    Raises
    ------
    ValueError
        If both or neither is given, if `snr` is not above 0 (it was most likely meant in dB), or if
        a value is not finite.
    """
    if (snr is None) == (snr_db is None):
        raise ValueError("snr, snr_db: give exactly one, the linear ratio or the value in dB")
    if snr_db is not None:
        check_finite(np.asarray(snr_db), "snr_db")
        return 10.0 ** (snr_db / 10.0)
    assert snr is not None  # for the type checker
    check_finite(np.asarray(snr), "snr")
    smallest = float(np.min(snr))
    if smallest <= 0:
        raise ValueError(
            f"snr = {smallest:.6g}: allowed is (0, inf), a linear ratio; "
            "SNR in the wrong unit by its sign: give snr_db"
        )
    return snr


def capacity_bps(
    bandwidth_hz: float, snr: Values | None = None, snr_db: Values | None = None
) -> Values:
    r"""Capacity of the additive white Gaussian noise channel.

    .. math:: C = W \log_2(1 + \mathrm{SNR})

    1 MHz at 0 dB carries 1 Mbit/s; C ~ W SNR / ln 2 as SNR falls to 0.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    return bandwidth_hz / math.log(2.0) * np.log1p(linear_snr(snr, snr_db))


def scaled_exponential_integral(a: Values) -> Values:
    r"""Exponential integral times the exponential that would overflow beside it.

    .. math:: e^a E_1(a) = \int_0^\infty \frac{e^{-t}}{a + t}\,dt, \qquad a > 0

    Tends to 1/a for large a and to -ln a - 0.5772 for small a. scipy's E1 alone underflows from
    a = 740 on.
    """
    check_positive(a, "a")
    near = np.minimum(a, ASYMPTOTIC_FROM)
    far = np.polyval(ASYMPTOTIC_TERMS, 1.0 / np.maximum(a, ASYMPTOTIC_FROM)) / a
    return np.where(a < ASYMPTOTIC_FROM, np.exp(near) * exp1(near), far)


def ergodic_rayleigh_rate_bps(
    bandwidth_hz: float, snr: Values | None = None, snr_db: Values | None = None
) -> Values:
    r"""Ergodic rate under Rayleigh fading of this mean SNR, channel known at the receiver.

    .. math:: \bar C = W \log_2(e)\, e^{1/\bar\gamma} E_1(1/\bar\gamma)

    Below :func:`capacity_bps` at the same mean SNR, by Jensen; they agree as the SNR falls to 0.

    Valid when a payload spans many fades, so that the rate averages out.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = linear_snr(snr, snr_db)
    return bandwidth_hz / math.log(2.0) * scaled_exponential_integral(1.0 / ratio)


def outage_probability(
    rate_bps: Values,
    bandwidth_hz: float,
    snr: Values | None = None,
    snr_db: Values | None = None,
) -> Values:
    r"""Probability that a Rayleigh block of this mean SNR cannot carry a rate R > 0.

    .. math:: p_{out} = 1 - e^{-g_0}, \qquad g_0 = (2^{R/W} - 1)/\bar\gamma

    with g_0 the power gain, exponential with mean 1, that carries just R.
    """
    check_positive(rate_bps, "rate_bps")
    check_positive(bandwidth_hz, "bandwidth_hz")
    # Past 1000 bit/s/Hz every block fails anyway, and 2^1000 is still finite.
    efficiency = np.minimum(rate_bps / bandwidth_hz, 1000.0)
    return -np.expm1(-np.expm1(efficiency * math.log(2.0)) / linear_snr(snr, snr_db))


def best_outage_rate_bps(
    bandwidth_hz: float, snr: float | None = None, snr_db: float | None = None
) -> float:
    r"""The fixed rate that sends a payload soonest over Rayleigh blocks with retransmission.

    .. math:: R^* = \arg\max_R R\,(1 - p_{out}(R)) = W\, W_0(\bar\gamma) / \ln 2

    with :math:`W_0` the Lambert function: the derivative vanishes where
    :math:`z e^z = \bar\gamma`, z = R ln 2 / W.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    return bandwidth_hz * float(lambertw(linear_snr(snr, snr_db)).real) / math.log(2.0)
