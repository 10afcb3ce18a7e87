"""A device model made from a server model by leaving decoder layers out, sharing its tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from calibrate.pairs.quiet import quiet
from calibrate.run.errors import UserError


def share_without_layers(model: Any, dropped: Sequence[int]) -> Any:
    """Build a model without some decoder layers; its weights are the given model's own tensors.

    The model given stays as it is. Layers to leave out are counted from 0; those kept are numbered
    anew, as a KV cache requires.

    Raises
    ------
    UserError
        A layer number the model does not have, or no layer left.
    """
    import torch

    source_config = model.config.get_text_config()
    num_layers = int(source_config.num_hidden_layers)
    if any(not 0 <= layer < num_layers for layer in dropped) or len(dropped) >= num_layers:
        raise UserError(
            f"--drop-layers {','.join(map(str, dropped))}: the model has layers 0 to "
            f"{num_layers - 1}, and at least one must stay"
        )
    kept = [layer for layer in range(num_layers) if layer not in set(dropped)]

    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    # Some families say for each layer what it is (sliding or full attention, with or without
    # rotation); these lists must follow the layers.
    for name, value in vars(text_config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(text_config, name, type(value)(value[layer] for layer in kept))
    text_config.num_hidden_layers = len(kept)

    with torch.device("meta"), quiet():
        smaller = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    prefix = _layers_prefix(model, num_layers)

    def source_name(name: str) -> str:
        if not name.startswith(prefix):
            return name
        number, rest = name[len(prefix) :].split(".", 1)
        return f"{prefix}{kept[int(number)]}.{rest}"

    source = model.state_dict(keep_vars=True)
    smaller.load_state_dict(
        {name: source[source_name(name)] for name in smaller.state_dict()}, assign=True
    )
    smaller.tie_weights()
    # Buffers outside the state dict, such as the rotary frequencies, were never saved either.
    buffers = dict(model.named_buffers())
    for name, buffer in list(smaller.named_buffers()):
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            setattr(smaller.get_submodule(owner), attribute, buffers[source_name(name)])
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval().requires_grad_(False)


def _layers_prefix(model: Any, num_layers: int) -> str:
    """Name of the list of decoder layers, with a dot behind it."""
    from torch import nn

    names: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not names:
        raise UserError(
            f"cannot drop layers of a {type(model).__name__}: its decoder layers are not found; "
            "give a smaller model with --slm"
        )
    return min(names, key=lambda name: name.count(".")) + "."
