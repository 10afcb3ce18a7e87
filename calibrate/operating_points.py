"""`hlm derive`: from a fit to thresholds, sizes, and what they are predicted to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from calibrate.fit import NUM_RESAMPLES
from calibrate.policy_tokens import (
    METRICS,
    UNITS,
    Economics,
    as_figure,
    metrics,
    predicted_importance,
    predicted_tokens,
)
from calibrate.recording import SIZE_GRID
from calibrate.runs import Figure
from calibrate.traces import Trace
from hlmtheory.clusters import bootstrap_interval, resample_prompts, sum_by_prompt
from hlmtheory.guarantees import conformal_threshold, learn_then_test_threshold
from hlmtheory.policies import (
    GATED_POLICIES,
    FixedSize,
    ImportanceSettings,
    OnlineSize,
    Policy,
    make_policy,
)
from hlmtheory.thresholds import (
    Threshold,
    risk_averse_threshold,
    risk_budget_threshold,
    risk_prone_threshold,
)
from hlmtheory.truncation import offline_truncation, online_bound_denominator

THRESHOLD_BINS = 400


@dataclass(frozen=True)
class OperatingPoint:
    """One policy at one derived setting.

    Attributes
    ----------
    policy, rule : str
    uncertainty_threshold : Figure
        u_th with its cluster-bootstrap interval; value None if infeasible.
    feasible : bool
    reason : str
        Why infeasible, or what is degenerate; empty otherwise.
    settings : dict
        Sizes, importance, and whatever else a rerun needs.
    predicted : dict of str to Figure
        The metrics of the command contract.
    """

    policy: str
    rule: str
    uncertainty_threshold: Figure
    feasible: bool
    reason: str
    settings: dict[str, Any]
    predicted: dict[str, Figure]

    def to_policy(self) -> Policy:
        """The policy that the engine runs."""
        return policy_from_settings(self.policy, self.uncertainty_threshold.value, self.settings)


def policy_from_settings(name: str, threshold: float | None, settings: dict[str, Any]) -> Policy:
    """Rebuild a policy from what operating_points.json holds."""
    size: FixedSize | OnlineSize | None = None
    if "num_entries" in settings:
        size = FixedSize(int(settings["num_entries"]))
    elif "theta" in settings:
        size = OnlineSize(
            settings["theta"], settings["slope"], settings["intercept"], settings["eta"]
        )
    importance = None
    if "importance" in settings:
        importance = ImportanceSettings(**settings["importance"])
    return make_policy(
        name,
        threshold,
        statistic=settings.get("statistic", "exact"),
        size=size,
        importance=importance,
        draft_from_sent=settings.get("draft_from_sent", False),
    )


@dataclass(frozen=True)
class DeriveRequest:
    """Which points to derive.

    Attributes
    ----------
    policies : tuple of str
    risks : tuple of float
        Budgets for the risk rules, in (0, 1).
    confidence : float
        Of every interval and of the Learn-then-Test guarantee.
    theta, eta : float
        Tolerance and sharpness of the truncation bound.
    importance : ImportanceSettings
    """

    policies: tuple[str, ...]
    risks: tuple[float, ...] = (0.01,)
    confidence: float = 0.95
    theta: float = 0.1
    eta: float = 1.0
    importance: ImportanceSettings = field(default_factory=ImportanceSettings)


def derive(
    trace: Trace, calibration: dict[str, Any], request: DeriveRequest, economics: Economics
) -> list[OperatingPoint]:
    """Operating points of every requested policy under every rule.

    Parameters
    ----------
    trace : Trace
        The calibration trace.
    calibration : dict
        calibration.json.
    request : DeriveRequest
    economics : Economics

    Returns
    -------
    list of OperatingPoint
        Infeasible ones included, with the reason.
    """
    points: list[OperatingPoint] = []
    for name in request.policies:
        if name not in GATED_POLICIES:
            policy = make_policy(name)
            points.append(
                OperatingPoint(
                    name,
                    "none",
                    Figure(None),
                    True,
                    "",
                    {},
                    predict(trace, policy, economics, request.confidence),
                )
            )
            continue
        settings = policy_settings(name, trace, calibration, request)
        score = gate_score(trace, name, request.importance)
        for threshold, interval in derive_thresholds(trace, score, calibration, request):
            points.append(
                _point(name, threshold, interval, settings, trace, economics, request.confidence)
            )
    return points


def policy_settings(
    name: str, trace: Trace, calibration: dict[str, Any], request: DeriveRequest
) -> dict[str, Any]:
    """Sizes and importance of a gated policy, as operating_points.json stores them."""
    fit = calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    if name == "ui-hlm":
        return {"importance": asdict(request.importance)}
    if name == "cu-hlm-online":
        return {
            "theta": request.theta,
            "eta": request.eta,
            "slope": slope,
            "intercept": intercept,
        }
    if name == "cu-hlm-offline":
        beta = np.clip(slope * trace["uncertainty"] + intercept, 0.0, 1.0)
        denominator = online_bound_denominator(trace["draft_prob"], beta, request.eta)
        sizes = tuple(min(k, calibration["pair"]["vocab_size"]) for k in SIZE_GRID)
        chosen = offline_truncation(
            trace["tail_deviation"] / denominator[:, None], sizes, request.theta
        )
        return {
            "num_entries": chosen.num_entries,
            "tolerance": request.theta,
            "tolerance_met": chosen.feasible,
        }
    return {}


def gate_score(trace: Trace, name: str, importance: ImportanceSettings) -> np.ndarray:
    """The score whose comparison with u_th is the gate: u, or 0 where importance skips anyway."""
    score = trace["uncertainty"]
    if name == "ui-hlm":
        return np.where(predicted_importance(trace, importance), score, 0.0)
    return score


def derive_thresholds(
    trace: Trace, score: np.ndarray, calibration: dict[str, Any], request: DeriveRequest
) -> list[tuple[Threshold, tuple[float, float] | None]]:
    """Every rule's threshold with its cluster-bootstrap interval."""
    fit = calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    index, num_prompts = trace.prompt_index, trace.num_prompts
    beta = trace["rejection_prob"]
    counts = resample_prompts(num_prompts, NUM_RESAMPLES, np.random.default_rng(0))
    u = trace["uncertainty"]
    can_reject = (trace["target_prob"] < trace["draft_prob"]).astype(float)
    moments = sum_by_prompt(
        np.stack([np.ones_like(u), u, beta, u * u, u * beta, can_reject], axis=1),
        index,
        num_prompts,
    )

    def linear(level_is_delta: bool) -> Any:
        def statistic(totals: np.ndarray) -> np.ndarray:
            n, su, sb, suu, sub, sd = np.moveaxis(totals.astype(np.float64), -1, 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                a = (sub - su * sb / n) / (suu - su * su / n)
                b = (sb - a * su) / n
                level = sd / n if level_is_delta else 0.0
                return (level - b) / a

        return statistic

    edges = np.unique(np.quantile(score, np.linspace(0, 1, THRESHOLD_BINS + 1)[1:]))
    bins = np.searchsorted(edges, score, side="left")
    by_bin = np.zeros((num_prompts, 2, len(edges)))
    np.add.at(by_bin[:, 0], (index, bins), 1.0)
    np.add.at(by_bin[:, 1], (index, bins), beta)

    def budget(alpha: float) -> Any:
        def statistic(totals: np.ndarray) -> np.ndarray:
            n, b = (totals.reshape(-1, 2, len(edges))[:, i] for i in range(2))
            risk = np.cumsum(b, axis=1) / n.sum(1, keepdims=True)
            inside = (risk <= alpha).sum(1)
            return np.where(inside > 0, edges[np.maximum(inside - 1, 0)], 0.0)

        return statistic

    def interval(data: np.ndarray, statistic: Any) -> tuple[float, float] | None:
        return bootstrap_interval(data, statistic, counts, request.confidence)

    out = [
        (risk_averse_threshold(slope, intercept), interval(moments, linear(False))),
        (
            risk_prone_threshold(slope, intercept, fit["delta"]["value"]),
            interval(moments, linear(True)),
        ),
    ]
    flat = by_bin.reshape(num_prompts, -1)
    for alpha in request.risks:
        out.append((risk_budget_threshold(score, beta, alpha), interval(flat, budget(alpha))))
        out.append((conformal_threshold(score, beta, index, num_prompts, alpha), None))
        out.append(
            (
                learn_then_test_threshold(
                    score, beta, index, num_prompts, alpha, 1 - request.confidence
                ),
                None,
            )
        )
    return out


def predict(
    trace: Trace, policy: Policy, economics: Economics, confidence: float
) -> dict[str, Figure]:
    """Predicted metrics of a policy with intervals for the calibration sampling."""
    tokens = predicted_tokens(trace, policy, economics.vocab_size)
    return {
        name: as_figure(estimate, UNITS[name], confidence)
        for name, estimate in metrics(tokens, economics).items()
    }


def _point(
    name: str,
    threshold: Threshold,
    interval: tuple[float, float] | None,
    settings: dict[str, Any],
    trace: Trace,
    economics: Economics,
    confidence: float,
) -> OperatingPoint:
    low, high = interval if interval is not None else (None, None)
    if not threshold.feasible:
        value = threshold.uncertainty_threshold
        return OperatingPoint(
            name,
            threshold.rule,
            Figure(float(value) if np.isfinite(value) else None, low, high),
            False,
            threshold.reason,
            settings,
            {metric: Figure(None, unit=UNITS[metric]) for metric in METRICS},
        )
    policy = policy_from_settings(name, threshold.uncertainty_threshold, settings)
    predicted = predict(trace, policy, economics, confidence)
    reason = threshold.reason
    skip_rate = predicted["skip_rate"].value
    if not settings.get("tolerance_met", True):
        size = settings["num_entries"]
        reason = f"no stored size meets theta = {settings['tolerance']:g}: k = {size}, the largest"
    elif not reason and skip_rate == 0.0:
        reason = "degenerate: no calibration token is skipped"
    elif not reason and skip_rate == 1.0:
        reason = "degenerate: every calibration token is skipped"
    return OperatingPoint(
        name,
        threshold.rule,
        Figure(threshold.uncertainty_threshold, low, high),
        True,
        reason,
        settings,
        predicted,
    )
