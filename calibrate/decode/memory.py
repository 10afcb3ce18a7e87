"""How many prompts to decode together, and memory given back between the phases of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calibrate.pairs.buffers import WORKING_SET_BYTES, glibc
from calibrate.pairs.loading import PADDING_MULTIPLE
from calibrate.run.machine import available_memory

if TYPE_CHECKING:
    from calibrate.pairs.loading import LoadedPair
    from calibrate.run.prompts import TokenizedPrompt

MAX_ROWS = 64
"""Larger batches gain little on a processor, and a shard, one a batch, is what a stop can lose."""

MAX_ROWS_ACCELERATOR = 256

MANY_POLICIES = 2
"""Working sets that several policies may take: fewer prompts together would be slower."""

# Arrays of one row's vocabulary that are alive at once in a step of a full trace, as float32.
VOCABULARY_ARRAYS = 16


def release_freed_buffers() -> None:
    """Give freed arrays back to the system, wherever in the heap they lie.

    Called between the phases of a batch, whose arrays differ in size: what one phase has freed
    would lie unused beside what the next one allocates. Without glibc nothing is done.
    """
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def automatic_batch_size(
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    max_new_tokens: int,
    num_policies: int = 1,
    num_beside: int = 1,
    worker_bytes: int = 0,
) -> int:
    """Prompts to decode together: as many as the memory and the longest prompt allow, evenly split.

    A prompt takes a row for each policy whose answer has parted from the others'; how many will is
    not known beforehand, so room is made for one row each.

    Parameters
    ----------
    pair : LoadedPair
        On its device, whose free memory is asked.
    prompts : sequence of TokenizedPrompt
    max_new_tokens : int
    num_policies : int
        Policies decoded together.
    num_beside : int
        Workers that share this machine's memory.
    worker_bytes : int
        That each of them will take before it decodes.

    Returns
    -------
    int
        From 1 to 64, or to 256 on an accelerator.
    """
    import torch

    longest = max((len(prompt.tokens) for prompt in prompts), default=1)
    models = (pair.slm, pair.llm)
    cache = sum(_cache_bytes(model, longest + max_new_tokens) for model in models)
    vocabulary = 4 * pair.vocab_size
    row = num_policies * (cache + VOCABULARY_ARRAYS * vocabulary)
    fixed = max(_prefill_bytes(model, longest) for model in models)
    if torch.device(pair.device).type == "cuda":
        budget, most = torch.cuda.mem_get_info(pair.device)[0] // 2, MAX_ROWS_ACCELERATOR
    else:
        room = WORKING_SET_BYTES * (1 if num_policies == 1 else MANY_POLICIES)
        free = available_memory() - num_beside * worker_bytes
        budget, most = min(room, free // (2 * num_beside)), MAX_ROWS
    rows = max(1, min(most, (budget - fixed) // row))
    return even_batch_size(len(prompts), rows)


def even_batch_size(num_prompts: int, most: int) -> int:
    """Size of equal batches, none larger than `most`."""
    num_batches = max(1, math.ceil(num_prompts / most))
    return max(1, math.ceil(num_prompts / num_batches))


def _cache_bytes(model: Any, num_positions: int) -> int:
    """Key-value cache of one context in one model."""
    from calibrate.decode.kv_cache import SPARE_POSITIONS

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = num_positions + PADDING_MULTIPLE + SPARE_POSITIONS
    item = next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * kv_heads * head_size * positions * item)


def _prefill_bytes(model: Any, longest: int) -> int:
    """Largest activations while prompts are read, a group at a time."""
    from calibrate.decode.models import MAX_PREFILL_TOKENS, MIN_ROWS

    config = model.config.get_text_config()
    item = next(model.parameters()).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if not isinstance(inner, int):  # one size a layer
        inner = max(inner)
    width = longest + PADDING_MULTIPLE
    rows = max(MIN_ROWS, MAX_PREFILL_TOKENS // width)
    scores = config.num_attention_heads * width**2 * 4
    eager = scores if config._attn_implementation == "eager" else 0
    # The feed-forward block holds three of its inner arrays, a norm the hidden ones in float32.
    token = 3 * inner * item + 4 * config.hidden_size * 4
    return int(rows * (width * token + eager))
