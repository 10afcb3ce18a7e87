"""Users who share a server, simulated one request at a time."""

from __future__ import annotations

import heapq
import itertools

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hlmtheory.serving import (
    server_ms_per_token,
    shared_server,
    users_from_which_asking_is_faster,
)

T_LLM = 30.0


def asked_ms(own_ms: float, skip_rate: float, num_users: int, num_tokens: int, seed: int) -> float:
    """Mean time of a token where users ask one server, first come, first served.

    A token takes the device `own_ms`; unless it is skipped, the server then takes T_LLM for it.
    """
    rng = np.random.default_rng(seed)
    free, done = 0.0, np.zeros(num_users, dtype=int)
    queue = [(float(rng.uniform(0, own_ms)), user) for user in range(num_users)]
    heapq.heapify(queue)
    end = 0.0
    while queue:
        moment, user = heapq.heappop(queue)  # its draft is ready
        if rng.random() >= skip_rate:
            free = max(free, moment) + T_LLM
            moment = free
        done[user] += 1
        end = max(end, moment)
        if done[user] < num_tokens:
            heapq.heappush(queue, (moment + own_ms, user))
    return end / num_tokens


@pytest.mark.parametrize(("own_ms", "skip_rate"), [(60.0, 0.5), (45.0, 0.3), (35.0, 0.8)])
def test_from_that_number_on_asking_is_faster_than_writing(own_ms, skip_rate):
    token_ms = own_ms + server_ms_per_token(skip_rate, T_LLM)
    least = users_from_which_asking_is_faster(token_ms, skip_rate, T_LLM, T_LLM)
    assert least is not None
    assert least > 1
    for num in (least, 2 * least):
        assert asked_ms(own_ms, skip_rate, num, 2000, num) < num * T_LLM * 0.99
    # and one user alone is not
    assert asked_ms(own_ms, skip_rate, 1, 2000, 0) > T_LLM


@given(st.floats(0.01, 1.0), st.floats(1.0, 500.0), st.floats(0.1, 100.0), st.floats(1.0, 100.0))
def test_the_number_is_the_least_from_which_on_the_bound_holds(
    skip_rate: float, own_ms: float, t_llm: float, alone_ms: float
) -> None:
    token_ms = own_ms + server_ms_per_token(skip_rate, t_llm)
    num = np.arange(1, 1_000_000)
    margin = np.maximum(alone_ms, num * t_llm) - token_ms - (num - 1) * (1 - skip_rate) * t_llm
    assume(not np.any(np.abs(margin) < 1e-9 * alone_ms))
    least = users_from_which_asking_is_faster(token_ms, skip_rate, t_llm, alone_ms)
    assert least == num[margin <= 0].max(initial=0) + 1


def test_no_number_is_enough_where_nothing_is_skipped():
    assert users_from_which_asking_is_faster(100.0, 0.0, 30.0, 30.0) is None
    assert users_from_which_asking_is_faster(100.0, 1e-320, 30.0, 30.0) is None


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="skip_rate = 1"):
        server_ms_per_token(1.5, 30.0)
    with pytest.raises(ValueError, match="token_time_ms = 0"):
        users_from_which_asking_is_faster(0.0, 0.5, 30.0, 30.0)


