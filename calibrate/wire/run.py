"""A server and a device made of a run: which models, which policy, which settings."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from calibrate.decode.engine import DecodingSettings
from calibrate.decode.models import TransformerModel
from calibrate.derive.predict import feasible_point, point_policy
from calibrate.pairs.loading import LoadedModel, load_model
from calibrate.pairs.sources import ModelSpec
from calibrate.pairs.tokenizers import vocabulary_sha256
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, DerivationRecord, OperatingPoint
from calibrate.run.traces import read_axes, shard_paths
from calibrate.wire.client import ServerLink
from calibrate.wire.device import PROB_BITS, Device
from calibrate.wire.options import ServerOptions
from calibrate.wire.relay import WireLink, relay
from calibrate.wire.server import Server, serve_until_stopped
from hlmtheory.policies import Policy
from hlmtheory.uncertainty import Temperatures

START_S = 600.0
"""A model is loaded within this, or something is wrong."""


@dataclass(frozen=True)
class Derived:
    """A run as far as a device reads it.

    Attributes
    ----------
    derivation, calibration : records
    settings : DecodingSettings
        Those of the calibration, rounded to PROB_BITS bits a probability.
    """

    derivation: DerivationRecord
    calibration: CalibrationRecord
    settings: DecodingSettings

    def point(self, key: str) -> OperatingPoint:
        """A feasible operating point by its key.

        Raises
        ------
        UsageError
        """
        return feasible_point(self.derivation, key)

    @property
    def prob_bits(self) -> int:
        """Bits of a probability on the wire."""
        return self.settings.prob_bits or PROB_BITS

    def policy(self, key: str) -> Policy:
        """What the device runs."""
        return point_policy(self.derivation, self.point(key), self.calibration.learned)

    def device(
        self,
        policy: Policy,
        model: LoadedModel,
        server: ServerLink | None,
        audit_rate: float = 0.0,
        **settings: Any,
    ) -> Device:
        """A device with this model; settings take the place of the calibration's."""
        size = self.derivation.pair.vocab_size
        if model.vocab_size < size:
            raise UserError(
                f"{model.label} has {model.vocab_size} tokens, the calibrated pair {size}; give "
                "the calibrated device model"
            )
        slm = None if policy.role == "server" else TransformerModel(model.model, size)
        link = None if policy.role == "device" else server
        ends = [token for token in model.end_tokens if token < size]
        return Device(
            slm,
            policy,
            replace(self.settings, **settings),
            size,
            vocabulary_sha256(model.tokenizer, size),
            ends,
            link,
            audit_rate,
        )


def read_derived(run: Path, name: str) -> Derived:
    """What was derived of a run under a name; nothing is loaded.

    Raises
    ------
    UserError
    """
    calibration = read_record(run, CalibrationRecord)
    of, shards = calibration.settings, shard_paths(run)
    if not shards:
        raise UserError(f"{run}: holds no trace shard, which says what u is; calibrate again")
    settings = DecodingSettings(
        sampling=of.sampling,
        max_new_tokens=of.max_new_tokens,
        batch_size=1,
        seed=of.seed + 1,
        thetas=Temperatures(read_axes(shards[0]).thetas),
        prob_bits=PROB_BITS,
    )
    return Derived(read_record(run, DerivationRecord, name), calibration, settings)


def serve(model: LoadedModel, options: ServerOptions, ready: Callable[[int], None]) -> None:
    """Serve a model until SIGTERM or SIGINT; `ready` is told the port.

    Raises
    ------
    UserError
        If the port is taken.
    """
    size = model.vocab_size
    server = Server(
        TransformerModel(model.model, size),
        lambda num: vocabulary_sha256(model.tokenizer, num),
        model.end_tokens,
        replace(options, max_context=min(options.max_context, model.max_context)),
    )
    try:
        asyncio.run(serve_until_stopped(server, ready))
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port}: {error.strerror or error}; take another"
        ) from None


@contextlib.contextmanager
def serving(
    spec: ModelSpec, options: ServerOptions, dtype: str, device: str, num_threads: int | None
) -> Iterator[int]:
    """A server in a process of its own while the block runs; gives its port."""
    arguments = (spec, options, dtype, device, num_threads)
    with _process(_serve_in_process, *arguments) as port:
        yield port


@contextlib.contextmanager
def relaying(link: WireLink, port: int) -> Iterator[int]:
    """A relay in a process of its own to a port of this machine; gives its own port."""
    with _process(_relay_in_process, link, port) as own:
        yield own


@contextlib.contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        try:
            told = here.recv() if here.poll(START_S) else "it took too long to start"
        except EOFError:
            told = "it ended before it listened"
        if not isinstance(told, int):
            raise UserError(f"the process beside this one failed: {told}")
        yield told
    finally:
        process.terminate()
        process.join(20)
        if process.is_alive():
            process.kill()


def _serve_in_process(
    spec: ModelSpec,
    options: ServerOptions,
    dtype: str,
    device: str,
    num_threads: int | None,
    pipe: Connection,
) -> None:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        serve(load_model(spec, dtype=dtype, device=device), options, pipe.send)
    except UserError as error:
        pipe.send(str(error))


def _relay_in_process(link: WireLink, port: int, pipe: Connection) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(relay(link, ("127.0.0.1", port), ready=pipe.send))
