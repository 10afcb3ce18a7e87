"""Progress on stderr: bars with rates and time left, and one-line notes between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from calibrate.run.watch import Progress as Told


def say(text: object) -> None:
    """One line on stderr, out of the way of results."""
    print(text, file=sys.stderr, flush=True)


class TokenBar:
    """A bar that counts tokens; rows that end early shorten what is left."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._emitted = 0

    def set_total(self, num_tokens: int) -> None:
        """Most tokens that may be decoded."""
        self._progress.update(self._task, total=num_tokens)

    def advance(self, emitted: int, spared: int) -> None:
        """Tokens just emitted, and tokens that ended rows will never need."""
        self._emitted += emitted
        self._progress.update(self._task, advance=emitted + spared, emitted=self._emitted)

    def at_part(self, text: str) -> None:
        """Say what is running."""
        self._progress.update(self._task, description=text)


def _token_columns(what: str) -> tuple[Any, ...]:
    """What a bar of tokens shows: how many, how many a second, and the time left."""
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TokenRate(ProgressColumn):
        def render(self, task: Any) -> Text:
            elapsed = task.elapsed or 0.0
            emitted = task.fields["emitted"]
            rate = emitted / elapsed if elapsed > 0 else 0.0
            return Text(f"{emitted} {what}, {rate:.0f}/s")

    left = (TextColumn("left"), TimeRemainingColumn())
    return TextColumn("{task.description}"), BarColumn(bar_width=16), TokenRate(), *left


def _byte_columns() -> tuple[Any, ...]:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    shown = (BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    return TextColumn("{task.description}"), *shown


@contextmanager
def token_progress(
    description: str, what: str = "tokens", silent_in_pipe: bool = False
) -> Iterator[TokenBar]:
    """A bar with how many a second, and time left; its last state is a line of a log as well."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    silent = silent_in_pipe and not console.is_terminal
    with Progress(*_token_columns(what), console=console, disable=silent) as progress:
        task = progress.add_task(description, total=None, emitted=0)
        yield TokenBar(progress, task)


class Bars:
    """Bars for what a verb tells, one a stage, and its lines between them.

    It may be told from several threads: downloads have some.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._live: Progress | None = None
        self._unit = ""
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, now: Told) -> None:
        """Show how far a stage is."""
        with self._lock:
            self._show(now)

    def _show(self, now: Told) -> None:
        if self._live is None or now.unit != self._unit:
            self._begin(now.unit)
        live = self._live
        assert live is not None
        if now.stage not in self._tasks:
            self._tasks[now.stage] = live.add_task(now.stage, total=now.total, emitted=0)
        described = f"{now.stage}, {now.detail}" if now.detail else now.stage
        live.update(
            self._tasks[now.stage], completed=now.done, total=now.total, description=described,
            emitted=now.num_emitted,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """One line on stderr, below the bars so far."""
        with self._lock:
            self._close()
            say(text)

    def _begin(self, unit: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._close()
        columns = _byte_columns() if unit == "byte" else _token_columns("tokens")
        self._live, self._unit = Progress(*columns, console=Console(stderr=True)), unit
        self._live.start()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks = None, {}
