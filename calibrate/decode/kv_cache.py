"""A key-value cache whose rows can be filled in groups, grown in place, repeated and dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calibrate.decode.memory import release_freed_buffers

SPARE_POSITIONS = 128


class RowCache:
    """The cache object a model fills, and what the session does with its rows.

    Attributes
    ----------
    cache : transformers Cache
        Passed to the model.
    can_place_rows : bool
        Whether groups of rows can be prefilled apart; not where a layer keeps a sliding window.
    """

    def __init__(self, cache: Any, can_place_rows: bool, num_rows: int) -> None:
        self.cache = cache
        self.can_place_rows = can_place_rows
        self._num_rows = num_rows

    def place_rows(self, part: RowCache, places: Sequence[int], width: int) -> None:
        """Copy the first rows of a prefilled part to `places`, in `width` columns."""
        if not self.can_place_rows:
            # One group holds every row; only its order may differ.
            order = torch.argsort(torch.tensor(places))
            part.cache.batch_select_indices(order.to(part.cache.layers[0].keys.device))
            self.cache = part.cache
            return
        for layer, filled in zip(self.cache.layers, part.cache.layers, strict=True):
            layer.place_rows(filled, list(places), self._num_rows, width)

    def begin_with(self, prefix: RowCache, width: int) -> None:
        """Begin every row, empty as yet, with one row's tokens; room for `width` columns."""
        for layer, filled in zip(self.cache.layers, prefix.cache.layers, strict=True):
            layer.begin_with(filled, self._num_rows, width)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come more than once."""
        before = self._room_for()
        self.cache.batch_select_indices(rows)
        if self._room_for() > before:
            release_freed_buffers()

    def _room_for(self) -> int:
        """Rows that there is room for; 0 where layers keep their own."""
        return max((getattr(layer, "capacity", 0) for layer in self.cache.layers), default=0)


def make_cache(config: Any, num_rows: int) -> RowCache:
    """An empty cache for a model of this configuration."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
        """A layer with spare room behind its tokens, instead of a copy at every token."""

        keys: Any
        values: Any
        _room: tuple[torch.Tensor, torch.Tensor] | None = None
        _num_rows: int

        @property
        def capacity(self) -> int:
            """Rows that there is room for."""
            return 0 if self._room is None else int(self._room[0].shape[0])

        def _reserve(self, like: tuple[Any, Any], num_rows: int, num_positions: int) -> None:
            # Masked positions are multiplied by zero, so they must hold finite numbers.
            keys, values = (
                x.new_zeros((num_rows, x.shape[1], num_positions, x.shape[3])) for x in like
            )
            self._room, self._num_rows = (keys, values), num_rows

        def _show(self, num_positions: int) -> None:
            assert self._room is not None
            self.keys = self._room[0][: self._num_rows, :, :num_positions]
            self.values = self._room[1][: self._num_rows, :, :num_positions]

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            states = (key_states, value_states)
            used = self.get_seq_length()
            total = used + key_states.shape[-2]
            if self._room is None or self._room[0].shape[-2] < total:
                earlier = (self.keys, self.values)
                spare = SPARE_POSITIONS if used else 0
                self._reserve(states, key_states.shape[0], total + spare)
                assert self._room is not None
                if used:
                    for room, before in zip(self._room, earlier, strict=True):
                        room[..., :used, :] = before
            for room, new in zip(self._room, states, strict=True):
                room[: self._num_rows, :, used:total] = new
            self._show(total)
            return self.keys, self.values

        def begin_with(self, prefix: Any, num_rows: int, width: int) -> None:
            """Begin every row with the tokens of another layer's one row."""
            self.lazy_initialization(prefix.keys, prefix.values)
            self._reserve((prefix.keys, prefix.values), num_rows, width)
            assert self._room is not None
            begun = prefix.keys.shape[-2]
            for room, one in zip(self._room, (prefix.keys, prefix.values), strict=True):
                room[:, :, :begun] = one
            self._show(begun)

        def place_rows(self, part: Any, places: list[int], num_rows: int, width: int) -> None:
            """Take over rows of another layer."""
            if not self.is_initialized:
                self.lazy_initialization(part.keys, part.values)
                self._reserve((part.keys, part.values), num_rows, width + SPARE_POSITIONS)
            assert self._room is not None
            columns = part.keys.shape[-2]
            self._room[0][places, :, :columns] = part.keys[: len(places)]
            self._room[1][places, :, :columns] = part.values[: len(places)]
            self._show(width)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            """Rows that keep their place are not copied."""
            if self._room is None:
                return
            used, wanted = self.get_seq_length(), indices.tolist()
            moved = [place for place, row in enumerate(wanted) if place != row]
            sources = [wanted[place] for place in moved]
            # Read before anything is written, for a row may be a source and a place.
            taken = [room[sources, :, :used] for room in self._room]
            if len(wanted) > self.capacity:
                earlier = (self.keys, self.values)
                # By half, and seldom: each growth leaves holes that the next is too large for.
                rows = max(len(wanted), self.capacity * 3 // 2)
                self._reserve(self._room, rows, self._room[0].shape[-2])
                for room, before in zip(self._room, earlier, strict=True):
                    room[: before.shape[0], :, :used] = before
                del earlier
            for room, rows_taken in zip(self._room, taken, strict=True):
                room[moved, :, :used] = rows_taken
            self._num_rows = len(wanted)
            self._show(used)

    cache = DynamicCache(config=config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers) and bool(cache.layers)
    if plain:
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return RowCache(cache, plain, num_rows)
