"""Columns of a full trace: what later stages need to know of (x, y) without keeping x and y."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from hlmtheory.importance import (
    attention_entropy,
    attention_sink,
    context_attention,
    normalised_attention,
    topk_attention,
)
from hlmtheory.truncation import tail_deviation_at, truncation_bias
from hlmtheory.uncertainty import Temperatures, exact_uncertainty

Columns: TypeAlias = dict[str, np.ndarray]

THRESHOLD_GRID = (
    0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4,
    0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98,
)  # fmt: skip
"""Uncertainty thresholds at which the skip set of every context is recorded."""

SIZE_GRID = (
    1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 48, 64, 96, 128, 256, 512, 832, 1024, 2048, 4096, 8192,
)  # fmt: skip
"""Truncation sizes k at which the tail deviation of every context is recorded."""

BIAS_SIZE_GRID = (1, 4, 16, 30, 64, 256, 1024, 4096)
"""Sizes at which the exact bias of truncation is recorded, every BIAS_STRIDE-th step."""

BIAS_STRIDE = 8

TOPK_ATTENTION_GRID = (1, 2, 4, 8, 16)
"""k of the `topk` importance recorded at every step."""


def skip_set_columns(
    z: torch.Tensor, x: torch.Tensor, y: torch.Tensor, thetas: Temperatures, log_z: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Size, drawn mass and bias of the skip set at every threshold of the grid: (B, G) each.

    docs/theory.md, (11), (24). The skip set at a threshold below 0.98 has at most fifty tokens,
    and they are the likeliest.
    """
    num_tokens = min(z.shape[-1], int(1 / (1 - THRESHOLD_GRID[-1])) + 1)
    top = z.topk(num_tokens).indices  # (B, M)
    uncertainty = exact_uncertainty(z, top, thetas, log_z)  # (B, M)
    x_top, y_top = x.gather(1, top), y.gather(1, top)
    grid = torch.tensor(THRESHOLD_GRID, device=z.device, dtype=uncertainty.dtype)
    inside = (uncertainty[:, :, None] <= grid).to(x.dtype)  # (B, M, G)
    return {
        "skip_set_size": inside.sum(1).to(torch.int16),
        "skip_set_mass": (inside * x_top[:, :, None]).sum(1),
        "skip_set_bias": (inside * (x_top - y_top).clamp(min=0)[:, :, None]).sum(1),
    }


def truncation_columns(step: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """N(k) on the size grid, and the exact bias of truncation at a few k every few steps."""
    vocab = x.shape[-1]
    sizes = tuple(min(k, vocab) for k in SIZE_GRID)
    columns = {"tail_deviation": tail_deviation_at(x, sizes)}
    bias = torch.full((x.shape[0], len(BIAS_SIZE_GRID)), float("nan"), device=x.device)
    if step % BIAS_STRIDE == 0:
        for i, k in enumerate(BIAS_SIZE_GRID):
            bias[:, i] = truncation_bias(x, y, min(k, vocab))
    columns["truncation_bias"] = bias
    return columns


def attention_columns(
    attention: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Statistics of the attention row that the importance of a context is made of."""
    raise NotImplementedError


def to_numpy(values: Any) -> np.ndarray:
    """A CPU numpy array, whatever came in."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)
