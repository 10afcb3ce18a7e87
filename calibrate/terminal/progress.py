"""Progress on stderr: bars with rates and time left, and one-line notes between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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

    def at_batch(self, number: int, total: int) -> None:
        """Say which batch is running."""
        self._progress.update(self._task, description=f"validating, batch {number}/{total}")


@contextmanager
def token_progress(
    description: str, what: str = "tokens", silent_in_pipe: bool = False
) -> Iterator[TokenBar]:
    """A bar with how many a second, and time left; its last state is a line of a log as well."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TokenRate(ProgressColumn):
        def render(self, task: Any) -> Text:
            elapsed = task.elapsed or 0.0
            emitted = task.fields["emitted"]
            rate = emitted / elapsed if elapsed > 0 else 0.0
            return Text(f"{emitted} {what}, {rate:.0f}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TokenRate(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    silent = silent_in_pipe and not console.is_terminal
    with Progress(*columns, console=console, disable=silent) as progress:
        task = progress.add_task(description, total=None, emitted=0)
        yield TokenBar(progress, task)


@contextmanager
def transfer_progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each stage of fetching and converting, in bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, object] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report
