r"""A watch on a risk while a policy runs: an e-process over audited tokens; docs/theory.md, (42).

Of the drafts that the device skips some are checked by the server, each by a coin of known chance
q that is thrown when the draft is there. The losses

.. math:: X_t = \frac{S_t A_t \beta_t}{q_t} \in [0, B], \qquad B = 1/\min q,

S skipped, A checked, have the rejection risk of the token as mean given the past. Nothing is
assumed of how tokens depend on each other: what is tested is the mean, so far, of these conditional
risks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import brentq

from hlmtheory.domain import check_unit_interval
from hlmtheory.risk_tests import check_level

STAKES = 2.0 ** np.arange(-10, 7)
"""eta B of the bets that the risk is above: fixed beforehand, so no past can choose them."""

FALLING_STAKES = np.append(2.0 ** np.arange(-12, 0), 0.9)
"""eta B of the bets that it is below; below 1, since 1 - eta X must stay positive."""


def _log_weights(stakes: np.ndarray) -> np.ndarray:
    """Shares of the capital, most on a stake of 1, where drifts worth an alarm lie."""
    weights = 1.0 / (1.0 + np.abs(np.log2(stakes)))
    return np.asarray(np.log(weights / np.sum(weights)))


def audited_losses(
    skipped: np.ndarray, rejection: np.ndarray, audit_rate: np.ndarray | float
) -> np.ndarray:
    r"""X of tokens, (N,): :math:`\beta/q` of checked drafts, 0 of all others.

    Parameters
    ----------
    skipped : bool array (N,)
    rejection : float array (N,)
        beta of the drafts that were checked, or whether the server's coin rejected them, 0 or 1;
        NaN of the others. What is known of a draft that was not skipped counts for nothing.
    audit_rate : float array (N,) or float
        q in (0, 1]: with what chance a skipped draft is checked, known before the coin is thrown.

    Raises
    ------
    ValueError
        If a rejection lies outside [0, 1] or a rate outside (0, 1].
    """
    checked = np.asarray(skipped) & ~np.isnan(rejection)
    check_unit_interval(np.where(checked, rejection, 0.0), "rejection")
    rate = np.broadcast_to(np.asarray(audit_rate, dtype=float), checked.shape)
    if not np.all((rate > 0) & (rate <= 1)):
        raise ValueError("audit_rate: allowed is above 0 and at most 1")
    return np.asarray(np.where(checked, rejection, 0.0) / rate)


def window_level(delta: float, window: int) -> float:
    r"""Level of the k-th window, k from 1: :math:`\delta/(k(k + 1))`, which add up to delta."""
    return delta / (window * (window + 1))


@dataclass(frozen=True)
class Tally:
    r"""All that a watch keeps of the losses X_1, ..., X_n so far.

    Attributes
    ----------
    bound : float
        B.
    num : int
        n.
    total : float
        :math:`\sum_t X_t`.
    rising : float array (J,)
        :math:`\sum_t \ln(1 + \eta_j X_t)`, :math:`\eta_j` = STAKES/B.
    falling : float array (J',)
        :math:`\sum_t \ln(1 - \eta_j X_t)`, :math:`\eta_j` = FALLING_STAKES/B.
    """

    bound: float
    num: int = 0
    total: float = 0.0
    rising: np.ndarray = field(default_factory=lambda: np.zeros(len(STAKES)))
    falling: np.ndarray = field(default_factory=lambda: np.zeros(len(FALLING_STAKES)))

    def appended(self, losses: np.ndarray) -> Tally:
        """The tally with further losses (N,), in [0, B].

        Raises
        ------
        ValueError
            If a loss lies outside [0, B].
        """
        self._check(losses)
        used = losses[losses > 0][:, None] / self.bound
        return replace(
            self,
            num=self.num + len(losses),
            total=self.total + float(np.sum(losses)),
            rising=self.rising + np.sum(np.log1p(STAKES * used), axis=0),
            falling=self.falling + np.sum(np.log1p(-FALLING_STAKES * used), axis=0),
        )

    def log_e_values(self, losses: np.ndarray, budget: float) -> np.ndarray:
        r"""ln E after each of further losses (N,).

        .. math:: E_n = \sum_j w_j \prod_{t \le n} \frac{1 + \eta_j X_t}{1 + \eta_j \alpha}

        Each factor is a bet of :math:`\lambda_j = \eta_j/(1 + \eta_j\alpha) < 1/\alpha` on
        :math:`X_t > \alpha`, :math:`1 + \lambda_j (X_t - \alpha)`. docs/theory.md, (42).
        """
        self._check(losses)
        place = np.flatnonzero(losses > 0)
        # Between two losses above 0 every E is the one before, times a power of 1/(1 + eta alpha).
        gains = np.zeros((len(place) + 1, len(STAKES)))
        gains[1:] = np.cumsum(np.log1p(STAKES * losses[place, None] / self.bound), axis=0)
        num_gains = np.cumsum(losses > 0)
        num = self.num + 1 + np.arange(len(losses))[:, None]
        price = np.log1p(STAKES * budget / self.bound)
        return _log_sum(_log_weights(STAKES) + self.rising + gains[num_gains] - num * price)

    def log_e_value(self, budget: float) -> float:
        """ln E of the losses so far."""
        price = np.log1p(STAKES * budget / self.bound)
        return float(_log_sum(_log_weights(STAKES) + self.rising - self.num * price))

    def interval(self, confidence: float) -> tuple[float, float]:
        r"""Confidence sequence of the mean of the conditional risks so far, in [0, 1].

        .. math:: \Big\{m : \sum_j w_j \prod_{t \le n} \frac{1 \pm \eta_j X_t}{1 \pm \eta_j m}
                  < \frac{2}{\delta} \text{ for both signs}\Big\}

        With probability `confidence` it holds that mean at every n at once. docs/theory.md, (42).
        """
        check_level(confidence, "confidence")
        limit = np.log(2.0 / (1.0 - confidence))
        eta, falling_eta = STAKES / self.bound, FALLING_STAKES / self.bound
        weights, falling_weights = _log_weights(STAKES), _log_weights(FALLING_STAKES)

        def above(mean: float) -> float:
            gains = weights + self.rising - self.num * np.log1p(eta * mean)
            return float(_log_sum(gains) - limit)

        def below(mean: float) -> float:
            gains = falling_weights + self.falling - self.num * np.log1p(-falling_eta * mean)
            return float(_log_sum(gains) - limit)

        mean = min(self.mean, 1.0)
        low = brentq(above, 0.0, mean, xtol=1e-12) if above(0.0) > 0 > above(mean) else 0.0
        high = brentq(below, mean, 1.0, xtol=1e-12) if below(1.0) > 0 > below(mean) else 1.0
        return float(low), float(high)

    @property
    def mean(self) -> float:
        """Mean loss so far; 0 of none."""
        return self.total / self.num if self.num else 0.0

    def _check(self, losses: np.ndarray) -> None:
        if not np.all((losses >= 0) & (losses <= self.bound * (1 + 1e-12))):
            raise ValueError(f"losses: allowed is 0 to {self.bound:g}, one over the least rate")


def _log_sum(logs: np.ndarray) -> np.ndarray:
    """ln of the sum of exponentials along the last axis."""
    peak = np.max(logs, axis=-1, keepdims=True)
    return np.asarray(peak[..., 0] + np.log(np.sum(np.exp(logs - peak), axis=-1)))
