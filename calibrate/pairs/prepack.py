"""Weights of linear layers in the order in which the processor's matrix kernels read them.

oneDNN reads a weight in blocks; given one row by row it puts the blocks together anew at every
product, which for the few rows of a decoding step takes about as long as the product itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from calibrate.pairs.buffers import WORKING_SET_BYTES
from calibrate.run.machine import available_memory

ROWS = 64
"""Rows that the order is chosen for; any number may come."""

TRIED_ROWS = 4
AGREEMENT = 2**-7
"""Most that an output may differ, of the largest: sums are in float32 and rounded once, to the 8
bits of bfloat16, so two orders of one sum are neighbours at most."""


class PrepackedLinear(nn.Module):  # type: ignore[misc, unused-ignore]
    """Like the layer it is made from, whose weight it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        return int(self.in_features * self.out_features * self._packed.dtype.itemsize)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight (out, in), row by row, for models that look at it."""
        return torch.as_tensor(self._packed.to_dense())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _apply(self, fn: Any, recurse: bool = True) -> PrepackedLinear:
        """What `.float()`, `.to()` and the like call with what they do to a tensor."""
        changed = fn(torch.empty(0, dtype=self._packed.dtype))
        if changed.dtype != self._packed.dtype or changed.device.type != "cpu":
            raise RuntimeError(
                "a prepacked layer keeps its precision and its place: load the pair with another "
                "dtype, or with prepack=False"
            )
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W' + b, (..., out)."""
        return torch.as_tensor(
            torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        )


def prepack_linear_layers(models: Sequence[Any], always: bool = False) -> None:
    """Replace the linear layers in bfloat16 on a processor, of models that may share tensors.

    Each is tried first, and stays as it was where torch does not know the operation or its output
    is another. That products are faster so is measured on a Xeon with AMX (docs/performance.md) and
    assumed of other processors. A weight that is tied to the embedding is
    held twice from then on; one that two models share is held once. Weights as they come are mapped
    from their file, and the system may drop what it can read again; these it must keep, so all
    layers stay as they are where the memory would not hold them.

    Parameters
    ----------
    models : sequence of torch modules
    always : bool
        Whatever memory there is: it was looked at before.
    """
    places: dict[tuple[Any, ...], list[tuple[nn.Module, str]]] = {}
    for model in models:
        for owner in model.modules():
            for name, layer in owner.named_children():
                if _can_be_packed(layer):
                    key = (layer.weight.data_ptr(), layer.weight.shape, id(layer.bias))
                    places.setdefault(key, []).append((owner, name))
    size = sum(getattr(*holders[0]).weight.nbytes for holders in places.values())
    if not (always or room_for(size)):
        return
    for holders in places.values():  # one by one, so that one weight at a time is there twice
        packed = _prepacked(getattr(*holders[0]))
        for owner, name in holders:
            setattr(owner, name, packed)


def prepacked_bytes(models: Sequence[Any]) -> int:
    """Memory that the prepacked layers of models take."""
    layers = {layer for model in models for layer in model.modules()}
    found = (layer for layer in layers if isinstance(layer, PrepackedLinear))
    return sum(layer.nbytes for layer in found)


def room_for(num_bytes: int, num_processes: int = 1) -> bool:
    """Whether so many processes can each hold so much in prepacked layers and decode beside it."""
    return available_memory() >= num_processes * (num_bytes + 2 * WORKING_SET_BYTES)


def _can_be_packed(layer: Any) -> bool:
    # A subclass may compute something else.
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
        return False
    return bool(layer.weight.is_contiguous()) and layer.weight.dtype == torch.bfloat16


def _prepacked(layer: nn.Linear) -> nn.Module:
    """The layer to use: prepacked if it works, else the layer itself."""
    place = torch.arange(TRIED_ROWS * layer.in_features, dtype=torch.float32)
    tried = torch.sin(place).reshape(TRIED_ROWS, -1).to(layer.weight.dtype)
    try:
        with torch.inference_mode():
            prepacked = PrepackedLinear(layer)
            before, after = layer(tried).float(), prepacked(tried).float()
    except (RuntimeError, AttributeError, TypeError):
        return layer
    apart = float((after - before).abs().max())
    return prepacked if apart <= AGREEMENT * float(before.abs().max()) else layer
