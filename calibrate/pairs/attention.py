"""The newest token's attention, recorded beside the fast kernels instead of in their place.

transformers gives attention weights only with its eager attention, which is slow and rounds
differently. Here the output still comes from torch's fused kernel, and the weights of a single
query, softmax(q K / sqrt(d)) averaged over heads, are computed next to it only while somebody is
recording: whether they are wanted changes no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from calibrate.run.errors import UserError

RECORDING = "hlm_recording"
_recorded: list[torch.Tensor] | None = None


def allow_recording(model: Any) -> None:
    """Make a model able to give the attention of its newest token, as fast as its kernels allow.

    A model without the fused kernel, or with attention that is no plain softmax (capped scores,
    sinks), falls back to transformers' own eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    plain = not any(
        getattr(config, name, None) for name in ("attn_logit_softcapping", "use_attention_sinks")
    )
    if model.config._attn_implementation == "sdpa" and plain and _is_grouped_softmax(model):
        AttentionInterface.register(RECORDING, _attend)
        AttentionMaskInterface.register(RECORDING, sdpa_mask)
        model.set_attn_implementation(RECORDING)
    else:
        model.set_attn_implementation("eager")
        # Some families fix their attention when they are built, and only log that they did not
        # switch; asked for weights as they are, they may compute wrong logits.
        if model.config._attn_implementation != "eager":
            raise UserError(
                f"{type(model).__name__} cannot give its attention as it was loaded; "
                "calibrate with --trace minimal"
            )


def _is_grouped_softmax(model: Any) -> bool:
    """Whether attention layers say how queries share keys, and have no weights of their own."""
    layers = [m for m in model.modules() if hasattr(m, "num_key_value_groups")]
    return bool(layers) and not any(hasattr(layer, "sinks") for layer in layers)


def records(model: Any) -> bool:
    """Whether :func:`recording` sees this model's attention."""
    return bool(model.config._attn_implementation == RECORDING)


def takes_masks(model: Any, attention: bool) -> bool:
    """Whether a boolean mask may be given as it is, and attention recorded if it is wanted.

    To eager attention a mask is numbers to add, to other kernels something else again.
    """
    return records(model) or (model.config._attn_implementation == "sdpa" and not attention)


@contextmanager
def recording() -> Iterator[list[torch.Tensor]]:
    """Collect, of every layer that runs inside, the newest token's attention (B, n), float32."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _recorded is not None and query.shape[2] == 1:
        _recorded.append(newest_attention(query, key, attention_mask, scaling))
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output, None


def newest_attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention weights of one query, mean over heads: (B, n) float32, rows that sum to one.

    The query is (B, H, 1, d), the keys (B, G, n, d), where G divides H: heads in groups share their
    keys. The mask (B, 1, 1, n) says which positions are seen; a scaling of None is 1/sqrt(d).
    """
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    scores = (grouped @ key.transpose(2, 3)).float() * (scaling or size**-0.5)  # (B, G, H/G, n)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise UserError(
                "the device model adds numbers to its attention scores, which is not recorded; "
                "calibrate with --trace minimal"
            )
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1).mean((1, 2))
