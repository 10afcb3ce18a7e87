"""Many devices on one server: tokens per second, waits and fairness, beside a queue's prediction.

    python -m benchmarks.load RUN [--users 1,2,4,...] [--seconds 20] [--point POLICY/RULE ...]

The server is `hlm serve`'s, in a process of its own on one thread. Devices have no model here: each
thinks as long as the calibration's device takes for a token, skips where the policy skipped along a
recorded answer, and sends frames as long as that policy's. So any number of devices costs the
machine little more than its frames.

Predicted by docs/theory.md, (64): a pass over b asks, their frames unpacked, is timed apart, on the
same server without a socket, and the think time is the device's for all tokens to the next ask,
plus what one device alone waits beyond its pass. Nothing else is taken from what is predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from websockets.asyncio.client import connect

from calibrate.decode.models import TransformerModel
from calibrate.derive.predict import drawn_tokens
from calibrate.derive.roads import read_roads
from calibrate.pairs.loading import LoadedModel, load_model
from calibrate.pairs.registry import spec_from_settings
from calibrate.pairs.tokenizers import vocabulary_sha256
from calibrate.run.prompts import TokenizedPrompt, draw_prompts, read_prompts, tokenize_prompts
from calibrate.wire.options import ServerOptions
from calibrate.wire.protocol import (
    SUBPROTOCOL,
    Ask,
    Kind,
    Opening,
    kind_of,
    pack_ask,
    pack_open,
    unpack_ask,
)
from calibrate.wire.run import Derived, read_derived, serving
from calibrate.wire.server import Job, Server, Session
from hlmtheory.policies import Policy
from hlmtheory.serving import shared_server

POINTS = ("llm/none", "hlm/none", "u-hlm/risk-0.05", "r-hlm/risk-0.05", "coupled/risk-0.05")
USERS = (1, 2, 4, 8, 16, 32, 64)
MAX_BATCH = 32
POSITION = slice(4, 8)
"""Of an ASK's header: docs/protocol.md."""
LONGEST = 4096


@dataclass(frozen=True)
class Habit:
    """What a device does under a policy, token by token along recorded answers.

    Attributes
    ----------
    policy : Policy
    decide_ms : float
        Of a token, on the device.
    skips : bool array (N,)
    entries : int array (N,)
        Probabilities that are sent.
    """

    policy: Policy
    decide_ms: float
    skips: np.ndarray
    entries: np.ndarray

    @property
    def skip_rate(self) -> float:
        """Share of skipped tokens."""
        return float(self.skips.mean())


@dataclass(frozen=True)
class Load:
    """One policy with a number of devices: the clock beside (64)."""

    point: str
    num_users: int
    tokens_per_s: float
    predicted_tokens_per_s: float
    wait_ms: float
    predicted_wait_ms: float
    busy_share: float
    predicted_busy_share: float
    fairness: float
    """Jain's index of the devices' tokens: 1 where all have as many."""


def habit_of(derived: Derived, trace: Any, key: str) -> Habit:
    """A point's habit; a device model costs its time unless the server writes alone."""
    policy, timings = derived.policy(key), derived.calibration.timings
    assert timings is not None
    of = {name: number.value or 0.0 for name, number in timings.medians.items()}
    decide_ms = 0.0 if policy.role == "server" else of["t_slm_ms"]
    decide_ms += of["t_uncertainty_ms"] if policy.gated else 0.0
    tokens = drawn_tokens(trace, policy)
    return Habit(policy, decide_ms, tokens.skip > 0.5, np.rint(tokens.entries).astype(int))


class Frames:
    """Asks as long as a policy's: which tokens they name changes no time, so they are made once."""

    def __init__(self, habit: Habit, opening: Opening) -> None:
        self._habit, self._opening = habit, opening
        self._rng = np.random.default_rng(0)
        self._made: dict[tuple[int, int], bytes] = {}

    def at(self, token: int, position: int, unseen: int) -> bytes:
        """What the policy sends at a token of the recorded answers."""
        size = self._opening.vocab_size
        key = (min(int(self._habit.entries[token]), size), unseen)
        if key not in self._made:
            self._made[key] = pack_ask(self._ask(*key), size, self._opening.prob_bits)
        made = self._made[key]
        return made[: POSITION.start] + struct.pack("<I", position) + made[POSITION.stop :]

    def _ask(self, num: int, unseen: int) -> Ask:
        size, rng = self._opening.vocab_size, self._rng
        return Ask(
            0,
            rng.integers(0, size, unseen),
            int(rng.integers(size)) if self._habit.policy.draft_sent else None,
            rng.choice(size, num, replace=False) if num else np.zeros(0, dtype=np.int64),
            np.ones(num, dtype=np.int64),
            1e6,
        )


