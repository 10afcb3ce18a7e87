"""Counter-based random numbers: one stream for each (seed, prompt), one block for each step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Columns of a step's block. The layout is part of the trace format: changing it changes every
# token of every seed, so new uses take new columns.
DRAFT = slice(0, 2)
ACCEPT = 2
RESAMPLE = slice(3, 5)
PERTURBATION = slice(8, 136)
NUM_COLUMNS = 136


def stream_key(seed: int, prompt_id: str) -> tuple[int, int]:
    """Philox key of a prompt: the seed, and 64 bits of the SHA-256 of the prompt's id."""
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return seed % 2**64, int.from_bytes(digest[:8], "little")


@dataclass
class Streams:
    """Uniforms of a batch of prompts.

    The uniforms of (seed, prompt, step) are a pure function of these three, whatever the batch,
    its order, or the number of steps run.
    """

    seed: int
    prompt_ids: Sequence[str]

    def __post_init__(self) -> None:
        self._generators = [
            np.random.Generator(np.random.Philox(key=stream_key(self.seed, prompt_id)))
            for prompt_id in self.prompt_ids
        ]

    def next_step(self) -> np.ndarray:
        """Uniforms (B, NUM_COLUMNS) of the next step, float64 in [0, 1)."""
        return np.stack([generator.random(NUM_COLUMNS) for generator in self._generators])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the streams of these rows, in this order."""
        self._generators = [self._generators[i] for i in rows]
