"""Uncertainty thresholds: skip the server when u <= u_th."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hlmtheory.domain import check_unit_interval


@dataclass(frozen=True)
class Threshold:
    """A derived threshold, or why there is none.

    Attributes
    ----------
    rule : str
        Which rule gave it.
    uncertainty_threshold : float
        u_th; NaN where the rule has no solution.
    feasible : bool
        Whether the rule has a solution that some token can meet.
    reason : str
        Empty, or what is degenerate or missing.
    """

    rule: str
    uncertainty_threshold: float
    feasible: bool
    reason: str


def linear_threshold(
    rule: str, rejection_level: float, slope: float, intercept: float
) -> Threshold:
    r"""Largest u whose predicted rejection probability does not exceed a level.

    .. math:: u_{th} = (\ell - b)/a

    The common form of the papers' two rules: :func:`risk_averse_threshold` (level 0) and
    :func:`risk_prone_threshold` (level Delta).

    Raises
    ------
    ValueError
        If the level lies outside [0, 1] or a coefficient is not finite.
    """
    check_unit_interval(rejection_level, "rejection_level")
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise ValueError(f"slope, intercept = {slope}, {intercept}: both must be finite")
    if slope <= 0:
        return Threshold(
            rule,
            float("nan"),
            False,
            f"slope {slope:.3g} is not positive: uncertainty does not predict rejection",
        )
    value = (rejection_level - intercept) / slope
    if value < 0:
        return Threshold(
            rule,
            value,
            False,
            f"threshold {value:.3g} is below 0: the line predicts rejection "
            f"{intercept:.3g} > {rejection_level:.3g} already at u = 0, so no token qualifies",
        )
    reason = "threshold is at or above 1: every token is skipped" if value >= 1 else ""
    return Threshold(rule, value, True, reason)


def risk_averse_threshold(slope: float, intercept: float) -> Threshold:
    r"""Threshold below which the line predicts no rejection.

    .. math:: u_{th} = -b/a

    docs/theory.md, (8); U-HLM, second-hand. Infeasible when b > 0, which low sampling
    temperatures produce. Published fits: 0.06/0.82 = 0.0732, 0.066/0.815 = 0.0810.
    """
    return linear_threshold("risk-averse", 0.0, slope, intercept)


def risk_prone_threshold(slope: float, intercept: float, delta: float) -> Threshold:
    r"""Threshold at which the predicted rejection probability is Delta = P(y_d < x_d).

    .. math:: u_{th} = (\Delta - b)/a

    docs/theory.md, (9); U-HLM, second-hand. The quoted 0.43 with a = 0.82, b = -0.06 implies
    Delta = 0.293. Degenerate (skips everything) once Delta >= a + b.
    """
    return linear_threshold("risk-prone", delta, slope, intercept)


def risk_budget_threshold(
    uncertainty: np.ndarray, rejection_prob: np.ndarray, alpha: float
) -> Threshold:
    r"""Largest threshold whose empirical rejection risk stays within a budget.

    .. math:: u_{th}(\alpha) = \sup\{u : \hat R(u) \le \alpha\}, \quad
              \hat R(u) = \frac1N \sum_t \beta_t 1\{u_t \le u\}

    docs/theory.md, (10). The plug-in rule: no guarantee, see hlmtheory.guarantees for those. The
    supremum is returned as the midpoint between the last uncertainty that fits and the first that
    does not, for every value in between gives the same skips and the midpoint is furthest from
    both.

    Parameters
    ----------
    uncertainty, rejection_prob : float array (N,)
        u_t and beta_t of the calibration tokens, in [0, 1].
    alpha : float
        Risk budget in [0, 1].

    Raises
    ------
    ValueError
        If an argument is out of range or there are no tokens.
    """
    check_unit_interval(uncertainty, "uncertainty")
    check_unit_interval(rejection_prob, "rejection_prob")
    check_unit_interval(alpha, "alpha")
    if len(uncertainty) == 0:
        raise ValueError("uncertainty is empty: give at least one token")
    if len(rejection_prob) != len(uncertainty):
        raise ValueError(
            f"rejection_prob has {len(rejection_prob)} entries for {len(uncertainty)} of "
            "uncertainty: give one for each token"
        )
    order = np.argsort(uncertainty, kind="stable")
    u_sorted = np.asarray(uncertainty, dtype=np.float64)[order]
    risk = np.cumsum(np.asarray(rejection_prob, dtype=np.float64)[order]) / len(u_sorted)
    rule = f"risk-{alpha:g}"
    if risk[-1] <= alpha:
        return Threshold(rule, 1.0, True, "budget is met even when every token is skipped")
    first_over = int(np.argmax(risk > alpha))
    over = u_sorted[first_over]
    below = u_sorted[u_sorted < over]
    if len(below) == 0:
        least = risk[np.searchsorted(u_sorted, over, side="right") - 1]
        return Threshold(
            rule,
            float("nan"),
            False,
            f"the least uncertain tokens (u = {over:.3g}) already carry risk {least:.4g} > "
            f"{alpha:g}",
        )
    middle = (below[-1] + over) / 2
    # Between neighbouring floats the midpoint rounds to one of them, maybe to the wrong one.
    return Threshold(rule, float(middle if middle < over else below[-1]), True, "")


@dataclass(frozen=True)
class ThresholdSensitivity:
    """Partial derivatives of a linear threshold, for the delta method."""

    d_slope: float
    d_intercept: float
    d_level: float

    def standard_error(self, covariance: np.ndarray) -> float:
        """Delta-method standard error from the 2 x 2 covariance of (slope, intercept)."""
        gradient = np.array([self.d_slope, self.d_intercept])
        return float(np.sqrt(gradient @ np.asarray(covariance) @ gradient))


def threshold_sensitivity(
    rejection_level: float, slope: float, intercept: float
) -> ThresholdSensitivity:
    r"""Derivatives of u_th = (l - b)/a.

    .. math:: \partial_a u_{th} = -(\ell - b)/a^2, \quad \partial_b u_{th} = -1/a,
              \quad \partial_\ell u_{th} = 1/a

    docs/theory.md, (8) and (9).
    """
    if slope == 0:
        raise ValueError("slope = 0: the threshold is not defined")
    return ThresholdSensitivity(
        -(rejection_level - intercept) / slope**2, -1.0 / slope, 1.0 / slope
    )
