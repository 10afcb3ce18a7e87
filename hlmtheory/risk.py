"""Rejection risk: what skipping costs, and the sums by prompt that every figure of it follows from.

Two weightings of prompts of different lengths, n prompts with T_i tokens:

- ``tokens``: sum over all tokens / number of tokens, a ratio of sums. The mean token's risk, and
  what (10), (11), (15), (16) and every measured rate mean.
- ``prompts``: mean over prompts of each prompt's own mean. The loss of (33) that the guarantees of
  hlmtheory.guarantees speak of by default.

They agree when all prompts have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.clusters import RatioEstimate, bootstrap_totals, ratio_of_sums
from hlmtheory.domain import (
    Array,
    check_distribution,
    check_finite,
    check_nonnegative,
    check_same_shape,
    check_unit_interval,
)

Weighting = Literal["tokens", "prompts"]
MAX_GRID = 1000
ROUNDING = 1e-3
"""By how much single precision may leave a prompt's mass off its number of tokens, relatively."""


def rejection_risk(x: Array, y: Array, skip_probability: Array) -> Array:
    r"""Expected rejection risk of a gate in one context: its exact output bias.

    .. math:: \rho(s) = E_{d \sim x}[\sigma(d)\, \beta_d] = \sum_v \sigma_v \max(x_v - y_v, 0)

    docs/theory.md, (11). With accept/resample on the tokens not skipped it equals the total
    variation between the output law and y (12), for any sigma in [0, 1]. For sigma in {0, 1} it is
    also the least bias of any scheme with this gate (13); a randomised sigma has a lower floor.

    Parameters
    ----------
    x, y : array (..., V)
        Device and server distributions.
    skip_probability : array (..., V)
        sigma, the probability of skipping each draft, in [0, 1].

    Returns
    -------
    array (...)
        sigma = 0 gives 0 (HLM), sigma = 1 gives TV(x, y) (the device alone).

    Raises
    ------
    ValueError
        If x or y is not a distribution, the vocabularies differ, or sigma leaves [0, 1].

    Source: docs/theory.md, (11).
    """
    check_distribution(x, "x")
    check_distribution(y, "y")
    check_same_shape(x, y, "x", "y")
    check_same_shape(x, skip_probability, "x", "skip_probability")
    check_unit_interval(skip_probability, "skip_probability")
    xp = array_namespace(x, y, skip_probability)
    return xp.sum(skip_probability * xp.clip(x - y, 0.0, None), axis=-1)


