r"""Thresholds with a guarantee from finitely many calibration prompts.

Prompts are the exchangeable unit. The loss of prompt i at threshold u lies in [0, 1] and rises
with u; docs/theory.md, (33):

- by default each prompt's own mean, L_i(u) = (1/T_i) sum_t beta_t 1{s_t <= u}: its mean over
  prompts is the ``prompts`` weighting of hlmtheory.risk;
- with `max_tokens` = T_max, a cap fixed before calibration, prompts are filled up to T_max with
  tokens of loss alpha: L_i(u) = (sum_t beta_t 1{s_t <= u} + alpha (T_max - T_i)) / T_max. Its mean
  is at most alpha exactly when sum of beta over skipped tokens <= alpha x number of tokens, both in
  expectation: the ``tokens`` weighting, the risk of (10) and (11).

Under an answer cap kappa (hlmtheory.answer_cap) both lie in [0, kappa], and kappa takes the place
of the largest loss: L/kappa is tested at alpha/kappa. With `answers` the loss is the probability
that the answer differs from the server's at all; docs/theory.md, (50), (52).

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

Under a cap losses do not rise with u, and :func:`fixed_sequence_threshold` is the rule: a grid
fixed before calibration is tested from below until the first failure. If its answer breaks the
budget, the first threshold of the grid with a risk above alpha was rejected: again one event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hlmtheory.kinds import Certified, TestMethod
from hlmtheory.risk import SkipAtoms, SkipRiskSums
from hlmtheory.risk_tests import (
    MONOTONE,
    check_level,
    conformal_bound,
    conformal_prompts_needed,
    p_value,
    prompts_needed,
    risk_upper_bound,
)
from hlmtheory.thresholds import Threshold, largest_passing


def prompt_losses(
    rejected: np.ndarray,
    num_tokens: np.ndarray,
    alpha: float,
    certified: Certified = "prompts",
    max_tokens: int | None = None,
    cap: float | None = None,
) -> tuple[np.ndarray, float]:
    r"""Losses in [0, 1] whose mean is at most the level exactly if the budget alpha is kept.

    .. math:: \frac{A_i}{\kappa T_i}, \qquad
              \frac{A_i + \alpha (T_{max} - T_i)}{\kappa T_{max}}, \qquad A_i

    for prompts, tokens and answers, each at level alpha/kappa; kappa = 1 without a cap, which
    answers cannot have: it does not bound their loss.

    Parameters
    ----------
    rejected : float array (P, ...)
        A_i: sum of beta over the skipped tokens of each prompt; for answers the probability that
        one of them is rejected.
    num_tokens : float array (P,)
    alpha : float
    certified : {"prompts", "tokens", "answers"}
    max_tokens : int, optional
        T_max, for tokens.
    cap : float, optional
        kappa.

    Returns
    -------
    losses : float array (P, ...)
    level : float
        Where it is 1 or more the cap alone keeps the budget.

    Raises
    ------
    ValueError
        If a prompt has more than max_tokens tokens, or that is missing; for answers under a cap.
    """
    lengths = num_tokens.reshape(-1, *[1] * (rejected.ndim - 1))
    if certified == "answers":
        if cap is not None:
            raise ValueError(f"cap = {cap}: it does not bound the loss of answers; leave it out")
        return np.minimum(rejected, 1.0), alpha
    bound = 1.0 if cap is None else cap
    if certified == "prompts":
        values = rejected / np.maximum(lengths, 1.0)
    else:
        most = _most_tokens(num_tokens, max_tokens)
        values = (rejected + alpha * (most - lengths)) / most
    return np.minimum(values / bound, 1.0), alpha / bound


def _most_tokens(num_tokens: np.ndarray, max_tokens: int | None) -> int:
    if max_tokens is None or num_tokens.max() > max_tokens:
        raise ValueError(
            f"max_tokens = {max_tokens}: a prompt has {int(num_tokens.max())} tokens; give the "
            "cap that the calibration ran under"
        )
    return max_tokens


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
        Infeasible when n < 1/alpha - 1: too few prompts for the budget; about tokens, more.

    Raises
    ------
    ValueError
        If alpha is outside (0, 1), or a prompt has more than max_tokens tokens.

    Source: Angelopoulos et al. 2022 (conformal risk control).
    Valid when fresh prompts are exchangeable with the calibration prompts, in contexts of the
    calibration policy; approximate for a learned score that was fitted on these prompts.
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
        _too_few_for_conformal(num_prompts, alpha, _mean_filler(atoms.num_tokens, max_tokens)),
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
        A test that rises with every loss, chosen beforehand, not by the result. Betting is much the
        stronger one for losses that are means over many tokens, Hoeffding-Bentkus for losses near 0
        and 1.

    Returns
    -------
    Threshold

    Raises
    ------
    ValueError
        If alpha or delta is outside (0, 1), the method is unknown, or a prompt has more than
        max_tokens tokens.

    Source: Angelopoulos et al. 2021 (Learn then Test); the tests are those of hlmtheory.risk_tests.
    Valid when calibration prompts are independent draws of the population of fresh prompts, in
    contexts of the calibration policy; approximate for a learned score fitted on these prompts.
    """
    check_level(alpha, "alpha")
    check_level(delta, "delta")
    if method not in MONOTONE:
        raise ValueError(f"method = {method!r}: allowed are {', '.join(MONOTONE)}")
    num_prompts = atoms.num_prompts
    return _certify(
        "ltt",
        atoms,
        alpha,
        highest,
        thresholds,
        max_tokens,
        lambda losses: bool(p_value(losses, alpha, delta, method) <= delta),
        lambda losses: float(risk_upper_bound(losses, delta, method)),
        _too_few(
            num_prompts, alpha, alpha, delta, method, _mean_filler(atoms.num_tokens, max_tokens)
        ),
        1 - delta,
    )