def pass_times(
    model: LoadedModel,
    opening: Opening,
    habit: Habit,
    prompts: Sequence[TokenizedPrompt],
    most: int,
    repeats: int = 7,
) -> list[float]:
    """Median time of a pass over 1 to `most` asks, ms: some measured, lines between."""
    size = opening.vocab_size
    options = ServerOptions(port=0, max_sessions=most, max_batch=most)
    server = Server(TransformerModel(model.model, size), lambda num: "", (), options)
    rng, frames = np.random.default_rng(0), Frames(habit, opening)
    sessions = [
        Session(b"", slot, opening, habit.policy, list(prompt.tokens), 0)
        for slot, prompt in zip(range(most), prompts, strict=False)
    ]
    asked = np.flatnonzero(~habit.skips)
    unseen = np.diff(asked, prepend=-1) - 1

    def one(session: Session) -> bytes:
        at = int(rng.integers(len(asked)))
        return frames.at(int(asked[at]), session.position + int(unseen[at]), int(unseen[at]))

    def taken(some: Sequence[Session]) -> float:
        """Milliseconds of a pass over an ask of each."""
        sent = [one(session) for session in some]
        begin = time.perf_counter()
        asks = [unpack_ask(frame, size, opening.prob_bits) for frame in sent]
        jobs = [Job(*pair, None, begin) for pair in zip(some, asks, strict=True)]  # type: ignore[arg-type]
        server.advance(jobs)
        return 1e3 * (time.perf_counter() - begin)

    for session in sessions:
        taken([session])
    sizes = [num for num in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if num <= most]
    times = {num: [taken(sessions[:num]) for _ in range(repeats)] for num in sizes}
    medians = [float(np.median(times[num])) for num in sizes]
    return [float(one) for one in np.interp(np.arange(1, most + 1), sizes, medians)]


