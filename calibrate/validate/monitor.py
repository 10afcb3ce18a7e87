"""The watch on a risk budget while a policy runs: JSON lines of audited tokens, an e-process."""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import figure
from calibrate.run.folder import read_record, read_record_file, write_record_file
from calibrate.run.records import (
    AuditedToken,
    DerivationRecord,
    MonitorAlarm,
    MonitorPlace,
    MonitorRecord,
    MonitorSettings,
    MonitorTally,
    MonitorUnit,
    OpenAnswer,
    OperatingPoint,
)
from calibrate.run.stopping import Interrupted
from hlmtheory.kinds import Certified
from hlmtheory.monitoring import Tally, audited_losses, window_level

CHUNK_NUM_BYTES = 1 << 20
TAIL_NUM_BYTES = 1024
AUDIT_SPREADS = 5.0
"""Distance of checked drafts from those expected, over the root of these, that is no chance."""
NUM_CLOSED = 256
"""Answers remembered, so that of so many whose lines are mixed none passes for two."""
TOKENS = TypeAdapter(list[AuditedToken])
UNITS: dict[Certified | None, MonitorUnit] = {"tokens": "tokens", "prompts": "answers"}
"""What a watch is over, by what a budget is about; one for whole answers has no tokens to audit."""


class Stream(Protocol):
    """What lines are read from."""

    def read1(self, size: int, /) -> bytes:
        """What is there, at most `size` bytes; none at the end."""
        ...


def watched_point(run: Path, name: str, key: str) -> OperatingPoint:
    """The operating point of a derivation whose budget is to be watched, in :data:`UNITS`.

    Raises
    ------
    UsageError
        If there is no such point, it is infeasible, or it has no budget of the rejection risk.
    """
    record = read_record(run, DerivationRecord, name)
    found = {point.key: point for point in record.operating_points}
    if key not in found:
        known = ", ".join(
            name
            for name, one in found.items()
            if one.feasible and one.budget is not None and one.weighting in UNITS
        )
        raise UsageError(f"--point {key}: points with a budget to watch there are {known}")
    point = found[key]
    if not point.feasible:
        raise UsageError(f"--point {key}: is infeasible: {point.reason}")
    if point.budget is None:
        raise UsageError(f"--point {key}: has no risk budget; give --risk")
    if point.weighting not in UNITS:
        raise UsageError(
            f"--point {key}: its budget is about whole {point.weighting}, which audited tokens do "
            "not show; give --risk for the rejection risk"
        )
    return point


