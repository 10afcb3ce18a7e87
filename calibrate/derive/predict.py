"""Token by token, what a policy does: expected over its drafts, as drawn, or measured in a rerun.

All three go through the same :func:`metrics`, and the first two are the policy itself run on the
recorded steps of a trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from calibrate.derive.presets import link_from_dict, profile_from_dict
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import AMOUNT, SHARE
from calibrate.run.records import DerivationRecord, LearnedModel, OperatingPoint
from calibrate.run.traces import Trace
from calibrate.work.job import PolicySource
from hlmtheory.answers import answer_divergence, log_weights, tokens_in_agreement
from hlmtheory.clusters import RatioEstimate, answer_rows, estimate_of, mean_over_tokens
from hlmtheory.context_shift import along_answers
from hlmtheory.cost import (
    DeviceProfile,
    payload_bits,
    reply_bits,
    token_energy_j,
    token_time_ms,
)
from hlmtheory.link import Link
from hlmtheory.policies import GatedPolicy, Outcome, Policy
from hlmtheory.risk import SkipAtoms
from hlmtheory.scores import score_named
from hlmtheory.serving import used_profile
from hlmtheory.steps import Step

UNITS = {
    "skip_rate": "",
    "rejection_risk": "",
    "uplink_bits_per_token": "bit/token",
    "downlink_bits_per_token": "bit/token",
    "token_time_ms": "ms",
    "throughput_tok_s": "token/s",
    "mean_throughput_tok_s": "token/s",
    "energy_j_per_token": "J/token",
    "devices_per_server": "device",
    "tv_bias": "",
    "answer_divergence": "",
    "tokens_in_agreement": "token",
}
METRICS = tuple(UNITS)
RANGES: dict[str, tuple[float, float]] = {
    metric: AMOUNT if unit else SHARE for metric, unit in UNITS.items()
}
"""Where each metric lies, and its interval with it: what has no unit is a share."""
IMPLIED = ("time", "tok_s", "energy", "devices", "downlink")
SOURCES: dict[str, Literal["counted", "implied"]] = {
    metric: "implied" if any(word in metric for word in IMPLIED) else "counted"
    for metric in METRICS
}
"""Counted token by token in a rerun, or implied by what was counted and by given times."""

OF_SERVER_ANSWERS = ("answer_divergence", "tokens_in_agreement")
"""Metrics that are means over the server's own answers, whatever road a policy takes."""

CHUNK = 8192
"""Steps looked at together: the head of these fits the cache."""


@dataclass(frozen=True)
class PolicyTokens:
    """What one policy does at each token of a set of prompts.

    Attributes
    ----------
    policy : Policy
    skip : float array (N,)
        Probability that the draft is emitted without the server; 0 or 1 where it was drawn.
    risk : float array (N,)
        Rejection risk taken there.
    bias : float array (N,)
        TV between the policy's output law and the server's; NaN where unknown.
    entries : float array (N,)
        Probabilities sent, 0 where nothing is.
    rho : float array (N,)
        Rejection risk expected there, over the draft.
    log_ratio : float array (2, N)
        Least and greatest log of the ratio that weighs the answer: of the policy's law over the
        server's at the output, and the other way round where the outputs are the policy's own.
    prompt_index : int array (N,)
    num_prompts : int
    num_prompt_tokens : float array (P,)
        Of each prompt, which the server must read before it can say anything.
    """

    policy: Policy
    skip: np.ndarray
    risk: np.ndarray
    bias: np.ndarray
    entries: np.ndarray
    rho: np.ndarray
    log_ratio: np.ndarray
    prompt_index: np.ndarray
    num_prompts: int
    num_prompt_tokens: np.ndarray

    def mean(self, means: Means) -> dict[str, RatioEstimate]:
        """Means over these tokens."""
        return means(self)

    def of_prompts(self, place: np.ndarray) -> PolicyTokens:
        """The tokens of some prompts, (N,) in rising order, numbered anew."""
        kept = np.isin(self.prompt_index, place)
        columns = {
            name: getattr(self, name)[kept] for name in ("skip", "risk", "bias", "entries", "rho")
        }
        index = np.searchsorted(place, self.prompt_index[kept])
        ratio = self.log_ratio[:, kept]
        return replace(
            self, **columns, log_ratio=ratio, prompt_index=index, num_prompts=len(place),
            num_prompt_tokens=self.num_prompt_tokens[place],
        )  # fmt: skip


