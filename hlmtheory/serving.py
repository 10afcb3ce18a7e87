"""A server that several users share: when asking it for some tokens beats letting it write all.

docs/theory.md, (61) and (64). One user alone says little of this: a server writes a token sooner
than a device asks for one, but each of its milliseconds is one that another user waits for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

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

    Assumption: the server takes one token at a time, first come, first served, and where it writes,
    all n answers are being written at once. One that batches B tokens in the time of one counts B
    users as one.
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


RESTART = 1e-30
"""Probability that the chain of a shared server's queue begins anew after a pass.

It only has to be there: no difference is taken, so that the law is exact to rounding beside it.
"""


@dataclass(frozen=True)
class SharedServer:
    """What a server's queue settles to.

    Attributes
    ----------
    asks_per_s : float
        Of all users.
    busy_share : float
        Of the time, in which the server runs a pass.
    wait_ms : float
        From a user's ask to the end of the pass that answers it, mean.
    asks_per_pass : float
        Mean.
    """

    asks_per_s: float
    busy_share: float
    wait_ms: float
    asks_per_pass: float


def shared_server(num_users: int, think_ms: float, pass_ms: Sequence[float]) -> SharedServer:
    r"""The queue of a server that answers all who wait in one pass.

    Users ask, wait, and think: for all the time that their devices and the link take until the next
    ask. At the end of each pass m of them wait; min(m, B) are served together in s_b, and each of
    the n - m who think asks meanwhile with probability 1 - exp(-s_b/Z):

    .. math:: m' = m - b + \mathrm{Bin}(n - m,\; 1 - e^{-s_b/Z}), \qquad b = \min(m, B)

    where nobody waits, the first comes after Z/n in the mean and is served alone. It begins with
    all of them waiting. Its stationary law pi gives all means. The wait is n/X - Z by Little's law;
    where the server is hardly busy that is a small difference of large numbers, so it is taken as
    users present, over time, by users answered. In a pass these are the a = max(m, 1) who are there
    at its begin, and of each other what is left of it when they come:

    .. math:: w = \sum_m \pi_m \big(a s_b + (n - a)(s_b - Z(1 - e^{-s_b/Z}))\big)
              \Big/ \sum_m \pi_m b, \qquad b = \min(a, B)

    docs/theory.md, (64).

    Parameters
    ----------
    num_users : int
        n >= 1, each with one ask at a time.
    think_ms : float
        Z > 0, mean time from an answer to the user's next ask.
    pass_ms : sequence of float, B of them
        s_1 to s_B > 0, time of a pass over that many asks; B is the most that run together.

    Raises
    ------
    ValueError

    Assumption: thinking takes exponential times, independently; first come, first served. Skips in
    runs, and a link that others fill, are not in it.
    """
    if num_users < 1:
        raise ValueError(f"num_users = {num_users}: allowed is >= 1")
    check_positive(think_ms, "think_ms")
    if not len(pass_ms):
        raise ValueError("pass_ms: give the time of at least one ask")
    times = np.asarray(pass_ms, dtype=float)
    check_positive(times, "pass_ms")
    waiting = np.arange(num_users + 1)
    served = np.clip(waiting, 1, len(times))  # who waits for nobody is served alone
    at_begin = np.maximum(waiting, 1)
    pass_time = times[served - 1]
    comes = -np.expm1(-pass_time / think_ms)
    arrivals = waiting[None, :] - (at_begin - served)[:, None]
    chain = stats.binom.pmf(arrivals, (num_users - at_begin)[:, None], comes[:, None])
    # Where nearly nobody thinks the chain falls apart into cycles. The one is meant that is reached
    # when all users begin by asking: the law of a chain that hardly ever begins anew.
    chain[:, -1] += RESTART
    stationary = _stationary_law(chain, len(times))
    idle = stationary[0] * think_ms / num_users
    busy = float(stationary @ pass_time)
    per_pass = float(stationary @ served)
    per_ms = per_pass / (busy + idle)
    rest = np.maximum(pass_time - think_ms * comes, 0.0)  # of a pass, for one who thought at first
    present = float(stationary @ (at_begin * pass_time + (num_users - at_begin) * rest))
    return SharedServer(1e3 * per_ms, busy / (busy + idle), present / per_pass, per_pass)


def _stationary_law(chain: np.ndarray, most_down: int) -> np.ndarray:
    """Stationary law (N,) of a chain (N, N) that falls by at most so many states; overwritten.

    The last state is reached from every other. Elimination after Grassmann, Taksar and Heyman
    1985: sums and products of positive numbers alone, so every entry is right to rounding.
    """
    num = len(chain) - 1
    above = [slice(state + 1, min(state + most_down, num) + 1) for state in range(num)]
    for state, rows in enumerate(above):
        onward = chain[state, state + 1 :]
        chain[rows, state] /= onward.sum()
        chain[rows, state + 1 :] += np.outer(chain[rows, state], onward)
    visits = np.append(np.zeros(num), 1.0)
    for state, rows in reversed(list(enumerate(above))):
        visits[state] = visits[rows] @ chain[rows, state]
    return np.asarray(visits / visits.sum())
