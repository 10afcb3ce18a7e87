"""The watch as a command uses it: lines in, a verdict out, and a state that loses nothing."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_records import derivation_record, point, run_record

from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import read_record_file, write_record
from calibrate.run.records import MonitorRecord, MonitorSettings
from calibrate.validate.monitor import UNITS, Watch, run_monitor, watched_point
from hlmtheory.monitoring import Tally


def settings(**changes: Any) -> MonitorSettings:
    asked = {"risk": 0.02, "confidence": 0.95, "audit_rate": 0.5, "unit": "tokens", "window": None}
    return MonitorSettings(**{**asked, **changes})


def tokens(num: int, risk: float = 0.02, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(num):
        one = {"skipped": bool(rng.random() < 0.4), "answer": f"a{i // 20}"}
        if one["skipped"] and rng.random() < 0.5:
            one["rejection"] = round(float(rng.random() < risk / 0.4), 3)
        out.append(one)
    return out


def lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text(lines(tokens(3000, 0.06)))
    return path


@pytest.mark.parametrize("unit", ["tokens", "answers"])
@pytest.mark.parametrize("window", [None, 70])
def test_a_log_read_as_it_grows_ends_as_one_that_is_read_at_once(
    tmp_path: Path, unit: str, window: int | None
) -> None:
    asked = settings(unit=unit, window=window)
    entries = tokens(3000, 0.1, 1)
    text = lines(entries)
    once, grown, state = tmp_path / "once.jsonl", tmp_path / "grown.jsonl", tmp_path / "state.json"
    once.write_text(text)
    whole = run_monitor(once, asked)
    rng = np.random.default_rng(2)
    cuts = [0, *np.sort(rng.integers(0, len(text), 6)).tolist(), len(text)]
    for begin, end in pairwise(cuts):
        with grown.open("a") as file:
            file.write(text[begin:end])  # most cuts lie inside a line
        parts = run_monitor(grown, asked, state)
        assert read_record_file(state, MonitorRecord, "x") == parts
    assert parts.alarm == whole.alarm is not None
    assert parts.window == whole.window
    assert (parts.num_lines, parts.num_checked) == (3000, whole.num_checked)
    assert parts.log_e_value == pytest.approx(whole.log_e_value, abs=1e-9)
    assert parts.tally.num == whole.tally.num
    assert run_monitor(grown, asked, state) == parts  # nothing new: nothing changes


def test_the_losses_are_those_of_the_lines(log: Path) -> None:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = np.array([entry.get("rejection", 0.0) / 0.5 for entry in entries])
    got = run_monitor(log, settings())
    path = Tally(2.0).log_e_values(losses, 0.02)
    assert got.alarm is not None
    assert got.alarm.num_units == got.alarm.line == np.argmax(path >= np.log(20)) + 1
    assert got.log_e_value == pytest.approx(path[-1])
    assert got.num_skipped == sum(entry["skipped"] for entry in entries)
    assert got.num_checked == sum("rejection" in entry for entry in entries)
    answers = losses[:2980].reshape(-1, 20).mean(1)  # the last one may go on
    got = run_monitor(log, settings(unit="answers"))
    assert got.open_answer is not None
    assert (got.num_units, got.open_answer.answer) == (149, "a149")
    path = Tally(2.0).log_e_values(answers, 0.02)
    assert got.log_e_value == pytest.approx(path[-1])
    assert got.alarm is not None
    assert got.alarm.num_units == np.argmax(path >= np.log(20)) + 1
    assert got.alarm.line == 20 * got.alarm.num_units + 1


def test_a_window_begins_anew_at_a_level_of_its_own() -> None:
    watch = Watch(settings(window=100, audit_rate=1.0))
    quiet = {"skipped": True, "rejection": 0.0}
    watch.read(lines([quiet] * 100).encode().splitlines())
    assert watch.record().window == 1
    watch.read(lines([quiet] * 50).encode().splitlines())
    record = watch.record()
    assert (record.window, record.tally.num, record.num_units) == (2, 50, 150)
    assert record.log_alarm_level == pytest.approx(np.log(6 / 0.05))
    fresh = Watch(settings(window=100, audit_rate=1.0))
    fresh.read(lines([quiet] * 50).encode().splitlines())
    assert fresh.record().log_e_value == record.log_e_value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"skipped": true', ["JSON"]),
        ('{"skipped": 1}', ["skipped", "boolean"]),
        ('{"skiped": true}', ["skip", "rejection, audit_rate, answer"]),
        ('{"skipped": true, "rejection": 1.5}', ["rejection", "less than or equal to 1"]),
        ('{"skipped": true, "rejection": NaN}', ["rejection"]),
        ('{"skipped": true, "rejection": 0.1, "audit_rate": 0.1}', ["0.1 is below 0.5"]),
        ('{"skipped": true, "audit_rate": 1}', ["without rejection", "--audit-rate"]),
        ('{"skipped": true}, {"skipped": true}', ["trailing characters"]),
        ("[1]", ["object"]),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_leaves_no_state(
    tmp_path: Path, log: Path, line: str, words: list[str]
) -> None:
    state = tmp_path / "state.json"
    run_monitor(log, settings(), state)
    before = state.read_bytes()
    with log.open("a") as file:
        file.write("\n" + lines(tokens(7)) + line + "\n" + lines(tokens(7)))
    with pytest.raises(UserError, match=r"line 3009: ") as told:
        run_monitor(log, settings(), state)
    for word in words:
        assert word in str(told.value)
    assert "\n" not in str(told.value)
    assert state.read_bytes() == before


def test_answers_need_a_name() -> None:
    with pytest.raises(UserError, match="line 2: answer is missing"):
        Watch(settings(unit="answers")).read(
            [b'{"skipped": false, "answer": "a"}', b'{"skipped": false}']
        )


def test_an_answer_does_not_come_back(tmp_path: Path) -> None:
    """Mixed lines of two answers would pass for many short ones, in one file or over a state."""
    asked, state, log = settings(unit="answers"), tmp_path / "state.json", tmp_path / "log.jsonl"
    log.write_text(lines([{"skipped": False, "answer": name} for name in "aabb"]))
    assert run_monitor(log, asked, state).closed_answers == ("a",)
    before = state.read_bytes()
    for names, number, name in (("bba", 7, "a"), ("bcb", 7, "b"), ("ca", 6, "a")):
        grown = lines([{"skipped": False, "answer": one} for one in "aabb" + names])
        log.write_text(grown)
        with pytest.raises(UserError, match=rf"line {number}: answer '{name}' comes back"):
            run_monitor(log, asked, state)
        assert state.read_bytes() == before
    log.write_text(lines([{"skipped": False, "answer": one} for one in "aabbbcc"]))
    assert run_monitor(log, asked, state).closed_answers == ("a", "b")
    assert run_monitor(log, settings()).closed_answers == ()


@pytest.mark.parametrize(("num_checked", "holds"), [(100, True), (130, True), (155, False)])
def test_another_audit_rate_than_was_said_is_found(num_checked: int, holds: bool) -> None:
    watch = Watch(settings(audit_rate=0.1))
    drafts = [{"skipped": True, "rejection": 0.0}] * num_checked
    drafts += [{"skipped": True}] * (1000 - num_checked)
    watch.read(lines(drafts).encode().splitlines())
    assert watch.record().as_audited is holds


def test_a_state_goes_on_only_as_it_began_and_where_it_was(tmp_path: Path, log: Path) -> None:
    state = tmp_path / "state.json"
    run_monitor(log, settings(), state)
    with pytest.raises(UsageError, match=r"risk was 0\.02, now 0\.03"):
        run_monitor(log, settings(risk=0.03), state)
    log.write_text(lines(tokens(3000, 0.06, 5)))
    with pytest.raises(UserError, match="are not those that were read before"):
        run_monitor(log, settings(), state)
    other = tmp_path / "next.jsonl"
    other.write_text(lines(tokens(50)))
    assert run_monitor(other, settings(), state).num_lines == 3050
    state.write_text("{}")
    with pytest.raises(UserError, match="schema version"):
        run_monitor(other, settings(), state)
    with pytest.raises(UsageError, match="no such folder"):
        run_monitor(other, settings(), tmp_path / "nowhere" / "state.json")
    with pytest.raises(UsageError, match="no such file"):
        run_monitor(tmp_path / "nowhere.jsonl", settings())


def test_a_stream_rings_at_once_and_ends_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    text = lines(tokens(2000, 0.2)).encode()

    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            part = super().read1(700)
            if not part:
                raise KeyboardInterrupt  # who watches a pipe ends it so
            return part

    class Stdin:
        buffer = Slow(text)

    rung: list[int] = []
    monkeypatch.setattr("sys.stdin", Stdin)
    got = run_monitor(None, settings(), on_alarm=lambda alarm: rung.append(Stdin.buffer.tell()))
    assert got.num_lines == 2000
    assert got.place is None
    assert got.alarm is not None
    assert got.alarm.line < 500
    assert len(rung) == 1
    assert rung[0] <= len(text) * got.alarm.line / 2000 + 2100


def test_an_operating_point_says_what_is_watched(tmp_path: Path) -> None:
    plain = point("u-hlm", "risk-0.01")
    several = [
        plain.model_copy(update={"budget": 0.01, "weighting": "tokens"}),
        plain.model_copy(update={"rule": "risk-averse", "budget": None}),
        plain.model_copy(update={"rule": "ltt-0.01", "feasible": False, "reason": "too few"}),
        plain.model_copy(
            update={"rule": "answer-0.1", "family": "answer", "budget": 0.1, "weighting": "answers"}
        ),
        plain.model_copy(
            update={"rule": "ltt-0.1", "family": "ltt", "budget": 0.1, "weighting": "answers"}
        ),
        plain.model_copy(
            update={"rule": "ltt-0.2", "family": "ltt", "budget": 0.2, "weighting": "prompts"}
        ),
    ]
    write_record(tmp_path, run_record())
    write_record(tmp_path, derivation_record(operating_points=tuple(several)))
    assert watched_point(tmp_path, "default", "u-hlm/risk-0.01").budget == 0.01
    with pytest.raises(UsageError, match="no risk budget"):
        watched_point(tmp_path, "default", "u-hlm/risk-averse")
    with pytest.raises(UsageError, match="infeasible: too few"):
        watched_point(tmp_path, "default", "u-hlm/ltt-0.01")
    with pytest.raises(UsageError, match=r"there are u-hlm/risk-0\.01, u-hlm/ltt-0\.2$"):
        watched_point(tmp_path, "default", "r-hlm/risk-0.01")
    for key in ("u-hlm/answer-0.1", "u-hlm/ltt-0.1"):
        with pytest.raises(UsageError, match=rf"^--point {key}: its budget is about whole answers"):
            watched_point(tmp_path, "default", key)
    assert UNITS[watched_point(tmp_path, "default", "u-hlm/ltt-0.2").weighting] == "answers"
