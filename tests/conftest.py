"""What several test files share: a seeded generator, random laws, a toy pair, a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PairFactory = Callable[..., tuple[Any, Any]]


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts at the same place in every test."""
    return np.random.default_rng(20240607)


@pytest.fixture
def dirichlet_pairs(rng: np.random.Generator) -> PairFactory:
    """Factory of pairs (x, y) of float64 distributions (batch, V), numpy or torch.

    y is x moved part of the way to an independent draw, so that TV(x, y) covers the range from
    near 0 to near 1; small concentrations give peaked laws, large ones flat laws.
    """

    def make(
        batch: int, vocab: int, *, concentration: float = 0.3, as_torch: bool = False
    ) -> tuple[Any, Any]:
        x = rng.dirichlet(np.full(vocab, concentration), size=batch)
        other = rng.dirichlet(np.full(vocab, concentration), size=batch)
        share = rng.uniform(size=(batch, 1))
        y = (1 - share) * x + share * other
        x, y = x / x.sum(axis=-1, keepdims=True), y / y.sum(axis=-1, keepdims=True)
        if as_torch:
            import torch

            return torch.from_numpy(x), torch.from_numpy(y)
        return x, y

    return make


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models of the toy pair and its prompts.txt; tests write their runs elsewhere."""
    import toy_pair

    path = tmp_path_factory.mktemp("toy")
    toy_pair.make_pair(path)
    toy_pair.write_prompts(path / "prompts.txt")
    return path


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic run that was calibrated, derived and validated; left as it is found."""
    import synthetic_run

    run = tmp_path_factory.mktemp("judged") / "run"
    synthetic_run.make_run(run)
    synthetic_run.add_validation(run)
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The faults that were injected, if any, as a table for docs/reliability.md."""
    rows = getattr(terminalreporter.config, "faults", [])
    if not rows:
        return
    terminalreporter.section("faults")
    names = ("fault", "tried", "told", "harmless", "silent", "tracebacks", "lost", "doubled")
    terminalreporter.write_line(f"| {' | '.join((*names, 'message'))} |")
    terminalreporter.write_line("| --- " * 9 + "|")
    for row in rows:
        told = row.tried - row.harmless - row.silent - row.tracebacks
        cells = (row.name, row.tried, told, row.harmless, row.silent, row.tracebacks, row.lost,
                 row.doubled, row.message)  # fmt: skip
        terminalreporter.write_line(f"| {' | '.join(map(str, cells))} |")
