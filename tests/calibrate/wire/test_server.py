"""Hostile frames, lost links, lost servers: one line each, and the same text as on a calm day."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_wire import END, VOCAB, VOCABULARY, Running, Toys, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from calibrate.run.errors import UsageError, UserError
from calibrate.wire.client import ServerLink
from calibrate.wire.device import Device
from calibrate.wire.options import ServerOptions, read_token
from calibrate.wire.protocol import (
    SUBPROTOCOL,
    Ask,
    Kind,
    Opening,
    Reason,
    kind_of,
    pack_ask,
    pack_open,
    unpack_error,
    unpack_opened,
    unpack_reply,
)
from hlmtheory.policies import policy_from_settings

OPENING = Opening(VOCAB, VOCABULARY, "hlm", {}, {}, 8, (3, 4), 12, (END,))
POLICY = policy_from_settings("u-hlm", {}, 0.5)


def text(
    toys: Toys, url: str, prompt: int = 0, on_token=lambda token: None, **options
) -> list[int]:
    """A device's answer to one prompt."""
    with ServerLink(url, **options) as link:
        device = Device(toys.slm, POLICY, toys.settings, VOCAB, VOCABULARY, [END], link)
        answer = device.decode(toys.prompts[prompt], on_token)
    return [one.output_token for one in answer.tokens]


@contextlib.contextmanager
def raw(url: str, **options) -> Iterator:
    with connect(url, subprotocols=[SUBPROTOCOL], compression=None, **options) as one:
        yield one


def error_of(frame: bytes) -> tuple[Reason, str]:
    assert kind_of(frame) == Kind.ERROR
    error = unpack_error(frame)
    return error.reason, str(error)


# --- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", range(60))
def test_a_hostile_frame_ends_its_own_connection_and_no_other(toys, server: Running, hostile):
    rng = np.random.default_rng(hostile)
    frames = [rng.bytes(int(rng.integers(0, 200)))]
    good = pack_ask(Ask(0, draft=3, tokens=np.arange(9), codes=np.arange(9)), VOCAB, 8)
    broken = bytearray(good)
    broken[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
    frames += [bytes(broken), good[: int(rng.integers(len(good)))], "a text"]
    before = len(server.server.sessions)
    with raw(server.url) as one, contextlib.suppress(ConnectionClosed):
        one.send(pack_open(OPENING, [1, 5]))
        assert kind_of(one.recv(timeout=10)) == Kind.OPENED
        one.send(frames[hostile % len(frames)])
        answer = one.recv(timeout=10)
        assert kind_of(answer) in (Kind.ERROR, Kind.REPLY)
    assert len(server.server.sessions) <= before + 1
    assert text(toys, server.url)


@pytest.mark.long
def test_ten_thousand_hostile_frames(toys):
    rng = np.random.default_rng(1)
    good = [
        pack_open(OPENING, [1, 5]),
        pack_ask(Ask(0, draft=3, tokens=np.arange(9), codes=np.arange(9)), VOCAB, 8),
    ]
    with running(toys, max_sessions=8) as server:
        calm = text(toys, server.url)
        sent = 0
        while sent < 10_000:
            with raw(server.url) as one, contextlib.suppress(ConnectionClosed):
                for _ in range(50):
                    frame = bytearray(good[int(rng.integers(2))])
                    for _ in range(int(rng.integers(0, 4))):
                        frame[int(rng.integers(len(frame)))] = int(rng.integers(256))
                    cut = len(frame) if rng.random() < 0.7 else int(rng.integers(len(frame)))
                    one.send(bytes(frame[:cut]))
                    sent += 1
                    assert kind_of(one.recv(timeout=20)) in (Kind.ERROR, Kind.REPLY, Kind.OPENED)
        assert len(server.server.sessions) + len(server.server.free) == 8
        assert text(toys, server.url) == calm


def test_an_ask_without_a_session_and_at_a_false_position_is_refused(server: Running):
    with raw(server.url) as one:
        one.send(pack_ask(Ask(0), VOCAB, 8))
        assert error_of(one.recv(timeout=10))[0] == Reason.SESSION
        one.send(pack_open(OPENING, [1, 5]))
        assert unpack_opened(one.recv(timeout=10), VOCAB)[1:] == (0, [END])
        one.send(pack_ask(Ask(3, draft=4), VOCAB, 8))
        reason, line = error_of(one.recv(timeout=10))
        assert (reason, line) == (
            Reason.POSITION, "position 3 with 0 unseen tokens: the session is at 0",
        )  # fmt: skip
        one.send(pack_ask(Ask(0, draft=4), VOCAB, 8))
        assert unpack_reply(one.recv(timeout=10), VOCAB).position == 0


def test_the_same_ask_twice_is_answered_alike_and_counted_once(server: Running):
    with raw(server.url) as one:
        one.send(pack_open(OPENING, [1, 5]))
        one.recv(timeout=10)
        frame = pack_ask(Ask(0, draft=4), VOCAB, 8)
        replies = []
        for _ in range(2):
            one.send(frame)
            replies.append(one.recv(timeout=10))
        assert replies[0] == replies[1]
        one.send(pack_ask(Ask(1, draft=4), VOCAB, 8))
        assert unpack_reply(one.recv(timeout=10), VOCAB).position == 1


# --- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "line"), [
    ({"vocabulary": "other"}, "the device's 96 tokens are not"),
    ({"vocab_size": 97}, "server's 96"),
    ({"policy": "nobody"}, "policy nobody: unknown"), ({"policy": "mine.py:Mine"}, "registered"),
    ({"settings": {"odd": 1}}, "unknown setting 'odd'"), ({"max_new_tokens": 10**6}, "holds 8192"),
])  # fmt: skip
def test_a_session_that_cannot_be_is_refused_in_one_line(server: Running, change, line):
    opening = replace(OPENING, **change)
    with ServerLink(server.url) as link, pytest.raises(UserError, match="refuses") as found:
        link.open(opening, [1, 5])
    assert line in str(found.value)
    assert "\n" not in str(found.value)


