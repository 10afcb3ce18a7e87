"""Reruns: the whole pipeline decoded again under a policy, each kept by what it ran.

A file is named by a hash of everything that decides its tokens. So reruns of other settings, seeds
or prompts lie beside one another, none replaces another, and one that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.run.prompts import Prompt, TokenizedPrompt, text_key
from calibrate.run.records import OperatingPoint
from calibrate.run.traces import write_shard
from hlmtheory.policies import Policy

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodedBatch, DecodingSettings
    from calibrate.pairs.registry import LoadedPair
    from hlmtheory.steps import Axes

OnStep = Callable[[int, int], None]


def rerun_identity(
    point: OperatingPoint,
    source: str | None,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
    temperature: float,
    thetas: tuple[float, ...],
) -> dict[str, Any]:
    """Everything that decides the tokens of a rerun, beside the run's own pair.

    Parameters
    ----------
    point : OperatingPoint
    source : str or None
        FILE.py:NAME of somebody's own policy; the hash of its text counts, not its place.
    prompts : sequence of Prompt
        Their ids key the random numbers, so both ids and texts count.
    seed, max_new_tokens : int
    temperature : float
    thetas : tuple of float
        Temperatures of the uncertainty.
    """
    return {
        "policy": point.policy,
        "source": None if source is None else _source_identity(source),
        "settings": point.settings,
        "threshold": point.uncertainty_threshold.value,
        "score": point.score,
        "seed": seed,
        "prompt_keys": {prompt.prompt_id: text_key(prompt.text) for prompt in prompts},
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "thetas": thetas,
    }


def rerun_path(run: Path, identity: Mapping[str, Any]) -> Path:
    """RUN/reruns/POLICY-HASH.parquet."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return run / "reruns" / f"{identity['policy']}-{digest}.parquet"


def _source_identity(source: str) -> str:
    path, _, name = source.rpartition(":")
    return f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}:{name}"


def decode_policies(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    policies: Mapping[str, Policy],
    settings: DecodingSettings,
    on_step: OnStep | None = None,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> Iterator[tuple[str, list[DecodedBatch]]]:
    """Decode the same prompts under every policy: batch by batch, so that prompts are read once.

    Parameters
    ----------
    pair : LoadedPair
    prompts : sequence of TokenizedPrompt
    policies : mapping of str to Policy
    settings : DecodingSettings
    on_step : callable, optional
        See :func:`calibrate.decode.engine.decode`.
    on_batch : callable, optional
        Told the number of this batch of one policy, how many there are in all, and its label.

    Yields
    ------
    label, batches
        Of each policy as soon as its last batch is done.
    """
    from calibrate.decode.engine import batches_by_length, decode
    from calibrate.decode.models import TransformerModel

    slm = TransformerModel(pair.slm, pair.vocab_size, reuse_prefill=True)
    llm = TransformerModel(pair.llm, pair.vocab_size, reuse_prefill=True)
    batches = batches_by_length(prompts, settings.batch_size)
    decoded: dict[str, list[DecodedBatch]] = {label: [] for label in policies}
    number = 0
    for batch in batches:
        for label, policy in policies.items():
            number += 1
            if on_batch is not None:
                on_batch(number, len(batches) * len(policies), label)
            decoded[label] += decode(slm, llm, batch, policy, settings, pair.eos_token_ids, on_step)
            if len(decoded[label]) == len(batches):
                yield label, decoded.pop(label)


def keep_rerun(
    path: Path, batches: Sequence[DecodedBatch], header: Mapping[str, Any], axes: Axes
) -> None:
    """Keep the batches of one policy in one file."""
    prompt_ids: list[str] = []
    categories: list[str] = []
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, values in batch.columns.items():
            shifted = values + len(prompt_ids) if name == "row" else values
            parts.setdefault(name, []).append(shifted)
        prompt_ids += batch.prompt_ids
        categories += batch.categories
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    write_shard(path, columns, prompt_ids, header, axes, categories)
