"""Users who share a server, simulated one request at a time."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hlmtheory.serving import server_ms_per_token, users_from_which_asking_is_faster

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