def _too_few(
    num_prompts: int, alpha: float, level: float, delta: float, method: TestMethod, filler: float
) -> str:
    return (
        f"{num_prompts} prompts certify no threshold at risk {alpha:g} with confidence "
        f"{1 - delta:g}; even without any loss it takes "
        f"{prompts_needed(level, delta, method, filler)} prompts"
    )


@dataclass(frozen=True)
class GridLosses:
    """What every threshold of a grid does to each prompt; the grid was fixed beforehand.

    Attributes
    ----------
    sums : SkipRiskSums
        Over the tokens of each prompt; for answers `rejected` holds the loss itself.
    certified : {"prompts", "tokens", "answers"}
    max_tokens : int or None
    cap : float or None
    """

    sums: SkipRiskSums
    certified: Certified = "prompts"
    max_tokens: int | None = None
    cap: float | None = None

    def losses(self, alpha: float) -> tuple[np.ndarray, float]:
        """Losses (P, G) and their level; see :func:`prompt_losses`."""
        sums, most = self.sums, self.max_tokens
        return prompt_losses(
            sums.rejected, sums.num_tokens, alpha, self.certified, most, self.cap
        )  # fmt: skip

    def in_order(self, prompts: np.ndarray) -> GridLosses:
        """The same with its prompts in another order, which one test looks at; (51)."""
        sums = self.sums
        return replace(
            self,
            sums=replace(
                sums,
                skipped=sums.skipped[prompts],
                rejected=sums.rejected[prompts],
                num_tokens=sums.num_tokens[prompts],
            ),
        )

    def risks(self) -> np.ndarray:
        """What the budget is about at each threshold, (G,): no filler, no cap in it; (52)."""
        if self.certified == "answers":
            return np.asarray(self.sums.rejected.mean(axis=0))
        return self.sums.curve(self.certified)[1]

    @property
    def filler(self) -> float:
        """Mean share of its level that a prompt is charged with though it loses nothing."""
        most = self.max_tokens if self.certified == "tokens" else None
        return _mean_filler(self.sums.num_tokens, most)


