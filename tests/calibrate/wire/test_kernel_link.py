"""The relay against the kernel's own link: a network namespace behind a token bucket of `tc`."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from calibrate.wire.relay import Rate, WireLink, relay

RATE_BPS = 6e6
SIZES = (60_000, 150_000, 400_000)
HEADERS = 66 / 1448
"""Of Ethernet, IP and TCP with timestamps on a full segment: the kernel's bucket counts them."""
BURST_BYTES = 3200
PORT = 8799

ECHO = f"""
import socket
with socket.create_server(("0.0.0.0", {PORT})) as server:
    print("ready", flush=True)
    while True:
        there, _ = server.accept()
        with there:
            while head := there.recv(8, socket.MSG_WAITALL):
                num = int.from_bytes(head, "big")
                there.sendall(there.recv(num, socket.MSG_WAITALL))
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=20)


@pytest.fixture
def behind_the_kernel() -> Iterator[str]:
    """Address of an echo in a namespace whose link has a rate each way."""
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs ip and tc")
    space, here, there = "hlm-link", "hlm-here", "hlm-there"
    bucket = ("root", "tbf", "rate", f"{RATE_BPS / 1e3:g}kbit", "burst", str(BURST_BYTES),
              "limit", "4mb")  # fmt: skip
    within = ("ip", "netns", "exec", space)
    echo = None
    try:
        try:
            run("ip", "netns", "add", space)
            run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            run("ip", "link", "set", there, "netns", space)
            run("ip", "addr", "add", "10.213.7.1/24", "dev", here)
            run(*within, "ip", "addr", "add", "10.213.7.2/24", "dev", there)
            for prefix, name in (((), here), (within, there)):
                run(*prefix, "ip", "link", "set", name, "mtu", "1500", "up")
                run(*prefix, "tc", "qdisc", "add", "dev", name, *bucket)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"the kernel does not let us: {error.stderr.decode().strip()}")
        words = [*within, sys.executable, "-c", ECHO]
        echo = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        yield "10.213.7.2"
    finally:
        if echo is not None:
            echo.kill()
            echo.communicate()
        for words in (("ip", "link", "del", here), ("ip", "netns", "del", space)):
            with contextlib.suppress(subprocess.CalledProcessError):
                run(*words)


@contextlib.contextmanager
def relayed() -> Iterator[int]:
    """Port of a relay of the same rate to an echo of this machine."""
    words = [sys.executable, "-c", ECHO.replace(str(PORT), str(PORT + 1))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as echo:
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        ready: list[int] = []
        listening, stop = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        def note(port: int) -> None:
            ready.append(port)
            listening.set()

        link = WireLink(Rate((RATE_BPS,)), Rate((RATE_BPS,)))
        job = relay(link, ("127.0.0.1", PORT + 1), ready=note, stop=stop)
        thread = threading.Thread(target=loop.run_until_complete, args=(job,))
        thread.start()
        try:
            assert listening.wait(10)
            yield ready[0]
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            loop.close()
            echo.kill()


def there_and_back_s(host: str, port: int, size: int) -> float:
    """Best of three, so that a busy moment of the machine does not count."""
    message = np.random.default_rng(size).bytes(size)
    best = np.inf
    with socket.create_connection((host, port), 10) as link:
        link.settimeout(None)  # with one, WAITALL does not wait
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(3):
            time.sleep(0.1)  # both buckets are full again
            begin = time.perf_counter()
            link.sendall(size.to_bytes(8, "big") + message)
            back = link.recv(size, socket.MSG_WAITALL)
            best = min(best, time.perf_counter() - begin)
            assert back == message
    return best


@pytest.mark.long
def test_the_relay_takes_what_the_kernel_takes_but_for_headers(behind_the_kernel: str) -> None:
    with relayed() as port:
        for size in SIZES:
            ours = there_and_back_s("127.0.0.1", port, size)
            kernel = there_and_back_s(behind_the_kernel, PORT, size)
            bits = 8 * size * (1 + HEADERS) - 8 * BURST_BYTES
            assert kernel == pytest.approx(2 * bits / RATE_BPS, rel=0.05)
            assert ours == pytest.approx(2 * 8 * (size + 4) / RATE_BPS, rel=0.03)
            assert ours / kernel == pytest.approx(size / (bits / 8), rel=0.05)
