"""A step in tensors that never move, so that an accelerator can replay it as one graph.

A decoder's step is some thousand kernels, and starting them one by one takes longer than running
them. Where nothing about a step changes but the numbers in its tensors, a CUDA graph starts them
all at once. So rows and columns of the caches are fixed: rows that no context uses compute for
nobody, and columns that no token has reached are masked.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from calibrate.decode.clock import ForwardClock
from calibrate.pairs.attention import recording

if TYPE_CHECKING:
    from calibrate.decode.models import Prefill, StepOutput

Pair = tuple[torch.Tensor, torch.Tensor]

ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 128
WARM_UPS = 2


class StaticStep:
    """One model's step for R rows and L columns.

    Parameters
    ----------
    model : transformers model
    num_rows, num_columns : int
        R and L.
    attention : bool
        Whether the newest token's attention is recorded beside the kernels.
    like : sequence of (keys, values)
        Of each layer of a cache of the model: sizes and kinds are theirs.
    """

    def __init__(
        self, model: Any, num_rows: int, num_columns: int, attention: bool, like: Sequence[Pair]
    ) -> None:
        from transformers import DynamicCache

        self._model, self._attention = model, attention
        self.num_rows, self.num_columns = num_rows, num_columns
        device = like[0][0].device
        self.tokens = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(num_rows, 1, 1, num_columns, dtype=torch.bool, device=device)
        kind = _layer_class()
        self._layers = [kind(*one, num_rows, num_columns, self.column) for one in like]
        self._cache = DynamicCache(config=model.config)
        self._cache.layers = self._layers
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._can_capture = device.type == "cuda"

    @property
    def pairs(self) -> list[Pair]:
        """Keys and values (R, h, L, d) of each layer."""
        return [(layer.keys, layer.values) for layer in self._layers]

    @property
    def reusable(self) -> tuple[int, int, bool]:
        """What another session must want, to go on with this one's tensors."""
        return self.num_rows, self.num_columns, self._attention

    def fill(self, pairs: Sequence[Pair], mask: torch.Tensor) -> None:
        """Take over contexts, keys and values of each layer; the mask (b, n) says where tokens are.

        Rows that are left see the first column, for nobody: a row that sees nothing has no softmax.
        """
        num, width = mask.shape
        self.mask.zero_()
        self.mask[:num, 0, 0, :width] = mask.bool()
        self.mask[num:, ..., 0] = True
        for own, theirs in zip(self.pairs, pairs, strict=True):
            for room, new in zip(own, theirs, strict=True):
                room[:num, :, :width] = new[:num, :, :width]

    def select(self, rows: torch.Tensor, width: int) -> None:
        """Contexts of these rows, in this order, in the first places."""
        num = len(rows)
        moved = torch.nonzero(rows != torch.arange(num, device=rows.device))[:, 0]
        sources = rows[moved]
        self.mask[moved] = self.mask[sources]
        self.mask[num:, ..., 1:] = False
        self.mask[num:, ..., 0] = True
        if len(moved):
            for room in (room for pair in self.pairs for room in pair):
                room[moved, :, :width] = room[sources, :, :width]

    def run(self, column: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (R, V) behind the tokens, which go to this column, and the attention (R, L)."""
        self.column.fill_(column)
        self.mask[..., column] = True
        if self._can_capture and self._graph is None:
            self._capture()
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        assert self._out is not None
        return self._out

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        with recording() if self._attention else nullcontext() as recorded:
            output = self._model(
                input_ids=self.tokens,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        weights = torch.stack(recorded).mean(0) if recorded else None
        return output.logits[:, -1], weights

    def _capture(self) -> None:
        """Steps write the column that the replay writes again, so warming up changes nothing."""
        beside, graph = torch.cuda.Stream(self.tokens.device), torch.cuda.CUDAGraph()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                self._forward()
        torch.cuda.current_stream().wait_stream(beside)
        try:
            with torch.cuda.graph(graph):
                self._out = self._forward()
        except RuntimeError:  # a step that asks for a number on the way
            self._can_capture = False
        else:
            self._graph = graph


class StaticSteps:
    """The static steps of one model: taken by a session, and free again when it is gone."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._free: list[StaticStep] = []

    def take(
        self,
        owner: Any,
        num_rows: int,
        num_columns: int,
        attention: bool,
        like: Sequence[Pair],
    ) -> StaticStep:
        """A free step of these sizes, or a new one in the place of all that are free."""
        wanted = (num_rows, num_columns, attention)
        found = next((one for one in self._free if one.reusable == wanted), None)
        if found is None:
            self._free.clear()
            found = StaticStep(self._model, num_rows, num_columns, attention, like)
        else:
            self._free.remove(found)
        weakref.finalize(owner, self._free.append, found)
        return found


class StaticSession:
    """As :class:`calibrate.decode.models.TransformerSession`, in static steps."""

    def __init__(
        self,
        steps: StaticSteps,
        prefill: Prefill,
        num_contexts: int,
        vocab_size: int,
        attention: bool,
        fill: bool,
        prefill_s: float,
    ) -> None:
        self._steps, self._vocab_size, self._attention = steps, vocab_size, attention
        self._live, self._multiple = num_contexts, ROW_MULTIPLE if fill else 1
        self._clock = ForwardClock(prefill.mask.device, prefill_s)
        mask = prefill.mask[:num_contexts]
        pairs = [(layer.keys, layer.values) for layer in prefill.cache.cache.layers]
        self._width = mask.shape[1]
        self._next = mask.sum(-1)  # (b,)
        self._step = self._taken(pairs, self._width + 1)
        self._step.fill(pairs, mask)

    def _taken(self, like: Sequence[Pair], num_columns: int) -> StaticStep:
        rows = -(-self._live // self._multiple) * self._multiple
        columns = -(-num_columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return self._steps.take(self, rows, columns, self._attention, like)

    @property
    def forward_s(self) -> float:
        """Seconds inside the model so far."""
        return self._clock.seconds

    def step(self, tokens: torch.Tensor) -> StepOutput:
        """Append one token to each live context."""
        from calibrate.decode.models import StepOutput

        live = self._live
        if self._width == self._step.num_columns:
            old = self._step
            self._step = self._taken(old.pairs, self._width + 1)
            self._step.fill(old.pairs, old.mask[:live, 0, 0])
        own = self._step
        own.tokens[:live, 0] = tokens
        own.positions[:live, 0] = self._next
        with self._clock.running():
            logits, weights = own.run(self._width)
        self._width += 1
        self._next = self._next + 1
        found = logits[:live, : self._vocab_size].to(torch.float32, copy=True)
        if weights is None:
            return StepOutput(found)
        seen = own.mask[:live, 0, 0, : self._width].clone()
        return StepOutput(found, weights[:live, : self._width].clone(), seen)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        self._next, self._live, old = self._next[rows], len(rows), self._step
        if self._live <= old.num_rows:
            old.select(rows, self._width)
            return
        pairs = [(keys[rows], values[rows]) for keys, values in old.pairs]
        self._step = self._taken(pairs, old.num_columns)
        self._step.fill(pairs, old.mask[rows, 0, 0])


def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class StaticLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
        """Keys and values (R, h, L, d) in one place; a step writes one column of all rows."""

        def __init__(
            self, keys: Any, values: Any, num_rows: int, num_columns: int, column: Any
        ) -> None:
            super().__init__()
            # Masked columns are multiplied by zero, so they must hold finite numbers.
            self.keys, self.values = (
                x.new_zeros((num_rows, x.shape[1], num_columns, x.shape[3])) for x in (keys, values)
            )
            self.is_initialized, self._column = True, column

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return 0  # positions and mask are given

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.keys.index_copy_(2, self._column, key_states)
            self.values.index_copy_(2, self._column, value_states)
            return self.keys, self.values

    return StaticLayer
