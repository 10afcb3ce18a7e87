"""Temperature-perturbation uncertainty of a draft token: exact, sampled, and what K costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_distribution, check_finite, check_unit_interval
from hlmtheory.order import largest, on_accelerator

GridKind = Literal["grid", "midpoint"]

CHUNK_ENTRIES = 2**18
LOG2_E = float(np.log2(np.e))


@dataclass(frozen=True)
class Temperatures:
    """Perturbation temperatures theta_1..theta_K >= 0; theta = 0 is read as argmax."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("temperatures is empty: give at least one value >= 0")
        for value in self.values:
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"temperature = {value}: allowed is [0, inf); theta = 0 is argmax")


def temperatures(
    num_temperatures: int = 20, theta_max: float = 2.0, kind: GridKind = "grid"
) -> Temperatures:
    r"""Perturbation temperatures.

    ``grid``: theta_k = theta_max (k - 1)/(K - 1), the linspace from 0 to theta_max that public
    replications of U-HLM use with K = 20 and theta_max = 2.
    ``midpoint``: theta_k = theta_max (k - 1/2)/K, the midpoint rule for the integral over
    theta ~ uniform(0, theta_max), the other reading of the paper.

    Assumption: the papers' own choice is not public to us; ``grid`` is the default everywhere.

    Raises
    ------
    ValueError
        If K < 2, theta_max <= 0, or the kind is unknown.
    """
    if num_temperatures < 2:
        raise ValueError(f"num_temperatures = {num_temperatures}: allowed is >= 2")
    if not theta_max > 0 or not np.isfinite(theta_max):
        raise ValueError(f"theta_max = {theta_max}: allowed is (0, inf)")
    if kind == "grid":
        grid = theta_max * np.arange(num_temperatures) / (num_temperatures - 1)
    elif kind == "midpoint":
        grid = theta_max * (np.arange(num_temperatures) + 0.5) / num_temperatures
    else:
        raise ValueError(f"kind = {kind!r}: allowed are 'grid', 'midpoint'")
    return Temperatures(tuple(float(value) for value in grid))


