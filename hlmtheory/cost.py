"""What a token costs: bits on the uplink, time, throughput, energy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from array_api_compat import array_namespace

from hlmtheory.domain import Array, check_nonnegative

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
    accounting: str = "paper",
) -> Array | float:
    r"""Uplink bits of one sent token.

    .. math:: B = k\,(b_{prob} + b_{index}), \qquad b_{index} = \lceil \log_2 V \rceil

    docs/theory.md, (18). The paper's accounting stops there: indices of drafts, replies and
    resynchronisation are free. ``full`` adds everything else that crosses the link for a sent
    token: the draft's index (a token that is not sent must reach the server's context too, so this
    is charged for every verified draft) and the server's reply index.

    Parameters
    ----------
    num_entries : array or float
        k >= 0 probabilities sent.
    vocab_size : int
        V >= 2.
    prob_bits : int
        Bits of one probability; 8 in the papers.
    accounting : {"paper", "full"}

    Returns
    -------
    array or float
        Bits. V = 32,000: k = V gives 736,000 bit = 92,000 B, k = 30 gives 690 bit = 86.25 B.

    Source: CU-HLM (arXiv 2505.11788), eq. 5, second-hand; ``full`` docs/theory.md, (18).
    """
    check_nonnegative(num_entries, "num_entries")
    if prob_bits < 1:
        raise ValueError(f"prob_bits = {prob_bits}: allowed is >= 1")
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting = {accounting!r}: allowed are {', '.join(ACCOUNTINGS)}")
    index = index_bits(vocab_size)
    bits = num_entries * (prob_bits + index)
    return bits + 2 * index if accounting == "full" else bits


@dataclass(frozen=True)
class DeviceProfile:
    """Times and powers of one token, each stated by whoever made the profile.

    Attributes
    ----------
    t_slm_ms, t_uncertainty_ms, t_llm_ms : float
        Milliseconds a token of the device model, of the uncertainty, of the server model.
    p_slm_w, p_tx_w, p_llm_w, p_idle_w : float
        Watts of the device while it computes, of its transmitter, of the server, and of the device
        while it waits.
    """

    t_slm_ms: float
    t_uncertainty_ms: float
    t_llm_ms: float
    p_slm_w: float
    p_tx_w: float
    p_llm_w: float
    p_idle_w: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            check_nonnegative(float(getattr(self, name)), name)


def token_time_ms(
    sent: Array,
    uplink_ms: Array,
    profile: DeviceProfile,
    round_trip_ms: float = 0.0,
    server_only: bool = False,
) -> Array:
    r"""Time of each token.

    .. math:: t = t_{slm} + t_u + 1\{sent\}\,(B/C + t_{llm} + t_{rt})

    docs/theory.md, (27).

    Parameters
    ----------
    sent : array (N,)
        1 (or the probability) that the server is asked.
    uplink_ms : array (N,)
        B/C of each token, 0 where nothing is sent.
    profile : DeviceProfile
    round_trip_ms : float
    server_only : bool
        The server decodes alone and streams: t_llm and nothing else. Assumption: the stream hides
        its own delay.
    """
    check_nonnegative(uplink_ms, "uplink_ms")
    if server_only:
        return 0 * uplink_ms + profile.t_llm_ms
    return (
        profile.t_slm_ms
        + profile.t_uncertainty_ms
        + uplink_ms
        + sent * (profile.t_llm_ms + round_trip_ms)
    )


def token_energy_j(
    sent: Array,
    uplink_ms: Array,
    profile: DeviceProfile,
    round_trip_ms: float = 0.0,
    server_only: bool = False,
) -> Array:
    r"""Energy of each token, device and server together.

    .. math:: E = P_{slm}(t_{slm} + t_u) + P_{tx} B/C
              + 1\{sent\}\,(P_{llm} t_{llm} + P_{idle}(t_{llm} + t_{rt}))

    docs/theory.md, (29). UI-HLM's constants are not public to us: the profile states its own.

    Parameters are those of :func:`token_time_ms`.
    """
    check_nonnegative(uplink_ms, "uplink_ms")
    if server_only:
        watts = profile.p_llm_w + profile.p_idle_w
        return 0 * uplink_ms + 1e-3 * watts * profile.t_llm_ms
    waiting_ms = profile.t_llm_ms + round_trip_ms
    return 1e-3 * (
        profile.p_slm_w * (profile.t_slm_ms + profile.t_uncertainty_ms)
        + profile.p_tx_w * uplink_ms
        + sent * (profile.p_llm_w * profile.t_llm_ms + profile.p_idle_w * waiting_ms)
    )


def throughput_tok_s(time_ms: Array) -> float:
    """1 / E[token time], tokens per second: docs/theory.md, (28)."""
    xp = array_namespace(time_ms)
    return 1e3 / float(xp.mean(time_ms))


def mean_throughput_tok_s(time_ms: Array) -> float:
    """E[1 / token time], tokens per second: docs/theory.md, (28); never below the other one."""
    xp = array_namespace(time_ms)
    return 1e3 * float(xp.mean(1.0 / time_ms))


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
