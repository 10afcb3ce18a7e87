"""The best operating point: which policy, threshold and k, for a link, a device and a bias budget.

docs/theory.md, (30). The search is over given curves, one for each policy and k on a grid of
thresholds. What they say of risk and bias is taken as it is; what they cost is worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from hlmtheory.cost import (
    DeviceProfile,
    mean_throughput_at_skip_rate_tok_s,
    throughput_at_skip_rate_tok_s,
    token_energy_j,
    token_time_ms,
)
from hlmtheory.domain import check_finite, check_nonnegative, check_unit_interval
from hlmtheory.link import Link
from hlmtheory.serving import used_profile

Objective: TypeAlias = Literal["throughput", "mean-throughput", "energy"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""1/E[token time], E[1/token time], or energy of a token; the first two are maximised."""


@dataclass(frozen=True)
class PolicyCurve:
    """What one policy, as the command line names it, does at each threshold of a grid (G,).

    Attributes
    ----------
    uncertainty_threshold, skip_rate : float array (G,)
        Threshold of the policy's score, 0 for a policy without a gate; share of tokens emitted
        without the server.
    risk, bias : float array (G,)
        R, expected rejection risk of the skipped tokens, docs/theory.md, (11); what the
        bias exceeds it by, (B - R)_+; 0 under accept/resample.
    payload_bits : float array (G,)
        Mean uplink bits of one *sent* token.
    num_entries : int, optional
        k of a rule with a fixed size.
    server_only : bool
        The server decodes alone.
    gated : bool
        Whether the device works out the uncertainty of every draft.
    num_exchanges : float
        Round trips of a sent token: 1, or one over an answer's tokens where the server decodes
        alone.
    reply_bits : int
        That come down for a sent token.

    Raises
    ------
    ValueError
        If the arrays differ in length, are empty, or hold a value out of range.
    """

    policy: str
    rule: str
    uncertainty_threshold: np.ndarray
    skip_rate: np.ndarray
    risk: np.ndarray
    payload_bits: np.ndarray
    bias: np.ndarray
    num_entries: int | None = None
    server_only: bool = False
    gated: bool = True
    num_exchanges: float = 1.0
    reply_bits: int = 0

    def __post_init__(self) -> None:
        shape = np.shape(self.uncertainty_threshold)
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(f"uncertainty_threshold has shape {shape}: give at least one, (G,)")
        for name in ("uncertainty_threshold", "skip_rate", "risk", "payload_bits", "bias"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != shape:
                raise ValueError(f"{name} has shape {values.shape}: allowed is {shape}, the grid's")
            if name == "uncertainty_threshold":
                check_finite(values, name)
            elif name == "payload_bits":
                check_nonnegative(values, name)
            else:
                check_unit_interval(values, name)
            object.__setattr__(self, name, values)


@dataclass(frozen=True)
class Choice:
    """One point of a curve with what it costs, or why no point is allowed.

    Where infeasible, names are empty and numbers NaN. `total_bias` is the risk and what
    the bias exceeds it by: what the budget limits.
    `uplink_bits_per_token` is over all tokens, skipped ones included. `reason` says why infeasible,
    or what is degenerate, and is empty otherwise.
    """

    policy: str
    rule: str
    num_entries: int | None
    uncertainty_threshold: float
    skip_rate: float
    risk: float
    total_bias: float
    uplink_bits_per_token: float
    token_time_ms: float
    throughput_tok_s: float
    mean_throughput_tok_s: float
    energy_j_per_token: float
    feasible: bool
    reason: str

    def loss(self, objective: Objective) -> float:
        """The objective as something to minimise."""
        _check_objective(objective)
        if objective == "energy":
            return self.energy_j_per_token
        return -(self.throughput_tok_s if objective == "throughput" else self.mean_throughput_tok_s)


def _check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective = {objective!r}: allowed are {', '.join(OBJECTIVES)}")


def curve_choices(curve: PolicyCurve, link: Link, profile: DeviceProfile) -> tuple[Choice, ...]:
    """Every point of a curve (G,), priced over a link for a device; docs/theory.md, (27) to (29).

    Assumption: every sent token of a point carries the mean payload. Mean time and energy are exact
    all the same where time is linear in bits; the mean of throughputs is then a lower bound.
    """
    uplink = np.asarray(link.uplink_time_ms(curve.payload_bits))
    sent, none = np.ones_like(uplink), np.zeros_like(uplink)
    used = used_profile(profile, curve.gated, curve.server_only)
    round_trip_ms = curve.num_exchanges * link.round_trip_ms
    reply_ms = float(link.downlink_time_ms(float(curve.reply_bits)))
    sent_ms = token_time_ms(sent, uplink, used, round_trip_ms, reply_ms)
    sent_j = token_energy_j(sent, uplink, used, round_trip_ms, reply_ms)
    skipped_ms, skipped_j = sent_ms, sent_j  # of the server alone, which skips none
    if not curve.server_only:
        skipped_ms = token_time_ms(none, none, used, round_trip_ms)
        skipped_j = token_energy_j(none, none, used, round_trip_ms)
    skip = curve.skip_rate
    points = {
        "uncertainty_threshold": curve.uncertainty_threshold,
        "skip_rate": skip,
        "risk": curve.risk,
        "total_bias": np.minimum(curve.risk + curve.bias, 1.0),
        "uplink_bits_per_token": (1.0 - skip) * curve.payload_bits,
        "token_time_ms": skip * skipped_ms + (1.0 - skip) * sent_ms,
        "throughput_tok_s": throughput_at_skip_rate_tok_s(skip, skipped_ms, sent_ms),
        "mean_throughput_tok_s": mean_throughput_at_skip_rate_tok_s(skip, skipped_ms, sent_ms),
        "energy_j_per_token": skip * skipped_j + (1.0 - skip) * sent_j,
    }
    rows: list[dict[str, Any]] = [
        {name: float(values[g]) for name, values in points.items()} for g in range(len(skip))
    ]
    known = (curve.policy, curve.rule, curve.num_entries)
    return tuple(
        Choice(*known, **row, feasible=True, reason=_degenerate(row["skip_rate"])) for row in rows
    )


def _degenerate(skip_rate: float) -> str:
    if skip_rate >= 1:
        return "degenerate: every token is skipped"
    return "degenerate: no token is skipped" if skip_rate <= 0 else ""


def best_choice(
    curves: Sequence[PolicyCurve],
    link: Link,
    profile: DeviceProfile,
    alpha: float,
    objective: Objective = "throughput",
) -> Choice:
    r"""The fastest, or least hungry, point within a bias budget.

    .. math:: \max_{\text{policy},\, u_{th},\, k} \; \frac{1}{E[t]}
              \quad \text{subject to} \quad R + (B - R)_+ \le \alpha

    docs/theory.md, (30), over one curve for each policy and k. Ties go to the smaller bias, then to
    the curve given first. Infeasible, with the least bias there is as the reason, where no point
    keeps the budget alpha in [0, 1].

    Raises
    ------
    ValueError
        If there is no curve, or an argument is out of range.
    """
    check_unit_interval(alpha, "alpha")
    _check_objective(objective)
    if not curves:
        raise ValueError("curves is empty: give at least one")
    choices = [choice for curve in curves for choice in curve_choices(curve, link, profile)]
    allowed = [choice for choice in choices if choice.total_bias <= alpha]
    if allowed:
        return min(allowed, key=lambda choice: (choice.loss(objective), choice.total_bias))
    least = min(choices, key=lambda choice: choice.total_bias)
    unknown = {field.name: float("nan") for field in fields(Choice) if field.type == "float"}
    return replace(
        least,
        **unknown,
        policy="",
        rule="",
        num_entries=None,
        feasible=False,
        reason=(
            f"no point keeps the budget {alpha:g}: the least biased is {least.policy} at u_th = "
            f"{least.uncertainty_threshold:g} with {least.total_bias:.3g}"
        ),
    )