def log_partitions(logits: Array, thetas: Temperatures) -> Array:
    r"""Log partition functions (..., K) of the softmax, relative to the largest logit.

    .. math:: \log Z_k = \log \sum_v e^{(z_v - z_{\max})/\theta_k}, \quad \theta_k > 0

    and log(number of maxima) at theta = 0. Exponentials are the cost here, and
    exp(s/theta) = exp(s/(2 theta))^2, so a temperature whose double is in the grid too costs a
    square and no exponential: ten instead of nineteen for the default grid.

    Works in place on an array of its own, so it is not differentiable: detach tensors that require
    a gradient first.

    Parameters
    ----------
    logits : array (..., V)
        z, finite logits of the device model, before any temperature.
    thetas : Temperatures
    """
    check_finite(logits, "logits")
    xp = array_namespace(logits)
    batch_shape = tuple(logits.shape[:-1])
    rows = xp.reshape(logits, (-1, logits.shape[-1]))
    chains = _halving_chains(thetas.values)
    # In chunks that just fit a core's cache: a batch of the largest vocabularies does not.
    num_rows = max(1, len(rows) if on_accelerator(rows) else CHUNK_ENTRIES // rows.shape[1])
    out = [
        _log_partitions_chunk(xp, rows[i : i + num_rows], thetas.values, chains)
        for i in range(0, rows.shape[0], num_rows)
    ]
    return xp.reshape(xp.concat(out, axis=0), (*batch_shape, len(thetas.values)))


def _log_partitions_chunk(
    xp: Array, rows: Array, values: tuple[float, ...], chains: list[list[int]]
) -> Array:
    shifted = rows - xp.max(rows, axis=-1, keepdims=True)  # (R, V)
    sums: dict[int, Array] = {}
    for index, value in enumerate(values):
        if value == 0:
            sums[index] = xp.sum(xp.astype(shifted == 0, shifted.dtype), axis=-1)
    for chain in chains:
        # Base 2 and in place: torch's exp takes several times as long as its exp2, most of all
        # where the results are subnormal, and so does a new array of this size.
        weights = shifted * (LOG2_E / values[chain[0]])
        xp.exp2(weights, out=weights)
        sums[chain[0]] = xp.sum(weights, axis=-1)
        for index in chain[1:]:
            weights *= weights
            sums[index] = xp.sum(weights, axis=-1)
    return xp.log(xp.stack([sums[index] for index in range(len(values))], axis=-1))


def _halving_chains(values: tuple[float, ...]) -> list[list[int]]:
    """Partition the positive temperatures into chains, each entry half of the one before."""
    positive = [i for i, value in enumerate(values) if value > 0]
    half_of = {
        i: j
        for i in positive
        for j in positive
        if abs(values[j] - values[i] / 2) <= 1e-14 * values[i]
    }
    chains = [[start] for start in positive if start not in half_of.values()]
    for chain in chains:
        while chain[-1] in half_of:
            chain.append(half_of[chain[-1]])
    return chains


def perturbed_probabilities(
    logits: Array, token_ids: Array, thetas: Temperatures, log_z: Array | None = None
) -> Array:
    r"""Probability of given tokens under each perturbed softmax, (..., M, K).

    .. math:: p_k(d) = \mathrm{softmax}(z/\theta_k)_d

    At theta = 0 the softmax is the uniform law on the maxima (its limit).

    Parameters
    ----------
    logits : array (..., V)
        z, finite logits.
    token_ids : integer array (..., M)
        The tokens d.
    thetas : Temperatures
    log_z : array (..., K), optional
        Result of :func:`log_partitions`, if it is at hand.
    """
    xp = array_namespace(logits)
    if log_z is None:
        log_z = log_partitions(logits, thetas)
    largest_logit = xp.max(logits, axis=-1, keepdims=True)
    shifted = xp.take_along_axis(logits, token_ids, axis=-1) - largest_logit
    columns = []
    for index, theta in enumerate(thetas.values):
        log_zk = log_z[..., index][..., None]
        if theta == 0:
            columns.append(xp.astype(shifted == 0, shifted.dtype) * xp.exp(-log_zk))
        else:
            columns.append(xp.exp(shifted / theta - log_zk))
    return xp.clip(xp.stack(columns, axis=-1), 0.0, 1.0)


def exact_uncertainty(
    logits: Array, token_ids: Array, thetas: Temperatures, log_z: Array | None = None
) -> Array:
    r"""Exact temperature-perturbation uncertainty, (..., M) in [0, 1].

    .. math:: u(s, d) = 1 - \frac1K \sum_k \mathrm{softmax}(z/\theta_k)_d = E[u_K \mid s, d]

    docs/theory.md, (5). No token is ever drawn. u falls as z_d grows, so the tokens below any
    threshold are a prefix of the vocabulary sorted by logit, and there are at most
    1/(1 - threshold) of them, for the p_k sum to one over the vocabulary. Arguments are those of
    :func:`perturbed_probabilities`.

    Raises
    ------
    ValueError
        If logits holds NaN or infinity.

    Source: docs/theory.md, (5); the sampled estimator it is the mean of is U-HLM's (as public
    replications quote it).
    """
    xp = array_namespace(logits)
    probabilities = perturbed_probabilities(logits, token_ids, thetas, log_z)
    return xp.clip(1.0 - xp.mean(probabilities, axis=-1), 0.0, 1.0)


def sampled_uncertainty(probabilities: Array, uniforms: Array) -> Array:
    r"""Sampled uncertainty u_K, without drawing tokens.

    .. math:: u_K = \frac1K \#\{k : d_k \ne d\}, \qquad
              1\{d_k \ne d\} \sim \mathrm{Bernoulli}(1 - p_k(d))

    docs/theory.md, (4). Which token d_k is when it is not d does not matter, so K uniforms replace
    K draws over the vocabulary, with the same law: multiples of 1/K in [0, 1], shape (...).

    Parameters
    ----------
    probabilities, uniforms : array (..., K)
        p_k(d) from :func:`perturbed_probabilities`, and independent uniforms in [0, 1).
    """
    check_unit_interval(probabilities, "probabilities")
    check_unit_interval(uniforms, "uniforms")
    if uniforms.shape[-1] != probabilities.shape[-1]:
        raise ValueError(
            f"uniforms has {tuple(uniforms.shape)} and probabilities {tuple(probabilities.shape)}: "
            "give one uniform for each temperature, on the last axis"
        )
    xp = array_namespace(probabilities, uniforms)
    return xp.mean(xp.astype(uniforms >= probabilities, probabilities.dtype), axis=-1)


def sampled_uncertainty_variance(probabilities: Array) -> Array:
    r"""Variance of u_K given context and draft.

    .. math:: \mathrm{Var}(u_K \mid s, d) = \frac1{K^2} \sum_k p_k (1 - p_k)

    docs/theory.md, (5): (...) from p_k(d) of shape (..., K), at most 1/(4K).
    """
    check_unit_interval(probabilities, "probabilities")
    xp = array_namespace(probabilities)
    return xp.sum(probabilities * (1.0 - probabilities), axis=-1) / probabilities.shape[-1] ** 2


@dataclass(frozen=True)
class Attenuation:
    """What sampling noise in u_K does to the fitted line: docs/theory.md, (6); (...) each."""

    reliability: float | np.ndarray
    slope: float | np.ndarray
    correlation: float | np.ndarray


def attenuation(
    variance_exact: float | np.ndarray,
    mean_sampling_variance: float | np.ndarray,
    slope: float | np.ndarray,
    correlation: float | np.ndarray,
) -> Attenuation:
    r"""Predicted slope and correlation of beta on u_K from those on u.

    .. math:: \lambda_K = \frac{\mathrm{Var}(u)}{\mathrm{Var}(u) + E[\mathrm{Var}(u_K|s,d)]},
              \quad a_K = \lambda_K a, \quad r_K = \sqrt{\lambda_K}\, r

    docs/theory.md, (6). Each (...) or a float: Var(u) > 0 over tokens, E[Var(u_K | s, d)] >= 0, and
    a and r of beta on the exact u of the same K temperatures.

    Raises
    ------
    ValueError
        If a variance is out of range.

    Valid when the perturbation draws are independent of the verification given (s, d), which holds
    by construction: classical errors-in-variables, the covariance needs no linearity.
    """
    if not np.all(np.asarray(variance_exact) > 0):
        raise ValueError(f"variance_exact = {np.min(variance_exact)}: allowed is (0, inf)")
    if not np.all(np.asarray(mean_sampling_variance) >= 0):
        worst = np.min(mean_sampling_variance)
        raise ValueError(f"mean_sampling_variance = {worst}: allowed is [0, inf)")
    reliability = variance_exact / (variance_exact + mean_sampling_variance)
    return Attenuation(reliability, reliability * slope, reliability**0.5 * correlation)


def entropy(x: Array) -> Array:
    r"""Shannon entropy in nats, H = -sum_v x_v ln x_v, of distributions on the last axis."""
    check_distribution(x, "x")
    xp = array_namespace(x)
    smallest = xp.finfo(x.dtype).smallest_normal
    # 0 less it, not its negative: the entropy of a point mass has no sign.
    return 0.0 - xp.sum(x * xp.log(xp.clip(x, smallest, None)), axis=-1)


def margin(x: Array) -> Array:
    r"""Difference of the two largest probabilities, x_(1) - x_(2), in [0, 1]."""
    check_distribution(x, "x")
    if x.shape[-1] < 2:
        raise ValueError("x has one token: the margin needs a vocabulary of at least 2")
    top, _ = largest(x, 2)
    return top[..., 0] - top[..., 1]
