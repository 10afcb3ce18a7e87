"""Thresholds of a score: skip the server when score <= threshold.

hlmtheory.guarantees has the rules that promise something of fresh prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hlmtheory.domain import check_unit_interval
from hlmtheory.kinds import Certified
from hlmtheory.risk import SkipAtoms


@dataclass(frozen=True)
class Threshold:
    """A derived threshold, or why there is none.

    Attributes
    ----------
    rule : str
        Which rule gave it, with its budget.
    family : str
        The rule alone: risk-averse, risk-prone, risk, answer, conformal, ltt, or asymptotic, which
        guarantees nothing.
    value : float
        The threshold; NaN where the rule has no solution.
    feasible : bool
        Whether the rule has a solution that some token can meet.
    reason : str
        Empty, or what is degenerate or missing.
    budget : float or None
        alpha, of rules that have one.
    weighting : {"tokens", "prompts", "answers"} or None
        What the budget is about.
    confidence : float or None
        1 - delta, where the budget holds with that probability.
    bound : float or None
        What a certified rule compared with alpha at the threshold, or at the lowest candidate if
        none passes. The guarantee is about alpha: the bound belongs to a threshold chosen by
        looking at it.
    """

    rule: str
    family: str
    value: float
    feasible: bool
    reason: str
    budget: float | None = None
    weighting: Certified | None = None
    confidence: float | None = None
    bound: float | None = None


def linear_threshold(
    family: str,
    rejection_level: float,
    slope: float,
    intercept: float,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Threshold:
    r"""Largest score whose predicted rejection probability does not exceed a level.

    .. math:: u_{th} = (\ell - b)/a

    The common form of the papers' two rules: :func:`risk_averse_threshold` (level 0) and
    :func:`risk_prone_threshold` (level Delta).

    Parameters
    ----------
    family : str
    rejection_level : float
        In [0, 1].
    slope, intercept : float
        a and b of the line of beta on the score.
    lowest, highest : float
        Bounds of the score, infinite where it has none; those of u unless given.

    Raises
    ------
    ValueError
        If the level lies outside [0, 1] or a coefficient is not finite.
    """
    check_unit_interval(rejection_level, "rejection_level")
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise ValueError(f"slope, intercept = {slope}, {intercept}: both must be finite")
    if slope <= 0:
        reason = f"slope {slope:.3g} is not positive: uncertainty does not predict rejection"
        return Threshold(family, family, float("nan"), False, reason)
    value = (rejection_level - intercept) / slope
    if value < lowest:
        reason = (
            f"threshold {value:.3g} is below {lowest:g}: the line predicts rejection "
            f"{slope * lowest + intercept:.3g} > {rejection_level:.3g} already at u = {lowest:g}, "
            "so no token qualifies"
        )
        return Threshold(family, family, value, False, reason)
    all_skipped = f"threshold is at or above {highest:g}: every token is skipped"
    return Threshold(family, family, value, True, all_skipped if value >= highest else "")


def risk_averse_threshold(
    slope: float, intercept: float, lowest: float = 0.0, highest: float = 1.0
) -> Threshold:
    r"""Threshold below which the line predicts no rejection.

    .. math:: u_{th} = -b/a

    docs/theory.md, (8); U-HLM, second-hand. Infeasible when b > 0, which low sampling
    temperatures produce. Published fits: 0.06/0.82 = 0.0732, 0.066/0.815 = 0.0810.
    """
    return linear_threshold("risk-averse", 0.0, slope, intercept, lowest, highest)


def risk_prone_threshold(
    slope: float, intercept: float, delta: float, lowest: float = 0.0, highest: float = 1.0
) -> Threshold:
    r"""Threshold at which the predicted rejection probability is Delta = P(y_d < x_d).

    .. math:: u_{th} = (\Delta - b)/a

    docs/theory.md, (9); U-HLM, second-hand. The quoted 0.43 with a = 0.82, b = -0.06 implies
    Delta = 0.293. Degenerate (skips everything) once Delta >= a + b.
    """
    return linear_threshold("risk-prone", delta, slope, intercept, lowest, highest)


@dataclass(frozen=True)
class Passing:
    """The largest threshold that passes a test of what it would reject.

    Attributes
    ----------
    threshold : float
        NaN where none passes.
    rejected : float array (P,)
        Sum of beta over the skipped tokens of each prompt, there or at the lowest candidate.
    everything : bool
        Whether it skips every token.
    """

    threshold: float
    rejected: np.ndarray
    everything: bool


def largest_passing(
    atoms: SkipAtoms,
    passes: Callable[[np.ndarray], bool],
    highest: float,
    thresholds: np.ndarray | None = None,
) -> Passing:
    """Bisection over all thresholds that make a difference, with ties of the score together.

    The answer is the midpoint between the last score that passes and the first that does not, for
    every value in between gives the same skips and the midpoint is furthest from both. Each step
    adds up only what lies between its two ends, so the search costs one pass over the pieces.

    Parameters
    ----------
    atoms : SkipAtoms
    passes : callable
        Of `rejected` (P,); once it fails it must fail for anything larger.
    highest : float
        The answer where everything passes, or the largest score seen if that is above; with an
        infinite one, the largest score seen.
    thresholds : float array (G,), optional
        Rising candidates, then the only answers there are.
    """
    if thresholds is None:
        ends = atoms.ends
    else:
        grid = np.asarray(thresholds, dtype=float)
        if grid.ndim != 1 or len(grid) == 0 or np.any(np.diff(grid) < 0):
            raise ValueError("thresholds must be rising values, at least one")
        ends = np.searchsorted(atoms.score, grid, side="right")

    def added(begin: int, end: int) -> np.ndarray:
        inside = slice(begin, end)
        return np.bincount(
            atoms.prompt_index[inside], weights=atoms.rejection[inside], minlength=atoms.num_prompts
        )

    low, high, begin = -1, len(ends), 0
    rejected = np.zeros(atoms.num_prompts)
    while high - low > 1:
        middle = (low + high) // 2
        more = rejected + added(begin, ends[middle])
        if passes(more):
            low, rejected, begin = middle, more, ends[middle]
        else:
            high = middle
    if low < 0:
        return Passing(float("nan"), added(0, ends[0]), False)
    everything = bool(ends[low] == len(atoms.score))
    if thresholds is not None:
        return Passing(float(grid[low]), rejected, everything)
    last = float(atoms.score[ends[low] - 1])
    if everything:
        return Passing(max(highest, last) if np.isfinite(highest) else last, rejected, True)
    over = float(atoms.score[ends[low]])
    middle_score = (last + over) / 2
    # Between neighbouring floats the midpoint rounds to one of them, maybe to the wrong one.
    return Passing(middle_score if middle_score < over else last, rejected, False)


def risk_budget_threshold(
    atoms: SkipAtoms,
    alpha: float,
    highest: float = 1.0,
    thresholds: np.ndarray | None = None,
) -> Threshold:
    r"""Largest threshold whose empirical rejection risk stays within a budget.

    .. math:: u_{th}(\alpha) = \sup\{u : \hat R(u) \le \alpha\}, \quad
              \hat R(u) = \frac1N \sum_t \beta_t 1\{s_t \le u\}

    docs/theory.md, (10). The plug-in rule: no guarantee, it overshoots the budget about every
    second time; see hlmtheory.guarantees for the rules with one.

    Parameters
    ----------
    atoms : SkipAtoms
        Of the calibration tokens.
    alpha : float
        Risk budget in [0, 1].
    highest, thresholds
        As in :func:`largest_passing`.

    Raises
    ------
    ValueError
        If alpha is out of range or thresholds fall.
    """
    check_unit_interval(alpha, "alpha")
    num_tokens = atoms.num_tokens.sum()

    def passes(rejected: np.ndarray) -> bool:
        return bool(rejected.sum() / num_tokens <= alpha)

    found = largest_passing(atoms, passes, highest, thresholds)
    feasible = not np.isnan(found.threshold)
    reason = "budget is met even when every token is skipped" if found.everything else ""
    if not feasible:
        reason = (
            f"the least uncertain tokens (u = {atoms.score[0]:.3g}) already carry risk "
            f"{found.rejected.sum() / num_tokens:.4g} > {alpha:g}"
        )
    return Threshold(f"risk-{alpha:g}", "risk", found.threshold, feasible, reason, alpha, "tokens")