@dataclass(frozen=True)
class SkipAtoms:
    r"""Pieces of the drafts' probability with the score that a gate sees if they are drawn.

    A drawn draft is one piece of mass 1. Averaging over the draft, a context has a piece of mass
    x_v for each candidate v, and

    .. math:: \rho_t(u) = \sum_v x_{t,v}\, \beta_{t,v}\, 1\{s_{t,v} \le u\}
                        = E_{d \sim x_t}[\beta_d\, 1\{s_d \le u\}]

    stands where beta_t 1{s_t <= u} stood, whose mean it is given the context. It lies in [0, 1] and
    does not fall in u, which is all that (33) to (35) ask of losses. Summed over an answer it has
    the same mean, however answers end, so the risk over tokens is the same. The risk over prompts
    becomes that of rho itself; the one over draws can differ from it where a draft decides how long
    its answer gets. Given the contexts rho scatters less, so intervals are narrower as a rule.

    Attributes
    ----------
    score : float array (J,)
        A piece is skipped when score <= threshold. Rising: pieces are put in this order, and those
        without mass are dropped.
    mass, rejection : float array (J,)
        Its probability; mass x beta of it.
    prompt_index : int array (J,)
        Prompt of each piece, in [0, P).
    num_tokens : float array (P,)
        Tokens of each prompt, which its masses sum to.

    Raises
    ------
    ValueError
        If lengths differ, a score is not finite, rejection leaves [0, mass], a prompt index is out
        of range, a prompt's mass is not its number of tokens, or there is no piece.
    """

    score: np.ndarray
    mass: np.ndarray
    rejection: np.ndarray
    prompt_index: np.ndarray
    num_tokens: np.ndarray

    def __post_init__(self) -> None:
        parts = {
            "score": np.asarray(self.score, dtype=float),
            "mass": np.asarray(self.mass, dtype=float),
            "rejection": np.asarray(self.rejection, dtype=float),
            "prompt_index": np.asarray(self.prompt_index),
        }
        shapes = {values.shape for values in parts.values()}
        if len(shapes) > 1 or parts["score"].ndim != 1:
            given = ", ".join(f"{name} {values.shape}" for name, values in parts.items())
            raise ValueError(f"{given}: give one entry a piece in each, (J,)")
        check_finite(parts["score"], "score")
        check_nonnegative(parts["mass"], "mass")
        if not parts["mass"].any():
            raise ValueError("score is empty: give at least one token")
        check_nonnegative(parts["rejection"], "rejection")
        if np.any(parts["rejection"] > parts["mass"] * (1 + 1e-6)):
            raise ValueError("rejection is above mass somewhere: give mass x beta, beta in [0, 1]")
        index, num_tokens = parts["prompt_index"], np.asarray(self.num_tokens, dtype=float)
        if index.min() < 0 or index.max() >= len(num_tokens):
            raise ValueError(
                f"prompt_index spans {index.min()}..{index.max()}: allowed is 0 to "
                f"num_prompts - 1 = {len(num_tokens) - 1}"
            )
        total = np.bincount(index, weights=parts["mass"], minlength=len(num_tokens))
        if np.any(np.abs(total - num_tokens) > ROUNDING * np.maximum(num_tokens, 1.0)):
            worst = int(np.argmax(np.abs(total - num_tokens)))
            raise ValueError(
                f"mass of prompt {worst} sums to {total[worst]:.6g}: allowed is its number of "
                f"tokens, {num_tokens[worst]:g}; give the mass beyond the candidates as well"
            )
        if not parts["mass"].all():
            parts = {name: values[parts["mass"] > 0] for name, values in parts.items()}
        if np.any(np.diff(parts["score"]) < 0):
            order = np.argsort(parts["score"])
            parts = {name: values[order] for name, values in parts.items()}
        for name, values in {**parts, "num_tokens": num_tokens}.items():
            object.__setattr__(self, name, values)

    @classmethod
    def of_drafts(
        cls,
        score: np.ndarray,
        rejection_prob: np.ndarray,
        prompt_index: np.ndarray,
        num_prompts: int,
    ) -> SkipAtoms:
        """The drafts that were drawn, (N,): one piece of mass 1 a token, with its beta."""
        check_unit_interval(np.asarray(rejection_prob), "rejection_prob")
        num_tokens = np.bincount(prompt_index, minlength=num_prompts)[:num_prompts]
        return cls(score, np.ones(np.shape(score)), rejection_prob, prompt_index, num_tokens)

    @classmethod
    def of_candidates(
        cls,
        score: np.ndarray,
        mass: np.ndarray,
        rejection: np.ndarray,
        prompt_index: np.ndarray,
        num_prompts: int,
    ) -> SkipAtoms:
        """Candidates of each context, (N, J) each, with the contexts' prompts (N,)."""
        num_tokens = np.bincount(prompt_index, minlength=num_prompts)
        index = np.repeat(np.asarray(prompt_index, dtype=np.int32), np.shape(mass)[1])
        return cls(score.reshape(-1), mass.reshape(-1), rejection.reshape(-1), index, num_tokens)

    @property
    def num_prompts(self) -> int:
        """P, prompts without tokens included."""
        return len(self.num_tokens)

    @cached_property
    def ends(self) -> np.ndarray:
        """Pieces up to and with each distinct score, (M,): where a rising threshold may stop."""
        return np.flatnonzero(np.append(np.diff(self.score) > 0, True)) + 1

    def quantiles(self, most: int = MAX_GRID) -> np.ndarray:
        """The distinct scores, rising; beyond `most` of them, as many quantiles of the mass.

        A gate `score <= threshold` only changes where the threshold passes a score. The last one
        skips everything.
        """
        distinct = self.score[self.ends - 1]
        if len(distinct) <= most:
            return np.asarray(distinct)
        below = np.cumsum(self.mass)
        levels = np.arange(1, most + 1) * below[-1] / most
        return np.unique(self.score[np.minimum(np.searchsorted(below, levels), len(below) - 1)])