Means: TypeAlias = Callable[[PolicyTokens], dict[str, RatioEstimate]]
"""Means over tokens, of whatever tokens it is given."""


class Averaged(Protocol):
    """Something that means are taken over: a rerun's tokens, or a prediction."""

    def mean(self, means: Means) -> dict[str, RatioEstimate]:
        """The means with their errors."""
        ...


@dataclass(frozen=True)
class Economics:
    """Link, device and accounting under which bits and forwards become time and energy."""

    link: Link
    profile: DeviceProfile
    vocab_size: int
    accounting: str = "full"
    prompts_sent: bool = True
    """Whether an answer's first contact with the server brings the prompt too."""


def economics_of(derivation: DerivationRecord) -> Economics:
    """What a derivation priced its predictions with."""
    return Economics(
        link_from_dict(derivation.link),
        profile_from_dict(derivation.profile),
        derivation.pair.vocab_size,
        derivation.accounting,
    )


def source_sha256(source: str) -> str | None:
    """Hash of the file of FILE.py:NAME; None where there is none."""
    path = Path(source.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def feasible_point(derivation: DerivationRecord, key: str) -> OperatingPoint:
    """An operating point by its key, POLICY/RULE.

    Raises
    ------
    UsageError
        If there is none, or it is infeasible.
    """
    found = {point.key: point for point in derivation.operating_points}
    if key not in found:
        able = ", ".join(name for name, one in found.items() if one.feasible)
        raise UsageError(f"--point {key}: not derived; feasible are {able}")
    if not found[key].feasible:
        raise UsageError(f"--point {key}: is infeasible: {found[key].reason}")
    return found[key]


def point_policy(
    derivation: DerivationRecord, point: OperatingPoint, learned: LearnedModel | None
) -> Policy:
    """The policy that the engine runs at an operating point; see :func:`point_source`."""
    return point_source(derivation, point, learned).build()


def point_source(
    derivation: DerivationRecord, point: OperatingPoint, learned: LearnedModel | None
) -> PolicySource:
    """How the policy of an operating point is built, in whichever process runs it.

    Raises
    ------
    ValueError
        If the file of somebody's own policy is not what was derived.
    """
    info = next((one for one in derivation.policies if one.name == point.policy), None)
    source = None if info is None else info.source
    if source and info and source_sha256(source) != info.source_sha256:
        raise ValueError(f"policy {source}: its file is not what was derived; derive again")
    model = None if learned is None else learned.model_dump()
    score = None if point.score is None else score_named(point.score, model)
    return PolicySource(
        source or point.policy, point.settings, point.uncertainty_threshold.value, score
    )


def remembered(trace: Trace, policy: Policy) -> Mapping[str, np.ndarray]:
    """The trace's columns, and what the policy remembers along each answer, step by step."""
    memory, steps = policy.memory(), trace["step"]
    live = np.flatnonzero(steps == 0)  # row of each prompt's current token
    out: dict[str, np.ndarray] = {}

    def keep(found: Mapping[str, np.ndarray]) -> None:
        for name, values in found.items():
            kind = np.asarray(values)
            out.setdefault(name, np.zeros((trace.num_tokens, *kind.shape[1:]), dtype=kind.dtype))
            out[name][live] = values

    while len(live):
        keep(memory.update(trace.step(live)))
        if not out:
            break  # it remembers nothing
        step = Step(trace.axes, trace.columns | out, live)
        memory.advance(step)
        keep(memory.observe(step))
        following = live + 1
        inside = following < trace.num_tokens
        continues = inside & (steps[np.where(inside, following, 0)] > 0)
        memory.keep(np.flatnonzero(continues))
        live = following[continues]
    return trace.columns | out


def policy_steps(trace: Trace, policy: Policy) -> Iterator[Step]:
    """The trace as the policy reads it, CHUNK steps at a time."""
    columns = remembered(trace, policy)
    for begin in range(0, trace.num_tokens, CHUNK):
        yield Step(trace.axes, columns, slice(begin, begin + CHUNK))


def _tokens(trace: Trace, policy: Policy, look: Callable[[Step], Outcome]) -> PolicyTokens:
    found, ratios = [], []
    for step in policy_steps(trace, policy):
        found.append(look(step))
        ratios.append(policy.log_ratio(step))
    skip, risk, bias, entries, rho = (
        np.concatenate([np.asarray(getattr(one, name), dtype=np.float64) for one in found])
        for name in ("skip", "risk", "bias", "entries", "rho")
    )
    prompts = (trace.prompt_index, trace.num_prompts, prompt_lengths(trace))
    log_ratio: np.ndarray = np.concatenate(ratios, axis=1)
    return PolicyTokens(policy, skip, risk, bias, entries, rho, log_ratio, *prompts)


def prompt_lengths(trace: Trace) -> np.ndarray:
    """Tokens of each prompt, (P,): what its first draft attended to; 0 if that is not recorded."""
    if "num_attended" not in trace:
        return np.zeros(trace.num_prompts)
    return np.asarray(trace["num_attended"][trace["step"] == 0], dtype=np.float64)


def predicted_tokens(trace: Trace, policy: Policy) -> PolicyTokens:
    """What the policy is expected to do at the contexts of a calibration trace.

    Averaged over the draft wherever the recorded head decides. Its own outputs lead a policy to
    other contexts: calibrate/derive/roads.py takes that in.
    """
    return _tokens(trace, policy, policy.outcome)


def drawn_tokens(trace: Trace, policy: Policy) -> PolicyTokens:
    """What the policy would have done with the drafts that were drawn: a rerun's own spread."""
    return _tokens(trace, policy, policy.drawn)


def measured_tokens(trace: Trace, policy: Policy, num_prompt_tokens: np.ndarray) -> PolicyTokens:
    """What a rerun under the policy did, on prompts of so many tokens (P,), which no rerun says."""
    skipped = trace["skipped"].astype(np.float64)
    ratio = trace["policy_log_ratio"]
    return PolicyTokens(
        policy,
        skipped,
        skipped * trace["rejection_prob"],
        trace["policy_bias"],
        trace["policy_entries"],
        trace["policy_risk"],
        np.stack([-ratio, -ratio]),
        trace.prompt_index,
        trace.num_prompts,
        num_prompt_tokens,
    )


def policy_atoms(trace: Trace, policy: GatedPolicy) -> SkipAtoms:
    """Pieces of every draft's probability with the score that the policy's gate sees."""
    parts: list[tuple[np.ndarray, ...]] = []
    for number, step in enumerate(policy_steps(trace, policy)):
        score, mass, rejection = policy.atoms(step)
        index = trace.prompt_index[number * CHUNK : number * CHUNK + len(mass), None]
        used = mass > 0
        columns = (score, mass, rejection, np.broadcast_to(index, mass.shape))
        parts.append(tuple(column[used] for column in columns))
    score, mass, rejection, index = (np.concatenate(column) for column in zip(*parts, strict=True))
    num_tokens = np.bincount(trace.prompt_index, minlength=trace.num_prompts).astype(float)
    return SkipAtoms(score, mass, rejection, index, num_tokens)


def unsent_before(
    skip: np.ndarray, prompt_index: np.ndarray, num_prompt_tokens: np.ndarray
) -> np.ndarray:
    r"""Expected number of tokens that the server has not seen yet, (N,).

    .. math:: n_t = p_{t-1} (1 + n_{t-1}), \qquad n_0 = L

    along each answer, with p the probability of a skip and L (P,) the prompt's tokens; a count
    where p is 0 or 1. Valid for p in between if drafts are drawn independently along the recorded
    contexts.
    """
    out = np.zeros(len(skip))
    first = answer_rows(prompt_index)[0]
    out[first] = num_prompt_tokens[prompt_index[first]]
    for rows in along_answers(prompt_index):
        out[rows] = skip[rows - 1] * (1.0 + out[rows - 1])
    return out


def _if_sent(amount: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """An expected amount, given that the token is sent, which it is with probability `sent`."""
    return np.asarray(np.divide(amount, sent, out=np.zeros_like(sent), where=sent != 0))


def uplink_bits(tokens: PolicyTokens, economics: Economics) -> np.ndarray:
    """Expected uplink bits of each token, (N,); docs/theory.md, (18)."""
    if tokens.policy.role == "device":
        return np.zeros_like(tokens.skip)
    sent = 1.0 - tokens.skip
    if_sent = _if_sent(tokens.entries, sent)
    lengths = tokens.num_prompt_tokens * economics.prompts_sent
    bits = payload_bits(
        if_sent,
        economics.vocab_size,
        accounting=economics.accounting,
        draft_sent=tokens.policy.draft_sent,
        num_unsent=unsent_before(tokens.skip, tokens.prompt_index, lengths),
    )
    return np.asarray(sent * bits)


def downlink_bits(tokens: PolicyTokens, economics: Economics) -> np.ndarray:
    """Expected downlink bits of each token, (N,): a reply to each that is sent, or streamed."""
    reply = reply_bits(economics.vocab_size, economics.accounting)
    return _asked(tokens) * reply


def metrics(averaged: Averaged, economics: Economics) -> dict[str, RatioEstimate]:
    """Every metric of METRICS as a mean over tokens with its prompt-clustered standard error.

    docs/theory.md, (11), (18), (27), (28), (29). Throughput is 1/E[token time], mean throughput
    E[1/token time], expected over skipping and sending; they answer different questions.
    """
    found = averaged.mean(lambda tokens: _plain_means(tokens, economics))
    found["throughput_tok_s"] = rate_of(found["token_time_ms"])
    found["devices_per_server"] = quotient(found["token_time_ms"], found.pop("server_ms"))
    return {name: found[name] for name in METRICS}


def _plain_means(tokens: PolicyTokens, economics: Economics) -> dict[str, RatioEstimate]:
    bits = uplink_bits(tokens, economics)
    return {
        "skip_rate": _mean(tokens, tokens.skip),
        "rejection_risk": _mean(tokens, tokens.risk),
        "uplink_bits_per_token": _mean(tokens, bits),
        "downlink_bits_per_token": _mean(tokens, downlink_bits(tokens, economics)),
        "server_ms": _mean(tokens, _server_ms(tokens, economics)),
        **token_times(tokens, economics, bits),
        "energy_j_per_token": _mean(
            tokens, _expected(tokens, *_priced(token_energy_j, tokens, economics, bits))
        ),
        "tv_bias": mean_bias(tokens),
        "answer_divergence": answer_divergence_estimate(tokens),
        "tokens_in_agreement": _over_prompts(
            tokens_in_agreement(_exact(tokens), tokens.prompt_index, tokens.num_prompts)
        ),
    }


def path_means(tokens: PolicyTokens, economics: Economics) -> dict[str, RatioEstimate]:
    """The means that a policy's path along its thresholds is made of."""
    return {
        "skip_rate": _mean(tokens, tokens.skip),
        "rejection_risk": _mean(tokens, tokens.risk),
        "uplink_bits_per_token": _mean(tokens, uplink_bits(tokens, economics)),
        "tv_bias": mean_bias(tokens),
    }


def token_times(
    tokens: PolicyTokens, economics: Economics, bits: np.ndarray
) -> dict[str, RatioEstimate]:
    """Mean time of a token, and mean throughput, of tokens whose uplink bits are known."""
    skipped_ms, sent_ms = _priced(token_time_ms, tokens, economics, bits)
    return {
        "token_time_ms": _mean(tokens, _expected(tokens, skipped_ms, sent_ms)),
        "mean_throughput_tok_s": _mean(tokens, _expected(tokens, 1e3 / skipped_ms, 1e3 / sent_ms)),
    }


def rate_of(time_ms: RatioEstimate) -> RatioEstimate:
    """Throughput, 1/E[token time], in tokens a second."""
    scale = 1e3 / time_ms.value**2
    return RatioEstimate(
        1e3 / time_ms.value,
        scale * time_ms.standard_error,
        time_ms.num_prompts,
        -scale * time_ms.influence,
    )


def quotient(above: RatioEstimate, below: RatioEstimate) -> RatioEstimate:
    """One mean over another of the same prompts; none over 0."""
    if below.value <= 0:
        return RatioEstimate(float("nan"), float("nan"), above.num_prompts)
    value = above.value / below.value
    influence = value * (above.influence / above.value - below.influence / below.value)
    return estimate_of(value, influence)


def _server_ms(tokens: PolicyTokens, economics: Economics) -> np.ndarray:
    """Time of the server's model that each token takes; docs/theory.md, (63)."""
    return _asked(tokens) * economics.profile.t_llm_ms


def _asked(tokens: PolicyTokens) -> np.ndarray:
    """Probability that the server makes the token, or a part of it, (N,)."""
    if tokens.policy.role == "both":
        return np.asarray(1.0 - tokens.skip)
    return np.full(len(tokens.skip), 1.0 if tokens.policy.role == "server" else 0.0)


def _priced(
    price: Callable[..., Any], tokens: PolicyTokens, economics: Economics, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Time or energy of each token if it is skipped, and if it is sent, (N,) each."""
    link, sent, alone = economics.link, 1.0 - tokens.skip, tokens.policy.role == "server"
    if_sent = _if_sent(bits, sent)
    none, ones = np.zeros_like(sent), np.ones_like(sent)
    round_trip_ms = np.full_like(sent, link.round_trip_ms)
    if alone:  # it is asked once an answer
        round_trip_ms *= np.diff(tokens.prompt_index, prepend=-1) != 0
    reply = float(link.downlink_time_ms(reply_bits(economics.vocab_size, economics.accounting)))
    rest = (used_profile(economics.profile, tokens.policy.gated, alone), round_trip_ms, reply)
    if_sent_costs = price(ones, np.asarray(link.uplink_time_ms(if_sent)), *rest)
    return if_sent_costs if alone else price(none, none, *rest), if_sent_costs


def _expected(tokens: PolicyTokens, skipped: np.ndarray, sent: np.ndarray) -> np.ndarray:
    return np.asarray(tokens.skip * skipped + (1.0 - tokens.skip) * sent)


def _mean(tokens: PolicyTokens, values: np.ndarray) -> RatioEstimate:
    return mean_over_tokens(values, tokens.prompt_index, tokens.num_prompts)


EXACT = 1e-6
"""Least and greatest ratio this close are one number, apart from float32 rounding."""


def is_bounded(tokens: PolicyTokens) -> bool:
    """Whether the ratio that weighs answers is known within bounds only at some token."""
    low, high = tokens.log_ratio
    apart = np.zeros_like(low)  # and not where both are minus infinity, or unknown
    np.subtract(high, low, out=apart, where=high > low)
    return bool(np.any(apart > EXACT))


def _exact(tokens: PolicyTokens) -> np.ndarray:
    """The log ratio (N,), NaN throughout unless it is known exactly."""
    low, _ = tokens.log_ratio
    return np.full_like(low, np.nan) if is_bounded(tokens) else low


def answer_divergence_estimate(tokens: PolicyTokens, num_steps: int | None = None) -> RatioEstimate:
    r"""TV between policy's and server's answers, cut after `num_steps` tokens if given.

    .. math:: E[(1 - W)_+], \qquad W = \prod_t \frac{P(o_t)}{y(o_t)}

    docs/theory.md, (46); a mean over prompts. From the least ratio: an upper bound where that is
    all that is known (:func:`is_bounded`), no value where nothing is known of some token.
    """
    weights = log_weights(tokens.log_ratio[0], tokens.prompt_index, tokens.num_prompts, num_steps)
    return _over_prompts(answer_divergence(weights[:, -1]))


def _over_prompts(values: np.ndarray) -> RatioEstimate:
    """Mean of one value a prompt (P,); none if it is unknown of any prompt."""
    num = len(values)
    if np.isnan(values).any():
        return RatioEstimate(float("nan"), float("nan"), num)
    return mean_over_tokens(values, np.arange(num), num)


def mean_bias(tokens: PolicyTokens) -> RatioEstimate:
    r"""Mean bias over tokens, from those where it is known.

    .. math:: E[\rho] + E[\mathrm{bias} - \rho]

    with the first mean over all tokens and the second over those whose bias is known: rho, known
    everywhere, takes most of the sampling of the others out.

    Raises
    ------
    UserError
        If it is known at no token.
    """
    of = (tokens.prompt_index, tokens.num_prompts)
    if not np.isfinite(tokens.bias).any():
        raise UserError(
            f"policy {tokens.policy.name}: the trace does not hold what its bias follows from; "
            "calibrate again"
        )
    if np.isfinite(tokens.bias).all():
        return mean_over_tokens(tokens.bias, *of)
    first, rest = mean_over_tokens(tokens.rho, *of), mean_over_tokens(tokens.bias - tokens.rho, *of)
    return estimate_of(first.value + rest.value, first.influence + np.nan_to_num(rest.influence))
