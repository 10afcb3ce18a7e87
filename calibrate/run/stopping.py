"""Ctrl-C and SIGTERM: one stops at once, the other where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from calibrate.run.errors import UserError

_waiting: list[str] = []
_asked = False


class Interrupted(BaseException):
    """A signal that stops the command; whatever is in work cleans up after itself.

    Attributes
    ----------
    exit_code : int
        As shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class StoppedError(UserError):
    """An interrupt, with what stays and how to go on, in one line."""

    def __init__(self, text: str, interrupt: Interrupted) -> None:
        super().__init__(text)
        self.exit_code = interrupt.exit_code


def listen() -> None:
    """Let Ctrl-C and SIGTERM raise `Interrupted`; what ignores Ctrl-C goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)


@contextlib.contextmanager
def finishing(what: str) -> Iterator[None]:
    """Inside, SIGTERM waits for the next :func:`safe_point`; a second one does not, nor Ctrl-C.

    `what` is finished first, as the line on stderr says.
    """
    global _asked
    _waiting.append(what)
    try:
        yield
        safe_point()
    finally:
        _waiting.pop()
        _asked = False


def stop_asked() -> bool:
    """Whether SIGTERM waits for the next safe point: nothing more should be begun."""
    return _asked


def safe_point() -> None:
    """Stop here if SIGTERM has come: everything up to here is on disk."""
    if _asked:
        raise Interrupted(signal.SIGTERM)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _asked
    if number == signal.SIGTERM and _waiting and not _asked:
        _asked = True
        text = f"SIGTERM: stops when {_waiting[-1]} is finished; a second one stops at once"
        print(text, file=sys.stderr, flush=True)
        return
    raise Interrupted(number)
