"""Frames: there and back, of the length that is stated, and refused where they mean nothing."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.wire.protocol import (
    Ask,
    Flag,
    FrameError,
    Kind,
    Opening,
    Reason,
    Reply,
    ask_bytes,
    bytes_on_wire,
    kind_of,
    pack_ask,
    pack_error,
    pack_open,
    pack_reply,
    payload_bits_of,
    reply_bytes,
    unpack_ask,
    unpack_error,
    unpack_open,
    unpack_reply,
)
from hlmtheory.cost import payload_bits

OPENING = Opening(96, "x", "u-hlm", {}, {}, 8, (1, 2**64 - 1), 12, (2,))


@st.composite
def asks(draw: st.DrawFn) -> tuple[Ask, int, int]:
    vocab, bits = draw(st.integers(2, 200_000)), draw(st.integers(2, 16))
    tokens = draw(st.lists(st.integers(0, vocab - 1), max_size=50, unique=True))
    codes = [draw(st.integers(0, 2**bits - 1)) for _ in tokens]
    ask = Ask(
        draw(st.integers(0, 2**32 - 1)),
        np.array(draw(st.lists(st.integers(0, vocab - 1), max_size=20)), dtype=np.int64),
        draw(st.none() | st.integers(0, vocab - 1)),
        np.array(tokens, dtype=np.int64),
        np.array(codes, dtype=np.int64),
        draw(st.floats(1e-9, 1e6)),
        draw(st.sampled_from([0, Flag.STREAM, Flag.AUDIT])),
    )
    return ask, vocab, bits


@given(asks())
def test_an_ask_comes_back_whole_and_as_long_as_stated(case):
    ask, vocab, bits = case
    frame = pack_ask(ask, vocab, bits)
    found = unpack_ask(frame, vocab, bits)
    for name in ("position", "draft", "total", "flags"):
        assert getattr(found, name) == getattr(ask, name)
    for name in ("unseen", "tokens", "codes"):
        assert np.array_equal(getattr(found, name), getattr(ask, name))
    billed = payload_bits_of(ask, vocab, bits)
    assert bytes_on_wire(len(frame), True) == ask_bytes(billed)
    theory = payload_bits(
        len(ask.tokens), vocab, bits, draft_sent=ask.draft is not None,
        num_unsent=len(ask.unseen),
    )  # fmt: skip
    assert billed == theory


@given(st.binary(max_size=200), st.integers(2, 200_000))
def test_any_bytes_are_a_frame_or_one_line(blob, vocab):
    for unpack in (
        lambda: unpack_ask(blob, vocab, 8),
        lambda: unpack_open(blob),
        lambda: unpack_reply(blob, vocab),
        lambda: kind_of(blob),
    ):
        with contextlib.suppress(FrameError):  # anything else is a failure
            unpack()


@given(asks(), st.data())
def test_a_frame_cut_or_grown_is_refused(case, data):
    ask, vocab, bits = case
    frame = pack_ask(ask, vocab, bits)
    cut = data.draw(st.integers(0, len(frame) - 1))
    for bad in (frame[:cut], frame + b"\0"):
        with pytest.raises(FrameError):
            unpack_ask(bad, vocab, bits)


def test_tokens_beyond_the_vocabulary_and_doubled_ones_are_refused():
    frame = pack_ask(Ask(0, draft=99), 128, 8)
    with pytest.raises(FrameError, match="token 99: the vocabulary has 96"):
        unpack_ask(frame, 96, 8)
    twice = Ask(0, tokens=np.array([3, 3]), codes=np.array([1, 2]))
    with pytest.raises(FrameError, match="two probabilities"):
        unpack_ask(pack_ask(twice, 96, 8), 96, 8)


def test_a_session_comes_back_and_a_false_one_is_refused():
    opening, context = unpack_open(pack_open(OPENING, [1, 5, 95]))
    assert (opening, context) == (OPENING, [1, 5, 95])
    for name, value in (
        ("vocab_size", 1), ("prob_bits", 17), ("stream_key", [1]), ("sampling", {"top_p": 2}),
        ("settings", []), ("max_new_tokens", -1), ("end_tokens", ["x"]), ("num_answered", 3),
    ):  # fmt: skip
        frame = pack_open(OPENING, [1, 5, 95])
        size = int.from_bytes(frame[1:5], "little")
        head = json.dumps({**json.loads(frame[5 : 5 + size]), name: value}).encode()
        false = frame[:1] + len(head).to_bytes(4, "little") + head + frame[5 + size :]
        with pytest.raises(FrameError):
            unpack_open(false)


def test_a_reply_comes_back_as_long_as_stated():
    reply = Reply(7, 95, True, 1234, 2**32 - 1, 0.25)
    frame = pack_reply(reply, 96)
    assert unpack_reply(frame, 96) == reply
    assert bytes_on_wire(len(frame), False) == reply_bytes(96)


def test_an_error_comes_back():
    error = unpack_error(pack_error(Reason.FULL, "no room"))
    assert (error.reason, str(error)) == (Reason.FULL, "no room")
    assert kind_of(pack_error(Reason.FULL, "")) == Kind.ERROR


@pytest.mark.parametrize(("num", "masked", "expected"), [
    (0, False, 2), (125, True, 131), (126, True, 134), (65_535, False, 65_539),
    (65_536, True, 65_550),
])  # fmt: skip
def test_framing_is_that_of_the_standard(num, masked, expected):
    assert bytes_on_wire(num, masked) == expected
