"""What device and server say to each other: binary frames over a WebSocket; docs/protocol.md.

A frame is a fixed header and a payload of packed bits. The payload of a draft that is sent is what
docs/theory.md, (18), bills, to the bit, filled up to a byte; headers are framing, and counted as
such. Nothing is unpickled, and no length in a frame is believed before it is checked.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from hlmtheory.cost import index_bits
from hlmtheory.sampled_law import Sampling

SUBPROTOCOL = "hlm.1"
"""Named in the handshake; the number is the version."""

MAX_CONTEXT = 2**20
"""Tokens of a context that a frame may hold."""

MASKED_BYTES = 4
"""A device's frames are masked, as RFC 6455 has it."""


class Kind(IntEnum):
    """First byte of a frame."""

    OPEN = 1
    OPENED = 2
    ASK = 3
    REPLY = 4
    ERROR = 5
    RESUME = 6


class Flag(IntEnum):
    """Bits of an ASK's flags."""

    DRAFT = 1
    """The draft goes with it."""
    STREAM = 2
    """The server is to go on alone, a REPLY for each token."""
    AUDIT = 4
    """The draft stands; the server only tells how likely it would have been rejected."""


class Reason(IntEnum):
    """Why a server refuses: the code of an ERROR."""

    FRAME = 1
    VOCABULARY = 2
    POLICY = 3
    SESSION = 4
    POSITION = 5
    FULL = 6
    CONTEXT = 7
    DRAINING = 8
    NUMBERS = 9


RETRIED = (Reason.SESSION, Reason.FULL, Reason.DRAINING)
"""Reasons that pass: a device opens its session anew, or waits."""


class FrameError(ValueError):
    """A frame that means nothing, in one line."""


class RefusedError(Exception):
    """What a server said no to."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Opening:
    """A session: whose vocabulary, which policy, which laws, which random numbers.

    Attributes
    ----------
    vocab_size : int
    vocabulary : str
        SHA-256 of the tokens by their ids.
    policy : str
    settings : dict
        Of the policy, as an operating point stores them, without threshold and score: they are the
        device's own.
    sampling : dict
        Of :class:`hlmtheory.sampled_law.Sampling`.
    prob_bits : int
        Bits of a probability.
    stream_key : tuple of int
        Key of the session's random numbers; the server draws with them, and `coupled` shares them.
    max_new_tokens : int
        Longest answer, the tokens that are there already included.
    end_tokens : tuple of int
        A stream ends after one of these.
    num_answered : int
        How many of the context's tokens are the answer's.
    """

    vocab_size: int
    vocabulary: str
    policy: str
    settings: dict[str, Any]
    sampling: dict[str, Any]
    prob_bits: int
    stream_key: tuple[int, int]
    max_new_tokens: int
    end_tokens: tuple[int, ...] = ()
    num_answered: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "prob_bits", "max_new_tokens", "num_answered"):
            _whole(name, getattr(self, name))
        for name in ("stream_key", "end_tokens"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise FrameError(f"{name} = {values!r}: allowed is a list of numbers")
            object.__setattr__(self, name, tuple(_whole(name, one) for one in values))
        if not 2 <= self.vocab_size <= 2**24 or not 2 <= self.prob_bits <= 16:
            raise FrameError(
                f"vocab_size = {self.vocab_size}, prob_bits = {self.prob_bits}: allowed are 2 to "
                "2^24, and 2 to 16"
            )
        if len(self.stream_key) != 2 or max(self.stream_key) >= 2**64:
            raise FrameError("stream_key: allowed are two numbers below 2^64")
        if not (isinstance(self.settings, dict) and isinstance(self.sampling, dict)):
            raise FrameError("settings and sampling are objects")
        try:
            Sampling(**self.sampling)
        except (TypeError, ValueError) as error:
            raise FrameError(f"sampling: {error}") from None

    @property
    def laws(self) -> Sampling:
        """What makes the models' logits laws."""
        return Sampling(**self.sampling)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FrameError(f"{name} = {value!r}: allowed is a whole number, 0 or more")
    return value


@dataclass(frozen=True)
class Ask:
    """A draft that is sent, with what the server has not seen.

    Attributes
    ----------
    position : int
        Place of the draft in its answer.
    unseen : int array (m,)
        Tokens of the answer before it that the device emitted alone since it last asked.
    draft : int or None
        None for policies that do not send it.
    tokens, codes : int arrays (k,)
        Tokens and codes of the probabilities that are sent.
    total : float
        Sum of the levels of the whole law: hlmtheory.quantised_law.
    flags : int
        STREAM, AUDIT.
    """

    position: int
    unseen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    draft: int | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    total: float = 1.0
    flags: int = 0


@dataclass(frozen=True)
class Reply:
    """What the server answers.

    Attributes
    ----------
    position, token : int
    accepted : bool
        Whether the draft was.
    server_us, waited_us : int
        Time in the server's forward pass, and before it, microseconds.
    rejection : float
        Rejection probability of an audited draft; NaN else.
    """

    position: int
    token: int
    accepted: bool
    server_us: int
    waited_us: int
    rejection: float = float("nan")


