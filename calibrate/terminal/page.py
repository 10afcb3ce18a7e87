"""Where results are printed: lines and tables that fit the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from calibrate.run.figure import NBSP, NO_VALUE, number_text
from calibrate.terminal.layout import folded, table_lines

PIPE_WIDTH = 160
"""Of tables in a pipe, which has no width: folded to 80 columns they would be hard to read back."""
LEAST_WIDTH = 40
INTERVAL_WIDTH = 100
"""Columns from which tables that shrink show their intervals."""


PLAIN = str.maketrans(
    {
        NBSP: " ",
        NO_VALUE: "-",
        "\N{MINUS SIGN}": "-",
        "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
        "\N{RIGHTWARDS ARROW}": "->",
    }
)
"""What an encoding without these signs gets for them; an arrow moves what is right of it by one."""


class Page:
    """Prints to stdout, as wide as the terminal, and wide in a pipe."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        columns = shutil.get_terminal_size((80, 24)).columns
        self.width = max(columns, LEAST_WIDTH) if self._is_terminal else PIPE_WIDTH

    @property
    def with_intervals(self) -> bool:
        """Whether a table that shrinks has room for its intervals."""
        return self.width >= INTERVAL_WIDTH

    def say(self, text: str = "") -> None:
        """Lines, folded between words where a terminal is narrower."""
        for line in text.split("\n"):
            for part in folded(line, self.width, "  ") if self._is_terminal else [line]:
                self._print(part)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any] | str],
        title: str | None = None,
        num_names: int | None = None,
    ) -> None:
        """A table of texts, figures, numbers and truths, with room above and below.

        Columns whose name begins with ">" are set to the right, with "~" folded between words; a
        row that is a text is a line of its own, an empty one is blank. `num_names` columns name
        the rows, and are repeated where a table is set in parts.
        """
        told = [row if isinstance(row, str) else [_cell(one) for one in row] for row in rows]
        print()
        if title:
            self.say(title)
        for line in table_lines(columns, told, self.width, num_names):
            self._print(line)
        print()

    def _print(self, line: str) -> None:
        """A line, with other signs where standard output cannot encode its own."""
        encoding = sys.stdout.encoding or "utf-8"
        try:
            line.encode(encoding)
        except UnicodeEncodeError:
            line = line.translate(PLAIN).encode(encoding, "replace").decode(encoding)
        print(line)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return number_text(value)
