"""What a stage tells whoever waits for it: lines, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes
    ----------
    stage : str
        Such as calibrating, validating, or what is fetched.
    unit : {"token", "byte"}
    done : int
        Of the total: tokens that answers which ended early will not need count as done.
    total : int or None
        None while it is not known.
    num_emitted : int
        Tokens that were decoded.
    detail : str
        Which part of the stage is in work; empty if it has none.
    """

    stage: str
    unit: Literal["token", "byte"]
    done: int
    total: int | None
    num_emitted: int = 0
    detail: str = ""


def _ignore(told: object) -> None:
    """What is told to nobody."""


@dataclass(frozen=True)
class Watch:
    """Who is told: nobody, unless given."""

    say: Callable[[str], None] = _ignore
    progress: Callable[[Progress], None] = _ignore

    @classmethod
    def of(
        cls, say: Callable[[str], None] | None, progress: Callable[[Progress], None] | None
    ) -> Watch:
        """Whoever of the two was given."""
        return cls(say or _ignore, progress or _ignore)

    def lines(self, texts: Sequence[str]) -> None:
        """Tell several lines."""
        for text in texts:
            self.say(text)

    def warn(self, texts: Sequence[str]) -> None:
        """Tell what is allowed and hardly meant."""
        self.lines([f"warning: {text}" for text in texts])

    def transfer(self, stage: str, done: int, total: int | None) -> None:
        """Tell bytes of a transfer or conversion."""
        self.progress(Progress(stage, "byte", done, total))


class TokenCount:
    """Counts the tokens of a stage and tells them."""

    def __init__(self, stage: str, watch: Watch) -> None:
        self._watch = watch
        self._now = Progress(stage, "token", 0, None)

    def _tell(self, **changes: object) -> None:
        self._now = Progress(**(vars(self._now) | changes))
        self._watch.progress(self._now)

    def set_total(self, num_tokens: int) -> None:
        """Most tokens that may be decoded."""
        self._tell(total=num_tokens)

    def advance(self, emitted: int, spared: int) -> None:
        """Tokens just emitted, and tokens that ended answers will never need."""
        now = self._now
        self._tell(done=now.done + emitted + spared, num_emitted=now.num_emitted + emitted)

    def at_batch(self, number: int, total: int) -> None:
        """Which batch is running."""
        self._tell(detail=f"batch {number}/{total}")
