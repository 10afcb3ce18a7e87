r"""Thresholds with a guarantee from finitely many calibration prompts.

Prompts are the exchangeable unit. The loss of prompt i at threshold u lies in [0, 1] and rises
with u; docs/theory.md, (33):

- by default each prompt's own mean, L_i(u) = (1/T_i) sum_t beta_t 1{s_t <= u}: its mean over
  prompts is the ``prompts`` weighting of hlmtheory.risk;
- with `max_tokens` = T_max, a cap fixed before calibration, prompts are filled up to T_max with
  tokens of loss alpha: L_i(u) = (sum_t beta_t 1{s_t <= u} + alpha (T_max - T_i)) / T_max. Its mean
  is at most alpha exactly when sum of beta over skipped tokens <= alpha x number of tokens, both in
  expectation: the ``tokens`` weighting, the risk of (10) and (11).

Where beta_t 1{s_t <= u} is averaged over the draft (:class:`hlmtheory.risk.SkipAtoms`) rho_t(u)
takes its place, in [0, 1] and rising as well: (33) to (35) hold word for word with R(u) the mean of
these losses. The sum of rho over an answer has the mean of the sum of beta over its skipped tokens.

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

import numpy as np

from hlmtheory.risk import SkipAtoms
from hlmtheory.risk_tests import (
    TestMethod,
    betting_p_value,
    check_level,
    conformal_bound,
    hoeffding_bentkus_p_value,
    prompts_needed,
    risk_upper_bound,
)
from hlmtheory.thresholds import Threshold, largest_passing


def conformal_threshold(
    atoms: SkipAtoms,
    alpha: float,
    highest: float = 1.0,
    thresholds: np.ndarray | None = None,
    max_tokens: int | None = None,
) -> Threshold:
    r"""Conformal risk control: expected risk on a fresh prompt at most alpha.

    .. math:: u_{th} = \sup\Big\{u : \frac{n \hat R(u) + 1}{n + 1} \le \alpha\Big\}

    docs/theory.md, (34). The expectation is over calibration and fresh prompt together: a single
    calibration may overshoot the budget, how often depends on the spread of the losses against
    (1 - alpha)/(n + 1); see :func:`learn_then_test_threshold` for the other promise.

    Parameters
    ----------
    atoms : SkipAtoms
        Of the calibration tokens.
    alpha : float
        Risk budget in (0, 1).
    highest, thresholds
        As in :func:`hlmtheory.thresholds.largest_passing`.
    max_tokens : int, optional
        Cap on a prompt's tokens, fixed before calibration: then the risk is the mean over tokens.
        By default it is the mean over prompts of each prompt's mean; see the module's head.

    Returns
    -------
    Threshold
        Infeasible when n < 1/alpha - 1: too few prompts for the budget.

    Raises
    ------
    ValueError
        If alpha is outside (0, 1), or a prompt has more than max_tokens tokens.

    Source: Angelopoulos et al. 2022 (conformal risk control).
    Valid when fresh prompts are exchangeable with the calibration prompts.
    """
    check_level(alpha, "alpha")
    num_prompts = atoms.num_prompts

    def bound(losses: np.ndarray) -> float:
        return float(conformal_bound(losses.mean(), num_prompts))

    return _certify(
        "conformal",
        atoms,
        alpha,
        highest,
        thresholds,
        max_tokens,
        lambda losses: bound(losses) <= alpha,
        bound,
        f"{num_prompts} prompts: the bound (n R + 1)/(n + 1) is above {alpha:g} for every "
        f"threshold; a budget of {alpha:g} needs at least "
        f"{int(np.ceil(1 / alpha - 1 - 1e-9))} prompts",
    )


def learn_then_test_threshold(
    atoms: SkipAtoms,
    alpha: float,
    delta: float = 0.05,
    highest: float = 1.0,
    thresholds: np.ndarray | None = None,
    max_tokens: int | None = None,
    method: TestMethod = "betting",
) -> Threshold:
    r"""Learn-then-Test: with probability 1 - delta over calibrations the risk is at most alpha.

    docs/theory.md, (35). Thresholds are tested in rising order, each at level delta, until the
    first that fails: fixed-sequence testing, with family-wise error at most delta. As losses rise
    with the threshold no level is spent on multiplicity, and candidates may come from the
    calibration scores; the module's head has the argument.

    Parameters
    ----------
    atoms, alpha, highest, thresholds, max_tokens
        As in :func:`conformal_threshold`.
    delta : float
        Probability, in (0, 1), of a calibration whose threshold breaks the budget.
    method : {"betting", "hoeffding-bentkus"}
        Chosen beforehand, not by the result. Betting is much the stronger one for losses that are
        means over many tokens, Hoeffding-Bentkus for losses near 0 and 1.

    Returns
    -------
    Threshold

    Raises
    ------
    ValueError
        If alpha or delta is outside (0, 1), the method is unknown, or a prompt has more than
        max_tokens tokens.

    Source: Angelopoulos et al. 2021 (Learn then Test); the tests are those of hlmtheory.risk_tests.
    Valid when calibration prompts are independent draws of the population of fresh prompts.
    """
    check_level(alpha, "alpha")
    check_level(delta, "delta")
    if method not in ("betting", "hoeffding-bentkus"):
        raise ValueError(f"method = {method!r}: allowed are 'betting', 'hoeffding-bentkus'")
    num_prompts = atoms.num_prompts

    def passes(losses: np.ndarray) -> bool:
        if method == "betting":
            return bool(betting_p_value(losses, alpha) <= delta)
        mean = np.asarray(losses.mean())
        return bool(hoeffding_bentkus_p_value(mean, num_prompts, alpha) <= delta)

    return _certify(
        "ltt",
        atoms,
        alpha,
        highest,
        thresholds,
        max_tokens,
        passes,
        lambda losses: float(risk_upper_bound(losses, delta, method)),
        f"{num_prompts} prompts certify no threshold at risk {alpha:g} with confidence "
        f"{1 - delta:g}; even without any loss it takes {prompts_needed(alpha, delta, method)} "
        "prompts",
        1 - delta,
    )


def _certify(
    family: str,
    atoms: SkipAtoms,
    alpha: float,
    highest: float,
    thresholds: np.ndarray | None,
    max_tokens: int | None,
    passes: Callable[[np.ndarray], bool],
    bound: Callable[[np.ndarray], float],
    why_not: str,
    confidence: float | None = None,
) -> Threshold:
    """The largest threshold whose prompts' losses pass; the rule must be monotone in them."""
    lengths = atoms.num_tokens
    if max_tokens is not None and lengths.max() > max_tokens:
        raise ValueError(
            f"max_tokens = {max_tokens}: a prompt has {int(lengths.max())} tokens; give the cap "
            "that the calibration ran under"
        )

    def losses(rejected: np.ndarray) -> np.ndarray:
        if max_tokens is None:
            values = rejected / np.maximum(lengths, 1.0)
        else:
            values = (rejected + alpha * (max_tokens - lengths)) / max_tokens
        return np.asarray(np.minimum(values, 1.0))

    found = largest_passing(atoms, lambda sums: passes(losses(sums)), highest, thresholds)
    feasible = not np.isnan(found.threshold)
    reason = "certified even when every token is skipped" if found.everything else ""
    return Threshold(
        f"{family}-{alpha:g}",
        family,
        found.threshold,
        feasible,
        reason if feasible else why_not,
        alpha,
        "prompts" if max_tokens is None else "tokens",
        confidence,
        bound(losses(found.rejected)),
    )
