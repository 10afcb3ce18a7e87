"""Reruns: the whole pipeline decoded again under a policy, each kept by what it ran.

A folder is named by a hash of everything that decides its tokens, and holds a shard for each batch.
So reruns of other settings, seeds or prompts lie beside one another, none replaces another, what is
there is not made again, and a stop loses the batch in work and no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.prompts import Prompt, TokenizedPrompt, text_key
from calibrate.run.records import OperatingPoint
from calibrate.run.traces import finished_prompts, next_shards, shards_in
from calibrate.work.crew import Crew, Told
from calibrate.work.job import Job, Output, PolicySource
from hlmtheory.sampled_law import Sampling

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodingSettings


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

    policy: PolicySource
    header: Mapping[str, Any]


def decode_reruns(
    crew: Crew,
    prompts: Sequence[TokenizedPrompt],
    reruns: Mapping[Path, Rerun],
    settings: DecodingSettings,
    told: Told,
) -> None:
    """Decode what reruns lack, all of them together, and write each batch as it is done.

    Parameters
    ----------
    crew : Crew
    prompts : sequence of TokenizedPrompt
    reruns : mapping of Path to Rerun
        By the folder of each.
    settings : DecodingSettings
    told : Told
        Whom to tell of steps, batches and remarks.
    """
    from calibrate.decode.engine import batches_by_length

    done = {path: finished_prompts(shards_in(path)) for path in reruns}
    work: list[tuple[tuple[TokenizedPrompt, ...], list[Path]]] = []
    for batch in batches_by_length(prompts, settings.batch_size):
        alike: dict[tuple[str, ...], list[Path]] = {}
        for path in reruns:
            lacking = tuple(p.prompt_id for p in batch if p.prompt_id not in done[path])
            alike.setdefault(lacking, []).append(path)
        work += [
            (tuple(prompt for prompt in batch if prompt.prompt_id in lacking), paths)
            for lacking, paths in alike.items()
            if lacking
        ]
    shards = {path: iter(next_shards(path, len(work))) for path in reruns}
    jobs = [
        Job(
            part,
            tuple(
                Output(next(shards[path]).absolute(), reruns[path].policy, reruns[path].header)
                for path in paths
            ),
            settings,
        )
        for part, paths in work
    ]
    told.total(sum(job.most_tokens for job in jobs))
    for _ in crew.run(jobs, told):
        pass
