"""Rows on several threads are the rows on one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hlmtheory.coupling import coupling_columns
from hlmtheory.domain import unchecked
from hlmtheory.threads import MOST, map_rows, num_threads
from hlmtheory.truncation import tail_deviation, tail_deviation_at


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_numpy_is_worked_on_in_the_callers_thread(three_threads) -> None:
    assert num_threads(np.ones(2)) == 1
    assert num_threads(torch.ones(2)) == 3
    assert num_threads(torch.ones(2, device="meta")) == 1
    assert map_rows(lambda part: threading.current_thread(), 5, np.ones(2)) == [
        threading.main_thread()
    ]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 50])
def test_every_row_comes_once_and_in_order(num_rows: int, three_threads) -> None:
    parts = map_rows(lambda part: list(range(part.start, part.stop)), num_rows, torch.ones(2))
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert len(parts) == max(1, min(3, num_rows)) <= MOST


def test_what_a_thread_raises_is_raised(three_threads) -> None:
    def fails(part: slice) -> None:
        raise ValueError(f"row {part.start}")

    with pytest.raises(ValueError, match="row 0"):
        map_rows(fails, 4, torch.ones(2))


def test_columns_are_the_same_bits_on_any_number_of_threads(three_threads, rng) -> None:
    x, y = (torch.from_numpy(rng.dirichlet(np.full(900, 0.05), 7)) for _ in "xy")
    tokens = x.topk(32).indices
    sizes = (1, 2, 16, 300, 900)
    for function in (
        lambda a: coupling_columns(a, y, tokens),
        lambda a: (tail_deviation_at(a, sizes),),
    ):
        torch.set_num_threads(3)
        many = function(x)
        torch.set_num_threads(1)
        for one, other in zip(many, function(x), strict=True):
            assert torch.equal(one, other)
    exact = tail_deviation(x)[:, [k - 1 for k in sizes]]
    torch.testing.assert_close(tail_deviation_at(x, sizes), exact, rtol=0, atol=1e-12)


def test_no_rows_have_no_columns() -> None:
    nothing, tokens = np.ones((0, 50)), np.zeros((0, 4), dtype=int)
    with unchecked():
        for x, ids in ((nothing, tokens), (torch.from_numpy(nothing), torch.from_numpy(tokens))):
            assert [tuple(one.shape) for one in coupling_columns(x, x, ids)] == [(0, 4)] * 2
            assert tuple(tail_deviation_at(x, (1, 50)).shape) == (0, 2)
