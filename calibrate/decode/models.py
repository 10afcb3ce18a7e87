"""Language models as the engine sees them: a batch of contexts that grows a token a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from calibrate.decode.clock import ForwardClock, synchronise
from calibrate.decode.kv_cache import RowCache, make_cache
from calibrate.decode.memory import release_freed_buffers
from calibrate.decode.static_step import StaticSession, StaticSteps
from calibrate.pairs.attention import recording, records, takes_masks
from calibrate.pairs.loading import PADDING_MULTIPLE
from calibrate.run.errors import UserError
from calibrate.run.prompts import template_prefix

if TYPE_CHECKING:
    from calibrate.pairs.loading import LoadedPair

# Kernels for fewer rows than this round differently (a matrix-vector product is not a matrix
# product). Batches are filled up to it, so that a token never depends on how many others run.
MIN_ROWS = 4

# More tokens at once are no faster, and the activations of these are all that a prefill needs.
MAX_PREFILL_TOKENS = 2048

# Prompts that run apart do so in widths of this, half of a cache's padding: all of it is computed.
PREFILL_MULTIPLE = 16


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

    @property
    def forward_s(self) -> float:
        """Seconds inside the model so far, the prefill included."""
        ...

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token (B,) to each context and return what comes next."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows (integer tensor), in this order; a row may come more than once."""
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
    """A transformers causal language model behind the LanguageModel interface.

    Parameters
    ----------
    model : transformers model
    vocab_size : int
        Logits that are read.
    prefix : sequence of int
        Tokens that contexts are known to begin with, such as a chat template's: run once, for all
        contexts that do. It is the template's, not the batch's, so that a context is computed alike
        whatever it runs with.
    static : bool, optional
        Whether steps run in tensors that never move, for an accelerator to replay as a graph.
        Default: on CUDA.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        prefix: Sequence[int] = (),
        static: bool | None = None,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device
        self.prefix = list(prefix)
        self.static = self.device.type == "cuda" if static is None else static
        self._begun: RowCache | None = None
        self._steps = StaticSteps(model)

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> Session:
        """Prefill the contexts (each at least one token)."""
        if any(len(context) == 0 for context in contexts):
            raise UserError("a prompt has fewer than two tokens: give at least one word")
        min_rows = MIN_ROWS if fill else 1
        begin = time.perf_counter()
        prefill = self._prefill(contexts, min_rows)
        release_freed_buffers()
        synchronise(self.device)
        seconds = time.perf_counter() - begin
        if self.static and prefill.cache.can_place_rows and takes_masks(self.model, attention):
            size = self.vocab_size
            return StaticSession(
                self._steps, prefill, len(contexts), size, attention, fill, seconds
            )
        return TransformerSession(self, prefill, len(contexts), attention, min_rows, seconds)

    def _prefill(self, contexts: Sequence[Sequence[int]], min_rows: int) -> Prefill:
        """Run contexts, padded on the right, in groups of like width; the first fills missing rows.

        Groups too small are filled up as well.
        """
        rows = [list(context) for context in contexts]
        rows += [rows[0]] * (min_rows - len(rows))
        cache = make_cache(self.model.config, len(rows))
        multiple = PREFILL_MULTIPLE if cache.can_place_rows else PADDING_MULTIPLE
        widths = [_padded_width(len(row), multiple) for row in rows]
        shared = len(self.prefix) if cache.can_place_rows else 0
        begins = [
            shared if len(row) > shared and row[:shared] == self.prefix else 0 for row in rows
        ]
        columns = _padded_width(max(map(len, rows)), PADDING_MULTIPLE)
        mask = torch.zeros(len(rows), columns, dtype=torch.long)
        for places in _prefill_groups(widths, begins, min_rows, cache.can_place_rows):
            width, begin = max(widths[i] for i in places), begins[places[0]]
            ids = torch.zeros(len(places), width, dtype=torch.long)
            for i, place in enumerate(places):
                ids[i, : len(rows[place])] = torch.tensor(rows[place])
                mask[place, : len(rows[place])] = 1
            filled = places + places[:1] * (min_rows - len(places))
            ids = ids[[places.index(place) for place in filled], begin:]
            part = make_cache(self.model.config, len(filled))
            if begin:
                part.begin_with(self._prefix_cache(), width)
            self._run(ids, mask[filled, :width], begin, part)
            cache.place_rows(part, places, columns)
        return Prefill(cache, mask.to(self.device))

    def _prefix_cache(self) -> RowCache:
        """One row that holds the prefix."""
        if self._begun is None:
            ids = torch.tensor([self.prefix])
            begun = make_cache(self.model.config, 1)
            self._run(ids, torch.ones_like(ids), 0, begun)
            self._begun = begun
        return self._begun

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, begin: int, cache: RowCache) -> None:
        """The layers without the output head: no logits of a prompt are read, and on a slice of the
        hidden states the head would copy its whole matrix once a row."""
        positions = torch.arange(begin, begin + ids.shape[1], device=self.device)
        self.model.base_model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions.expand(ids.shape),
            past_key_values=cache.cache,
            use_cache=True,
        )


def transformer_models(pair: LoadedPair) -> tuple[TransformerModel, TransformerModel]:
    """Device model and server model of a pair, ready for the engine."""
    prefix = template_prefix(pair.tokenizer)
    slm, llm = (TransformerModel(one, pair.vocab_size, prefix) for one in (pair.slm, pair.llm))
    return slm, llm


@dataclass
class Prefill:
    """Contexts inside one model: their caches, and which positions hold a token.

    Attributes
    ----------
    cache : RowCache
        R rows, at least as many as there are contexts.
    mask : integer tensor (R, n)
    """

    cache: RowCache
    mask: torch.Tensor


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
        prefill: Prefill,
        num_contexts: int,
        attention: bool,
        min_rows: int,
        prefill_s: float,
    ) -> None:
        self._model = model.model
        self._vocab_size = model.vocab_size
        self._attention = attention
        self._min_rows = min_rows
        self._live = num_contexts
        self._cache, self._mask = prefill.cache, prefill.mask
        self._next_position = self._mask.sum(-1)  # (B,)
        self._clock = ForwardClock(model.device, prefill_s)

    @property
    def forward_s(self) -> float:
        """Seconds inside the model so far."""
        return self._clock.seconds

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token to each live context."""
        physical = self._mask.shape[0]
        if len(tokens) < physical:
            tokens = torch.cat([tokens, tokens[:1].expand(physical - len(tokens))])
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        beside = self._attention and records(self._model)
        with self._clock.running(), recording() if beside else nullcontext() as recorded:
            output = self._model(
                input_ids=tokens[:, None],
                attention_mask=self._mask,
                position_ids=self._next_position[:, None],
                past_key_values=self._cache.cache,
                use_cache=True,
                output_attentions=self._attention and not beside,
            )
        self._next_position = self._next_position + 1
        logits = output.logits[: self._live, -1, : self._vocab_size].float()
        if not self._attention:
            return StepOutput(logits)
        if not (recorded or output.attentions):
            raise UserError(
                f"{type(self._model).__name__} gives no attention; load it with attention=True, or "
                "calibrate with --trace minimal"
            )
        layers = recorded or [layer[:, :, -1].float().mean(1) for layer in output.attentions]
        row = torch.stack([layer[: self._live] for layer in layers]).mean(0)  # (B, n)
        return StepOutput(logits, row, self._mask[: self._live].bool())

    def keep(self, rows: torch.Tensor) -> None:
        """Drop contexts, or run one more than once; the batch never falls below its minimum."""
        self._live = len(rows)
        filler = rows[:1].expand(max(0, self._min_rows - len(rows)))
        physical = torch.cat([rows, filler])
        self._cache.select_rows(physical)
        self._mask = self._mask[physical]
        self._next_position = self._next_position[physical]