_ASK = struct.Struct("<BBHIId")
_REPLY = struct.Struct("<BBHIIIf")
_OPEN = struct.Struct("<BI")
_OPENED = struct.Struct("<B16sIB")
_RESUME = struct.Struct("<B16sI")
_ERROR = struct.Struct("<BB")


def payload_bits_of(ask: Ask, vocab_size: int, prob_bits: int) -> int:
    """Bits of an ASK's payload: docs/theory.md, (18)."""
    index = index_bits(vocab_size)
    sent = len(ask.tokens) * (prob_bits + index)
    return sent + (len(ask.unseen) + (ask.draft is not None)) * index


def bytes_on_wire(num_bytes: int, masked: bool) -> int:
    """Bytes of a WebSocket message of one frame: RFC 6455, section 5.2."""
    extended = 0 if num_bytes < 126 else 2 if num_bytes < 2**16 else 8
    return 2 + extended + (MASKED_BYTES if masked else 0) + num_bytes


def ask_bytes(payload_bits: int) -> int:
    """Bytes of an ASK on the wire."""
    return bytes_on_wire(_ASK.size + -(-payload_bits // 8), True)


def reply_bytes(vocab_size: int) -> int:
    """Bytes of a REPLY on the wire."""
    return bytes_on_wire(_REPLY.size + -(-index_bits(vocab_size) // 8), False)


def _bits(values: np.ndarray, width: int) -> np.ndarray:
    """Each value's last `width` bits, (n, width)."""
    octets = np.ascontiguousarray(values, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return np.unpackbits(octets, axis=1)[:, 32 - width :]


def _values(payload: np.ndarray, begin: int, num: int, width: int) -> np.ndarray:
    """What :func:`_bits` took apart: `num` values of `width` <= 24 bits, from bit `begin` on.

    Each lies in the four octets from its first one on.
    """
    bit = begin + width * np.arange(num, dtype=np.int64)
    first, octets = bit >> 3, np.append(payload, np.zeros(4, dtype=np.uint8)).astype(np.uint32)
    word = np.zeros(num, dtype=np.uint32)
    for i in range(4):
        word |= octets[first + i] << np.uint32(24 - 8 * i)
    word <<= (bit & 7).astype(np.uint32)
    return (word >> np.uint32(32 - width)).astype(np.int64)


def pack_tokens(tokens: Any, vocab_size: int) -> bytes:
    """Token indices, ceil(log2 V) bits each."""
    return np.packbits(_bits(np.asarray(tokens), index_bits(vocab_size)).ravel()).tobytes()


def unpack_tokens(payload: bytes, num: int, vocab_size: int) -> np.ndarray:
    """What :func:`pack_tokens` packed, (num,).

    Raises
    ------
    FrameError
        If the payload has another length, or a token lies beyond the vocabulary.
    """
    return _tokens(_taken(payload, num * index_bits(vocab_size)), num, vocab_size)


def _taken(payload: bytes, num_bits: int) -> np.ndarray:
    """The octets of a payload of so many bits."""
    if len(payload) != -(-num_bits // 8):
        raise FrameError(f"payload of {len(payload)} bytes: {-(-num_bits // 8)} were announced")
    return np.frombuffer(payload, dtype=np.uint8)


def _tokens(payload: np.ndarray, num: int, vocab_size: int) -> np.ndarray:
    """The tokens that a payload begins with."""
    found = _values(payload, 0, num, index_bits(vocab_size))
    if num and int(found.max()) >= vocab_size:
        raise FrameError(f"token {int(found.max())}: the vocabulary has {vocab_size}")
    return found


def pack_open(opening: Opening, context: Any) -> bytes:
    """OPEN: the session as JSON, and its context."""
    head = json.dumps({**asdict(opening), "num_context": len(context)}).encode()
    return _OPEN.pack(Kind.OPEN, len(head)) + head + pack_tokens(context, opening.vocab_size)


def unpack_open(frame: bytes) -> tuple[Opening, list[int]]:
    """What :func:`pack_open` packed.

    Raises
    ------
    FrameError
    """
    _, size = _unpacked(_OPEN, frame)
    try:
        entry = json.loads(frame[_OPEN.size : _OPEN.size + size])
        num = _whole("num_context", entry.pop("num_context"))
        opening = Opening(**entry)
    except FrameError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FrameError(f"OPEN holds no session: {error}") from None
    if not 1 <= num <= MAX_CONTEXT or opening.num_answered >= num:
        raise FrameError(f"num_context = {num}: allowed is 1 to {MAX_CONTEXT}, more than answered")
    tokens = unpack_tokens(frame[_OPEN.size + size :], num, opening.vocab_size)
    return opening, tokens.tolist()


def pack_ask(ask: Ask, vocab_size: int, prob_bits: int) -> bytes:
    """ASK: header, then unseen tokens, draft, tokens and codes in packed bits."""
    index = index_bits(vocab_size)
    flags = ask.flags | (Flag.DRAFT if ask.draft is not None else 0)
    own = [] if ask.draft is None else [ask.draft]
    indices = np.concatenate([ask.unseen, own, ask.tokens]).astype(np.int64)
    bits = [_bits(indices, index).ravel(), _bits(ask.codes, prob_bits).ravel()]
    header = _ASK.pack(Kind.ASK, flags, len(ask.unseen), ask.position, len(ask.tokens), ask.total)
    return header + np.packbits(np.concatenate(bits)).tobytes()


def unpack_ask(frame: bytes, vocab_size: int, prob_bits: int) -> Ask:
    """What :func:`pack_ask` packed.

    Raises
    ------
    FrameError
    """
    _, flags, num_unseen, position, num_entries, total = _unpacked(_ASK, frame)
    if num_entries > vocab_size:
        raise FrameError(f"{num_entries} probabilities: the vocabulary has {vocab_size} tokens")
    if not (np.isfinite(total) and total > 0):
        raise FrameError(f"total = {total}: allowed is a finite number above 0")
    index, has_draft = index_bits(vocab_size), bool(flags & Flag.DRAFT)
    num_indices = num_unseen + has_draft + num_entries
    payload = _taken(frame[_ASK.size :], num_indices * index + num_entries * prob_bits)
    indices = _tokens(payload, num_indices, vocab_size)
    codes = _values(payload, num_indices * index, num_entries, prob_bits)
    unseen, tokens = indices[:num_unseen], indices[num_unseen + has_draft :]
    if np.bincount(tokens, minlength=1).max() > 1:
        raise FrameError("a token has two probabilities")
    draft = int(indices[num_unseen]) if has_draft else None
    return Ask(position, unseen, draft, tokens, codes, total, flags & ~Flag.DRAFT)


def pack_reply(reply: Reply, vocab_size: int) -> bytes:
    """REPLY: header, and the token."""
    header = _REPLY.pack(
        Kind.REPLY, reply.accepted, 0, reply.position, reply.server_us, reply.waited_us,
        reply.rejection,
    )  # fmt: skip
    return header + pack_tokens([reply.token], vocab_size)


def unpack_reply(frame: bytes, vocab_size: int) -> Reply:
    """What :func:`pack_reply` packed.

    Raises
    ------
    FrameError
    """
    _, accepted, _, position, server_us, waited_us, rejection = _unpacked(_REPLY, frame)
    token = int(unpack_tokens(frame[_REPLY.size :], 1, vocab_size)[0])
    return Reply(position, token, bool(accepted), server_us, waited_us, rejection)


def pack_opened(session: bytes, position: int, end_tokens: Any, vocab_size: int) -> bytes:
    """OPENED: the session's name, how many tokens of its answer are known, what ends an answer."""
    ends = [one for one in end_tokens if one < vocab_size][:255]
    head = _OPENED.pack(Kind.OPENED, session, position, len(ends))
    return head + pack_tokens(ends, vocab_size)


def unpack_opened(frame: bytes, vocab_size: int) -> tuple[bytes, int, list[int]]:
    """What :func:`pack_opened` packed.

    Raises
    ------
    FrameError
    """
    _, session, position, num = _unpacked(_OPENED, frame)
    return session, position, unpack_tokens(frame[_OPENED.size :], num, vocab_size).tolist()


def pack_resume(session: bytes, position: int) -> bytes:
    """RESUME: the session's name, and the position that is asked for next."""
    return _RESUME.pack(Kind.RESUME, session, position)


def unpack_resume(frame: bytes) -> tuple[bytes, int]:
    """What :func:`pack_resume` packed.

    Raises
    ------
    FrameError
    """
    _, session, position = _unpacked(_RESUME, frame)
    _taken(frame[_RESUME.size :], 0)
    return session, position


def pack_error(reason: Reason, text: str) -> bytes:
    """ERROR: a code, and one line."""
    return _ERROR.pack(Kind.ERROR, reason) + text.encode()[:1000]


def unpack_error(frame: bytes) -> RefusedError:
    """What :func:`pack_error` packed."""
    _, reason = _unpacked(_ERROR, frame)
    known = Reason(reason) if reason in list(Reason) else Reason.FRAME
    return RefusedError(known, frame[_ERROR.size :].decode(errors="replace"))


def kind_of(frame: bytes) -> Kind:
    """Which frame it is.

    Raises
    ------
    FrameError
        If it is none.
    """
    if not isinstance(frame, bytes) or not frame or frame[0] not in list(Kind):
        raise FrameError("not a frame of this protocol")
    return Kind(frame[0])


def _unpacked(form: struct.Struct, frame: bytes) -> tuple[Any, ...]:
    if len(frame) < form.size:
        raise FrameError(f"a frame of {len(frame)} bytes: its header has {form.size}")
    return form.unpack(frame[: form.size])
