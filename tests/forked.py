"""A command in a fork of this process, which has imported what takes a command seconds."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sklearn.ensemble
import sklearn.linear_model  # noqa: F401, all of them are for the forks
import statsmodels.api  # noqa: F401
import torch

import calibrate.decode.engine
import calibrate.derive.derivation
import calibrate.fit.calibration
import calibrate.pairs.loading
import calibrate.terminal.tables
import calibrate.validate.validation  # noqa: F401
import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    code : int
        Its exit code, or minus the number of the signal that ended it.
    text : str
        All that it wrote.
    """

    code: int
    text: str

    @property
    def said(self) -> list[str]:
        """Its last words: lines that begin with its name."""
        return [line for line in self.text.splitlines() if line.startswith("hlm: ")]


def hlm(
    *words: str,
    log: Path,
    first: Callable[[], None] | None = None,
    meanwhile: Callable[[int], None] | None = None,
) -> Ended:
    """Run one command to its end.

    Parameters
    ----------
    words : str
    log : Path
        A file for what it writes.
    first : callable, optional
        Called in the fork before the command.
    meanwhile : callable, optional
        Called here with the fork's number once it listens to signals.
    """
    heard, ready = os.pipe()
    child = os.fork()
    if child == 0:
        _run(words, log, first, ready)
    os.close(ready)
    os.read(heard, 1)
    os.close(heard)
    if meanwhile is not None:
        meanwhile(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, log.read_text(encoding="utf-8", errors="replace"))


def _run(words: tuple[str, ...], log: Path, first: Callable[[], None] | None, ready: int) -> None:
    """The fork: it never returns."""
    code = 70
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            torch.set_num_threads(1)  # those of a pool are not in the fork
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cli.listen()
            sys.argv = ["hlm", *words]
            if first is not None:
                first()
            os.write(ready, b".")
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
            file.flush()
    except BaseException:
        import traceback

        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)