def test_another_protocol_is_told(server: Running, monkeypatch):
    monkeypatch.setattr("calibrate.wire.client.SUBPROTOCOL", "hlm.9")
    line = re.escape("this server speaks hlm.1; the device offers hlm.9")
    with ServerLink(server.url) as link, pytest.raises(UserError, match=line):
        link.open(OPENING, [1, 5])


def certificate(folder: Path, days: int = 2) -> tuple[Path, Path]:
    """A self-signed certificate of localhost, valid until `days` from now."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert, secret


def test_a_server_with_tls_and_a_token_serves_who_has_both(toys, tmp_path):
    cert, key = certificate(tmp_path)
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef\n")
    with running(toys, tls_cert=cert, tls_key=key, token_file=secret) as server:
        mine = text(toys, server.url, token="0123456789abcdef", tls_ca=cert)
        for options, line in (
            ({"tls_ca": cert}, "does not know the token"),
            ({"tls_ca": cert, "token": "0123456789abcdeF"}, "does not know the token"),
            ({"token": "0123456789abcdef"}, "its certificate does not hold"),
        ):
            with pytest.raises(UserError, match=line):
                text(toys, server.url, **options)
    with running(toys) as plain:
        assert text(toys, plain.url) == mine


def test_an_expired_certificate_is_told(toys, tmp_path):
    cert, key = certificate(tmp_path, days=-1)
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef")
    with (
        running(toys, tls_cert=cert, tls_key=key, token_file=secret) as server,
        pytest.raises(UserError, match="certificate has expired"),
    ):
        text(toys, server.url, token="0123456789abcdef", tls_ca=cert)


def test_off_loopback_a_server_needs_tls_and_a_token(tmp_path):
    for host in ("0.0.0.0", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match=f"--host {host}: off loopback"):
            ServerOptions(host=host)
    with pytest.raises(UsageError, match="give both or none"):
        ServerOptions(tls_cert=tmp_path / "cert.pem")
    short = tmp_path / "token"
    short.write_text("short")
    with pytest.raises(UsageError, match="16 or more"):
        read_token(short)


# --- bad days ------------------------------------------------------------------------------------


class Cutting:
    """A proxy that carries so many bytes of each connection and then cuts it."""

    def __init__(self, port: int, limits: list[int]) -> None:
        self.port, self._target, self._limits = 0, port, limits
        self.num_cut = 0
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _carry(self, reader, writer) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        left = [self._limits.pop(0) if self._limits else 10**9]

        async def one_way(source, sink) -> None:
            while left[0] > 0 and (chunk := await source.read(64)):
                sink.write(chunk[: left[0]])
                left[0] -= len(chunk)
                await sink.drain()

        ways = [asyncio.ensure_future(one_way(*pair)) for pair in ((reader, back), (there, writer))]
        with contextlib.suppress(ConnectionError):
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        self.num_cut += left[0] <= 0
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for one in (writer, back):
            one.transport.abort()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


@pytest.mark.parametrize("seed", range(4))
def test_a_link_that_is_cut_anywhere_changes_no_token(toys, server: Running, seed):
    rng = np.random.default_rng(seed)
    proxy = Cutting(server.port, [int(n) for n in rng.integers(500, 3000, 6)])
    expected = text(toys, server.url, 1)
    assert text(toys, f"ws://127.0.0.1:{proxy.port}", 1) == expected
    assert proxy.num_cut >= 1
    proxy.close()


def test_a_server_that_is_killed_and_started_again_changes_no_token(toys):
    with running(toys) as first:
        expected = text(toys, first.url)
        port = first.port
    servers = [Running(toys, port=port)]

    def restart(token) -> None:
        if token.step == 4:
            servers[0].close()
            servers.append(Running(toys, port=port))

    try:
        assert text(toys, servers[0].url, on_token=restart) == expected
        assert len(servers) == 2
    finally:
        servers[-1].close()


def test_a_server_that_never_comes_is_told_within_patience(toys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"no answer for 0.3 s .* start it with `hlm serve`"):
            text(toys, f"ws://127.0.0.1:{port}", patience_s=0.3)


def test_sessions_of_devices_that_vanished_are_freed(toys):
    with running(toys, max_sessions=2, idle_s=0.4) as server:
        for _ in range(2):
            with raw(server.url) as one:
                one.send(pack_open(OPENING, [1, 5]))
                one.recv(timeout=10)
        assert len(server.server.sessions) == 2
        deadline = time.monotonic() + 20
        while server.server.sessions and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.server.sessions
        assert sorted(server.server.free) == [0, 1]


def test_a_full_server_says_so_and_lets_a_vanished_one_go(toys):
    with running(toys, max_sessions=1) as server, raw(server.url) as two:
        with raw(server.url) as one:
            for link, expected in ((one, Kind.OPENED), (two, Kind.ERROR)):
                link.send(pack_open(OPENING, [1, 5]))
                assert kind_of(link.recv(timeout=10)) == expected
        time.sleep(0.3)
        two.send(pack_open(OPENING, [1, 5]))
        assert kind_of(two.recv(timeout=10)) == Kind.OPENED


def test_a_slow_reader_does_not_hold_up_others(toys, server: Running):
    """It asks for a stream and never reads it."""
    with raw(server.url) as slow:
        slow.send(pack_open(replace(OPENING, policy="llm", max_new_tokens=2000), [1, 5]))
        slow.send(pack_ask(Ask(0, flags=2), VOCAB, 8))
        assert text(toys, server.url)


def test_devices_together_get_what_each_gets_alone(toys, server: Running):
    alone = [text(toys, server.url, number) for number in range(8)]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = text(toys, server.url, number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert [found[number] for number in range(8)] == alone


def test_health_and_metrics_are_told(toys, server: Running):
    base = f"http://localhost:{server.port}"
    with urllib.request.urlopen(f"{base}/health", timeout=10) as answer:
        assert answer.read() == b"serving\n"

    def asked() -> float:
        with urllib.request.urlopen(f"{base}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(one for one in lines if one.startswith("hlm_asks_total ")).split()[1])

    before = asked()
    with ServerLink(server.url) as link:
        device = Device(toys.slm, POLICY, toys.settings, VOCAB, VOCABULARY, [END], link)
        tokens = device.decode(toys.prompts[0]).tokens
    assert asked() - before == sum(not one.skipped for one in tokens)


def test_audits_tell_the_rejection_of_skipped_drafts_and_change_no_token(toys, server: Running):
    from calibrate.decode.engine import decode

    (batch,) = decode(toys.slm, toys.llm, toys.prompts, POLICY, toys.settings, [END])
    ids = np.array(batch.prompt_ids)[batch.columns["row"]]
    beta = {
        (str(name), int(step)): float(value)
        for name, step, value in zip(
            ids, batch.columns["step"], batch.columns["rejection_prob"], strict=True
        )
    }
    with ServerLink(server.url) as link:
        device = Device(toys.slm, POLICY, toys.settings, VOCAB, VOCABULARY, [END], link, 0.5)
        tokens = [one for prompt in toys.prompts for one in device.decode(prompt).tokens]
    assert [one.output_token for one in tokens] == batch.columns["output_token"][
        np.lexsort((batch.columns["step"], ids))
    ].tolist()
    audited = [one for one in tokens if one.audited]
    skipped = sum(one.skipped for one in tokens)
    assert 0 < len(audited) < skipped
    for one in audited:
        assert one.rejection_prob == pytest.approx(beta[one.prompt_id, one.step], abs=1e-5)
