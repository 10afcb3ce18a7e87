"""Published numbers with their marks, and intervals from their rounding.

A published number stands for an interval, half a unit of its last digit to either side; what
follows from it is carried through as an interval too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MARKS = ("abstract", "second-hand")
"""abstract: stated by the paper's public abstract. second-hand: read from public replications and
notes that quote the paper, not checked against it."""

TOLERANCE = 1e-9


@dataclass(frozen=True)
class PublishedNumber:
    """One number of one paper (U-HLM, CU-HLM or UI-HLM), its quantity unique within the paper.

    `rounding` is half a unit of the last digit given, 0 for counts and exact values; `unit` is
    empty for shares and ratios; `mark` is one of MARKS, and `source` says where it is stated.
    """

    paper: str
    quantity: str
    value: float
    rounding: float
    unit: str
    mark: str
    source: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"value of {self.paper} {self.quantity} = {self.value}: give a number")
        if not (math.isfinite(self.rounding) and self.rounding >= 0):
            raise ValueError(f"rounding = {self.rounding}: allowed is [0, inf)")
        if self.mark not in MARKS:
            raise ValueError(f"mark = {self.mark!r}: allowed are {', '.join(MARKS)}")

    @property
    def low(self) -> float:
        """Least value that rounds to the published one."""
        return self.value - self.rounding

    @property
    def high(self) -> float:
        """Largest value that rounds to the published one."""
        return self.value + self.rounding


class PublishedTable:
    """Look-up of the numbers by paper and quantity."""

    def __init__(self, numbers: Sequence[PublishedNumber]) -> None:
        self._numbers = {(n.paper, n.quantity): n for n in numbers}
        if len(self._numbers) < len(numbers):
            raise ValueError("published holds a quantity of one paper twice: give each once")

    def __call__(self, paper: str, quantity: str) -> PublishedNumber:
        try:
            return self._numbers[paper, quantity]
        except KeyError:
            raise ValueError(f"published lacks {quantity!r} of {paper}: add it") from None

    def several(self, paper: str, *quantities: str) -> tuple[PublishedNumber, ...]:
        """The numbers of several quantities of one paper, in the order asked for."""
        return tuple(self(paper, quantity) for quantity in quantities)


@dataclass(frozen=True)
class Implied:
    """An implied figure with its interval from rounding."""

    value: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Both ends, None where rounding leaves none."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return low, high

    def meets(self, number: PublishedNumber) -> bool:
        """Whether this interval and the number's have a point in common."""
        margin = TOLERANCE * max(1.0, abs(number.value))
        return self.low <= number.high + margin and number.low <= self.high + margin


def imply(function: Callable[..., float], *numbers: PublishedNumber) -> Implied:
    """Value at the published numbers, range over the corners of their rounding.

    Exact for functions monotone in each argument, which all of this room's are. Corners without a
    solution stretch the range to infinity: the ceiling lies within rounding.
    """
    corners = [function(*c) for c in itertools.product(*((n.low, n.high) for n in numbers))]
    known = [corner for corner in corners if math.isfinite(corner)]
    high = math.inf if len(known) < len(corners) else max(known)
    return Implied(function(*(n.value for n in numbers)), min(known) if known else math.nan, high)
