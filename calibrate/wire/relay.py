"""A link of a given rate and delay between two processes of one machine; no privileges needed.

Bytes of each direction leave at the rate, one behind the other, and arrive after the delay: what a
token bucket of the size of a chunk does. All connections share it, as devices share a cell.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from calibrate.run.errors import UsageError

CHUNK_BYTES = 8192
"""Read together, so the last byte of a message leaves when its rate says."""

MAX_QUEUED_BYTES = 8 * 2**20
"""Of one connection and direction; then its sender waits."""


@dataclass(frozen=True)
class Rate:
    """Bits a second over time, each for `interval_s`, repeated for ever.

    Raises
    ------
    UsageError
        If a rate is negative, or all are 0.
    """

    bps: tuple[float, ...]
    interval_s: float = 1.0

    def __post_init__(self) -> None:
        if not self.bps or min(self.bps) < 0 or max(self.bps) <= 0 or self.interval_s <= 0:
            raise UsageError("rate: allowed are bits a second, 0 or more, and one above 0")

    @property
    def _carried(self) -> list[float]:
        return [0.0, *accumulate(rate * self.interval_s for rate in self.bps)]

    def end_s(self, begin_s: float, bits: float) -> float:
        """When bits that begin to leave at `begin_s` have left."""
        if len(self.bps) == 1:
            return begin_s + bits / self.bps[0]
        carried, period = self._carried, self.interval_s * len(self.bps)
        rounds, within = divmod(begin_s, period)
        place = min(int(within / self.interval_s), len(self.bps) - 1)
        level = carried[place] + (within - place * self.interval_s) * self.bps[place] + bits
        more, level = divmod(level, carried[-1])
        if level == 0 and more:  # the end of a round, not the beginning of the next
            more, level = more - 1, carried[-1]
        place = min(max(bisect_right(carried, level) - 1, 0), len(self.bps) - 1)
        while place and self.bps[place] == 0:
            place -= 1
        rest = (level - carried[place]) / self.bps[place] if self.bps[place] else 0.0
        return (rounds + more) * period + place * self.interval_s + rest


class Direction:
    """One way of the link: when each chunk arrives, given what left before it."""

    def __init__(self, rate: Rate | None, delay_s: float, start_s: float = 0.0) -> None:
        self._rate, self._delay_s, self._start_s = rate, delay_s, start_s
        self._free_s = 0.0
        self.num_bytes = 0

    def arrival_s(self, now_s: float, num_bytes: int) -> float:
        """When a chunk that is handed over now arrives."""
        now_s -= self._start_s
        self.num_bytes += num_bytes
        begin = max(now_s, self._free_s)
        self._free_s = begin if self._rate is None else self._rate.end_s(begin, 8.0 * num_bytes)
        return self._start_s + self._free_s + self._delay_s


@dataclass(frozen=True)
class WireLink:
    """What a relay makes of a link.

    Attributes
    ----------
    uplink, downlink : Rate or None
        None carries at once.
    round_trip_ms : float
        Half of it each way.
    """

    uplink: Rate | None = None
    downlink: Rate | None = None
    round_trip_ms: float = 0.0


async def relay(
    link: WireLink,
    target: tuple[str, int],
    host: str = "127.0.0.1",
    port: int = 0,
    ready: Callable[[int], None] = lambda port: None,
    stop: asyncio.Event | None = None,
) -> tuple[int, int]:
    """Carry connections to `target` until `stop`; returns the bytes carried up and down.

    `ready` is called with the port.
    """
    delay_s, start = 5e-4 * link.round_trip_ms, time.monotonic()
    up, down = (Direction(rate, delay_s, start) for rate in (link.uplink, link.downlink))

    stop = asyncio.Event() if stop is None else stop
    open_ones: set[asyncio.Task[None] | None] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.add(asyncio.current_task())
        try:
            there, back = await asyncio.open_connection(*target)
        except OSError:
            writer.close()
            return
        both = [
            asyncio.create_task(_carry_one_way(reader, back, up)),
            asyncio.create_task(_carry_one_way(there, writer, down)),
        ]
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([*both, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():  # what is under way still arrives
            await asyncio.wait([*both, stopped], timeout=2 * delay_s + 1.0)
        for task in (*both, stopped):
            task.cancel()
        await asyncio.gather(*both, stopped, return_exceptions=True)
        for one in (back, writer):
            one.close()
            with contextlib.suppress(OSError):
                await one.wait_closed()

    server = await asyncio.start_server(carry, host, port, limit=CHUNK_BYTES)
    ready(int(server.sockets[0].getsockname()[1]))
    async with server:
        await stop.wait()
        await asyncio.gather(*(one for one in open_ones if one), return_exceptions=True)
    return up.num_bytes, down.num_bytes


async def _carry_one_way(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
) -> None:
    """Read at once, write when it is due; the end of the stream is carried too."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_QUEUED_BYTES // CHUNK_BYTES)

    async def deliver() -> None:
        while True:
            due, chunk = await queue.get()
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if not chunk:
                return
            writer.write(chunk)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    try:
        with contextlib.suppress(ConnectionError):
            while (chunk := await reader.read(CHUNK_BYTES)) and not delivering.done():
                await queue.put((way.arrival_s(time.monotonic(), len(chunk)), chunk))
        await queue.put((way.arrival_s(time.monotonic(), 0), b""))
        with contextlib.suppress(ConnectionError):
            await delivering
    finally:
        delivering.cancel()
