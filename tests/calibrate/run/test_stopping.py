"""SIGTERM waits for a safe point, and is not lost if none comes."""

from __future__ import annotations

import os
import signal

import pytest

from calibrate.run.stopping import Interrupted, finishing, listen, safe_point


@pytest.fixture(autouse=True)
def listening():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_both_stop_at_once(number: int, code: int) -> None:
    with pytest.raises(Interrupted) as caught:
        send(number)
    assert caught.value.exit_code == code


def work(done: list[int], signals: dict[int, list[int]], safe: bool = True) -> None:
    """Three pieces; signals come during some of them."""
    with finishing("the shard in work"):
        for number in range(3):
            for sent in signals.get(number, []):
                send(sent)
            done.append(number)
            if safe:
                safe_point()


def test_inside_what_is_in_work_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    with pytest.raises(Interrupted) as caught:
        work(done, {1: [signal.SIGTERM]})
    assert caught.value.exit_code == 143
    assert done == [0, 1]
    assert "stops when the shard in work is finished" in capsys.readouterr().err
    work(done, {})  # nothing of it is left
    assert done == [0, 1, 0, 1, 2]


def test_without_a_safe_point_it_stops_when_all_is_done() -> None:
    done: list[int] = []
    with pytest.raises(Interrupted):
        work(done, {0: [signal.SIGTERM]}, safe=False)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_who_insists_or_interrupts_is_heard_at_once(second: int) -> None:
    done: list[int] = []
    with pytest.raises(Interrupted) as caught:
        work(done, {1: [signal.SIGTERM, second]})
    assert (caught.value.exit_code, done) == (128 + second, [0])


def test_what_ignores_interrupts_goes_on_ignoring_them() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
