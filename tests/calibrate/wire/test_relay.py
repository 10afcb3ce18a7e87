"""The relay: what a rate and a delay make of bytes, by arithmetic and by the clock."""

from __future__ import annotations

import asyncio
import queue
import threading
import time

import numpy as np
import pytest
from toy_wire import END, VOCAB, VOCABULARY

from calibrate.run.errors import UsageError
from calibrate.wire.client import ServerLink
from calibrate.wire.protocol import Ask, Opening, ask_bytes, payload_bits_of, reply_bytes
from calibrate.wire.relay import Direction, Rate, WireLink, relay


def test_a_constant_rate_carries_bits_over_rate():
    assert Rate((1e6,)).end_s(3.0, 5e5) == pytest.approx(3.5)


def test_rates_over_time_carry_what_their_sum_says(rng):
    """Against small steps of the obvious loop."""
    rate = Rate((2e3, 0.0, 5e3, 1e3), 0.5)
    for _ in range(40):
        begin, bits = rng.uniform(0, 5), rng.uniform(1, 2e4)
        now, left, step = begin, bits, 1e-4
        while left > 0:
            left -= step * rate.bps[int(now / rate.interval_s + 1e-12) % 4]
            now += step
        assert rate.end_s(begin, bits) == pytest.approx(now, abs=2e-3 + 1e-12)


def test_bits_end_before_a_gap_and_not_behind_it():
    rate = Rate((1e3, 0.0), 1.0)
    assert rate.end_s(0.0, 1e3) == pytest.approx(1.0)
    assert rate.end_s(0.0, 1001) == pytest.approx(2.001)


def test_chunks_leave_one_behind_the_other():
    way = Direction(Rate((8e3,)), 0.25)
    assert [way.arrival_s(0.0, 1000), way.arrival_s(0.0, 500)] == pytest.approx([1.25, 1.75])
    assert way.arrival_s(10.0, 1000) == pytest.approx(11.25)  # the link was idle
    assert way.num_bytes == 2500


def test_rates_that_carry_nothing_are_refused():
    for bad in ((), (0.0,), (-1.0, 2.0)):
        with pytest.raises(UsageError, match="bits a second"):
            Rate(bad)


def test_a_message_takes_what_the_link_says_by_the_clock():
    """There and back: bits over each rate, and the round trip; bytes whole and in order."""
    message = np.random.default_rng(0).bytes(40_000)
    link = WireLink(Rate((4e6,)), Rate((8e6,)), 60.0)
    expected_s = 8 * len(message) / 4e6 + 8 * len(message) / 8e6 + 0.06

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(len(message)))
        await writer.drain()
        writer.close()

    async def trip() -> tuple[float, tuple[int, int]]:
        target = await asyncio.start_server(echo, "127.0.0.1", 0)
        ports: asyncio.Queue[int] = asyncio.Queue()
        stop = asyncio.Event()
        there = ("127.0.0.1", target.sockets[0].getsockname()[1])
        carried = asyncio.create_task(relay(link, there, ready=ports.put_nowait, stop=stop))
        reader, writer = await asyncio.open_connection("127.0.0.1", await ports.get())
        begin = time.perf_counter()
        writer.write(message)
        assert await reader.readexactly(len(message)) == message
        spent = time.perf_counter() - begin
        writer.close()
        await writer.wait_closed()
        stop.set()
        found = await carried
        target.close()
        await target.wait_closed()
        return spent, found

    spent_s, num_bytes = asyncio.run(trip())
    assert num_bytes == (len(message), len(message))
    assert spent_s >= expected_s - 1e-3  # never faster; how much slower is the machine's affair


def test_an_ask_and_its_reply_are_as_many_bytes_on_the_socket_as_stated(toys, server):
    """Counted by the relay, which knows no frames: two sessions that differ in asks alone."""

    def carried(num_asks: int) -> tuple[int, int]:
        found: list[tuple[int, int]] = []
        ports: queue.Queue[int] = queue.Queue()
        stops: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

        async def carry() -> None:
            stop = asyncio.Event()
            stops.put((asyncio.get_running_loop(), stop))
            target = ("localhost", server.port)
            found.append(await relay(WireLink(), target, ready=ports.put, stop=stop))

        thread = threading.Thread(target=lambda: asyncio.run(carry()))
        thread.start()
        with ServerLink(f"ws://127.0.0.1:{ports.get(timeout=10)}") as link:
            link.open(opening, [1, 5])
            for position in range(num_asks):
                link.ask(ask_at(position), [1, 5])
        loop, stop = stops.get()
        time.sleep(0.2)  # the closing handshake
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        return found[0]

    def ask_at(position: int) -> Ask:
        return Ask(position, draft=3, tokens=np.arange(40), codes=np.arange(40))

    opening = Opening(VOCAB, VOCABULARY, "hlm", {}, {}, 8, (3, 4), 12, (END,))
    few, many = carried(2), carried(7)
    bits = payload_bits_of(ask_at(0), VOCAB, 8)
    assert many[0] - few[0] == 5 * ask_bytes(bits)
    assert many[1] - few[1] == 5 * reply_bytes(VOCAB)
