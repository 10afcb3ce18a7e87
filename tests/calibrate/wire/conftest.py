"""One toy pair and one server for the tests of the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_wire import Running, Toys, make_toys, running


@pytest.fixture(scope="session")
def toys(toy: Path) -> Toys:
    return make_toys(toy)


@pytest.fixture(scope="session")
def server(toys: Toys) -> Iterator[Running]:
    with running(toys) as one:
        yield one
