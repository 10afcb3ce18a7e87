"""Key-value caches of many contexts, each as long as it is, advanced together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calibrate.decode.models import TransformerModel
from calibrate.run.errors import UserError

SPARE_POSITIONS = 256
"""Room grows by this many positions at least, or by half."""

WORTH_TWO_PASSES = 24
"""Tokens of padding that are taken to cost more than a second pass over the weights: assumed."""


class SlotCaches:
    """A server model's contexts: rows of one cache, appended to by any number of tokens each.

    Parameters
    ----------
    model : TransformerModel
    num_slots : int
        Contexts that there is room for; memory is taken as they come.

    Raises
    ------
    UserError
        If the model keeps anything but plain keys and values, such as a sliding window.
    """

    def __init__(self, model: TransformerModel, num_slots: int) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self._model = model
        cache = DynamicCache(config=model.model.config)
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise UserError(
                f"{type(model.model).__name__} keeps a window of its context, or a state: the "
                "server serves models whose every layer attends to all of it"
            )
        kind = _layer_class()
        self._layers = [kind() for _ in cache.layers]
        cache.layers = self._layers
        self._cache = cache
        self.num_slots = num_slots
        self.lengths = [0] * num_slots

    def clear(self, slot: int) -> None:
        """Forget a context."""
        self.lengths[slot] = 0

    def append(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append n_i >= 1 tokens to each of b contexts; logits (b, V) behind the last of each.

        float32. Contexts are those that :meth:`clear` and earlier calls left.
        """
        rows = [list(row) for row in tokens]
        more = [i for i, row in enumerate(rows) if len(row) > 1]
        width = max(map(len, rows))
        apart = len(more) * (width - 1) + len(rows)
        if len(rows) * width > apart + WORTH_TWO_PASSES:  # few rows are long: not padded for all
            self._run([slots[i] for i in more], [rows[i][:-1] for i in more], False)
            rows = [row[-1:] for row in rows]
        output = self._run(list(slots), rows, True)
        return output.float()

    def _run(self, slots: list[int], rows: list[list[int]], head: bool) -> torch.Tensor:
        """One pass; logits (b, V) behind the last token of each; without a head hidden states."""
        device = self._model.device
        counts = [len(row) for row in rows]
        width, starts = max(counts), [self.lengths[slot] for slot in slots]
        ids = torch.zeros(len(slots), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        begin = torch.tensor(starts, device=device)[:, None]
        positions = begin + torch.arange(width, device=device)  # (b, n)
        seen = max(starts) + width
        visible = torch.arange(seen, device=device) <= positions[..., None]  # (b, n, L)
        dtype = self._model.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        for layer in self._layers:
            layer.aim(slots, starts, seen, self.num_slots)
        for slot, start, count in zip(slots, starts, counts, strict=True):
            self.lengths[slot] = start + count
        given = {
            "input_ids": ids.to(device),
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if not head:
            return torch.as_tensor(self._model.model.base_model(**given).last_hidden_state)
        last = torch.tensor(counts, device=device) - 1
        wanted, place = torch.unique(last, return_inverse=True)
        logits = self._model.model(**given, logits_to_keep=wanted).logits
        index = torch.arange(len(slots), device=device)
        return torch.as_tensor(logits[index, place, : self._model.vocab_size])


def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class SlotLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
        """Keys and values (S, h, L, d) of all slots, of which a call reads and writes some."""

        _room: tuple[torch.Tensor, torch.Tensor] | None = None

        def aim(self, slots: list[int], starts: list[int], seen: int, num_slots: int) -> None:
            """Say which slots the next update writes, from where, and how far it looks."""
            self._slots, self._starts, self._seen, self._most = slots, starts, seen, num_slots

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            return 0  # positions and mask are given

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            states, slots, seen = (key_states, value_states), self._slots, self._seen
            self._make_room(states, max(slots) + 1, seen)
            assert self._room is not None
            out = []
            for room, new in zip(self._room, states, strict=True):
                for i, (slot, start) in enumerate(zip(slots, self._starts, strict=True)):
                    room[slot, :, start : start + new.shape[2]] = new[i]
                one = slots[0]
                rows = room[one : one + 1] if len(slots) == 1 else room[slots]
                out.append(rows[:, :, :seen])
            return out[0], out[1]

        def _make_room(self, like: tuple[Any, Any], num_slots: int, num_positions: int) -> None:
            held, long = (0, 0) if self._room is None else self._room[0].shape[::2]
            if held >= num_slots and long >= num_positions:
                return
            if held < num_slots:
                held = min(max(num_slots, held * 2), max(self._most, num_slots))
            if long < num_positions:
                long = max(num_positions + SPARE_POSITIONS, long * 3 // 2)
            # Masked positions are multiplied by zero, so they must hold finite numbers.
            wider = tuple(x.new_zeros((held, x.shape[1], long, x.shape[3])) for x in like)
            if self._room is not None:
                for new, old in zip(wider, self._room, strict=True):
                    new[: old.shape[0], :, : old.shape[2]] = old
            self._room = (wider[0], wider[1])

    return SlotLayer
