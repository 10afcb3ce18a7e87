"""Language models as the engine sees them: a batch of contexts that grows a token a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from calibrate.errors import UserError
from calibrate.kv_cache import RowCache, make_cache

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
        widths = torch.tensor([_padded_width(len(row)) for row in rows])
        self._cache = make_cache(self._model.config, len(rows))
        self._mask = torch.zeros(len(rows), int(widths.max()), dtype=torch.long)
        for group in _prefill_groups(widths.tolist(), min_rows, self._cache.can_place_rows):
            self._prefill([rows[i] for i in group], group, model.device)
        self._mask = self._mask.to(model.device)
        self._next_position = self._mask.sum(-1)  # (B,)

    def _prefill(
        self, rows: Sequence[Sequence[int]], places: list[int], device: torch.device
    ) -> None:
        """Run some of the contexts, padded to their own width, and put their caches in place."""
        width = max(_padded_width(len(row)) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        positions = torch.arange(width, device=device).expand(len(rows), width)
        part = make_cache(self._model.config, len(rows))
        self._forward(ids.to(device), mask.to(device), positions, part, want_attention=False)
        self._mask[places, :width] = mask
        self._cache.place_rows(part, places, self._mask.shape[1])

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token to each live context."""
        physical = self._mask.shape[0]
        if len(tokens) < physical:
            tokens = torch.cat([tokens, tokens[:1].expand(physical - len(tokens))])
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        output = self._forward(
            tokens[:, None],
            self._mask,
            self._next_position[:, None],
            self._cache,
            want_attention=self._attention,
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
        self._cache.select_rows(physical)
        self._mask = self._mask[physical]
        self._next_position = self._next_position[physical]

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: RowCache,
        want_attention: bool,
    ) -> Any:
        begin = time.perf_counter()
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache.cache,
            use_cache=True,
            logits_to_keep=1,
            output_attentions=want_attention,
        )
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.forward_s += time.perf_counter() - begin
        return output


def _padded_width(num_tokens: int) -> int:
    """Columns of a context: a multiple of the padding, with one masked position at least.

    Without any masked position, attention takes another kernel.
    """
    return -(-(num_tokens + 1) // PADDING_MULTIPLE) * PADDING_MULTIPLE


def _prefill_groups(widths: list[int], min_rows: int, separable: bool) -> list[list[int]]:
    """Rows to prefill together: like widths, and never fewer rows than the minimum.

    A group too small joins the next wider one; what is left over joins the last.
    """
    order = sorted(range(len(widths)), key=lambda i: widths[i])
    if not separable:
        return [order]
    groups: list[list[int]] = [[]]
    for i in order:
        current = groups[-1]
        if len(current) >= min_rows and widths[i] > widths[current[-1]]:
            groups.append([])
        groups[-1].append(i)
    if len(groups) > 1 and len(groups[-1]) < min_rows:
        last = groups.pop()
        groups[-1] += last
    return groups
