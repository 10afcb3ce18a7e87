"""A server that several users share: when asking it for some tokens beats letting it write all.

docs/theory.md, (61). One user alone says little of this: a server writes a token sooner than a
device asks for one, but each of its milliseconds is one that another user waits for.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hlmtheory.cost import DeviceProfile
from hlmtheory.domain import check_positive, check_unit_interval


def used_profile(profile: DeviceProfile, gated: bool, server_only: bool) -> DeviceProfile:
    """What of a profile a policy takes: without a gate nobody works out the uncertainty.

    Where the server writes alone nobody runs the device model either: its token takes t_llm, and
    of the link its reply, and once an answer the prompt and a round trip; docs/theory.md, (27).
    """
    if server_only:
        return replace(profile, t_slm_ms=0.0, t_uncertainty_ms=0.0)
    return profile if gated else replace(profile, t_uncertainty_ms=0.0)


def server_ms_per_token(skip_rate: float, t_llm_ms: float) -> float:
    """Time of the server that a token takes, (1 - p) t_llm, ms; with p = 0 what it writes alone."""
    check_unit_interval(skip_rate, "skip_rate")
    check_positive(t_llm_ms, "t_llm_ms")
    return (1.0 - skip_rate) * t_llm_ms


def users_from_which_asking_is_faster(
    token_time_ms: float, skip_rate: float, t_llm_ms: float, alone_ms: float
) -> int | None:
    r"""Least number of users of one server from which on asking is surely faster than its writing.

    .. math:: t + (n - 1)(1 - p)\, t_{llm} < \max(t_{alone},\, n\, t_{llm})

    docs/theory.md, (61). On the left the longest that a token can take n users who ask: each of the
    others has at most one request in front of ours. On the right the shortest that a token takes
    users whom the server writes for, one token after another.

    Parameters
    ----------
    token_time_ms : float
        t, mean time of a token under the policy for one user, waiting for nobody.
    skip_rate : float
        p, share of tokens emitted without the server.
    t_llm_ms : float
        Time of the server for one token, > 0.
    alone_ms : float
        Mean time of a token that the server writes, for one user.

    Returns
    -------
    int or None
        1 if asking is faster however many they are; None if no number is enough, which is where
        nothing is skipped.

    Assumption: the server takes one token at a time, first come, first served. One that batches B
    tokens in the time of one counts B users as one.
    """
    check_positive(token_time_ms, "token_time_ms")
    check_positive(alone_ms, "alone_ms")
    asked_ms = server_ms_per_token(skip_rate, t_llm_ms)
    spared_ms = t_llm_ms - asked_ms
    if spared_ms <= 0:
        return None
    least = max(math.floor((token_time_ms - asked_ms) / spared_ms) + 1, 1)
    with_fewer = token_time_ms + (least - 2) * asked_ms  # the longest for least - 1 users
    return 1 if with_fewer < alone_ms else least
