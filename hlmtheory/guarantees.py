r"""Thresholds with a guarantee from finitely many calibration prompts.

Prompts are the exchangeable unit. The loss of prompt i at threshold u lies in [0, 1] and rises
with u; docs/theory.md, (33):

- by default each prompt's own mean, L_i(u) = (1/T_i) sum_t beta_t 1{s_t <= u}: its mean over
  prompts is the ``prompts`` weighting of hlmtheory.risk;
- with `max_tokens` = T_max, a cap fixed before calibration, prompts are filled up to T_max with
  tokens of loss alpha: L_i(u) = (sum_t beta_t 1{s_t <= u} + alpha (T_max - T_i)) / T_max. Its mean
  is at most alpha exactly when sum of beta over skipped tokens <= alpha x number of tokens, both in
  expectation: the ``tokens`` weighting, the risk of (10) and (11).

Both rules hold for prompts exchangeable with the calibration prompts and for contexts of the
calibration policy; skipping changes contexts, which reruns measure.

Because losses rise with u, whether a threshold passes is monotone in u: testing thresholds in
rising order until the first failure and bisection give the same answer, and candidates may be taken
from the calibration scores themselves. For the error of the answer is one event at one fixed
threshold: let u+ be the infimum of thresholds with risk above alpha. If the answer lies above u+
(or at it, where the risk jumps there), then u+ passes too, and that has probability at most delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hlmtheory.clusters import sum_by_prompt
from hlmtheory.risk import skip_risk_sums
from hlmtheory.risk_tests import (
    TestMethod,
    betting_p_value,
    check_level,
    conformal_bound,
    hoeffding_bentkus_p_value,
    prompts_needed,
    risk_upper_bound,
)
from hlmtheory.thresholds import Threshold


@dataclass(frozen=True)
class CertifiedThreshold(Threshold):
    """A threshold derived from calibration prompts, with what it rests on.

    Attributes
    ----------
    rule, uncertainty_threshold, feasible, reason
        As in :class:`hlmtheory.thresholds.Threshold`.
    alpha : float
        Risk budget.
    empirical_risk : float
        Mean loss of the calibration prompts at the threshold, or at the lowest candidate if none
        passes.
    bound : float
        What was compared with alpha there: the mean loss itself (plug-in), (n R + 1)/(n + 1)
        (conformal), or the upper confidence bound (Learn-then-Test). The guarantee is about alpha:
        the bound belongs to a threshold chosen by looking at it.
    confidence : float
        1 - delta, or NaN for rules without one.
    num_prompts : int
    """

    alpha: float
    empirical_risk: float
    bound: float
    confidence: float
    num_prompts: int


def prompt_losses(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    thresholds: np.ndarray,
) -> np.ndarray:
    r"""Loss of each prompt at each threshold, (P, G), weighting by prompts.

    .. math:: L_i(u) = \frac{1}{T_i} \sum_t \beta_t 1\{s_t \le u\}

    docs/theory.md, (33). A prompt without tokens has loss 0.

    Parameters
    ----------
    score : float array (N,)
        What the gate compares with the threshold.
    rejection_prob : float array (N,)
        beta in [0, 1].
    prompt_index : int array (N,)
    num_prompts : int
    thresholds : float array (G,)
        Rising.

    Raises
    ------
    ValueError
        As :func:`hlmtheory.risk.skip_risk_sums`.
    """
    sums = skip_risk_sums(score, rejection_prob, prompt_index, num_prompts, thresholds)
    return np.minimum(sums.rejected / np.maximum(sums.num_tokens, 1)[:, None], 1.0)


def plug_in_threshold(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
    thresholds: np.ndarray | None = None,
    max_tokens: int | None = None,
) -> CertifiedThreshold:
    """Largest threshold whose mean calibration loss is within alpha: the baseline, no guarantee.

    It overshoots the budget about every second time. Arguments as :func:`conformal_threshold`.
    """
    trace = _trace(score, rejection_prob, prompt_index, num_prompts, alpha, max_tokens)

    def bound(losses: np.ndarray) -> float:
        return float(losses.mean())

    return _certify(
        f"plug-in-{alpha:g}",
        trace,
        thresholds,
        lambda losses: bound(losses) <= alpha,
        bound,
        f"{num_prompts} prompts: the least uncertain tokens already carry a mean loss above "
        f"{alpha:g}",
    )


def conformal_threshold(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
    thresholds: np.ndarray | None = None,
    max_tokens: int | None = None,
) -> CertifiedThreshold:
    r"""Conformal risk control: expected risk on a fresh prompt at most alpha.

    .. math:: u_{th} = \sup\Big\{u : \frac{n \hat R(u) + 1}{n + 1} \le \alpha\Big\}

    docs/theory.md, (34). The expectation is over calibration and fresh prompt together: a single
    calibration may overshoot the budget, how often depends on the spread of the losses against
    (1 - alpha)/(n + 1); see :func:`learn_then_test_threshold` for the other promise.

    Parameters
    ----------
    score : float array (N,)
        What the gate compares with the threshold: a token is skipped when score <= threshold.
    rejection_prob : float array (N,)
        beta in [0, 1].
    prompt_index : int array (N,)
        Prompt of each token, in [0, num_prompts).
    num_prompts : int
    alpha : float
        Risk budget in (0, 1).
    thresholds : float array (G,), optional
        Rising candidates. By default all thresholds that make a difference: the midpoints between
        neighbouring scores, and 1.
    max_tokens : int, optional
        Cap on a prompt's tokens, fixed before calibration: then the risk is the mean over tokens.
        By default it is the mean over prompts of each prompt's mean; see the module's head.

    Returns
    -------
    CertifiedThreshold
        Infeasible when n < 1/alpha - 1: too few prompts for the budget.

    Raises
    ------
    ValueError
        If alpha is outside (0, 1), a prompt has more than max_tokens tokens, or the trace is bad.

    Source: Angelopoulos et al. 2022 (conformal risk control).
    Valid when fresh prompts are exchangeable with the calibration prompts.
    """
    trace = _trace(score, rejection_prob, prompt_index, num_prompts, alpha, max_tokens)

    def bound(losses: np.ndarray) -> float:
        return float(conformal_bound(losses.mean(), num_prompts))

    return _certify(
        f"conformal-{alpha:g}",
        trace,
        thresholds,
        lambda losses: bound(losses) <= alpha,
        bound,
        f"{num_prompts} prompts: the bound (n R + 1)/(n + 1) is above {alpha:g} for every "
        f"threshold; a budget of {alpha:g} needs at least {int(np.ceil(1 / alpha - 1 - 1e-9))} "
        "prompts",
    )


def learn_then_test_threshold(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
    delta: float = 0.05,
    thresholds: np.ndarray | None = None,
    max_tokens: int | None = None,
    method: TestMethod = "betting",
) -> CertifiedThreshold:
    r"""Learn-then-Test: with probability 1 - delta over calibrations the risk is at most alpha.

    docs/theory.md, (35). Thresholds are tested in rising order, each at level delta, until the
    first that fails: fixed-sequence testing, with family-wise error at most delta. As losses rise
    with the threshold no level is spent on multiplicity, and candidates may come from the
    calibration scores; the module's head has the argument.

    Parameters
    ----------
    score, rejection_prob, prompt_index, num_prompts, alpha, thresholds, max_tokens
        As in :func:`conformal_threshold`.
    delta : float
        Probability, in (0, 1), of a calibration whose threshold breaks the budget.
    method : {"betting", "hoeffding-bentkus"}
        Chosen beforehand, not by the result. Betting is much the stronger one for losses that are
        means over many tokens, Hoeffding-Bentkus for losses near 0 and 1.

    Returns
    -------
    CertifiedThreshold

    Raises
    ------
    ValueError
        If alpha or delta is outside (0, 1), the method is unknown, a prompt has more than
        max_tokens tokens, or the trace is bad.

    Source: Angelopoulos et al. 2021 (Learn then Test); the tests are those of hlmtheory.risk_tests.
    Valid when calibration prompts are independent draws of the population of fresh prompts.
    """
    check_level(delta, "delta")
    if method not in ("betting", "hoeffding-bentkus"):
        raise ValueError(f"method = {method!r}: allowed are 'betting', 'hoeffding-bentkus'")
    trace = _trace(score, rejection_prob, prompt_index, num_prompts, alpha, max_tokens)

    def passes(losses: np.ndarray) -> bool:
        if method == "betting":
            return bool(betting_p_value(losses, alpha) <= delta)
        mean = np.asarray(losses.mean())
        return bool(hoeffding_bentkus_p_value(mean, num_prompts, alpha) <= delta)

    return _certify(
        f"ltt-{alpha:g}",
        trace,
        thresholds,
        passes,
        lambda losses: float(risk_upper_bound(losses, delta, method)),
        f"{num_prompts} prompts certify no threshold at risk {alpha:g} with confidence "
        f"{1 - delta:g}; even without any loss it takes {prompts_needed(alpha, delta, method)} "
        "prompts",
        1 - delta,
    )


@dataclass(frozen=True)
class _Trace:
    """A calibration trace, ready to give the prompts' losses at any threshold."""

    score: np.ndarray
    rejection_prob: np.ndarray
    prompt_index: np.ndarray
    num_prompts: int
    num_tokens: np.ndarray
    alpha: float
    max_tokens: int | None

    def losses(self, threshold: float) -> np.ndarray:
        """L_i at one threshold, (num_prompts,): the module's head."""
        counted = np.where(self.score <= threshold, self.rejection_prob, 0.0)
        rejected = sum_by_prompt(counted, self.prompt_index, self.num_prompts)
        if self.max_tokens is None:
            return np.minimum(rejected / np.maximum(self.num_tokens, 1), 1.0)
        filled = rejected + self.alpha * (self.max_tokens - self.num_tokens)
        return np.minimum(filled / self.max_tokens, 1.0)

    def candidates(self) -> np.ndarray:
        """Midpoints between neighbouring scores, then the least threshold that skips everything."""
        distinct = np.unique(self.score)
        return np.append((distinct[1:] + distinct[:-1]) / 2, max(1.0, distinct[-1]))


