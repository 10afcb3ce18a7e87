"""What a channel carries: capacity, ergodic and outage rates under Rayleigh fading.

Every rate here assumes capacity-reaching codes. An SNR is given in exactly one of two scales, by
name: `snr`, a linear ratio, or `snr_db`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from scipy.integrate import quad
from scipy.special import lambertw

from hlmtheory.domain import Array, check_finite, check_positive

SERIES_BELOW = 2.0
SERIES_TERMS = 40
FRACTION_DEPTH = 60


def as_array(value: Any) -> Any:
    """The value itself, or a float as a numpy array without axes."""
    return np.asarray(value, dtype=np.float64) if isinstance(value, int | float) else value


def float_if_floats(result: Any, *given: Any) -> Any:
    """A float where only floats were given."""
    scalar = all(value is None or isinstance(value, int | float) for value in given)
    return float(result) if scalar else result


def linear_snr(snr: Array | float | None = None, snr_db: Array | float | None = None) -> Array:
    r"""Signal-to-noise ratio as a linear ratio, from exactly one of its two scales.

    .. math:: \mathrm{SNR} = 10^{\mathrm{SNR_{dB}}/10}

    Parameters
    ----------
    snr : array or float
        Linear, > 0.
    snr_db : array or float
        Decibels, any finite value.

    Raises
    ------
    ValueError
        If both or neither is given, if `snr` is not above 0 (it was most likely meant in dB), or if
        a value is not finite.
    """
    if (snr is None) == (snr_db is None):
        raise ValueError("snr, snr_db: give exactly one, the linear ratio or the value in dB")
    if snr_db is not None:
        decibels = as_array(snr_db)
        check_finite(decibels, "snr_db")
        return float_if_floats(10.0 ** (decibels / 10.0), snr_db)
    ratio = as_array(snr)
    check_finite(ratio, "snr")
    smallest = float(array_namespace(ratio).min(ratio))
    if smallest <= 0:
        raise ValueError(
            f"snr = {smallest:.6g}: allowed is (0, inf), a linear ratio; "
            "SNR in the wrong unit by its sign: give snr_db"
        )
    return float_if_floats(ratio, snr)


def capacity_bps(
    bandwidth_hz: float, snr: Array | float | None = None, snr_db: Array | float | None = None
) -> Array:
    r"""Capacity of the additive white Gaussian noise channel, bits per second.

    .. math:: C = W \log_2(1 + \mathrm{SNR})

    docs/theory.md, (26).

    Parameters
    ----------
    bandwidth_hz : float
        W > 0.
    snr, snr_db : array or float (...)
        Exactly one: the linear ratio > 0, or decibels.

    Returns
    -------
    array or float (...)
        1 MHz at 0 dB carries 1 Mbit/s; C ~ W SNR / ln 2 as SNR falls to 0.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = as_array(linear_snr(snr, snr_db))
    xp = array_namespace(ratio)
    return float_if_floats(bandwidth_hz * xp.log1p(ratio) / math.log(2.0), snr, snr_db)


def scaled_exponential_integral(a: Array | float) -> Array:
    r"""Exponential integral times the exponential that would overflow beside it.

    .. math:: e^a E_1(a) = \int_0^\infty \frac{e^{-t}}{a + t}\,dt, \qquad a > 0

    The power series below a = 2, where it loses less than two digits; above, the continued fraction

    .. math:: e^a E_1(a) = \cfrac{1}{a + 1 - \cfrac{1^2}{a + 3 - \cfrac{2^2}{a + 5 - \cdots}}}

    whose error falls as exp(-4 sqrt(n a)), so 60 levels are beyond double precision. Written here
    because scipy's E1 takes no tensors and underflows from a = 740 on.

    Parameters
    ----------
    a : array or float (...)
        > 0.

    Returns
    -------
    array or float (...)
        Tends to 1/a for large a and to -ln a - 0.5772 for small a.
    """
    check_positive(a, "a")
    value = as_array(a)
    xp = array_namespace(value)
    small = value < SERIES_BELOW
    edge = xp.full_like(value, SERIES_BELOW)
    near, far = xp.where(small, value, edge), xp.where(small, edge, value)
    term, series = xp.ones_like(near), -np.euler_gamma - xp.log(near)
    for n in range(1, SERIES_TERMS):
        term = term * (-near / n)
        series = series - term / n
    fraction = far + (2 * FRACTION_DEPTH + 1)
    for n in range(FRACTION_DEPTH, 0, -1):
        fraction = far + (2 * n - 1) - n * n / fraction
    return float_if_floats(xp.where(small, xp.exp(near) * series, 1.0 / fraction), a)


