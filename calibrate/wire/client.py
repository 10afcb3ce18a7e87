"""A device's end of the wire: frames there and back, again after a cut; no model, no torch."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import ClientConnection, connect

from calibrate.run.errors import UserError
from calibrate.wire.protocol import (
    RETRIED,
    SUBPROTOCOL,
    Ask,
    Flag,
    FrameError,
    Kind,
    Opening,
    Reason,
    RefusedError,
    Reply,
    bytes_on_wire,
    kind_of,
    pack_ask,
    pack_open,
    pack_resume,
    unpack_error,
    unpack_opened,
    unpack_reply,
)

MAX_REPLY_BYTES = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One reply, and what it took.

    Attributes
    ----------
    reply : Reply
    frame_ms, wait_ms : float
        Building the frame; from its first byte to the reply's last.
    sent_bytes, received_bytes : int
        On the wire, with the WebSocket's framing.
    """

    reply: Reply
    frame_ms: float
    wait_ms: float
    sent_bytes: int
    received_bytes: int


class ServerLink:
    """A connection to a server that is made again whenever it breaks.

    Parameters
    ----------
    url : str
        ws://HOST:PORT or wss://HOST:PORT.
    token : str, optional
    tls_ca : Path, optional
        Certificates to trust in the place of the system's.
    patience_s : float
        How long to try without an answer before giving up.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        tls_ca: Path | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.url, self.patience_s = url, patience_s
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._tls = _trusting(tls_ca) if url.startswith("wss:") else None
        self._connection: ClientConnection | None = None
        self._open_ones = ExitStack()
        self._opening: Opening | None = None
        self._session: bytes | None = None
        self._attached = False  # whether the connection is the session's
        self.reconnects = 0
        self.end_tokens: frozenset[int] = frozenset()

    def __enter__(self) -> ServerLink:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection = None
        self._open_ones.close()

    def open(self, opening: Opening, context: Sequence[int]) -> int:
        """Begin a session; returns the bytes sent for it.

        Raises
        ------
        UserError
            If the server cannot be reached, or refuses.
        """
        self._opening, self._session, self._attached = opening, None, False
        return self._persist(lambda: self._opened(list(context), 0))

    def ask(self, ask: Ask, context: Sequence[int]) -> Exchange:
        """Send a draft; `context` is all of it before the draft, should the session be lost.

        Raises
        ------
        UserError
        """
        assert self._opening is not None
        opening = self._opening
        begin = time.perf_counter()
        frame = pack_ask(ask, opening.vocab_size, opening.prob_bits)
        built = time.perf_counter()

        def exchange() -> Exchange:
            sent = frame
            if not self._attached:
                found = self._attach(list(context), ask.position)
                if found == ask.position:  # the whole context was given anew
                    none = replace(ask, unseen=ask.unseen[:0])
                    sent = pack_ask(none, opening.vocab_size, opening.prob_bits)
            start = time.perf_counter()
            self._send(sent)
            received = self._receive(Kind.REPLY)
            return Exchange(
                unpack_reply(received, opening.vocab_size),
                1e3 * (built - begin),
                1e3 * (time.perf_counter() - start),
                bytes_on_wire(len(sent), True),
                bytes_on_wire(len(received), False),
            )

        found = self._persist(exchange)
        if found.reply.position != ask.position:
            raise UserError(f"server {self.url}: it answered position {found.reply.position}")
        return found

    def stream(self, position: int, context: Sequence[int]) -> Iterator[Exchange]:
        """The server's own tokens from `position` on, as they come."""
        assert self._opening is not None
        opening, tokens = self._opening, list(context)
        while True:
            ask = Ask(position, flags=Flag.STREAM)
            yield (first := self.ask(ask, tokens))
            tokens.append(first.reply.token)
            position += 1
            while not self._ended(tokens[-1], position):
                start = time.perf_counter()
                try:
                    frame = self._receive(Kind.REPLY)
                except (OSError, WebSocketException, RefusedError):
                    self._drop()
                    break  # asks again from here
                reply = unpack_reply(frame, opening.vocab_size)
                spent = 1e3 * (time.perf_counter() - start)
                yield Exchange(reply, 0.0, spent, 0, bytes_on_wire(len(frame), False))
                tokens.append(reply.token)
                position += 1
            if self._ended(tokens[-1], position):
                return

    def _ended(self, token: int, position: int) -> bool:
        assert self._opening is not None
        ended = token in self._opening.end_tokens or token in self.end_tokens
        return ended or position >= self._opening.max_new_tokens

    # The connection.

    def _persist(self, attempt: Callable[[], T]) -> T:
        """The attempt's result, tried again after a cut until patience ends."""
        deadline, pause = time.monotonic() + self.patience_s, 0.05
        while True:
            try:
                return attempt()
            except FrameError as error:
                raise UserError(f"server {self.url}: {error}") from None
            except RefusedError as error:
                if error.reason not in RETRIED or time.monotonic() > deadline:
                    raise UserError(f"server {self.url} refuses: {error}") from None
                if error.reason == Reason.SESSION:
                    self._session = None
                    self._attached = False
                    continue
                self._drop()
            except (OSError, WebSocketException) as error:
                _raise_if_final(self.url, error)
                self._drop()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"server {self.url}: no answer for {self.patience_s:g} s "
                        f"({_first_line(error)}); start it with `hlm serve`, or mend the link"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _drop(self) -> None:
        self._attached = False
        if self._connection is not None:
            self.reconnects += 1
            with suppress(OSError, WebSocketException):
                self.close()

    def _send(self, frame: bytes) -> None:
        if self._connection is None:
            made = connect(
                self.url,
                additional_headers=self._headers,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                compression=None,
                ssl=self._tls,
                max_size=MAX_REPLY_BYTES,
                open_timeout=10,
                ping_interval=10,
                ping_timeout=60,
                close_timeout=0.5,
            )
            self._connection = self._open_ones.enter_context(made)
        self._connection.send(frame)

    def _receive(self, kind: Kind) -> bytes:
        if self._connection is None:
            raise ConnectionError("the connection is gone")
        frame = self._connection.recv()
        if isinstance(frame, str):
            raise FrameError("not a frame of this protocol")
        found = kind_of(frame)
        if found == Kind.ERROR:
            raise unpack_error(frame)
        if found != kind:
            raise FrameError(f"{found.name} where {kind.name} was due")
        return frame

    def _opened(self, context: list[int], num_answered: int) -> int:
        assert self._opening is not None
        frame = pack_open(replace(self._opening, num_answered=num_answered), context)
        self._send(frame)
        opened = self._receive(Kind.OPENED)
        self._session, _, ends = unpack_opened(opened, self._opening.vocab_size)
        self.end_tokens = frozenset(ends)
        self._attached = True
        return bytes_on_wire(len(frame), True)

    def _attach(self, context: list[int], position: int) -> int:
        """This connection made the session's; returns how many answered tokens it knows."""
        if self._session is None:
            self._opened(context, position)
            return position
        assert self._opening is not None
        self._send(pack_resume(self._session, position))
        _, known, _ = unpack_opened(self._receive(Kind.OPENED), self._opening.vocab_size)
        self._attached = True
        return known if known <= position else -1


def _trusting(tls_ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if tls_ca is None else str(tls_ca))
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--tls-ca {tls_ca}: {error}; give a PEM file of certificates") from None


def _raise_if_final(url: str, error: Exception) -> None:
    """Trouble that no second try mends, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        raise UserError(
            f"server {url}: its certificate does not hold ({error.verify_message}); give "
            "--tls-ca, or mend the server's"
        ) from None
    if isinstance(error, InvalidURI):
        raise UserError(f"--server {url}: allowed are ws://HOST:PORT and wss://HOST:PORT") from None
    if isinstance(error, InvalidStatus):
        code = error.response.status_code
        said = (error.response.body or b"").decode(errors="replace").strip()
        if code == 401:
            raise UserError(
                f"server {url}: it does not know the token; give its own with --token-file"
            ) from None
        if code < 500:
            raise UserError(f"server {url}: {said or f'HTTP status {code}'}") from None
    elif isinstance(error, InvalidHandshake) and not isinstance(error, ConnectionClosed):
        raise UserError(f"server {url}: not a server of this protocol ({error})") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
