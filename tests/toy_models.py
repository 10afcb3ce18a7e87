"""Language models without a network: logits are a table, so every law is known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from calibrate.decode.models import StepOutput


class TableModel:
    """Logits of the next token as a function of the last one (or of nothing)."""

    def __init__(self, logits: np.ndarray) -> None:
        self.table = torch.tensor(np.atleast_2d(logits), dtype=torch.float32)  # (1 or V, V)
        self.vocab_size = self.table.shape[1]
        self.device = torch.device("cpu")

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> TableSession:
        return TableSession(self.table, attention, len(contexts))


class TableSession:
    def __init__(self, table: torch.Tensor, attention: bool, num_rows: int) -> None:
        self.table = table
        self.attention = attention
        self.forward_s = 0.0
        self.length = torch.ones(num_rows, dtype=torch.long)

    def step(self, tokens: torch.Tensor) -> StepOutput:
        rows = tokens if len(self.table) > 1 else torch.zeros_like(tokens)
        self.length = self.length + 1
        logits = self.table[rows]
        if not self.attention:
            return StepOutput(logits)
        # Attention whose place and focus depend on the last token, from uniform to sharp.
        width = int(self.length.max())
        positions = torch.arange(width)
        mask = positions < self.length[:, None]
        focus = (tokens[:, None] % 4) / 2
        weights = torch.exp(-focus * ((positions + tokens[:, None]) % 5)) * mask
        return StepOutput(logits, weights / weights.sum(-1, keepdim=True), mask)

    def keep(self, rows: torch.Tensor) -> None:
        self.length = self.length[rows]
