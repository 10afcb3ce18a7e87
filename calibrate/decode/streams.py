"""Counter-based random numbers: one stream for each (seed, prompt), one block for each step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Columns of a step's block. The layout is part of the trace format: changing it changes every
# token of every seed, so new uses take new columns.
DRAFT = slice(0, 2)
ACCEPT = 2
RESAMPLE = slice(3, 5)
PERTURBATION = slice(8, 136)
NUM_COLUMNS = 136
RACE_BLOCK = 1


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
        self._keys = [stream_key(self.seed, prompt_id) for prompt_id in self.prompt_ids]
        self._generators = [np.random.Generator(np.random.Philox(key=key)) for key in self._keys]
        self._step = 0

    def next_step(self, vocab_size: int, device: torch.device) -> StepNoise:
        """Random numbers of the next step."""
        uniforms = np.stack([generator.random(NUM_COLUMNS) for generator in self._generators])
        noise = StepNoise(torch.from_numpy(uniforms).to(device), self._keys, self._step, vocab_size)
        self._step += 1
        return noise

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the streams of these rows, in this order."""
        self._generators = [self._generators[i] for i in rows]
        self._keys = [self._keys[i] for i in rows]


class StepNoise:
    """Random numbers of one step: uniforms (B, NUM_COLUMNS), and shared races on demand.

    Races are standard exponentials from a block of the counter that uniforms never reach, so that
    device and server can each make them from (seed, prompt, step) alone.
    """

    def __init__(
        self, uniforms: torch.Tensor, keys: Sequence[tuple[int, int]], step: int, vocab_size: int
    ) -> None:
        self.uniforms = uniforms
        self.draft = uniforms[:, DRAFT]
        self.accept = uniforms[:, ACCEPT]
        self.resample = uniforms[:, RESAMPLE]
        self.perturbation = uniforms[:, PERTURBATION]
        self._keys, self._step, self._vocab_size = keys, step, vocab_size
        self._races: torch.Tensor | None = None

    def races(self) -> torch.Tensor:
        """Standard exponentials (B, V), float64."""
        if self._races is None:
            counter = [0, 0, self._step, RACE_BLOCK]
            rows = [
                np.random.Generator(
                    np.random.Philox(key=key, counter=counter)
                ).standard_exponential(self._vocab_size)
                for key in self._keys
            ]
            self._races = torch.from_numpy(np.stack(rows)).to(self.uniforms.device)
        return self._races
