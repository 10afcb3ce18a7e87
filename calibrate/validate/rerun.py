"""`hlm validate`: run the whole pipeline again at the derived settings.

The prompts are fresh, the seed is fresh, and the tokens are decoded by the policy itself, not
replayed from the calibration trace. calibrate.validate.comparison holds them against the
predictions: what is compared is the theory, for device, link and model times are those of the
predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.derive.operating_points import policy_from_settings
from calibrate.derive.policy_tokens import measured_tokens
from calibrate.run.figure import as_figure
from calibrate.run.folder import Figure
from calibrate.run.prompts import TokenizedPrompt
from calibrate.run.traces import Trace, write_shard
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.policies import Policy

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodedBatch, DecodingSettings
    from calibrate.pairs.registry import LoadedPair

OnStep = Callable[[int, int], None]


def decode_policies(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    policies: Mapping[str, Policy],
    settings: DecodingSettings,
    on_step: OnStep | None = None,
    on_batch: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[DecodedBatch]]:
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
    return decoded


def keep_rerun(path: Path, batches: Sequence[DecodedBatch], header: dict[str, Any]) -> None:
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
    write_shard(path, columns, prompt_ids, header, categories)


def entries_per_sent_token(point: dict[str, Any], trace: Trace, confidence: float) -> Figure:
    """Probabilities sent with a token that is sent, measured; none where nothing is sent."""
    policy = policy_from_settings(
        point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
    )
    tokens = measured_tokens(trace, policy)
    sent = np.where(tokens.skipped < 0.5, tokens.num_entries, np.nan)
    if point["policy"] in ("slm", "llm") or not np.isfinite(sent).any():
        return Figure(None)
    return as_figure(
        mean_over_tokens(sent, tokens.prompt_index, tokens.num_prompts), "", confidence
    )
