"""What several test files share: a seeded generator, random laws, a toy pair, a finished run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import Fault, table

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
def toy_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy pair that was calibrated, with a pilot, and derived; left as it is found."""
    import toy_commands
    from forked import hlm

    path = tmp_path_factory.mktemp("toy-run")
    run, log = path / "run", path / "log"
    for words in (toy_commands.calibration(toy, run), toy_commands.derivation(run)):
        assert hlm(*words, log=log).code == 0, log.read_text()
    assert (run / "pilot").is_dir()
    return run


@pytest.fixture(scope="session")
def toy_validated(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it that was validated."""
    import toy_commands
    from forked import hlm

    path = tmp_path_factory.mktemp("toy-validated")
    run, log = path / "run", path / "log"
    shutil.copytree(toy_run, run)
    assert hlm(*toy_commands.validation(run), log=log).code == 0, log.read_text()
    assert len(list((run / "reruns").iterdir())) == len(toy_commands.POLICIES)
    return run


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic run that was calibrated, derived and validated; left as it is found."""
    import synthetic_run

    run = tmp_path_factory.mktemp("judged") / "run"
    synthetic_run.make_run(run)
    synthetic_run.add_validation(run)
    return run


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str], Fault]:
    """Factory of rows of the table of faults."""

    def make(name: str) -> Fault:
        row = Fault(name)
        config: Any = request.config
        config.faults = [*getattr(config, "faults", []), row]
        return row

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The faults that were injected, if any, as docs/reliability.md shows them."""
    if faults := getattr(terminalreporter.config, "faults", []):
        terminalreporter.section("faults")
        for line in table(faults):
            terminalreporter.write_line(line)
