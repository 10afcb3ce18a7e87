"""Tables as lines of text that fit a width: no number is ever broken or cut.

What is too wide for one table is first folded (headers, then columns of words), then set as several
tables below one another, each with the columns that name its rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TypeAlias

from rich.cells import cell_len

RIGHT, FOLDED = ">", "~"
GAP = "  "
LEAST_FOLDED = 24
"""Width that a column of words keeps while there is another way."""
MOST_NAMES = 0.6
"""Part of the width that the columns which name the rows may take where a table is set in parts."""

Row: TypeAlias = Sequence[str] | str
"""Cells; or a line of its own across the table, and an empty sequence for a blank one."""


def table_lines(
    columns: Sequence[str], rows: Sequence[Row], width: int, num_names: int | None = None
) -> list[str]:
    """A table in lines of at most `width`, but for a single cell that is wider.

    Parameters
    ----------
    columns : sequence of str
        Names; ">" before one sets it to the right, "~" lets its cells be folded between words.
    rows : sequence of Row
        Every cell stands whole on one line, those of folded columns word by word.
    width : int
    num_names : int, optional
        Columns at the left that name the rows; those before the first number, unless told.
    """
    names = _num_names(columns) if num_names is None else num_names
    widths = _widths(columns, rows, width, names)
    while names > 1 and _total(widths[:names]) > width * MOST_NAMES:
        names -= 1
    blocks: list[list[int]] = [[]]
    for place in range(names, len(columns)):
        wider = [*range(names), *blocks[-1], place]
        if blocks[-1] and _total([widths[one] for one in wider]) > width:
            blocks.append([])
        blocks[-1].append(place)
    out: list[str] = []
    for block in blocks:
        shown = [*range(names), *block]
        part = [row if isinstance(row, str) or not row else [row[one] for one in shown]
                for row in rows]  # fmt: skip
        out += [""] if out else []
        titles = [columns[one] for one in shown]
        sizes = _stretched(titles, part, [widths[one] for one in shown], width)
        out += _block(titles, sizes, part, width)
    return out


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """A text in lines of at most `width`, folded between words; later lines are indented."""
    lead = text[: len(text) - len(text.lstrip(" "))]
    return textwrap.wrap(
        text, width, subsequent_indent=lead + indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * max(len(widths) - 1, 0)


def _num_names(columns: Sequence[str]) -> int:
    """How many columns at the left name the rows: all before the first number, but not all."""
    numbers = (place for place, name in enumerate(columns) if name.startswith(RIGHT))
    return max(min(next(numbers, 1), len(columns) - 1), 1)


def _widths(columns: Sequence[str], rows: Sequence[Row], width: int, num_names: int) -> list[int]:
    """Of every column: as wide as it wants, then with folded headers, then with folded words."""
    cells = [[row[place] for row in rows if row and not isinstance(row, str)]
             for place in range(len(columns))]  # fmt: skip
    bodies = [max(map(cell_len, texts), default=0) for texts in cells]
    titles = [name.lstrip(RIGHT + FOLDED) for name in columns]
    widths = [max(body, cell_len(title)) for body, title in zip(bodies, titles, strict=True)]
    if _total(widths) <= width:
        return widths
    words = [_longest_word([title]) for title in titles]
    widths = [max(body, word) for body, word in zip(bodies, words, strict=True)]
    for place, name in enumerate(columns):
        if name.startswith(FOLDED):
            spare = width - _total(widths) + widths[place]
            least = max(_longest_word(cells[place]), words[place])
            least = least if place < num_names else max(least, LEAST_FOLDED)
            widths[place] = min(widths[place], max(spare, least))
    return widths


def _stretched(
    columns: Sequence[str], rows: Sequence[Row], widths: Sequence[int], width: int
) -> list[int]:
    """What is left of the width goes to columns of words, as far as they want it."""
    out = list(widths)
    for place in reversed(range(len(columns))):
        if columns[place].startswith(FOLDED):
            cells = [row[place] for row in rows if row and not isinstance(row, str)]
            wanted = max(map(cell_len, [columns[place].lstrip(FOLDED), *cells]))
            out[place] += max(min(wanted - out[place], width - _total(out)), 0)
    return out


def _longest_word(texts: Sequence[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split(" ")), default=0)


def _block(
    columns: Sequence[str], widths: Sequence[int], rows: Sequence[Row], width: int
) -> list[str]:
    header = [name.lstrip(RIGHT + FOLDED) for name in columns]
    right = [name.startswith(RIGHT) for name in columns]
    fold = [name.startswith(FOLDED) for name in columns]
    out = _lines(header, widths, right, [True] * len(columns), at_bottom=True)
    out.append("─" * _total(widths))
    for row in rows:
        if isinstance(row, str):
            out += folded(row, width, GAP)
        else:
            out += _lines(row, widths, right, fold) if row else [""]
    return out


def _lines(
    cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], fold: Sequence[bool],
    at_bottom: bool = False,
) -> list[str]:  # fmt: skip
    """One row: several lines where cells are folded, a header's at the bottom."""
    parts = [folded(cell, size) if may else [cell]
             for cell, size, may in zip(cells, widths, fold, strict=True)]  # fmt: skip
    height = max(map(len, parts))
    blank = [[""] * (height - len(part)) for part in parts]
    parts = [e + p if at_bottom else p + e for e, p in zip(blank, parts, strict=True)]
    out = []
    for line in zip(*parts, strict=True):
        padded = []
        for text, size, to_right in zip(line, widths, right, strict=True):
            space = " " * (size - cell_len(text))
            padded.append(space + text if to_right else text + space)
        out.append(GAP.join(padded).rstrip(" "))
    return out