def read_state(path: Path, settings: MonitorSettings) -> MonitorRecord | None:
    """The state that a watch left in a file; None if there is none yet.

    Raises
    ------
    UsageError
        If it was begun with other settings.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--state {path}: no such folder; make it first")
        return None
    state = read_record_file(path, MonitorRecord, f"hlm monitor --state {path}")
    before, now = state.settings.model_dump(), settings.model_dump()
    for key, value in before.items():
        if value != now[key]:
            raise UsageError(
                f"--state {path}: {key} was {value}, now {now[key]}; a watch keeps its settings, "
                "so name another file"
            )
    return state


def _place(path: Path, num_bytes: int, num_lines: int) -> MonitorPlace:
    with path.open("rb") as file:
        start = max(num_bytes - TAIL_NUM_BYTES, 0)
        file.seek(start)
        digest = hashlib.sha256(file.read(num_bytes - start)).hexdigest()
    return MonitorPlace(
        file=str(path.resolve()), num_bytes=num_bytes, num_lines=num_lines, tail_sha256=digest
    )


def _where_to_go_on(path: Path, state: MonitorRecord | None) -> tuple[int, int]:
    """Bytes and lines of a file that a state has counted."""
    place = state.place if state is not None else None
    if place is None or place.file != str(path.resolve()):
        return 0, 0
    if _place(path, place.num_bytes, place.num_lines) != place:
        raise UserError(
            f"{path}: the first {place.num_bytes} bytes are not those that were read before; give "
            "another log another name"
        )
    return place.num_bytes, place.num_lines


def run_monitor(
    source: Path | None,
    settings: MonitorSettings,
    state_path: Path | None = None,
    set_total: Callable[[int], None] = lambda size: None,
    on_lines: Callable[[int, int], None] = lambda lines, size: None,
    on_alarm: Callable[[MonitorAlarm], None] = lambda alarm: None,
) -> MonitorRecord:
    """Read what a file holds beyond the state, or all of stdin, and keep the new state.

    Parameters
    ----------
    source : Path or None
        None for stdin. Interrupted while it waits there, a watch ends as at the end of the stream.
    settings : MonitorSettings
    state_path : Path, optional
        Where to go on, and to keep the state: written whole, and only if every line was read.
    set_total, on_lines, on_alarm : callable
        Called with the bytes to read, with lines and bytes just counted, and at the first alarm.

    Raises
    ------
    UserError
        If a line is not an audited token, the state is of other settings, or the file changed
        where it was read before.
    """
    state = None if state_path is None else read_state(state_path, settings)
    if source is None:
        watch = Watch(settings, state)
        watch.read_all(sys.stdin.buffer, False, on_lines, on_alarm)  # type: ignore[arg-type]
        place = None
    else:
        if not source.is_file():
            raise UsageError(f"FILE {source}: no such file; - reads from stdin")
        start, num_before = _where_to_go_on(source, state)
        watch = Watch(settings, state, str(source), num_before)
        with source.open("rb") as file:
            set_total(source.stat().st_size - start)
            file.seek(start)
            size = watch.read_all(file, state_path is not None, on_lines, on_alarm)
        place = _place(source, start + size, watch.num_read)
    record = watch.record(place)
    if state_path is not None:
        write_record_file(state_path, record)
    return record


class Watch:
    """A watch in progress: fed with lines, it keeps a tally and remembers its first alarm.

    Parameters
    ----------
    settings : MonitorSettings
    state : MonitorRecord, optional
        Where an earlier watch of these settings ended.
    name : str
        What is read, for messages.
    num_read : int
        Lines of it that were read before.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        state: MonitorRecord | None = None,
        name: str = "-",
        num_read: int = 0,
    ) -> None:
        self.settings, self._name, self.num_read = settings, name, num_read
        self.num_lines = self.num_units = self.num_skipped = self.num_checked = 0
        self.expected_checked, self.window = 0.0, 1
        self.alarm: MonitorAlarm | None = None
        self._open: OpenAnswer | None = None
        self._closed: deque[str] = deque(maxlen=NUM_CLOSED)
        self._tally = Tally(1.0 / settings.audit_rate)
        if state is not None:
            self.num_lines, self.num_units = state.num_lines, state.num_units
            self.num_skipped, self.num_checked = state.num_skipped, state.num_checked
            self.expected_checked, self.window = state.expected_checked, state.window
            self.alarm, self._open = state.alarm, state.open_answer
            self._closed.extend(state.closed_answers)
            kept = state.tally
            self._tally = Tally(
                self._tally.bound, kept.num, kept.total, np.array(kept.rising),
                np.array(kept.falling),
            )  # fmt: skip

    def read_all(
        self,
        stream: Stream,
        keep_open_line: bool,
        on_lines: Callable[[int, int], None] = lambda lines, size: None,
        on_alarm: Callable[[MonitorAlarm], None] = lambda alarm: None,
    ) -> int:
        """Read a stream to its end, a chunk of lines at a time; return how many bytes counted.

        A last line without a line end is left for the next time, still being written, if
        `keep_open_line`.
        """
        rest, num_bytes = b"", 0
        while True:
            try:
                chunk = stream.read1(CHUNK_NUM_BYTES)
            except (KeyboardInterrupt, Interrupted):
                chunk = b""
            whole, end, begun = (rest + chunk).rpartition(b"\n")
            if not chunk and not keep_open_line:
                whole, end, begun = rest, b"", b""
            if whole or end:
                quiet, lines = self.alarm is None, whole.split(b"\n")
                self.read(lines)
                num_bytes += len(whole) + len(end)
                on_lines(len(lines), len(whole) + len(end))
                if quiet and self.alarm is not None:
                    on_alarm(self.alarm)
            rest = begun
            if not chunk:
                return num_bytes

    def read(self, lines: list[bytes]) -> None:
        """Count lines, all or none of them.

        Raises
        ------
        UserError
            If one is not a token, naming its place in what was read.
        """
        number = self.num_read + 1 + np.flatnonzero([bool(line.strip()) for line in lines])
        tokens = self._tokens([line for line in lines if line.strip()], number)
        skipped = np.array([token.skipped for token in tokens], dtype=bool)
        rejection = np.array([token.rejection for token in tokens], dtype=float)  # None is NaN
        rate = np.array([token.audit_rate for token in tokens], dtype=float)
        least = self.settings.audit_rate
        rate = np.where(np.isnan(rate), least, rate)
        checked = skipped & ~np.isnan(rejection)
        self._refuse(number, rate < least, lambda i: (
            f"audit_rate {rate[i]:g} is below {least:g}, the least that was promised; begin with a "
            "smaller --audit-rate"
        ))  # fmt: skip
        self._refuse(number, skipped & ~checked & (rate == 1), lambda i: (
            "a skipped draft without rejection, though all are checked at audit rate 1; give the "
            "chance of a check by --audit-rate"
        ))  # fmt: skip
        losses = audited_losses(skipped, rejection, rate)
        if self.settings.unit == "answers":
            names = [token.answer for token in tokens]
            absent = np.array([name is None for name in names], dtype=bool)
            self._refuse(number, absent, lambda i: "answer is missing; --unit answers needs it")
            self._closed = self._closing(names, number)
            losses, ends = self._close_answers(np.array(names, dtype=object), losses)
        else:
            ends = np.arange(1, len(losses) + 1)
        self._count(losses, self.num_lines + ends)
        self.num_read += len(lines)
        self.num_lines += len(tokens)
        self.num_skipped += int(np.sum(skipped))
        self.num_checked += int(np.sum(checked))
        self.expected_checked += float(np.sum(rate[skipped]))

    def _refuse(self, number: np.ndarray, bad: np.ndarray, text: Callable[[int], str]) -> None:
        if np.any(bad):
            first = int(np.argmax(bad))
            raise UserError(f"{self._name}, line {number[first]}: {text(first)}")

    def _tokens(self, lines: list[bytes], number: np.ndarray) -> list[AuditedToken]:
        try:
            tokens = TOKENS.validate_json(b"[" + b",".join(lines) + b"]")
            if len(tokens) == len(lines):
                return tokens
        except ValidationError:
            pass
        out = []  # which line it was
        for line, place in zip(lines, number, strict=True):
            try:
                out.append(AuditedToken.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                what = f"{field}: {first['msg']}" if field else first["msg"]
                raise UserError(
                    f"{self._name}, line {place}: {what}; allowed are the keys "
                    f"{', '.join(AuditedToken.model_fields)}"
                ) from None
        return out

    def _closing(self, names: Sequence[str | None], number: np.ndarray) -> deque[str]:
        """The answers that are closed once these lines are read; none may come back."""
        closed = self._closed.copy()
        present = None if self._open is None else self._open.answer
        back = np.zeros(len(names), dtype=bool)
        for place, name in enumerate(names):
            if name == present or name is None:
                continue
            back[place] = name in closed
            if present is not None:
                closed.append(present)
            present = name
        self._refuse(number, back, lambda i: (
            f"answer {names[i]!r} comes back after another began; the lines of an answer follow "
            "one another"
        ))  # fmt: skip
        return closed

    def _close_answers(
        self, names: np.ndarray, losses: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean losses of the answers that another has followed, and in which line it did."""
        if not len(names):
            return losses, np.arange(0)
        starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
        totals = np.add.reduceat(losses, starts)
        counts = np.diff(np.append(starts, len(names)))
        begun = self._open
        if begun is not None and begun.answer == names[0]:
            totals[0] += begun.loss
            counts[0] += begun.num_tokens
        elif begun is not None:
            totals, counts = np.append(begun.loss, totals), np.append(begun.num_tokens, counts)
            starts = np.append(0, starts)
        self._open = OpenAnswer(
            answer=names[-1], num_tokens=int(counts[-1]), loss=float(totals[-1])
        )
        return totals[:-1] / counts[:-1], starts[1:] + 1

    def _count(self, losses: np.ndarray, lines: np.ndarray) -> None:
        """Bet on losses (N,) in their order; a full window begins the next."""
        room = self.settings.window
        while len(losses):
            end = len(losses) if room is None else room - self._tally.num
            part = losses[:end]
            if self.alarm is None:
                reached = self._tally.log_e_values(part, self.settings.risk) >= self._level()
                if np.any(reached):
                    first = int(np.argmax(reached))
                    num = self.num_units + first + 1
                    self.alarm = MonitorAlarm(num_units=num, line=int(lines[first]))
            self._tally = self._tally.appended(part)
            self.num_units += len(part)
            losses, lines = losses[end:], lines[end:]
            if len(losses) and self._tally.num == room:
                self._tally, self.window = Tally(self._tally.bound), self.window + 1

    def _level(self) -> float:
        return float(-np.log(self._delta()))

    def _delta(self) -> float:
        delta = 1.0 - self.settings.confidence
        return delta if self.settings.window is None else window_level(delta, self.window)

    def record(self, place: MonitorPlace | None = None) -> MonitorRecord:
        """Verdict and state, to be written."""
        tally = self._tally
        low, high = tally.interval(1.0 - self._delta())
        return MonitorRecord(
            settings=self.settings,
            alarm=self.alarm,
            log_e_value=tally.log_e_value(self.settings.risk),
            log_alarm_level=self._level(),
            mean_risk=figure(min(tally.mean, 1.0) if tally.num else np.nan, low, high),
            num_lines=self.num_lines,
            num_units=self.num_units,
            num_skipped=self.num_skipped,
            num_checked=self.num_checked,
            expected_checked=self.expected_checked,
            as_audited=abs(self.num_checked - self.expected_checked)
            <= AUDIT_SPREADS * max(self.expected_checked, 1.0) ** 0.5,
            window=self.window,
            tally=MonitorTally(
                num=tally.num,
                total=tally.total,
                rising=tuple(tally.rising.tolist()),
                falling=tuple(tally.falling.tolist()),
            ),
            open_answer=self._open,
            closed_answers=tuple(self._closed),
            place=place,
        )
