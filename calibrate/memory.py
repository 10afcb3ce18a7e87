"""How many prompts to decode together, and how the process keeps its large buffers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from calibrate.loading import LoadedPair
    from calibrate.prompts import TokenizedPrompt

MAX_ROWS = 64
"""Larger batches gain little on a processor, and a shard, one a batch, is what a stop can lose."""

MAX_ROWS_ACCELERATOR = 256
WORKING_SET_BYTES = 5 * 2**28
"""Room for everything but the weights, 1.25 GiB, where the machine has twice that to spare."""

# Arrays of one row's vocabulary that are alive at once in a step of a full trace, as float32.
VOCABULARY_ARRAYS = 16

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEPT_BYTES = 2**30


def keep_large_buffers() -> None:
    """Let freed arrays of a step be the arrays of the next, instead of going back to the system.

    A step needs a dozen arrays of batch x vocabulary, tens of megabytes each. By default glibc maps
    every one anew, and the page faults cost several times the arithmetic. Kept are at most 1 GiB.
    On systems without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def automatic_batch_size(
    pair: LoadedPair, prompts: Sequence[TokenizedPrompt], max_new_tokens: int
) -> int:
    """Prompts to decode together: as many as the memory and the longest prompt allow, evenly split.

    Parameters
    ----------
    pair : LoadedPair
        On its device, whose free memory is asked.
    prompts : sequence of TokenizedPrompt
    max_new_tokens : int

    Returns
    -------
    int
        From 1 to 64, or to 256 on an accelerator.
    """
    import torch

    longest = max((len(prompt.tokens) for prompt in prompts), default=1)
    row = sum(
        _row_bytes(model, longest, longest + max_new_tokens) for model in (pair.slm, pair.llm)
    )
    row += VOCABULARY_ARRAYS * 4 * pair.vocab_size
    if torch.device(pair.device).type == "cuda":
        budget, most = torch.cuda.mem_get_info()[0] // 2, MAX_ROWS_ACCELERATOR
    else:
        budget = min(WORKING_SET_BYTES, psutil.virtual_memory().available // 2)
        most = MAX_ROWS
    return even_batch_size(len(prompts), max(1, min(most, budget // row)))


def even_batch_size(num_prompts: int, most: int) -> int:
    """Size of equal batches, none larger than `most`."""
    num_batches = max(1, math.ceil(num_prompts / most))
    return max(1, math.ceil(num_prompts / num_batches))


def _row_bytes(model: Any, num_prefilled: int, num_positions: int) -> int:
    """Key-value cache and largest activations of one context in one model."""
    config = model.config.get_text_config()
    item = next(model.parameters()).element_size()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * kv_heads * head_size * num_positions * item
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # The feed-forward block holds three of its inner arrays, a norm the hidden ones in float32.
    activations = num_prefilled * (3 * inner * item + 4 * config.hidden_size * 4)
    scores = heads * num_prefilled**2 * 4 if config._attn_implementation == "eager" else 0
    # The cache is copied once when it outgrows its room.
    return int(2 * cache + activations + scores)
