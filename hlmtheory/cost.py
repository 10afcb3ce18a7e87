"""What a token costs: bits on the link, time, throughput, energy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from hlmtheory.domain import Array, check_nonnegative, check_positive, check_unit_interval

ACCOUNTINGS = ("paper", "full")


def index_bits(vocab_size: int) -> int:
    """Bits of a token index, ceil(log2 V)."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size = {vocab_size}: allowed is >= 2")
    return math.ceil(math.log2(vocab_size))


def payload_bits(
    num_entries: Array | float,
    vocab_size: int,
    prob_bits: int = 8,
    accounting: str = "full",
    *,
    draft_sent: bool = True,
    num_unsent: Array | float = 0,
) -> Array | float:
    r"""Bits that go up for one sent token.

    .. math:: B_{paper} = k\,(b_{prob} + b_{index}), \qquad b_{index} = \lceil \log_2 V \rceil

    .. math:: B_{full} = B_{paper} + (1_{draft} + m)\, b_{index}

    docs/theory.md, (18). The paper's accounting stops at the k entries. ``full`` adds whatever else
    the server must learn: the draft's index (unless the rule does not need it), and the indices of
    the m tokens that the device emitted alone since the server was last asked, which belong to its
    context. The server's reply goes down: :func:`reply_bits`.

    Parameters
    ----------
    num_entries : array (...) or float
        k >= 0 probabilities sent.
    vocab_size, prob_bits : int
        V >= 2, and the bits of one probability, 8 in the papers.
    accounting : {"paper", "full"}
    draft_sent : bool
        False for rules that resample without it (residual, asking). Only ``full`` counts this and
        what follows.
    num_unsent : array (...) or float
        m >= 0.

    V = 32,000, paper: k = V gives 736,000 bit = 92,000 B, k = 30 gives 690 bit = 86.25 B.

    Source: CU-HLM (arXiv 2505.11788), eq. 5, second-hand; ``full`` docs/theory.md, (18).
    """
    check_nonnegative(num_entries, "num_entries")
    check_nonnegative(num_unsent, "num_unsent")
    if prob_bits < 1:
        raise ValueError(f"prob_bits = {prob_bits}: allowed is >= 1")
    _check_accounting(accounting)
    index = index_bits(vocab_size)
    bits = num_entries * (prob_bits + index)
    if accounting == "paper":
        return bits
    return bits + (int(draft_sent) + num_unsent) * index


def reply_bits(vocab_size: int, accounting: str = "full") -> int:
    """Bits that come down for one sent token, or one streamed: an index; 0 in ``paper``.

    An accepted draft costs the same reply as a rejected one.
    """
    _check_accounting(accounting)
    return 0 if accounting == "paper" else index_bits(vocab_size)


def _check_accounting(accounting: str) -> None:
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting = {accounting!r}: allowed are {', '.join(ACCOUNTINGS)}")


@dataclass(frozen=True)
class DeviceProfile:
    """Times and powers of one token, each stated by whoever made the profile.

    Milliseconds a token of the device model, of the uncertainty, of the server model; watts of the
    device while it computes, of its transmitter, of the server, and of the device while it waits.
    `assumed` names the fields that were neither measured nor taken from a source: whoever prints a
    figure made from them says so.
    """

    t_slm_ms: float
    t_uncertainty_ms: float
    t_llm_ms: float
    p_slm_w: float
    p_tx_w: float
    p_llm_w: float
    p_idle_w: float = 0.0
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "assumed", tuple(self.assumed))
        known = tuple(f.name for f in fields(self) if f.name != "assumed")
        for name in known:
            check_nonnegative(float(getattr(self, name)), name)
        for name in self.assumed:
            if name not in known:
                raise ValueError(f"assumed holds {name!r}: allowed are {', '.join(known)}")


def token_time_ms(
    sent: Array,
    uplink_ms: Array,
    profile: DeviceProfile,
    round_trip_ms: Array | float = 0.0,
    downlink_ms: Array | float = 0.0,
) -> Array:
    r"""Time of each token (N,), ms.

    .. math:: t = t_{slm} + t_u + 1\{sent\}\,(B_{up}/C_{up} + B_{down}/C_{down} + t_{llm} + t_{rt})

    docs/theory.md, (27). The device alone takes t_slm + t_u. What the server decodes alone has
    t_slm = t_u = 0: hlmtheory.serving.used_profile.

    Parameters
    ----------
    sent, uplink_ms : array (N,)
        1 (or the probability) that the server is asked; B_up/C_up, 0 where nothing is sent.
    profile : DeviceProfile
    round_trip_ms, downlink_ms : array (N,) or float
        Of an exchange; B_down/C_down of a reply.

    Assumption: nothing overlaps; the device waits for the server's reply before it goes on.
    """
    costs = WireCosts(profile.t_slm_ms + profile.t_uncertainty_ms, profile.t_llm_ms)
    return wire_time_ms(sent, uplink_ms, downlink_ms, costs, round_trip_ms)


@dataclass(frozen=True)
class WireCosts:
    """What a token takes where nothing delays a message: measured on the machines that will run.

    Attributes
    ----------
    decide_ms : float
        The device's forward pass, its law, draft and gate; 0 where the server decodes alone.
    ask_ms : float
        What a sent token takes beside it: frames built and read, the server's forward pass over the
        draft's context and what it had not seen, its answer. Of a stream, from token to token.
    """

    decide_ms: float
    ask_ms: float

    def __post_init__(self) -> None:
        for name in ("decide_ms", "ask_ms"):
            check_nonnegative(float(getattr(self, name)), name)


