"""Counter-based random numbers: one stream for each (seed, prompt), one block for each step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


BLOCK_WORDS = 4
"""Numbers of one Philox counter: a step's uniforms begin at a counter of their own."""


def step_noise(
    keys: Sequence[tuple[int, int]],
    steps: Sequence[int],
    vocab_size: int,
    device: torch.device,
) -> StepNoise:
    """Random numbers of one step of each row: a pure function of its key and its step.

    So rows may start, end, part and be repeated in any order.

    Parameters
    ----------
    keys : sequence of (int, int)
        :func:`stream_key` of each row.
    steps : sequence of int
        Place of each row's next token in its answer.
    vocab_size : int
    device : torch.device
    """
    per_step = NUM_COLUMNS // BLOCK_WORDS
    uniforms = np.stack(
        [
            np.random.Generator(np.random.Philox(key=key, counter=step * per_step)).random(
                NUM_COLUMNS
            )
            for key, step in zip(keys, steps, strict=True)
        ]
    )
    return StepNoise(torch.from_numpy(uniforms).to(device), list(keys), list(steps), vocab_size)


class StepNoise:
    """Random numbers of one step: uniforms (B, NUM_COLUMNS), and shared races on demand.

    Races are standard exponentials from a block of the counter that uniforms never reach, so that
    device and server can each make them from (seed, prompt, step) alone.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        keys: Sequence[tuple[int, int]],
        steps: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.uniforms = uniforms
        self.draft = uniforms[:, DRAFT]
        self.accept = uniforms[:, ACCEPT]
        self.resample = uniforms[:, RESAMPLE]
        self.perturbation = uniforms[:, PERTURBATION]
        self._keys, self._steps, self._vocab_size = keys, steps, vocab_size
        self._races: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> StepNoise:
        """The numbers of some rows."""
        chosen = index.tolist()
        keys, steps = ([values[i] for i in chosen] for values in (self._keys, self._steps))
        return StepNoise(self.uniforms[index], keys, steps, self._vocab_size)

    def races(self) -> torch.Tensor:
        """Standard exponentials (B, V), float64."""
        if self._races is None:
            rows = [
                np.random.Generator(
                    np.random.Philox(key=key, counter=[0, 0, step, RACE_BLOCK])
                ).standard_exponential(self._vocab_size)
                for key, step in zip(self._keys, self._steps, strict=True)
            ]
            self._races = torch.from_numpy(np.stack(rows)).to(self.uniforms.device)
        return self._races