def _padded_width(num_tokens: int, multiple: int) -> int:
    """Columns of a context: a multiple of some number, with one masked position at least.

    Without any masked position, attention takes another kernel.
    """
    return -(-(num_tokens + 1) // multiple) * multiple


def _prefill_groups(
    widths: list[int], begins: list[int], min_rows: int, separable: bool
) -> list[list[int]]:
    """Rows to prefill together: one beginning, like widths, few enough tokens, enough rows.

    A group too small joins the next wider one; what is left over joins the last.
    """
    order = sorted(range(len(widths)), key=lambda i: (begins[i], widths[i]))
    if not separable:
        return [order]
    groups: list[list[int]] = []
    for begin in sorted(set(begins)):
        groups += _groups_by_width(
            [i for i in order if begins[i] == begin],
            [width - begin for width in widths],
            min_rows,
        )
    return groups


def _groups_by_width(order: list[int], widths: list[int], min_rows: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for i in order:
        current = groups[-1]
        wider = bool(current) and widths[i] > widths[current[-1]]
        full = (len(current) + 1) * widths[i] > MAX_PREFILL_TOKENS
        if len(current) >= min_rows and (wider or full):
            groups.append([])
        groups[-1].append(i)
    if len(groups) > 1 and len(groups[-1]) < min_rows:
        last = groups.pop()
        groups[-1] += last
    return groups
