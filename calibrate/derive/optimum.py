"""Which policy, threshold and size is best under a bias budget: equation (30) on a trace."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrate.decode.recording import BIAS_SIZE_GRID, THRESHOLD_GRID
from calibrate.derive.policy_tokens import Economics, payload_of_sent, predicted_tokens
from calibrate.run.traces import Trace
from hlmtheory.optimise import Objective, PolicyCurve, best_choice
from hlmtheory.policies import FixedSize, Policy, make_policy

MAX_TOKENS = 200_000
OBJECTIVES: tuple[Objective, ...] = ("throughput", "mean-throughput", "energy")


@dataclass(frozen=True)
class Optimum:
    """The best choice within one budget for one objective.

    Attributes
    ----------
    risk : float
        Budget on rejection risk plus truncation bias.
    objective : str
    choice : dict
        Fields of hlmtheory.optimise.Choice; None where a number is not defined.
    """

    risk: float
    objective: str
    choice: dict[str, Any]


def policy_curves(trace: Trace, economics: Economics) -> list[PolicyCurve]:
    """Curves of the gated policies over the stored thresholds, and the two that verify all or none.

    Means over tokens of at most MAX_TOKENS of them; ui-hlm is left out, for it has no curve in u_th
    alone.
    """
    thinned = thin_prompts(trace)
    vocab = economics.vocab_size
    curves = [
        _curve(thinned, economics, "hlm", None, (0.0,)),
        _curve(thinned, economics, "u-hlm", None),
        _curve(thinned, economics, "r-hlm", None),
        _curve(thinned, economics, "ask-llm", None),
    ]
    for size in BIAS_SIZE_GRID:
        if size < vocab:
            curves.append(_curve(thinned, economics, "cu-hlm-offline", size))
    zero = np.zeros(1)
    curves.append(PolicyCurve("llm", "ask", zero, zero, zero, zero, zero, server_only=True))
    return curves


def thin_prompts(trace: Trace) -> Trace:
    """Every m-th prompt, whole, so that at most MAX_TOKENS tokens are left."""
    step = -(-trace.num_tokens // MAX_TOKENS)
    if step == 1:
        return trace
    kept = trace.prompt_index % step == 0
    columns = {name: values[kept] for name, values in trace.columns.items()}
    columns["prompt_index"] = columns["prompt_index"] // step
    return Trace(columns, trace.prompt_ids[::step])


def _curve(
    trace: Trace,
    economics: Economics,
    name: str,
    size: int | None,
    thresholds: tuple[float, ...] = THRESHOLD_GRID,
) -> PolicyCurve:
    rows = []
    for threshold in thresholds:
        policy: Policy = make_policy(
            name, threshold, size=None if size is None else FixedSize(size)
        )
        tokens = predicted_tokens(trace, policy, economics.vocab_size)
        sent = 1.0 - tokens.skipped
        bits = payload_of_sent(tokens, economics)
        num_sent = sent.sum()
        risk = float(np.mean(tokens.skipped * tokens.rejection_prob))
        known = np.isfinite(tokens.bias)
        bias = float(np.mean(tokens.bias[known]))
        rows.append(
            (
                float(np.mean(tokens.skipped)),
                risk,
                float((sent * bits).sum() / num_sent) if num_sent else 0.0,
                max(bias - risk, 0.0),
            )
        )
    skip_rate, risks, payload, extra = (np.array(column) for column in zip(*rows, strict=True))
    return PolicyCurve(
        name,
        policy.rule.name,
        np.array(thresholds),
        skip_rate,
        risks,
        payload,
        extra,
        num_entries=size,
    )


def optima(trace: Trace, economics: Economics, risks: tuple[float, ...]) -> list[Optimum]:
    """The best choice for every budget and objective; docs/theory.md, (30)."""
    curves = policy_curves(trace, economics)
    out = []
    for risk in risks:
        for objective in OBJECTIVES:
            choice = best_choice(curves, economics.link, economics.profile, risk, objective)
            fields = {
                key: None if isinstance(value, float) and not np.isfinite(value) else value
                for key, value in asdict(choice).items()
            }
            out.append(Optimum(risk, objective, fields))
    return out
