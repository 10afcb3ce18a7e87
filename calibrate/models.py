"""Language models as the engine sees them: a batch of contexts that grows a token a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibrate.errors import UserError

# Kernels for fewer rows than this round differently (a matrix-vector product is not a matrix
# product). Batches are filled up to it, so that a token never depends on how many others run.
MIN_ROWS = 4

# Prompts are padded to a multiple of this, so that every context keeps the alignment it has
# alone: vectorised reductions then add the same numbers in the same order.
PADDING_MULTIPLE = 32


@dataclass
class StepOutput:
    """What one model says about the next token of each context.

    Attributes
    ----------
    logits : tensor (B, V)
        float32.
    attention : tensor (B, n) or None
        Row of the newest position's query, mean over heads and layers, float32.
    attention_mask : bool tensor (B, n) or None
        Which of the n positions hold a token.
    """

    logits: torch.Tensor
    attention: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


class Session(Protocol):
    """Contexts of one batch inside one model."""

    forward_s: float

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token (B,) to each context and return what comes next."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows (integer tensor), in this order."""
        ...


class LanguageModel(Protocol):
    """Starts sessions; `vocab_size` is the number of logits the engine reads."""

    vocab_size: int
    device: torch.device

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> Session:
        """Begin with these contexts; the caller steps in the token that follows each.

        `fill` lets a session run more rows than it was given, to keep its arithmetic the same in
        every batch; timing one user switches it off.
        """
        ...


class TransformerModel:
    """A transformers causal language model behind the LanguageModel interface."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> TransformerSession:
        """Prefill the contexts (each at least one token)."""
        return TransformerSession(self, contexts, attention, MIN_ROWS if fill else 1)


class TransformerSession:
    """KV caches of one batch, with prompts padded on the right and a masked gap behind them.

    Every prompt starts at cache position 0 and generated tokens at a multiple of the padding, so a
    context is computed by the same operations in the same order whatever the batch it runs in. On
    processors whose matrix kernels treat rows alike the logits are then the same bit for bit; a
    test measures it.
    """

    def __init__(
        self,
        model: TransformerModel,
        contexts: Sequence[Sequence[int]],
        attention: bool,
        min_rows: int,
    ) -> None:
        if any(len(context) == 0 for context in contexts):
            raise UserError("a prompt has fewer than two tokens: give at least one word")
        self._model = model.model
        self._vocab_size = model.vocab_size
        self._attention = attention
        self._min_rows = min_rows
        self.forward_s = 0.0
        self._live = len(contexts)
        rows = list(contexts)
        rows += [rows[0]] * (min_rows - len(rows))
        longest = max(len(row) for row in rows)
        # One masked position at least: without any, attention takes another kernel.
        width = -(-(longest + 1) // PADDING_MULTIPLE) * PADDING_MULTIPLE
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        self._mask = mask.to(model.device)
        self._next_position = self._mask.sum(-1)  # (B,)
        positions = torch.arange(width, device=model.device).expand(len(rows), width)
        self._cache = _make_cache(self._model.config)
        self._forward(ids.to(model.device), positions, want_attention=False)

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token to each live context."""
        physical = self._mask.shape[0]
        if len(tokens) < physical:
            tokens = torch.cat([tokens, tokens[:1].expand(physical - len(tokens))])
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        output = self._forward(
            tokens[:, None], self._next_position[:, None], want_attention=self._attention
        )
        self._next_position = self._next_position + 1
        logits = output.logits[: self._live, -1, : self._vocab_size].float()
        if not self._attention:
            return StepOutput(logits)
        row = torch.zeros((), device=logits.device)
        for layer in output.attentions:  # (B, heads, 1, n)
            row = row + layer[: self._live, :, -1].float().mean(1)
        row = row / len(output.attentions)
        return StepOutput(logits, row, self._mask[: self._live].bool())

    def keep(self, rows: torch.Tensor) -> None:
        """Drop the contexts that ended; the batch never falls below its minimum."""
        self._live = len(rows)
        filler = rows[:1].expand(max(0, self._min_rows - len(rows)))
        physical = torch.cat([rows, filler])
        self._cache.batch_select_indices(physical)
        self._mask = self._mask[physical]
        self._next_position = self._next_position[physical]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, want_attention: bool) -> Any:
        begin = time.perf_counter()
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            output_attentions=want_attention,
        )
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.forward_s += time.perf_counter() - begin
        return output


def _make_cache(config: Any) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """A cache layer that doubles its room instead of copying itself at every token."""

        keys: Any
        values: Any

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            super().lazy_initialization(key_states, value_states)
            self._room: tuple[torch.Tensor, torch.Tensor] | None = None

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            used = self.keys.shape[-2] if self.keys.numel() else 0
            total = used + key_states.shape[-2]
            if self._room is None or self._room[0].shape[-2] < total:
                shape = (*key_states.shape[:-2], 64 + total, key_states.shape[-1])
                value_shape = (*value_states.shape[:-2], 64 + total, value_states.shape[-1])
                room = key_states.new_empty(shape), value_states.new_empty(value_shape)
                if used:
                    room[0][..., :used, :] = self.keys
                    room[1][..., :used, :] = self.values
                self._room = room
            self._room[0][..., used:total, :] = key_states
            self._room[1][..., used:total, :] = value_states
            self.keys = self._room[0][..., :total, :]
            self.values = self._room[1][..., :total, :]
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._room = None

    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