def simulated_queue(
    num_users: int, think_ms: float, pass_ms: list[float], num_asks: int, seed: int
) -> tuple[float, float, float]:
    """(asks a second, busy share, mean wait) of a server that answers all who wait in one pass.

    All begin by asking; the first tenth of the asks is not counted.
    """
    rng = np.random.default_rng(seed)
    asks = [0.0] * num_users
    now = begin = busy = waited = 0.0
    answered = -(num_asks // 10)
    while answered < num_asks:
        if answered <= 0:
            begin, busy, waited, first = now, 0.0, 0.0, answered
        now = max(now, asks[0])
        some = [moment for moment in asks if moment <= now][: len(pass_ms)]
        took = pass_ms[len(some) - 1]
        now, busy, answered = now + took, busy + took, answered + len(some)
        waited += sum(now - moment for moment in some)
        again = now + rng.exponential(think_ms, len(some))
        asks = sorted(asks[len(some) :] + again.tolist())
    spent = now - begin
    return 1e3 * (answered - first) / spent, busy / spent, waited / (answered - first)


@pytest.mark.parametrize(
    ("num_users", "think_ms", "pass_ms"),
    [
        (1, 80.0, [30.0]),
        (5, 80.0, [30.0]),
        (12, 150.0, [20.0 + 4.0 * i for i in range(8)]),
        (40, 300.0, [20.0 + 4.0 * i for i in range(16)]),
        (3, 1e-3, [10.0, 15.0, 18.0]),
        (4, 1e-6, [10.0, 15.0, 18.0, 20.0]),
    ],
)
def test_the_queue_of_a_shared_server_against_one_that_is_simulated(num_users, think_ms, pass_ms):
    found = shared_server(num_users, think_ms, pass_ms)
    runs = np.array([simulated_queue(num_users, think_ms, pass_ms, 4000, i) for i in range(12)])
    error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    expected = (found.asks_per_s, found.busy_share, found.wait_ms)
    for mean, one, value in zip(runs.mean(axis=0), error, expected, strict=True):
        assert abs(mean - value) < 5 * one + 1e-3 * value


def ashcroft_wait_ms(num_users: int, think_ms: float, pass_ms: float) -> float:
    """Mean wait where the server answers one by one, from Ashcroft's asks per busy period (1950).

    In 80 digits, of which n/X - Z may lose what it likes.
    """
    with mpmath.workdps(80):
        think, took = mpmath.mpf(think_ms), mpmath.mpf(pass_ms)
        term = asks = mpmath.mpf(1)
        for num in range(1, num_users):
            term *= mpmath.expm1(num * took / think) * (num_users - num) / num
            asks += term
        per_ms = asks / (asks * took + think / num_users)
        return float(num_users / per_ms - think)


def solved_wait_ms(num_users: int, think_ms: float, pass_ms: list[float]) -> float:
    """n/X - Z from the chain's linear equations, in 80 digits."""
    with mpmath.workdps(80):
        think, states = mpmath.mpf(think_ms), range(num_users + 1)
        served = [min(max(m, 1), len(pass_ms)) for m in states]
        took = [mpmath.mpf(pass_ms[b - 1]) for b in served]
        system = mpmath.zeros(num_users + 1)
        for m in states:
            others, comes = num_users - max(m, 1), -mpmath.expm1(-took[m] / think)
            for k in range(others + 1):
                chance = mpmath.binomial(others, k) * comes**k * (1 - comes) ** (others - k)
                system[max(m, 1) - served[m] + k, m] += chance
            system[m, m] -= 1
        for m in states:  # one balance follows from the others
            system[num_users, m] = 1
        law = mpmath.lu_solve(system, mpmath.matrix([0] * num_users + [1]))
        cycle = sum(law[m] * took[m] for m in states) + law[0] * think / num_users
        return float(num_users * cycle / sum(law[m] * served[m] for m in states) - think)


@pytest.mark.parametrize(
    ("num_users", "think_ms", "pass_ms"),
    [(1, 1e10, 5.0), (1, 80.0, 30.0), (4, 1e6, 5.0), (40, 100.0, 10.0), (40, 1e3, 10.0),
     (200, 1e5, 1.0), (1000, 1e5, 1.0), (1000, 6e4, 5.0), (1000, 1e3, 1.0)],
)  # fmt: skip
def test_the_wait_of_users_who_are_served_one_by_one_is_ashcrofts(num_users, think_ms, pass_ms):
    found = shared_server(num_users, think_ms, [pass_ms])
    expected = ashcroft_wait_ms(num_users, think_ms, pass_ms)
    assert found.wait_ms == pytest.approx(expected, rel=1e-9)
    assert found.asks_per_s == pytest.approx(1e3 * num_users / (think_ms + expected), rel=1e-9)


@pytest.mark.parametrize("think_ms", [3.0, 80.0, 1e4, 1e9])
@pytest.mark.parametrize(
    ("num_users", "pass_ms"), [(2, [5.0, 6.0]), (7, [20.0, 24.0, 28.0]), (12, [3.0, 9.0])]
)
def test_the_wait_of_users_who_are_served_together_is_the_solved_one(num_users, think_ms, pass_ms):
    found = shared_server(num_users, think_ms, pass_ms)
    assert found.wait_ms == pytest.approx(solved_wait_ms(num_users, think_ms, pass_ms), rel=1e-10)


def test_users_who_never_think_go_round_in_the_cycle_that_they_begin_in():
    """Three at once, one alone, then two and one by turns, for ever: 25 ms for three asks."""
    found = shared_server(3, 1e-6, [10.0, 15.0, 18.0])
    assert found.asks_per_pass == pytest.approx(1.5, rel=1e-12)
    assert found.asks_per_s == pytest.approx(120, rel=1e-6)
    assert found.wait_ms == pytest.approx(25, rel=1e-6)


def test_what_the_queue_of_a_shared_server_must_be():
    alone = shared_server(1, 80.0, [30.0, 40.0])
    assert alone.asks_per_s == pytest.approx(1e3 / 110)
    assert alone.wait_ms == pytest.approx(30)
    assert alone.asks_per_pass == pytest.approx(1)
    crowd = shared_server(64, 1.0, [30.0 + i for i in range(16)])  # always full
    assert crowd.busy_share == pytest.approx(1)
    assert crowd.asks_per_s == pytest.approx(16e3 / 45)
    assert crowd.asks_per_pass == pytest.approx(16)
    few = [shared_server(n, 500.0, [30.0 + i for i in range(16)]) for n in range(1, 20)]
    assert all(a.asks_per_s < b.asks_per_s for a, b in itertools.pairwise(few))
    assert all(a.wait_ms < b.wait_ms for a, b in itertools.pairwise(few))
    assert all(one.busy_share < 1 for one in few)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 1.0, [1.0]), "num_users"), ((1, 0.0, [1.0]), "think_ms"), ((1, 1.0, []), "pass_ms"),
     ((1, 1.0, [1.0, -1.0]), "pass_ms")],
)  # fmt: skip
def test_a_queue_that_cannot_be_is_told(arguments, name):
    with pytest.raises(ValueError, match=name):
        shared_server(*arguments)