def ergodic_rayleigh_rate_bps(
    bandwidth_hz: float, snr: Array | float | None = None, snr_db: Array | float | None = None
) -> Array:
    r"""Ergodic rate under Rayleigh fading, channel known at the receiver, bits per second.

    .. math:: \bar C = W \log_2(e)\, e^{1/\bar\gamma} E_1(1/\bar\gamma)

    docs/theory.md, (26). Below :func:`capacity_bps` at the same mean SNR, by Jensen; the two agree
    as the SNR falls to 0.

    Parameters
    ----------
    bandwidth_hz : float
        W > 0.
    snr, snr_db : array or float (...)
        The mean SNR: exactly one of the linear ratio > 0, or decibels.

    Valid when a payload spans many fades, so that the rate averages out.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = linear_snr(snr, snr_db)
    return bandwidth_hz / math.log(2.0) * scaled_exponential_integral(1.0 / ratio)


def outage_gain(
    rate_bps: Array | float,
    bandwidth_hz: float,
    snr: Array | float | None = None,
    snr_db: Array | float | None = None,
) -> Array:
    r"""Power gain below which a block cannot carry the rate.

    .. math:: g_0 = (2^{R/W} - 1)/\bar\gamma

    Parameters and returns as for :func:`outage_probability`, which is P(gain < g_0) for a gain
    exponential with mean 1.
    """
    check_positive(rate_bps, "rate_bps")
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = linear_snr(snr, snr_db)
    # Past 1000 bit/s/Hz every block fails anyway, and 2^1000 is still finite.
    if isinstance(rate_bps, int | float):
        return math.expm1(min(rate_bps / bandwidth_hz, 1000.0) * math.log(2.0)) / ratio
    xp = array_namespace(rate_bps)
    return xp.expm1(xp.clip(rate_bps / bandwidth_hz, 0.0, 1000.0) * math.log(2.0)) / ratio


def outage_probability(
    rate_bps: Array | float,
    bandwidth_hz: float,
    snr: Array | float | None = None,
    snr_db: Array | float | None = None,
) -> Array:
    r"""Probability that a Rayleigh block cannot carry the rate.

    .. math:: p_{out} = 1 - \exp\big(-(2^{R/W} - 1)/\bar\gamma\big)

    Parameters
    ----------
    rate_bps : array or float (...)
        R > 0.
    bandwidth_hz : float
        W > 0.
    snr, snr_db : array or float (...)
        The mean SNR: exactly one of the linear ratio > 0, or decibels.

    Returns
    -------
    array or float (...)
        In [0, 1]; 0 as R falls to 0.
    """
    gain = as_array(outage_gain(rate_bps, bandwidth_hz, snr, snr_db))
    return float_if_floats(-array_namespace(gain).expm1(-gain), rate_bps, snr, snr_db)


def best_outage_rate_bps(
    bandwidth_hz: float, snr: float | None = None, snr_db: float | None = None
) -> float:
    r"""The fixed rate that sends a payload soonest over Rayleigh blocks with retransmission.

    .. math:: R^* = \arg\max_R R\,(1 - p_{out}(R)) = W\, W_0(\bar\gamma) / \ln 2

    with :math:`W_0` the Lambert function: the derivative vanishes where
    :math:`z e^z = \bar\gamma`, z = R ln 2 / W.

    Parameters
    ----------
    bandwidth_hz : float
        W > 0.
    snr, snr_db : float
        The mean SNR: exactly one of the linear ratio > 0, or decibels. Scalars only.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = float(linear_snr(snr, snr_db))
    return bandwidth_hz * float(lambertw(ratio).real) / math.log(2.0)


def mean_inverse_rate_s_per_bit(
    bandwidth_hz: float, gain: float, snr: float | None = None, snr_db: float | None = None
) -> float:
    r"""Mean of 1/C over Rayleigh blocks, given that the gain is at least a threshold.

    .. math:: E[1/C \mid g \ge g_0] = \int_{g_0}^\infty
              \frac{e^{-(g - g_0)}}{W \log_2(1 + \bar\gamma g)}\, dg

    The trap of (26), docs/theory.md: the integrand behaves as 1/g, so the mean upload time B E[1/C]
    grows as ln(1/g_0) ln 2/(W SNR) and is infinite without a threshold.

    Parameters
    ----------
    bandwidth_hz : float
        W > 0.
    gain : float
        The threshold g_0 > 0 on the power gain, whose mean is 1.
    snr, snr_db : float
        The mean SNR: exactly one of the linear ratio > 0, or decibels. Scalars only.

    Raises
    ------
    ValueError
        If `gain` is not above 0, where the mean is infinite.
    """
    check_positive(bandwidth_hz, "bandwidth_hz")
    ratio = float(linear_snr(snr, snr_db))
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(
            f"gain = {gain}: allowed is (0, inf); without an outage threshold E[1/C] diverges"
        )

    def integrand(log_gain: float) -> float:
        value = math.exp(log_gain)
        return value * math.exp(gain - value) / math.log1p(ratio * value)

    # On the scale of ln g the integrand is flat near the threshold and gone 40 e-folds above 1.
    top = math.log(gain + 40.0)
    middle = sorted({min(max(point, math.log(gain)), top) for point in (-math.log(ratio), 0.0)})
    edges = [math.log(gain), *middle, top]
    total = sum(
        quad(integrand, low, high, epsabs=0.0, epsrel=1e-11, limit=200)[0]
        for low, high in itertools.pairwise(edges)
        if high > low
    )
    return math.log(2.0) * total / bandwidth_hz
