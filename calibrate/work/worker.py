"""A worker: the loaded pair, and jobs done one after the other. It knows nothing of other workers.

A job done again writes the same rows into the same files, so whoever hands out jobs may repeat one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from calibrate.run.errors import UserError
from calibrate.run.traces import write_shard
from calibrate.work.job import Job, PairSource, Written

if TYPE_CHECKING:
    from calibrate.pairs.registry import LoadedPair


class Worker:
    """Decodes jobs with a pair that is loaded, on its device."""

    def __init__(self, pair: LoadedPair) -> None:
        from calibrate.decode.models import transformer_models

        self._models = transformer_models(pair)
        self._eos_token_ids = pair.eos_token_ids
        self._vocab_size = pair.vocab_size

    def run(
        self,
        job: Job,
        on_step: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Written:
        """Decode a job and write its shards, each whole or not at all.

        Parameters
        ----------
        job : Job
        on_step, on_note : callable, optional
            See :func:`calibrate.decode.engine.decode_together`.
        """
        from calibrate.decode.engine import decode_together

        policies = {str(place): one.policy.build() for place, one in enumerate(job.outputs)}
        (batches,) = decode_together(
            *self._models, job.prompts, policies, job.settings, self._eos_token_ids, on_step,
            on_note=on_note,
        )  # fmt: skip
        axes = job.settings.axes(self._vocab_size)
        for output, batch in zip(job.outputs, batches.values(), strict=True):
            spent = {"wall_s": batch.wall_s, "forward_s": batch.forward_s}
            write_shard(
                output.path,
                batch.columns,
                batch.prompt_ids,
                {**output.header, **spent},
                axes,
                batch.categories,
            )
        return Written(
            paths=tuple(output.path for output in job.outputs),
            num_tokens=sum(len(batch.columns["row"]) for batch in batches.values()),
            wall_s=batch.wall_s,
            forward_s=batch.forward_s,
        )


def load_worker(source: PairSource, num_threads: int) -> Worker:
    """A worker in a process of its own, with so many processor threads.

    Raises
    ------
    UserError
        If the pair cannot be loaded here, or is not the one that the jobs are of.
    """
    from calibrate.pairs.models import use_threads
    from calibrate.pairs.registry import load_pair

    use_threads(num_threads)
    pair = load_pair(
        source.spec,
        dtype=source.dtype,
        device=source.device,
        attention=source.attention,
        prepack=source.prepacked_bytes > 0,
    )
    for wanted, found in zip(source.hashes, (pair.slm_identity, pair.llm_identity), strict=True):
        if found.sha256 != wanted:
            raise UserError(
                f"a worker has other weights of {found.label} than the run (hash "
                f"{found.sha256[:12]} instead of {wanted[:12]}); give all machines the same"
            )
    return Worker(pair)
