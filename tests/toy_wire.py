"""A toy server in a thread of the tests, and what a device needs to ask it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.decode.engine import DecodingSettings
from calibrate.decode.models import TransformerModel
from calibrate.run.prompts import TokenizedPrompt
from calibrate.wire.options import ServerOptions
from calibrate.wire.server import Server

VOCAB = 96
VOCABULARY = "toy"
END = 2


@dataclass
class Toys:
    """Device and server model, and prompts."""

    slm: TransformerModel
    llm: TransformerModel
    prompts: list[TokenizedPrompt]
    settings: DecodingSettings


def make_toys(folder: Path) -> Toys:
    """From the folders of the toy pair."""
    from transformers import AutoModelForCausalLM

    from calibrate.pairs.attention import allow_recording

    slm, llm = (
        AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("device", "server")
    )
    allow_recording(slm)
    prompts = [
        TokenizedPrompt(f"p{i}", (1, 3 + i, 5 + 7 * i % 80, *range(10, 10 + i % 5)))
        for i in range(8)
    ]
    settings = DecodingSettings(max_new_tokens=12, batch_size=8, seed=4, prob_bits=8)
    return Toys(TransformerModel(slm, VOCAB), TransformerModel(llm, VOCAB), prompts, settings)


class Running:
    """A server in a thread of its own."""

    def __init__(self, toys: Toys, **options: Any) -> None:
        self.ready = threading.Event()
        self.port = 0
        self.server: Server | None = None
        self.stopped = threading.Event()
        self._options = ServerOptions(**{"port": 0} | options)
        self._toys = toys
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self.ready.wait(20)

    @property
    def url(self) -> str:
        scheme = "ws" if self._options.tls_cert is None else "wss"
        return f"{scheme}://localhost:{self.port}"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = Server(self._toys.llm, lambda size: VOCABULARY, [END], self._options)

        def ready(port: int) -> None:
            self.port = port
            self.ready.set()

        await self.server.run(ready, self._stop)

    def call(self, function: Callable[[], Any]) -> None:
        """Run something on the server's own loop."""
        assert self._loop is not None
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(10)

    def close(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def running(toys: Toys, **options: Any) -> Iterator[Running]:
    server = Running(toys, **options)
    try:
        yield server
    finally:
        server.close()
