"""Token by token, what a policy does: predicted from a calibration trace, or measured in a rerun.

Both ends of every comparison go through the same :func:`metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from calibrate.decode.recording import BIAS_SIZE_GRID, SIZE_GRID, THRESHOLD_GRID, replay_importance
from calibrate.run.traces import Trace
from hlmtheory.clusters import RatioEstimate, mean_over_tokens
from hlmtheory.cost import (
    DeviceProfile,
    num_unsent_before,
    payload_bits,
    token_energy_j,
    token_time_ms,
)
from hlmtheory.gates import AlwaysSkip, NeverSkip, UncertaintyGate, UncertaintyImportanceGate
from hlmtheory.link import Link
from hlmtheory.policies import FixedSize, ImportanceSettings, OnlineSize, Policy
from hlmtheory.relation import linear_rejection
from hlmtheory.truncation import online_bound_denominator

METRICS = (
    "skip_rate",
    "rejection_risk",
    "uplink_bits_per_token",
    "token_time_ms",
    "throughput_tok_s",
    "mean_throughput_tok_s",
    "energy_j_per_token",
    "tv_bias",
)
UNITS = {
    "skip_rate": "",
    "rejection_risk": "",
    "uplink_bits_per_token": "bit/token",
    "token_time_ms": "ms",
    "throughput_tok_s": "token/s",
    "mean_throughput_tok_s": "token/s",
    "energy_j_per_token": "J/token",
    "tv_bias": "",
}


@dataclass(frozen=True)
class PolicyTokens:
    """What one policy does at each token of a set of prompts.

    Attributes
    ----------
    policy : Policy
    skipped : float array (N,)
        1 where the draft is emitted without the server.
    rejection_prob : float array (N,)
        beta of the draft.
    bias : float array (N,)
        TV between the policy's output law and the server's at this context; NaN where unknown.
    num_entries : float array (N,)
        Probabilities sent if the draft is sent.
    prompt_index : int array (N,)
    num_prompts : int
    """

    policy: Policy
    skipped: np.ndarray
    rejection_prob: np.ndarray
    bias: np.ndarray
    num_entries: np.ndarray
    prompt_index: np.ndarray
    num_prompts: int


@dataclass(frozen=True)
class Economics:
    """Link, device and accounting under which bits and forwards become time and energy."""

    link: Link
    profile: DeviceProfile
    vocab_size: int
    accounting: str = "paper"


def payload_of_sent(tokens: PolicyTokens, economics: Economics) -> np.ndarray:
    """Uplink bits of each token if it is sent, (N,); docs/theory.md, (18)."""
    if tokens.policy.name in ("slm", "llm"):
        return np.zeros_like(tokens.skipped)
    starts = np.diff(tokens.prompt_index, prepend=-1) != 0
    return np.asarray(
        payload_bits(
            tokens.num_entries,
            economics.vocab_size,
            accounting=economics.accounting,
            draft_sent=tokens.policy.rule.name not in ("residual", "ask"),
            num_unsent=num_unsent_before(1.0 - tokens.skipped, starts),
        )
    )


def metrics(tokens: PolicyTokens, economics: Economics) -> dict[str, RatioEstimate]:
    """Every metric of METRICS as a mean over tokens with its prompt-clustered standard error.

    docs/theory.md, (11), (18), (27), (28), (29). Throughput is 1/E[token time], mean throughput
    E[1/token time]: they answer different questions, so both are given.
    """
    sent = 1.0 - tokens.skipped
    bits = sent * payload_of_sent(tokens, economics)
    server_only = tokens.policy.name == "llm"
    link, profile = economics.link, economics.profile
    if isinstance(tokens.policy.gate, AlwaysSkip | NeverSkip):
        # Nobody looks at the uncertainty, so nobody computes it.
        profile = replace(profile, t_uncertainty_ms=0.0)
    uplink_ms = link.uplink_time_ms(bits)
    time_ms = token_time_ms(sent, uplink_ms, profile, link.round_trip_ms, server_only)
    energy = token_energy_j(sent, uplink_ms, profile, link.round_trip_ms, server_only)

    def mean(values: np.ndarray) -> RatioEstimate:
        return mean_over_tokens(values, tokens.prompt_index, tokens.num_prompts)

    time = mean(time_ms)
    return {
        "skip_rate": mean(tokens.skipped),
        "rejection_risk": mean(tokens.skipped * tokens.rejection_prob),
        "uplink_bits_per_token": mean(bits),
        "token_time_ms": time,
        "throughput_tok_s": RatioEstimate(
            1e3 / time.value,
            1e3 * time.standard_error / time.value**2,
            time.num_prompts,
            -1e3 * time.influence / time.value**2,
        ),
        "mean_throughput_tok_s": mean(1e3 / time_ms),
        "energy_j_per_token": mean(energy),
        "tv_bias": mean(tokens.bias),
    }


def measured_tokens(trace: Trace, policy: Policy) -> PolicyTokens:
    """What a rerun under the policy did."""
    return PolicyTokens(
        policy,
        trace["skipped"].astype(np.float64),
        trace["rejection_prob"],
        trace["policy_bias"],
        trace["policy_entries"].astype(np.float64),
        trace.prompt_index,
        trace.num_prompts,
    )


def predicted_tokens(trace: Trace, policy: Policy, vocab_size: int) -> PolicyTokens:
    """What the policy would do at the contexts of a calibration trace.

    Valid when the contexts that the policy's own outputs lead to resemble those of the calibration
    policy; how far they do not is what a rerun measures.
    """
    num = trace.num_tokens
    zeros, ones = np.zeros(num), np.ones(num)
    beta = trace["rejection_prob"]

    def tokens(skipped: np.ndarray, bias: np.ndarray, entries: np.ndarray) -> PolicyTokens:
        return PolicyTokens(
            policy, skipped, beta, bias, entries, trace.prompt_index, trace.num_prompts
        )

    if policy.name == "slm":
        return tokens(ones, trace["tv_distance"], zeros)
    if policy.name == "llm":
        return tokens(zeros, zeros, zeros)
    if policy.name == "hlm":
        return tokens(zeros, zeros, zeros + vocab_size)
    gate = policy.gate
    if isinstance(gate, UncertaintyImportanceGate):
        important = predicted_importance(trace, policy.importance)
        skipped = (trace["uncertainty"] <= gate.threshold) | ~important
        distance = trace["tv_distance"]
        examined = at_threshold(trace, "skip_set_bias", gate.threshold, distance)
        rho = np.where(important, examined, distance)
        return tokens(skipped.astype(float), rho, zeros + vocab_size)
    if not isinstance(gate, UncertaintyGate):
        raise ValueError(f"policy {policy.name}: no prediction for gate {type(gate).__name__}")
    column = "uncertainty" if gate.statistic == "exact" else "uncertainty_sampled"
    skipped = (trace[column] <= gate.threshold).astype(float)
    if gate.statistic == "sampled":
        return tokens(skipped, skipped * beta, zeros + vocab_size)
    distance = trace["tv_distance"]
    rho = at_threshold(trace, "skip_set_bias", gate.threshold, distance)
    if policy.name == "r-hlm":
        return tokens(skipped, rho, sent_skip_set_size(trace, gate.threshold, vocab_size))
    if policy.name == "ask-llm":
        bias = at_threshold(trace, "skip_set_ask_bias", gate.threshold, distance)
        return tokens(skipped, bias, zeros)
    if isinstance(policy.size, FixedSize):
        sizes = np.minimum(zeros + policy.size.num_entries, vocab_size)
    elif isinstance(policy.size, OnlineSize):
        sizes = predicted_online_sizes(trace, policy.size, vocab_size)
    else:
        return tokens(skipped, rho, zeros + vocab_size)
    verified = gate.threshold < 1 and not policy.rule.drafts_from_sent
    extra = truncation_bias_at(trace, sizes, vocab_size) if verified else zeros
    # At most the sum of the gate's bias and the truncation's, and nearly it: docs/theory.md, (23).
    # Where the size depends on the draft, both this and the rerun's figure are of the law at the
    # drafted token's size: an estimate of the policy's bias, not a bound.
    return tokens(skipped, np.minimum(rho + extra, 1.0), sizes)


def at_threshold(
    trace: Trace, column: str, threshold: float, at_one: np.ndarray | float
) -> np.ndarray:
    """A skip-set bias at any threshold, linear between the stored ones, (N,).

    `at_one` is its value at u_th = 1, where the skip set is the whole vocabulary. From the last
    stored threshold to there uncertainty says little: tokens with u near 1 are most of it. There
    the weight is the share of the rejection risk gained on the way, for bias and risk have one mean
    (docs/theory.md, (11)).
    """
    if threshold >= 1:
        return np.broadcast_to(np.asarray(at_one, dtype=float), (trace.num_tokens,))
    grid = np.array(THRESHOLD_GRID)
    if threshold > grid[-1]:
        u, beta = trace["uncertainty"], trace["rejection_prob"]
        gained, beyond = (float(np.sum(beta[(u > grid[-1]) & (u <= t)])) for t in (threshold, 1.0))
        weight = gained / beyond if beyond > 0 else 0.0
        return (1 - weight) * trace[column][:, -1] + weight * at_one
    upper = int(np.clip(np.searchsorted(grid, threshold), 1, len(grid) - 1))
    weight = np.clip((threshold - grid[upper - 1]) / (grid[upper] - grid[upper - 1]), 0.0, 1.0)
    values = trace[column].astype(np.float64)
    return (1 - weight) * values[:, upper - 1] + weight * values[:, upper]


def sent_skip_set_size(trace: Trace, threshold: float, vocab_size: int) -> np.ndarray:
    """|S| at the threshold of each token, for tokens that are sent, (N,).

    A sent draft is not in S, but it may be in the stored skip set at the next higher threshold,
    with which :func:`at_threshold` interpolates: its own share is taken out. Beyond the last stored
    threshold the mean growth is that of drafts weighted by 1/x_d, each of which stands for 1/x_d
    tokens; |S| <= 1/(1 - u_th) throughout.
    """
    u, last = trace["uncertainty"], THRESHOLD_GRID[-1]
    if threshold >= 1:
        return np.full(trace.num_tokens, float(vocab_size))
    most = min(float(vocab_size), np.floor(1 / (1 - threshold) + 1e-9))
    if threshold > last:
        drawn = (u > last) & (u <= threshold)
        growth = float(np.mean(drawn / np.clip(trace["draft_prob"], 1e-12, None)))
        return np.clip(trace["skip_set_size"][:, -1] + growth, 0.0, most)
    sizes = at_threshold(trace, "skip_set_size", threshold, vocab_size)
    grid = np.array(THRESHOLD_GRID)
    upper = int(np.clip(np.searchsorted(grid, threshold), 1, len(grid) - 1))
    weight = np.clip((threshold - grid[upper - 1]) / (grid[upper] - grid[upper - 1]), 0.0, 1.0)
    return np.clip(sizes - weight * ((u > threshold) & (u <= grid[upper])), 0.0, most)


def predicted_importance(trace: Trace, settings: ImportanceSettings | None) -> np.ndarray:
    """Which contexts the setting calls important, (N,) bool."""
    if settings is None:
        raise ValueError("importance is None: this policy needs its settings")
    return replay_importance(trace, settings)


def predicted_online_sizes(trace: Trace, size: OnlineSize, vocab_size: int) -> np.ndarray:
    """k* of each token from N(k) on the stored grid, log-linear in between, (N,)."""
    sizes = np.minimum(np.array(SIZE_GRID, dtype=float), vocab_size)
    predicted_beta = linear_rejection(trace["uncertainty"], size.slope, size.intercept)
    limit = size.theta * online_bound_denominator(trace["draft_prob"], predicted_beta, size.eta)
    deviation = trace["tail_deviation"]  # (N, len(sizes)), decreasing
    fits = deviation <= limit[:, None]
    first = np.where(fits.any(1), fits.argmax(1), len(sizes) - 1)
    previous = np.maximum(first - 1, 0)
    rows = np.arange(len(first))
    high, low = deviation[rows, previous], deviation[rows, first]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, (high - limit) / (high - low), 0.0)
    share = np.clip(np.where(first == 0, 1.0, share), 0.0, 1.0)
    logs = np.log(sizes)
    exact = np.exp(logs[previous] + share * (logs[first] - logs[previous]))
    return np.ceil(np.where(fits.any(1), exact, sizes[-1]) - 1e-9)


def truncation_bias_at(trace: Trace, sizes: np.ndarray, vocab_size: int) -> np.ndarray:
    """Exact bias of truncation at each token's k, linear in log k in between; NaN unknown."""
    grid = np.log(np.minimum(np.array(BIAS_SIZE_GRID, dtype=float), vocab_size))
    target = np.log(np.clip(sizes, 1, None))
    upper = np.clip(np.searchsorted(grid, target), 1, len(grid) - 1)
    span = grid[upper] - grid[upper - 1]
    weight = np.clip((target - grid[upper - 1]) / np.where(span > 0, span, 1.0), 0.0, 1.0)
    rows = np.arange(len(sizes))
    values = trace["truncation_bias"]
    return (1 - weight) * values[rows, upper - 1] + weight * values[rows, upper]
