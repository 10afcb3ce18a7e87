"""Policies along their thresholds, and the best of all under a bias budget: (30) on a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np

from calibrate.derive.operating_points import Study
from calibrate.derive.predict import Economics, path_means, predicted_tokens
from calibrate.run.records import Optimum, PolicyPath
from calibrate.run.traces import Trace
from hlmtheory.cost import reply_bits
from hlmtheory.optimise import Choice, Objective, PolicyCurve, best_choice
from hlmtheory.policies import GatedPolicy, Policy

MAX_TOKENS = 50_000
"""Paths are drawn and searched, not reported: means over at most so many tokens will do."""
NUM_THRESHOLDS = 27
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Path:
    """A policy along rising thresholds, (G,) each; one point if it has none.

    Attributes
    ----------
    policy : Policy
    thresholds, skip_rate, rejection_risk, uplink_bits_per_token, tv_bias : float array (G,)
    num_exchanges : float
        Round trips of a sent token.
    reply_bits : int
        That come down for it.
    """

    policy: Policy
    thresholds: np.ndarray
    skip_rate: np.ndarray
    rejection_risk: np.ndarray
    uplink_bits_per_token: np.ndarray
    tv_bias: np.ndarray
    num_exchanges: float
    reply_bits: int

    def record(self) -> PolicyPath:
        """What figures draw of it."""
        names = ("thresholds", "skip_rate", "uplink_bits_per_token", "tv_bias")
        columns = {name: tuple(getattr(self, name).tolist()) for name in names}
        return PolicyPath(policy=self.policy.name, **columns)

    def curve(self) -> PolicyCurve:
        """What the search looks at; bias that the risk does not explain is truncation's."""
        sent = 1.0 - self.skip_rate
        return PolicyCurve(
            self.policy.name,
            type(self.policy.rule).__name__,
            self.thresholds,
            self.skip_rate,
            self.rejection_risk,
            np.where(sent > 0, self.uplink_bits_per_token / np.where(sent > 0, sent, 1.0), 0.0),
            np.clip(self.tv_bias - self.rejection_risk, 0.0, 1.0),
            num_entries=self.policy.fixed_size,
            server_only=self.policy.role == "server",
            gated=self.policy.gated,
            num_exchanges=self.num_exchanges,
            reply_bits=self.reply_bits,
        )


def thin_prompts(trace: Trace, most: int = MAX_TOKENS) -> Trace:
    """Every m-th prompt, whole, so that about at most so many tokens are left."""
    step = -(-trace.num_tokens // most)
    return trace if step <= 1 else trace.of_prompts(trace.prompt_ids[::step])


def in_double(trace: Trace) -> Trace:
    """The same with floats that every step would turn into double precision turned once."""
    columns = {
        name: values.astype(np.float64) if values.dtype == np.float32 else values
        for name, values in trace.columns.items()
    }
    return Trace(columns, trace.prompt_ids, trace.axes, trace.categories)


def path_thresholds(study: Study, policy: GatedPolicy) -> np.ndarray:
    """Rising thresholds that skip ever more: quantiles of the score, and the derived ones."""
    atoms, derived = study.gate(policy)
    own = [one.threshold.value for one in derived if one.threshold.feasible]
    both = np.append(atoms.quantiles(NUM_THRESHOLDS), own)
    return np.unique(np.clip(both, policy.score.low, policy.score.high))


def policy_path(trace: Trace, economics: Economics, policy: Policy, thresholds: np.ndarray) -> Path:
    """A policy along these thresholds of its gate, or as it is; at the server's contexts."""
    moved: list[Policy] = [policy]
    if isinstance(policy, GatedPolicy):
        moved = [policy.with_threshold(threshold) for threshold in thresholds]
    found = [path_means(predicted_tokens(trace, one), economics) for one in moved]
    rows = [[estimate.value for estimate in means.values()] for means in found]
    once = trace.num_prompts / trace.num_tokens  # an answer
    num_exchanges = once if policy.role == "server" else 1.0
    reply = reply_bits(economics.vocab_size, economics.accounting)
    skip_rate, risk, bits, bias = np.array(rows).T
    return Path(policy, thresholds, skip_rate, risk, bits, bias, num_exchanges, reply)


def policy_paths(study: Study) -> tuple[list[Path], list[Path]]:
    """Paths of the first setting of every policy, and those with another fixed size."""
    trace = in_double(thin_prompts(study.trace))
    first, resized = [], []
    for offers in study.offers.values():
        for offer in offers[:1]:
            policy, thresholds = offer.policy, np.zeros(1)
            if isinstance(policy, GatedPolicy):
                thresholds = path_thresholds(study, policy)
            first.append(policy_path(trace, study.economics, policy, thresholds))
            resized += [
                policy_path(trace, study.economics, other, thresholds)
                for other in _other_sizes(policy, trace)
            ]
    return first, resized


def _other_sizes(policy: Policy, trace: Trace) -> Iterator[Policy]:
    """The policy with every third recorded k, if it has a k of its own."""
    own = policy.fixed_size
    if own is not None:
        for size in trace.axes.truncation_sizes[::3]:
            if size not in (own, trace.axes.vocab_size):
                yield policy.with_size(size)


def optima(study: Study, paths: list[Path]) -> list[Optimum]:
    """The best choice among the requested policies for every budget and objective; (30)."""
    curves = [path.curve() for path in paths]
    link, profile = study.economics.link, study.economics.profile
    return [
        _optimum(best_choice(curves, link, profile, budget, objective), budget, objective)
        for budget in study.request.risks
        for objective in OBJECTIVES
    ]


def _optimum(choice: Choice, budget: float, objective: Objective) -> Optimum:
    names = ("skip_rate", "risk", "total_bias", "uplink_bits_per_token", "token_time_ms",
             "throughput_tok_s", "mean_throughput_tok_s", "energy_j_per_token")  # fmt: skip
    found = choice.feasible
    return Optimum(
        budget=budget,
        objective=objective,
        feasible=found,
        reason=choice.reason,
        policy=choice.policy if found else None,
        num_entries=choice.num_entries if found else None,
        uncertainty_threshold=choice.uncertainty_threshold if found else None,
        predicted={name: getattr(choice, name) for name in names} if found else {},
    )
