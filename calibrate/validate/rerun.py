"""Reruns: the whole pipeline decoded again under a policy, each kept by what it ran.

A folder is named by a hash of everything that decides its tokens, and holds a shard for each batch.
So reruns of other settings, seeds or prompts lie beside one another, none replaces another, what is
there is not made again, and a stop loses the batch in work and no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.prompts import Prompt, TokenizedPrompt, text_key
from calibrate.run.records import OperatingPoint
from calibrate.run.traces import finished_prompts, next_shard, shards_in, write_shard
from hlmtheory.policies import Policy
from hlmtheory.sampled_law import Sampling

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodingSettings
    from calibrate.pairs.registry import LoadedPair

OnStep = Callable[[int, int], None]


def rerun_identity(
    point: OperatingPoint,
    source: str | None,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
    sampling: Sampling,
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
    sampling : Sampling
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
        "sampling": asdict(sampling),
        "thetas": thetas,
    }


def rerun_path(run: Path, identity: Mapping[str, Any]) -> Path:
    """RUN/reruns/POLICY-HASH, a folder of shards."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return run / "reruns" / f"{identity['policy']}-{digest}"


def _source_identity(source: str) -> str:
    path, _, name = source.rpartition(":")
    return f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}:{name}"


@dataclass(frozen=True)
class Rerun:
    """One rerun to be decoded: the policy, and what its files say of it."""

    policy: Policy
    header: Mapping[str, Any]


def decode_reruns(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    reruns: Mapping[Path, Rerun],
    settings: DecodingSettings,
    on_step: OnStep | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> None:
    """Decode what reruns lack, all of them together, and write each batch as it is done.

    Parameters
    ----------
    pair : LoadedPair
    prompts : sequence of TokenizedPrompt
    reruns : mapping of Path to Rerun
        By the folder of each.
    settings : DecodingSettings
    on_step : callable, optional
        See :func:`calibrate.decode.engine.decode_together`.
    on_batch : callable, optional
        Told the number of this batch, and how many there are.
    on_total : callable, optional
        Told the most tokens that may be decoded, before decoding starts.
    """
    from calibrate.decode.engine import batches_by_length, decode_together
    from calibrate.decode.models import transformer_models

    slm, llm = transformer_models(pair)
    axes = settings.axes(pair.vocab_size)
    done = {path: finished_prompts(shards_in(path)) for path in reruns}
    work: list[tuple[list[TokenizedPrompt], list[Path]]] = []
    for batch in batches_by_length(prompts, settings.batch_size):
        alike: dict[tuple[str, ...], list[Path]] = {}
        for path in reruns:
            lacking = tuple(p.prompt_id for p in batch if p.prompt_id not in done[path])
            alike.setdefault(lacking, []).append(path)
        work += [
            ([prompt for prompt in batch if prompt.prompt_id in lacking], paths)
            for lacking, paths in alike.items()
            if lacking
        ]
    if on_total is not None:
        on_total(sum(len(part) * len(paths) for part, paths in work) * settings.max_new_tokens)
    for number, (part, paths) in enumerate(work, start=1):
        if on_batch is not None:
            on_batch(number, len(work))
        policies = {str(path): reruns[path].policy for path in paths}
        for decoded in decode_together(
            slm, llm, part, policies, settings, pair.eos_token_ids, on_step
        ):
            for path in paths:
                batch_of = decoded[str(path)]
                write_shard(
                    next_shard(path),
                    batch_of.columns,
                    batch_of.prompt_ids,
                    reruns[path].header,
                    axes,
                    batch_of.categories,
                )
