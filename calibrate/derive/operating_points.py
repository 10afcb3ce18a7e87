"""`hlm derive`: from a fit to thresholds, sizes, and what they are predicted to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from calibrate.decode.recording import SIZE_GRID
from calibrate.derive.policy_tokens import (
    METRICS,
    UNITS,
    Economics,
    metrics,
    predicted_importance,
    predicted_tokens,
)
from calibrate.fit.line import NUM_RESAMPLES
from calibrate.run.figure import as_figure
from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from hlmtheory.clusters import (
    bootstrap_totals,
    percentile_interval,
    resample_prompts,
    sum_by_prompt,
)
from hlmtheory.guarantees import conformal_threshold, learn_then_test_threshold
from hlmtheory.policies import (
    GATED_POLICIES,
    FixedSize,
    ImportanceSettings,
    OnlineSize,
    Policy,
    make_policy,
)
from hlmtheory.relation import line_moments, line_of_totals, linear_rejection
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
    thetas : tuple of float
        Tolerances of the truncation bound.
    eta : float
        Sharpness of the truncation bound.
    importances : tuple of ImportanceSettings
    draft_from_sent : bool
        Whether to derive cu-hlm-offline with drafts from the sent law too.

    The first theta and the first importance give the rules their plain names; each further one
    gives rules named `rule@setting`.
    """

    policies: tuple[str, ...]
    risks: tuple[float, ...] = (0.01,)
    confidence: float = 0.95
    thetas: tuple[float, ...] = (0.1,)
    eta: float = 1.0
    importances: tuple[ImportanceSettings, ...] = (ImportanceSettings(),)
    draft_from_sent: bool = False


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
    thresholds: dict[ImportanceSettings | None, Any] = {}
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
        for label, settings, importance in variants(name, trace, calibration, request):
            if importance not in thresholds:
                score = gate_score(trace, importance)
                thresholds[importance] = derive_thresholds(trace, score, calibration, request)
            for threshold, interval in thresholds[importance]:
                named = replace(threshold, rule=threshold.rule + label)
                points.append(
                    _point(name, named, interval, settings, trace, economics, request.confidence)
                )
    return points


def variants(
    name: str, trace: Trace, calibration: dict[str, Any], request: DeriveRequest
) -> list[tuple[str, dict[str, Any], ImportanceSettings | None]]:
    """Every setting of a gated policy: label behind the rule's name, settings, importance."""
    out: list[tuple[str, dict[str, Any], ImportanceSettings | None]] = []
    if name == "ui-hlm":
        for number, chosen in enumerate(request.importances):
            label = f"@{chosen.label}" if number else ""
            out.append((label, {"importance": asdict(chosen)}, chosen))
        return out
    if name not in ("cu-hlm-offline", "cu-hlm-online"):
        return [("", {}, None)]
    for number, theta in enumerate(request.thetas):
        settings = truncation_settings(name, trace, calibration, theta, request.eta)
        out.append((f"@theta-{theta:g}" if number else "", settings, None))
    if name == "cu-hlm-offline" and request.draft_from_sent:
        out.append(("@draft-from-sent", out[0][1] | {"draft_from_sent": True}, None))
    return out


def truncation_settings(
    name: str, trace: Trace, calibration: dict[str, Any], theta: float, eta: float
) -> dict[str, Any]:
    """How many entries a truncating policy sends, as operating_points.json stores it."""
    fit = calibration["fit"]
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    if name == "cu-hlm-online":
        return {"theta": theta, "eta": eta, "slope": slope, "intercept": intercept}
    beta = linear_rejection(trace["uncertainty"], slope, intercept)
    denominator = online_bound_denominator(trace["draft_prob"], beta, eta)
    sizes = tuple(min(k, calibration["pair"]["vocab_size"]) for k in SIZE_GRID)
    chosen = offline_truncation(trace["tail_deviation"] / denominator[:, None], sizes, theta)
    return {
        "num_entries": chosen.num_entries,
        "tolerance": theta,
        "tolerance_met": chosen.feasible,
    }


def gate_score(trace: Trace, importance: ImportanceSettings | None) -> np.ndarray:
    """The score whose comparison with u_th is the gate: u, or 0 where importance skips anyway."""
    score = trace["uncertainty"]
    if importance is None:
        return score
    return np.where(predicted_importance(trace, importance), score, 0.0)


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
        np.column_stack([line_moments(u, beta), can_reject]),
        index,
        num_prompts,
    )

    def linear(level_is_delta: bool) -> Any:
        def statistic(totals: np.ndarray) -> np.ndarray:
            line = line_of_totals(totals[..., :6])
            level = totals[..., 6] / totals[..., 0] if level_is_delta else 0.0
            with np.errstate(divide="ignore", invalid="ignore"):
                return (level - line.intercept) / line.slope

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

    def interval(values: np.ndarray) -> tuple[float, float] | None:
        return percentile_interval(values, num_prompts, request.confidence)

    resampled_moments = bootstrap_totals(moments, counts)
    out = [
        (risk_averse_threshold(slope, intercept), interval(linear(False)(resampled_moments))),
        (
            risk_prone_threshold(slope, intercept, fit["delta"]["value"]),
            interval(linear(True)(resampled_moments)),
        ),
    ]
    resampled_bins = bootstrap_totals(by_bin.reshape(num_prompts, -1), counts)
    for alpha in request.risks:
        out.append(
            (risk_budget_threshold(score, beta, alpha), interval(budget(alpha)(resampled_bins)))
        )
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
