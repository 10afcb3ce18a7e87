"""`hlm serve`: the server model behind a socket, many sessions advanced together.

A session is a context in the server's caches, with its random numbers and the policy's way of
answering. What it has answered last is kept, so a device that lost the reply asks again and gets
the same; a session without a connection is freed after a while, and a device that comes later gives
its context anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import math
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from calibrate.decode.clock import synchronise
from calibrate.decode.models import TransformerModel
from calibrate.decode.streams import step_noise
from calibrate.wire.options import ServerOptions
from calibrate.wire.protocol import (
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
    pack_error,
    pack_opened,
    pack_reply,
    unpack_ask,
    unpack_open,
    unpack_resume,
)
from calibrate.wire.slots import SlotCaches
from hlmtheory import domain
from hlmtheory.acceptance import rejection_probability
from hlmtheory.policies import Policy, policy_class, policy_from_settings
from hlmtheory.quantised_law import law_of, levels
from hlmtheory.sampled_law import penalised_logits, sampled_law

LONG_APPEND = 32
"""Contexts that grow by more tokens than this run alone: others would wait for their padding."""


@dataclass
class Session:
    """One context, and what is owed to its device.

    Attributes
    ----------
    name : bytes
    slot : int
        Its row of the caches.
    opening : Opening
    policy : Policy
        Answers; its gate is the device's affair.
    tokens : list of int
        Context and answer as far as known; the caches hold the first `fed` of them.
    position : int
        Tokens of the answer that are known.
    last : bytes
        The last reply, at `position` - 1.
    work : Future or None
        The reply that is being made, and for which position.
    connection : ServerConnection or None
    used : float
        When it was last heard of.
    """

    name: bytes
    slot: int
    opening: Opening
    policy: Policy
    tokens: list[int]
    position: int
    fed: int = 0
    last: bytes = b""
    work: tuple[int, asyncio.Future[bytes]] | None = None
    connection: ServerConnection | None = None
    used: float = field(default_factory=time.monotonic)


@dataclass
class Job:
    """An ask that waits, since when by the clock, and where its reply goes."""

    session: Session
    ask: Ask
    done: asyncio.Future[bytes]
    since: float


class _Numbers:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, **options: Any) -> Any:
            return kind(f"hlm_{name}", text, registry=self.registry, **options)

        self.sessions = make(Gauge, "sessions", "Sessions held")
        self.asked = make(Counter, "asks", "Drafts verified, and tokens streamed")
        self.refused = make(Counter, "refusals", "Errors sent", labelnames=["reason"])
        self.busy = make(Counter, "busy_seconds", "Time inside the model")
        self.received = make(Counter, "received_bytes", "Messages, with their framing")
        self.sent = make(Counter, "sent_bytes", "Messages, with their framing")
        buckets = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch = make(Histogram, "batch_size", "Sessions advanced together", buckets=buckets)


class Server:
    """Sessions, their queue, and the model.

    Parameters
    ----------
    model : TransformerModel
    vocabulary : callable
        SHA-256 of the tokens below an id.
    end_tokens : sequence of int
        Any of these ends an answer.
    options : ServerOptions
    """

    def __init__(
        self,
        model: TransformerModel,
        vocabulary: Callable[[int], str],
        end_tokens: Sequence[int],
        options: ServerOptions,
    ) -> None:
        self.model, self.options = model, options
        self.vocabulary, self.end_tokens = cache(vocabulary), tuple(end_tokens)
        self.caches = SlotCaches(model, options.max_sessions)
        self.sessions: dict[bytes, Session] = {}
        self.free = list(range(options.max_sessions))[::-1]
        self.queue: deque[Job] = deque()
        self.wake = asyncio.Event()
        self.draining = False
        self.numbers = _Numbers()
        self._token = options.token()
        # One thread owns model and caches.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    # Serving.

    async def run(self, ready: Callable[[int], None], stop: asyncio.Event) -> None:
        """Serve until `stop`; then finish what is being answered. `ready` is told the port."""
        options = self.options
        tasks = [asyncio.create_task(one) for one in (self._work(), self._forget())]
        async with serve(
            self._connected,
            options.host,
            options.port,
            ssl=options.tls(),
            compression=None,  # it would falsify bytes
            max_size=options.max_message_bytes,
            process_request=self._admit,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            ping_interval=20,
            ping_timeout=60,
        ) as listening:
            ready(int(next(iter(listening.sockets)).getsockname()[1]))
            await stop.wait()
            self.draining = True
            while self.queue or any(one.work for one in self.sessions.values()):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # the last replies leave
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._thread.shutdown()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Health and metrics by HTTP; a session only with the token and this protocol."""
        if request.path == "/health":
            state = "draining" if self.draining else "serving"
            return connection.respond(http.HTTPStatus.OK, f"{state}\n")
        given = request.headers.get("Authorization", "")
        if self._token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {self._token}".encode()
        ):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "give the bearer token\n")
        if request.path == "/metrics":
            text = generate_latest(self.numbers.registry).decode()
            return connection.respond(http.HTTPStatus.OK, text)
        offered = request.headers.get_all("Sec-WebSocket-Protocol")
        if SUBPROTOCOL not in [one.strip() for line in offered for one in line.split(",")]:
            text = f"this server speaks {SUBPROTOCOL}; the device offers {', '.join(offered)}\n"
            return connection.respond(http.HTTPStatus.UPGRADE_REQUIRED, text)
        return None

    async def _connected(self, connection: ServerConnection) -> None:
        session: Session | None = None
        try:
            while True:
                frame = await asyncio.wait_for(connection.recv(), self.options.idle_s)
                if isinstance(frame, str):
                    raise FrameError("not a frame of this protocol")
                self.numbers.received.inc(bytes_on_wire(len(frame), True))
                try:
                    session = await self._answer(connection, session, frame)
                except RefusedError as error:
                    await self._refuse(connection, error.reason, str(error))
        except FrameError as error:
            with contextlib.suppress(ConnectionClosed):
                await self._refuse(connection, Reason.FRAME, str(error))
                await connection.close(1002, str(error)[:100])
        except TimeoutError:
            await connection.close(1000, "silent for too long")
        except ConnectionClosed:
            pass
        finally:
            if session is not None and session.connection is connection:
                session.connection = None
                session.used = time.monotonic()

    async def _send(self, connection: ServerConnection, frame: bytes) -> None:
        self.numbers.sent.inc(bytes_on_wire(len(frame), False))
        await connection.send(frame)

    async def _refuse(self, connection: ServerConnection, reason: Reason, text: str) -> None:
        self.numbers.refused.labels(reason.name.lower()).inc()
        await self._send(connection, pack_error(reason, text))

    async def _answer(
        self, connection: ServerConnection, session: Session | None, frame: bytes
    ) -> Session | None:
        """One frame; returns the connection's session."""
        kind = kind_of(frame)
        if kind in (Kind.OPEN, Kind.RESUME):
            if session is not None:
                session.connection = None
            if kind == Kind.OPEN:
                opened_with = unpack_open(frame)
                if session is not None:  # a device has one answer at a time
                    self._free(session)
                session = self._open(*opened_with)
            else:
                session = self._resume(*unpack_resume(frame))
            session.connection, session.used = connection, time.monotonic()
            size = session.opening.vocab_size
            opened = pack_opened(session.name, session.position, self.end_tokens, size)
            await self._send(connection, opened)
            return session
        if kind != Kind.ASK:
            raise FrameError(f"{kind.name}: allowed from a device are OPEN, RESUME and ASK")
        if session is None or session.name not in self.sessions:
            raise RefusedError(Reason.SESSION, "no session here: open one")
        opening = session.opening
        ask = unpack_ask(frame, opening.vocab_size, opening.prob_bits)
        session.used = time.monotonic()
        if not ask.flags & Flag.STREAM:
            await self._send(connection, await self._reply(session, ask))
            return session
        while True:
            reply = await self._reply(session, ask)
            await self._send(connection, reply)
            done = session.position >= opening.max_new_tokens
            if done or session.tokens[-1] in (*opening.end_tokens, *self.end_tokens):
                return session
            ask = Ask(session.position, flags=Flag.STREAM)

    # Sessions.

    def _open(self, opening: Opening, context: list[int]) -> Session:
        if self.draining:
            raise RefusedError(Reason.DRAINING, "the server is stopping")
        size, own = opening.vocab_size, self.model.vocab_size
        if size > own or self.vocabulary(size) != opening.vocabulary:
            raise RefusedError(
                Reason.VOCABULARY,
                f"the device's {size} tokens are not the first {size} of the server's {own}: run "
                "two models of one family",
            )
        limit = self.options.max_context
        if len(context) - opening.num_answered + opening.max_new_tokens > limit:
            raise RefusedError(
                Reason.CONTEXT,
                f"{len(context) - opening.num_answered} tokens of a prompt and "
                f"{opening.max_new_tokens} of an answer: the server holds {limit}",
            )
        policy = _answering_policy(opening)
        if not self.free:
            self._evict()
        slot = self.free.pop()
        self.caches.clear(slot)
        session = Session(
            secrets.token_bytes(16), slot, opening, policy, context, opening.num_answered
        )
        self.sessions[session.name] = session
        self.numbers.sessions.set(len(self.sessions))
        return session

    def _resume(self, name: bytes, position: int) -> Session:
        session = self.sessions.get(name)
        if session is None:
            raise RefusedError(Reason.SESSION, "no such session: open one with the context")
        if not session.position - 1 <= position:
            raise RefusedError(
                Reason.POSITION, f"position {position}: the session is at {session.position}"
            )
        return session

    def _free(self, session: Session) -> None:
        if session.work is None and self.sessions.pop(session.name, None) is not None:
            self.free.append(session.slot)
            self.numbers.sessions.set(len(self.sessions))

    def _evict(self) -> None:
        """Room for a new session: of those without a connection the longest silent one goes."""
        left = [one for one in self.sessions.values() if one.connection is None and not one.work]
        if not left:
            raise RefusedError(
                Reason.FULL, f"the server holds {self.options.max_sessions} sessions already"
            )
        self._free(min(left, key=lambda one: one.used))

    async def _forget(self) -> None:
        """Free what nobody has asked for within the idle time."""
        while True:
            await asyncio.sleep(min(self.options.idle_s / 4, 5.0))
            now = time.monotonic()
            for session in list(self.sessions.values()):
                if session.connection is None and now - session.used > self.options.idle_s:
                    self._free(session)

    # Answering.

    async def _reply(self, session: Session, ask: Ask) -> bytes:
        """The reply to an ASK: made, being made, or made before."""
        if session.work is not None and session.work[0] == ask.position:
            return await asyncio.shield(session.work[1])
        if session.last and ask.position == session.position - 1:
            return session.last
        if session.work is not None or ask.position != session.position + len(ask.unseen):
            raise RefusedError(
                Reason.POSITION,
                f"position {ask.position} with {len(ask.unseen)} unseen tokens: the session is at "
                f"{session.position}",
            )
        if ask.position >= session.opening.max_new_tokens:
            raise RefusedError(
                Reason.POSITION,
                f"position {ask.position}: the session has {session.opening.max_new_tokens} tokens",
            )
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        session.work = (ask.position, done)
        self.queue.append(Job(session, ask, done, time.perf_counter()))
        self.wake.set()
        return await asyncio.shield(done)

    async def _work(self) -> None:
        """Advance what waits, first come first served, as many together as may be."""
        loop = asyncio.get_running_loop()
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.queue:
                jobs = self._next_batch()
                try:
                    replies: Sequence[Any] = await loop.run_in_executor(
                        self._thread, self.advance, jobs
                    )
                except Exception as error:  # told to each device; the server goes on
                    replies = [RefusedError(Reason.NUMBERS, f"the server failed: {error}")] * len(
                        jobs
                    )
                for job, reply in zip(jobs, replies, strict=True):
                    job.session.work = None
                    if isinstance(reply, Exception):
                        job.done.set_exception(reply)
                        job.done.exception()  # seen, should nobody wait for it any more
                    else:
                        job.done.set_result(reply)

    def _next_batch(self) -> list[Job]:
        """The first job, and those that go with it."""

        def growth(job: Job) -> int:
            return len(job.session.tokens) + len(job.ask.unseen) - job.session.fed

        jobs = [self.queue.popleft()]
        while (
            self.queue
            and len(jobs) < self.options.max_batch
            and max(growth(jobs[0]), growth(self.queue[0])) <= LONG_APPEND
        ):
            jobs.append(self.queue.popleft())
        return jobs

    def advance(self, jobs: Sequence[Job]) -> list[bytes | RefusedError]:
        """One forward pass for all, then each session's own answer."""
        begin = time.perf_counter()
        with torch.inference_mode(), domain.unchecked():
            known = [job.session.tokens + job.ask.unseen.tolist() for job in jobs]
            rows = [one[job.session.fed :] for one, job in zip(known, jobs, strict=True)]
            logits = self.caches.append([job.session.slot for job in jobs], rows)
            synchronise(self.model.device)
            forward_s = time.perf_counter() - begin
            out: list[bytes | RefusedError] = []
            for job, tokens, row in zip(jobs, known, logits, strict=True):
                job.session.tokens, job.session.fed = tokens, len(tokens)
                waited_s = begin - job.since
                out.append(self._answered(job, row[None], forward_s, waited_s))
        self.numbers.busy.inc(time.perf_counter() - begin)
        self.numbers.batch.observe(len(jobs))
        self.numbers.asked.inc(len(jobs))
        return out

    def _answered(
        self, job: Job, logits: torch.Tensor, forward_s: float, waited_s: float
    ) -> bytes | RefusedError:
        session, ask = job.session, job.ask
        opening = session.opening
        if not torch.isfinite(logits).all():
            return RefusedError(
                Reason.NUMBERS, f"the server model's logits are broken at position {ask.position}"
            )
        y = server_law(logits[:, : opening.vocab_size], opening, session.tokens)
        rejection = math.nan
        if ask.flags & Flag.AUDIT:
            draft = int(ask.draft or 0)
            sent = sent_law_of(ask, opening, y)
            own = rejection_probability(sent[:, draft], y[:, draft])
            token, accepted, rejection = draft, True, float(own[0])
        else:
            noise = step_noise([opening.stream_key], [ask.position], y.shape[-1], y.device)
            asked = torch.tensor([ask.draft or 0], device=y.device)
            answer = session.policy.reply(sent_law_of(ask, opening, y), asked, y, noise)
            token, accepted = int(answer.output[0]), bool(answer.accepted[0])
        session.tokens.append(token)
        session.position = ask.position + 1
        micro = [min(round(1e6 * one), 2**32 - 1) for one in (forward_s, max(waited_s, 0.0))]
        reply = Reply(ask.position, token, accepted, micro[0], micro[1], rejection)
        session.last = pack_reply(reply, opening.vocab_size)
        return session.last


