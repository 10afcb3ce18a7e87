"""A learned score of device-side features: the benchmark that estimators are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

from hlmtheory.domain import check_finite, check_unit_interval

Model = Literal["boosting", "logistic"]
CERTAIN = 50.0
"""Intercept of a fit to one class alone: its score is 1 - 2e-22, or 2e-22."""


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on standardised features: m, s > 0 and w (F,), and b."""

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """1/(1 + exp(-(b + sum_f w_f (v_f - m_f)/s_f))) of rows (N, F), (N,)."""
        rows = (np.asarray(features, dtype=float) - self.mean) / self.scale
        return np.asarray(expit(rows @ self.coefficients + self.intercept))


def fit_logistic(features: np.ndarray, rejection_prob: np.ndarray) -> Logistic:
    """Fit E[beta | features] by logistic regression, beta (N,) in [0, 1] as weight of class 1."""
    from sklearn.linear_model import LogisticRegression

    table, beta = np.asarray(features, dtype=float), np.asarray(rejection_prob, dtype=float)
    mean, scale = table.mean(axis=0), table.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    if beta.max() == 0 or beta.min() == 1:  # one class only: nothing to separate
        return Logistic(mean, scale, 0 * mean, CERTAIN * (2 * beta[0] - 1))
    rows = (table - mean) / scale
    # A fractional target is two weighted rows, one of each class.
    classes = np.repeat([1, 0], len(beta))
    weights = np.concatenate([beta, 1 - beta])
    model = LogisticRegression(max_iter=1000)
    model.fit(np.concatenate([rows, rows]), classes, sample_weight=weights)
    return Logistic(mean, scale, model.coef_[0], float(model.intercept_[0]))


def cross_fitted_score(
    features: np.ndarray,
    rejection_prob: np.ndarray,
    prompt_index: np.ndarray,
    model: Model = "boosting",
    num_folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    r"""A learned score (N,) in [0, 1], the estimate of E[beta | device-side features].

    docs/theory.md, (15): the best score there is, as far as it can be learned. Each prompt's tokens
    are scored by a model fitted to other prompts only, so the curve of the score is an honest one.

    Parameters
    ----------
    features : float array (N, F)
        Known on the device before anything is sent: uncertainty, entropy, margin, position and the
        like. Nothing of the server.
    rejection_prob : float array (N,)
        beta in [0, 1].
    prompt_index : int array (N,)
        Folds are made of whole prompts.
    model : {"boosting", "logistic"}
        Gradient-boosted trees with squared loss, whose minimum is the conditional mean, clipped to
        [0, 1]; or :func:`fit_logistic`.
    num_folds : int
        2 to the number of prompts.
    seed : int
        Of the folds and of the trees.

    Raises
    ------
    ValueError
        If an argument is out of range, not finite, or of another length.
    """
    from sklearn.model_selection import GroupKFold

    table, beta = np.asarray(features, dtype=float), np.asarray(rejection_prob, dtype=float)
    index = np.asarray(prompt_index)
    check_finite(table, "features")
    check_unit_interval(beta, "rejection_prob")
    if table.ndim != 2 or not len(table) == len(beta) == len(index):
        raise ValueError(
            f"features, rejection_prob, prompt_index have {table.shape}, {beta.shape}, "
            f"{index.shape}: give (N, F), (N,), (N,)"
        )
    num_prompts = len(np.unique(index))
    if not 2 <= num_folds <= num_prompts:
        raise ValueError(f"num_folds = {num_folds}: allowed is 2 to {num_prompts}, the prompts")
    if model not in ("boosting", "logistic"):
        raise ValueError(f"model = {model!r}: allowed are 'boosting', 'logistic'")
    score = np.empty(len(beta))
    folds = GroupKFold(num_folds, shuffle=True, random_state=seed)
    for train, test in folds.split(table, beta, index):
        if model == "boosting":
            score[test] = _boosted_mean(table[train], beta[train], table[test], seed)
        else:
            score[test] = fit_logistic(table[train], beta[train]).predict(table[test])
    return np.clip(score, 0.0, 1.0)


def _boosted_mean(train: np.ndarray, target: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingRegressor

    # Early stopping would hold out tokens of the very prompts it trains on; a fixed small number
    # of shallow trees is not tuned on anything.
    trees = HistGradientBoostingRegressor(
        max_iter=150,
        learning_rate=0.06,
        max_leaf_nodes=15,
        min_samples_leaf=40,
        early_stopping=False,
        random_state=seed,
    )
    return np.asarray(trees.fit(train, target).predict(test))