class Crowd:
    """Devices without a model, for a while."""

    def __init__(self, port: int, opening: Opening, habit: Habit) -> None:
        self.url, self.port = f"ws://127.0.0.1:{port}", port
        self.opening, self.habit, self.frames = opening, habit, Frames(habit, opening)
        self.tokens: list[int] = []
        self.waits: list[float] = []
        self.busy_share = 0.0

    def run(self, prompts: Sequence[TokenizedPrompt], seconds: float) -> None:
        """A device each prompt; what is counted begins when all sessions are open."""
        asyncio.run(self._run(prompts, seconds))

    def busy_s(self) -> float:
        """Time that the server has spent inside the model so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return float(next(one for one in lines if one.startswith("hlm_busy_seconds")).split()[1])

    async def _run(self, prompts: Sequence[TokenizedPrompt], seconds: float) -> None:
        self.tokens = [0] * len(prompts)
        ready = asyncio.Barrier(len(prompts) + 1)
        self.counting, self.over = False, False
        devices = [
            asyncio.create_task(self._device(i, prompt, ready)) for i, prompt in enumerate(prompts)
        ]
        await ready.wait()
        await asyncio.sleep(min(2.0, seconds / 4))  # away from the common start
        before, begin = await asyncio.to_thread(self.busy_s), time.perf_counter()
        self.counting = True
        await asyncio.sleep(seconds)
        self.counting = False
        self.seconds = time.perf_counter() - begin
        self.busy_share = (await asyncio.to_thread(self.busy_s) - before) / self.seconds
        self.over = True
        await asyncio.gather(*devices)

    async def _device(self, number: int, prompt: TokenizedPrompt, ready: asyncio.Barrier) -> None:
        habit, opening, rng = self.habit, self.opening, np.random.default_rng(number)
        at, position, unseen = int(rng.integers(len(habit.skips))), 0, 0
        async with connect(
            self.url,
            subprotocols=[SUBPROTOCOL],
            compression=None,
            max_size=4096,  # type: ignore[list-item]
        ) as connection:
            await connection.send(pack_open(opening, prompt.tokens))
            await connection.recv()
            first = True
            while not self.over:
                at = (at + 1) % len(habit.skips)
                if not first:
                    await asyncio.sleep(1e-3 * habit.decide_ms)
                    if habit.skips[at]:
                        unseen, position = unseen + 1, position + 1
                        self.tokens[number] += self.counting
                        continue
                sent = self.frames.at(at, position, unseen)
                begin = time.perf_counter()
                await connection.send(sent)
                frame = await connection.recv()
                assert isinstance(frame, bytes)
                assert kind_of(frame) == Kind.REPLY, frame
                if self.counting:
                    self.waits.append(1e3 * (time.perf_counter() - begin))
                    self.tokens[number] += 1
                unseen, position = 0, position + 1
                if first:
                    first = False
                    await ready.wait()


def opening_of(derived: Derived, model: LoadedModel, policy: Policy) -> Opening:
    """A session that no token ends."""
    settings, size = derived.settings, derived.derivation.pair.vocab_size
    return Opening(
        size, vocabulary_sha256(model.tokenizer, size), policy.name, policy.settings(),
        asdict(settings.sampling), derived.prob_bits, (1, 2), LONGEST,
    )  # fmt: skip


def loads_of(
    derived: Derived, trace: Any, model: LoadedModel, port: int, key: str,
    prompts: Sequence[TokenizedPrompt], users: Sequence[int], seconds: float,
) -> list[Load]:  # fmt: skip
    """One point at every number of devices."""
    habit = habit_of(derived, trace, key)
    opening = opening_of(derived, model, habit.policy)
    pass_ms = pass_times(model, opening, habit, prompts, min(MAX_BATCH, max(users)))
    alone = Crowd(port, opening, habit)
    alone.run(prompts[:1], seconds)
    beyond_ms = max(float(np.mean(alone.waits)) - pass_ms[0], 0.1)
    think_ms = habit.decide_ms / (1 - habit.skip_rate) + beyond_ms
    out = []
    for num in track(users, description=key, console=Console(stderr=True)):
        crowd = Crowd(port, opening, habit)
        crowd.run(prompts[:num], seconds)
        queue = shared_server(num, think_ms, pass_ms)
        tokens = np.array(crowd.tokens, dtype=float)
        out.append(
            Load(
                key,
                num,
                float(tokens.sum() / crowd.seconds),
                queue.asks_per_s / (1 - habit.skip_rate),
                float(np.mean(crowd.waits)),
                queue.wait_ms + beyond_ms,
                crowd.busy_share,
                queue.busy_share,
                float(tokens.sum() ** 2 / (num * (tokens**2).sum())),
            )
        )
    return out


def main() -> None:
    """Run every point and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", default=",".join(map(str, USERS)))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--point", action="append", help="repeatable")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    users = [int(one) for one in given.users.split(",")]
    torch.set_num_threads(1)
    derived = read_derived(given.run, "default")
    trace = read_roads(given.run, derived.calibration).server
    spec = spec_from_settings(derived.calibration.settings)
    dtype = derived.derivation.pair.dtype
    model = load_model(spec.llm, dtype=dtype, device="cpu")
    prompts = tokenize_prompts(
        draw_prompts(read_prompts(None), "calibration", max(users), seed=0),
        model.tokenizer, 64, model.max_context,
    )  # fmt: skip
    options = ServerOptions(port=0, max_sessions=max(users), max_batch=MAX_BATCH)
    loads = []
    for key in given.point or POINTS:
        with serving(spec.llm, options, dtype, "cpu", 1) as port:
            loads += loads_of(derived, trace, model, port, key, prompts, users, given.seconds)
    if given.json:
        print(json.dumps([asdict(one) for one in loads], indent=1))
        return
    print("| policy | devices | tokens/s | (64) | wait, ms | (64) | busy | (64) | fairness |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in loads:
        print(
            f"| {one.point} | {one.num_users} | {one.tokens_per_s:.1f} | "
            f"{one.predicted_tokens_per_s:.1f} | {one.wait_ms:.0f} | {one.predicted_wait_ms:.0f} | "
            f"{one.busy_share:.0%} | {one.predicted_busy_share:.0%} | {one.fairness:.3f} |"
        )
    errors = [abs(one.predicted_tokens_per_s / one.tokens_per_s - 1) for one in loads]
    print(f"\nTokens a second are {np.mean(errors):.1%} off their prediction in the mean.")


if __name__ == "__main__":
    main()