def server_law(logits: torch.Tensor, opening: Opening, context: Sequence[int]) -> torch.Tensor:
    """The law y (1, V) that the server samples from, of its logits behind a context."""
    laws, vocab_size = opening.laws, logits.shape[-1]
    if laws.repetition_penalty != 1:
        seen = [token for token in context if token < vocab_size]
        index = torch.tensor([seen], device=logits.device)
        logits = penalised_logits(logits, index, laws.repetition_penalty)
    return torch.as_tensor(sampled_law(logits, laws))


def sent_law_of(ask: Ask, opening: Opening, like: torch.Tensor) -> torch.Tensor:
    """Probabilities that were sent, (1, V), 0 where none was."""
    sent = torch.zeros_like(like)
    codes = torch.from_numpy(ask.codes).to(like.device)
    total = torch.tensor([ask.total], dtype=torch.float64, device=like.device)
    sent[0, torch.from_numpy(ask.tokens).to(like.device)] = law_of(
        codes, total, opening.prob_bits, like
    )
    return sent


def _answering_policy(opening: Opening) -> Policy:
    """The policy as far as a server needs it: any threshold will do.

    Raises
    ------
    RefusedError
        If the server knows no such policy: files of one's own are the device's alone.
    """
    try:
        levels(opening.prob_bits)
        if ":" in opening.policy:
            raise ValueError(f"policy {opening.policy}: a server knows registered ones only")
        threshold = 0.5 if policy_class(opening.policy).gated else None
        return policy_from_settings(opening.policy, opening.settings, threshold)
    except (ValueError, TypeError) as error:
        raise RefusedError(Reason.POLICY, str(error)) from None


async def serve_until_stopped(server: Server, ready: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.run(ready, stop)