def _trace(
    score: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    num_prompts: int,
    alpha: float,
    max_tokens: int | None,
) -> _Trace:
    check_level(alpha, "alpha")
    values = np.asarray(score, dtype=float)
    beta = np.asarray(rejection_prob, dtype=float)
    index = np.asarray(prompt_index)
    # One threshold is enough to have the trace checked and its tokens counted.
    num_tokens = skip_risk_sums(values, beta, index, num_prompts, np.zeros(1)).num_tokens
    if len(values) == 0:
        raise ValueError("score is empty: give at least one token")
    if max_tokens is not None and num_tokens.max() > max_tokens:
        raise ValueError(
            f"max_tokens = {max_tokens}: a prompt has {int(num_tokens.max())} tokens; give the cap "
            "that the calibration ran under"
        )
    return _Trace(values, beta, index, num_prompts, num_tokens, alpha, max_tokens)


def _certify(
    rule: str,
    trace: _Trace,
    thresholds: np.ndarray | None,
    passes: Callable[[np.ndarray], bool],
    bound: Callable[[np.ndarray], float],
    why_not: str,
    confidence: float = float("nan"),
) -> CertifiedThreshold:
    """The last candidate that passes, by bisection: the rule must be monotone in the losses."""
    grid = trace.candidates() if thresholds is None else np.asarray(thresholds, dtype=float)
    if grid.ndim != 1 or len(grid) == 0 or np.any(np.diff(grid) < 0):
        raise ValueError("thresholds must be rising values, at least one")
    low, high = -1, len(grid)  # the last known to pass, the first known to fail
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(trace.losses(grid[middle])) else (low, middle)
    feasible = low >= 0
    losses = trace.losses(grid[max(low, 0)])
    reason = why_not
    if feasible:
        everything = bool(np.all(trace.score <= grid[low]))
        reason = "certified even when every token is skipped" if everything else ""
    return CertifiedThreshold(
        rule,
        float(grid[low]) if feasible else float("nan"),
        feasible,
        reason,
        trace.alpha,
        float(losses.mean()),
        bound(losses),
        confidence,
        trace.num_prompts,
    )