def _mean_filler(num_tokens: np.ndarray, max_tokens: int | None) -> float:
    r"""How far prompts are filled up to T_max, in the mean: :math:`1 - \bar T/T_{max}` for tokens.

    So much of alpha a prompt without any loss is charged with; without T_max none; (33).
    """
    if max_tokens is None:
        return 0.0
    return 1.0 - float(np.mean(num_tokens)) / _most_tokens(num_tokens, max_tokens)


def num_passing(passed: np.ndarray) -> np.ndarray:
    """Length of the first run of truths along the last axis."""
    return np.asarray(np.cumprod(passed, axis=-1).sum(axis=-1))


def fixed_sequence_threshold(
    grid: GridLosses, alpha: float, delta: float = 0.05, method: TestMethod = "betting"
) -> Threshold:
    r"""Learn-then-Test on a grid fixed beforehand, for losses that need not rise with it.

    docs/theory.md, (50). Thresholds are tested in rising order, each at level delta, until the
    first that is not rejected. No bisection, no thresholds from the scores seen.

    Parameters
    ----------
    grid : GridLosses
    alpha, delta : float
    method : {"betting", "hoeffding-bentkus", "wsr", "t"}
        With "t", which is asymptotic, nothing is guaranteed.

    Returns
    -------
    Threshold

    Source: fixed-sequence testing, as in Angelopoulos et al. 2021.
    """
    check_level(alpha, "alpha")
    check_level(delta, "delta")
    losses, level = grid.losses(alpha)
    sums = grid.sums
    num, bound, why_not = len(sums.thresholds), None, ""
    if level < 1:
        rejected = p_value(losses.T, level, delta, method) <= delta
        num = int(num_passing(rejected))
        place = max(num - 1, 0)
        bound = alpha / level * float(risk_upper_bound(losses[:, place], delta, method))
        why_not = _too_few(len(losses), alpha, level, delta, method, grid.filler)
    family, label = ("asymptotic", "t") if method == "t" else ("ltt", "ltt")
    everything = num == len(sums.thresholds) and grid.cap is None
    reason = "certified even when every token is skipped" if everything else ""
    return Threshold(
        f"{label}-{alpha:g}",
        family,
        float(sums.thresholds[num - 1]) if num else float("nan"),
        num > 0,
        reason if num else why_not,
        alpha,
        grid.certified,
        1 - delta,
        bound,
    )


def conformal_on_grid(grid: GridLosses, alpha: float) -> Threshold:
    """Conformal risk control on a grid, for losses that rise with it: no answer cap; (34).

    Raises
    ------
    ValueError
        If the grid's losses are under a cap.
    """
    check_level(alpha, "alpha")
    if grid.cap is not None:
        raise ValueError(f"cap = {grid.cap}: losses under a cap do not rise with the threshold")
    losses, _ = grid.losses(alpha)
    bounds = conformal_bound(losses.mean(axis=0), len(losses))
    num = int(num_passing(bounds <= alpha))
    return Threshold(
        f"conformal-{alpha:g}",
        "conformal",
        float(grid.sums.thresholds[num - 1]) if num else float("nan"),
        num > 0,
        "" if num else _too_few_for_conformal(len(losses), alpha, grid.filler),
        alpha,
        grid.certified,
        None,
        float(bounds[max(num - 1, 0)]),
    )


def _too_few_for_conformal(num_prompts: int, alpha: float, filler: float) -> str:
    return (
        f"{num_prompts} prompts: the bound (n R + 1)/(n + 1) is above {alpha:g} for every "
        f"threshold; a budget of {alpha:g} needs at least "
        f"{conformal_prompts_needed(alpha, filler)} prompts"
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
    certified: Certified = "prompts" if max_tokens is None else "tokens"

    def losses(rejected: np.ndarray) -> np.ndarray:
        return prompt_losses(rejected, atoms.num_tokens, alpha, certified, max_tokens)[0]

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
        certified,
        confidence,
        bound(losses(found.rejected)),
    )
