"""What came of faults that tests inject: the rows of the table in docs/reliability.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = ("fault", "tried", "told", "harmless", "silent", "tracebacks", "lost", "doubled",
           "message")  # fmt: skip


@dataclass
class Fault:
    """A row: one fault, and how often each end was met.

    Attributes
    ----------
    name : str
    tried : int
    harmless : int
        Times that the right result was there nonetheless.
    silent : int
        Times that another result was taken for the right one.
    tracebacks : int
        Times that it ended in anything but one line; the rest of the times it was told in one.
    lost, doubled : int
        Rows of traces that were missing in the end, and that were there twice.
    message : str
        The last line that was told.
    """

    name: str
    tried: int = 0
    harmless: int = 0
    silent: int = 0
    tracebacks: int = 0
    lost: int = 0
    doubled: int = 0
    message: str = ""

    @property
    def told(self) -> int:
        """Times that it was refused in one line."""
        return self.tried - self.harmless - self.silent - self.tracebacks

    @property
    def kept_the_promise(self) -> bool:
        """Whether it was tried, and nothing was silent, a traceback, lost or doubled."""
        return self.tried > 0 and not any((self.silent, self.tracebacks, self.lost, self.doubled))


def table(faults: Sequence[Fault]) -> list[str]:
    """Lines of the table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [
        tuple(str(getattr(one, column)) for column in ("name", *COLUMNS[1:])) for one in faults
    ]
    return [f"| {' | '.join(row)} |" for row in rows]