@dataclass(frozen=True)
class SkipRiskSums:
    """Sums from which every figure of a threshold gate follows; a row is a prompt or a resample.

    Attributes
    ----------
    thresholds : float array (G,)
        Rising.
    skipped, rejected : float array (P, G)
        Number of skipped tokens of each row, and the sum of their rejection probabilities.
    num_tokens : float array (P,)
        Tokens of each row.
    """

    thresholds: np.ndarray
    skipped: np.ndarray
    rejected: np.ndarray
    num_tokens: np.ndarray

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        r"""Skip rate and risk of each row, (P, G) in [0, 1], 0 of a row without tokens.

        .. math:: p_i(u) = \frac1{T_i} \sum_t 1\{s_t \le u\}, \qquad
                  L_i(u) = \frac1{T_i} \sum_t \beta_t 1\{s_t \le u\}

        The second is the loss of (33) where rows are prompts.
        """
        lengths = np.maximum(self.num_tokens, 1.0)[:, None]
        return np.minimum(self.skipped / lengths, 1.0), np.minimum(self.rejected / lengths, 1.0)

    def curve(self, weighting: Weighting = "tokens") -> tuple[np.ndarray, np.ndarray]:
        r"""Skip rate and rejection risk at every threshold, (G,), under either weighting.

        .. math:: p(u) = \frac1N \sum_t 1\{s_t \le u\}, \qquad
                  \hat R(u) = \frac1N \sum_t \beta_t 1\{s_t \le u\}

        by tokens; by prompts, the means of :meth:`rates` over prompts with tokens. docs/theory.md,
        (11), (15): among gates that see the same features none skips more at any risk than the one
        whose score is E[beta | features] (Neyman-Pearson), so scores compare by this curve.
        """
        if weighting == "tokens":
            total = self.num_tokens.sum()
            return self.skipped.sum(axis=0) / total, self.rejected.sum(axis=0) / total
        if weighting != "prompts":
            raise ValueError(f"weighting = {weighting!r}: allowed are 'tokens', 'prompts'")
        used = self.num_tokens > 0
        skip_rate, risk = (rates[used].mean(axis=0) for rates in self.rates())
        return skip_rate, risk

    def estimates(self) -> tuple[list[RatioEstimate], list[RatioEstimate]]:
        """Skip rate and risk over tokens at every threshold, with errors clustered by prompt."""
        return (
            [ratio_of_sums(sums, self.num_tokens) for sums in self.skipped.T],
            [ratio_of_sums(sums, self.num_tokens) for sums in self.rejected.T],
        )

    def resampled(self, counts: np.ndarray) -> SkipRiskSums:
        """The same sums with a row for each resample of prompts, from their counts (R, P)."""
        skipped, rejected, num_tokens = (
            bootstrap_totals(sums, counts)
            for sums in (self.skipped, self.rejected, self.num_tokens[:, None])
        )
        return SkipRiskSums(self.thresholds, skipped, rejected, num_tokens[:, 0])


def skip_risk_sums(atoms: SkipAtoms, thresholds: np.ndarray | None = None) -> SkipRiskSums:
    """Sums by prompt of skipped tokens and of their rejection probability at every threshold.

    Parameters
    ----------
    atoms : SkipAtoms
    thresholds : float array (G,), optional
        Rising; by default :meth:`SkipAtoms.quantiles`.

    Raises
    ------
    ValueError
        If thresholds fall somewhere.
    """
    grid = atoms.quantiles() if thresholds is None else np.asarray(thresholds, dtype=float)
    if np.any(np.diff(grid) < 0):
        raise ValueError("thresholds fall somewhere: give them in rising order")
    # A piece counts from the first threshold that reaches its score on; those beyond all, never.
    ends = np.searchsorted(atoms.score, grid, side="right")
    place = np.repeat(np.arange(len(grid)), np.diff(ends, prepend=0))
    kept = slice(0, len(place))
    cell = atoms.prompt_index[kept].astype(np.int64) * len(grid) + place
    shape = (atoms.num_prompts, len(grid))
    skipped, rejected = (
        np.cumsum(
            np.bincount(cell, weights=w[kept], minlength=shape[0] * shape[1]).reshape(shape), axis=1
        )
        for w in (atoms.mass, atoms.rejection)
    )
    return SkipRiskSums(grid, skipped, rejected, atoms.num_tokens)


def skip_rate_at_risk(skip_rate: np.ndarray, risk: np.ndarray, alpha: float) -> np.ndarray:
    """Largest skip rate (..., G) whose risk is within alpha; 0 where none is: docs/theory.md, (15).

    Parameters
    ----------
    skip_rate, risk : float array (..., G)
        Of :meth:`SkipRiskSums.curve` or :meth:`SkipRiskSums.rates`.
    alpha : float
        Risk budget in [0, 1].
    """
    check_unit_interval(alpha, "alpha")
    return np.asarray(np.max(np.where(risk <= alpha, skip_rate, 0.0), axis=-1))