def wire_time_ms(
    sent: Array,
    uplink_ms: Array,
    downlink_ms: Array | float,
    costs: WireCosts,
    round_trip_ms: Array | float = 0.0,
    server_only: bool = False,
) -> Array:
    r"""Time of each token over a wire (N,), ms; docs/theory.md, (63). (27) is its simplest case.

    .. math:: t = t_{decide} + 1\{sent\}\,(t_{ask} + F_{up}/C_{up} + F_{down}/C_{down} + t_{rt})

    with F the bits of whole frames. A stream of the server alone takes t_ask or the time that its
    frame takes on the downlink, whichever is longer: they overlap.

    Parameters
    ----------
    sent, uplink_ms : array (N,)
        1 (or the probability) that the server is asked; F_up/C_up, 0 where nothing is sent.
    downlink_ms : array (N,) or float
        F_down/C_down of one reply.
    costs : WireCosts
    round_trip_ms : float
    server_only : bool
    """
    check_nonnegative(uplink_ms, "uplink_ms")
    check_nonnegative(downlink_ms, "downlink_ms")
    if server_only:
        return 0 * uplink_ms + max(costs.ask_ms, float(downlink_ms))
    return costs.decide_ms + uplink_ms + sent * (costs.ask_ms + downlink_ms + round_trip_ms)


def token_energy_j(
    sent: Array,
    uplink_ms: Array,
    profile: DeviceProfile,
    round_trip_ms: Array | float = 0.0,
    downlink_ms: Array | float = 0.0,
) -> Array:
    r"""Energy of each token, device and server together; as in :func:`token_time_ms`.

    .. math:: E = P_{slm}(t_{slm} + t_u) + P_{tx} B_{up}/C_{up}
              + 1\{sent\}\,(P_{llm} t_{llm} + P_{idle}(t_{llm} + B_{down}/C_{down} + t_{rt}))

    docs/theory.md, (29). UI-HLM's constants are not public to us: the profile states its own.

    Assumption: powers are constant while their stage lasts, receiving costs what waiting does, and
    the server serves one stream; a server that batches shares its power, so p_llm_w is then its
    share.
    """
    check_nonnegative(uplink_ms, "uplink_ms")
    check_nonnegative(downlink_ms, "downlink_ms")
    waiting_ms = profile.t_llm_ms + downlink_ms + round_trip_ms
    return 1e-3 * (
        profile.p_slm_w * (profile.t_slm_ms + profile.t_uncertainty_ms)
        + profile.p_tx_w * uplink_ms
        + sent * (profile.p_llm_w * profile.t_llm_ms + profile.p_idle_w * waiting_ms)
    )


def _check_two_times(
    skip_rate: Array | float, skipped_ms: Array | float, sent_ms: Array | float
) -> None:
    check_unit_interval(skip_rate, "skip_rate")
    check_positive(skipped_ms, "skipped_ms")
    check_positive(sent_ms, "sent_ms")


def throughput_at_skip_rate_tok_s(
    skip_rate: Array | float, skipped_ms: Array | float, sent_ms: Array | float
) -> Array | float:
    r"""1 / E[token time] from a skip rate and two mean times, tokens per second.

    .. math:: \frac{1}{p\, t_{skip} + (1 - p)\, E[t \mid sent]}

    docs/theory.md, (28); p in [0, 1] and times > 0, each (...) or a float. What a user who reads a
    long answer sees: tokens over the time they took.
    """
    _check_two_times(skip_rate, skipped_ms, sent_ms)
    return 1e3 / (skip_rate * skipped_ms + (1.0 - skip_rate) * sent_ms)


def mean_throughput_at_skip_rate_tok_s(
    skip_rate: Array | float, skipped_ms: Array | float, sent_ms: Array | float
) -> Array | float:
    r"""E[1 / token time] from a skip rate and two times, tokens per second.

    .. math:: \frac{p}{t_{skip}} + (1 - p)\, E[1/t \mid sent]

    Never below :func:`throughput_at_skip_rate_tok_s`, by Jensen; under skipping the fast tokens
    dominate it, and it may exceed any speed-up ceiling. Arguments are the same, but `sent_ms` is
    the *harmonic* mean time of a sent token, 1/E[1/t | sent]. With the arithmetic mean in its place
    the result is a lower bound, exact where every sent token takes equally long.
    """
    _check_two_times(skip_rate, skipped_ms, sent_ms)
    return 1e3 * (skip_rate / skipped_ms + (1.0 - skip_rate) / sent_ms)


def speedup_ceiling(skip_rate: float, sent_cost_ratio: float = 1.0) -> float:
    r"""Largest speed-up in mean token time that skipping can give.

    .. math:: \frac{1}{(1 - p)\, r}

    with p the share of tokens skipped and r the cost of a sent token relative to the baseline's;
    reached only if a skipped token is free. 45.93 % skipped: 1.85. 74.8 % skipped and 2.6 % of the
    payload: 152.6. docs/theory.md, section 10.
    """
    if not 0 <= skip_rate < 1:
        raise ValueError(f"skip_rate = {skip_rate}: allowed is [0, 1)")
    if not 0 < sent_cost_ratio <= 1:
        raise ValueError(f"sent_cost_ratio = {sent_cost_ratio}: allowed is (0, 1]")
    return 1.0 / ((1.0 - skip_rate) * sent_cost_ratio)
