"""Columns of a full trace: what later stages need to know of (x, y) without keeping x and y."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from calibrate.run.traces import Trace
from hlmtheory.importance import (
    RunningThreshold,
    attention_entropy,
    attention_sink,
    context_attention,
    normalised_attention,
    topk_attention,
    topk_importance_threshold,
)
from hlmtheory.policies import ImportanceSettings
from hlmtheory.truncation import tail_deviation_at
from hlmtheory.truncation_bias import truncation_bias_at
from hlmtheory.uncertainty import Temperatures, exact_uncertainty

if TYPE_CHECKING:
    import torch

Columns: TypeAlias = dict[str, np.ndarray]

THRESHOLD_GRID = (
    0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4,
    0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98,
)  # fmt: skip
"""Uncertainty thresholds at which the skip set of every context is recorded."""

SIZE_GRID = (
    1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 48, 64, 96, 128, 256, 512, 832, 1024, 2048, 4096, 8192,
)  # fmt: skip
"""Truncation sizes k at which the tail deviation is recorded."""

BIAS_SIZE_GRID = (1, 4, 16, 30, 64, 256, 1024, 4096)
"""Sizes at which the exact bias of truncation is recorded, every TRUNCATION_STRIDE-th step."""

TRUNCATION_STRIDE = 4
"""Steps from one recorded bias of a prompt to its next; the first is the prompt's own."""

TOPK_ATTENTION_GRID = (1, 2, 4, 8, 16)
"""k of the `topk` importance recorded at every step."""


def skip_set_columns(
    z: torch.Tensor, x: torch.Tensor, y: torch.Tensor, thetas: Temperatures, log_z: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Size, drawn mass and biases of the skip set at every threshold of the grid: (B, G) each.

    docs/theory.md, (11), (24), and (25) for `skip_set_ask_bias`. The skip set at a threshold up to
    0.98 has at most fifty tokens, and they are the likeliest.
    """
    import torch

    num_tokens = min(z.shape[-1], int(1 / (1 - THRESHOLD_GRID[-1])) + 1)
    top = z.topk(num_tokens).indices  # (B, M)
    uncertainty = exact_uncertainty(z, top, thetas, log_z)  # (B, M)
    x_top, y_top = x.gather(1, top), y.gather(1, top)
    grid = torch.tensor(THRESHOLD_GRID, device=z.device, dtype=uncertainty.dtype)
    inside = (uncertainty[:, :, None] <= grid).to(x.dtype)  # (B, M, G)
    mass = (inside * x_top[:, :, None]).sum(1)  # (B, G)
    return {
        "skip_set_size": inside.sum(1).to(torch.int16),
        "skip_set_mass": mass,
        "skip_set_bias": (inside * (x_top - y_top).clamp(min=0)[:, :, None]).sum(1),
        "skip_set_ask_bias": (
            inside * (x_top[:, :, None] - y_top[:, :, None] * mass[:, None]).clamp(min=0)
        ).sum(1),
    }


def truncation_phase(prompt_id: str) -> int:
    """First step at which a prompt's truncation bias is recorded: 0 to TRUNCATION_STRIDE - 1.

    A hash of the id, so that over many prompts every step counts alike.
    """
    return zlib.crc32(prompt_id.encode()) % TRUNCATION_STRIDE


def truncation_columns(
    recorded: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> dict[str, torch.Tensor]:
    """N(k) on the size grid; the exact bias at a few k in the rows `recorded`, bool (B,).

    The bias is NaN in the other rows, and means over tokens skip NaN.
    """
    import torch

    vocab = x.shape[-1]
    deviation = tail_deviation_at(x, tuple(min(k, vocab) for k in SIZE_GRID))
    bias = torch.full((x.shape[0], len(BIAS_SIZE_GRID)), float("nan"), device=x.device)
    if bool(recorded.any()):
        sizes = tuple(min(k, vocab) for k in BIAS_SIZE_GRID)
        bias[recorded] = truncation_bias_at(x[recorded], y[recorded], sizes).to(bias.dtype)
    return {"tail_deviation": deviation, "truncation_bias": bias}


def attention_columns(
    attention: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Statistics of the attention row that the importance of a context is made of."""
    import torch

    if mask is None:
        mask = torch.ones_like(attention, dtype=torch.bool)
    row = normalised_attention(attention, mask)
    return {
        "attention_sink": attention_sink(attention),
        "attention_entropy": attention_entropy(row),
        "context_attention": context_attention(attention, mask),
        "num_attended": mask.sum(-1),
        "topk_attention": torch.stack([topk_attention(row, k) for k in TOPK_ATTENTION_GRID], -1),
    }


class ColumnBuffer:
    """Columns of one batch, in arrays made once.

    Small arrays of every step, kept, would lie between the large ones that a step frees, and the
    next step's large ones would no longer fit where the last step's were.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._columns: Columns = {}
        self._used = 0

    def append(self, step: Columns) -> None:
        """Copy the rows of one step behind the others; every step has the same columns."""
        num = len(next(iter(step.values())))
        for name, values in step.items():
            if self._used == 0:
                shape = (self._num_rows, *values.shape[1:])
                self._columns[name] = np.empty(shape, values.dtype)
            self._columns[name][self._used : self._used + num] = values
        self._used += num

    def filled(self) -> Columns:
        """The rows so far, (N, ...) each."""
        return {name: values[: self._used] for name, values in self._columns.items()}


class ImportanceTracker:
    """Says of every step whether its context is important, row by row, as the tokens come."""

    def __init__(self, settings: ImportanceSettings) -> None:
        self.settings = settings
        self._running: RunningThreshold | None = None

    def update(self, columns: Mapping[str, Any]) -> Any:
        """Bool array (B,): importance of this step from its attention columns."""
        settings = self.settings
        if settings.variant == "topk":
            values = columns["topk_attention"][..., topk_column(settings)]
            return values >= topk_importance_threshold(columns["attention_entropy"], settings.gamma)
        values = columns["context_attention"]
        if self._running is None:
            self._running = RunningThreshold.start(values)
            return values >= values
        important = values >= self._running.threshold(settings.k)
        self._running = self._running.update(values, settings.gamma)
        return important

    def keep(self, rows: Any) -> None:
        """Keep only these rows."""
        if self._running is not None:
            self._running = RunningThreshold(self._running.mean[rows], self._running.variance[rows])


def topk_column(settings: ImportanceSettings) -> int:
    """Which recorded k an importance setting reads."""
    if settings.k not in TOPK_ATTENTION_GRID:
        raise ValueError(
            f"k = {settings.k:g}: allowed for topk are "
            f"{', '.join(map(str, TOPK_ATTENTION_GRID))}, the sizes that traces record"
        )
    return TOPK_ATTENTION_GRID.index(int(settings.k))


def replay_importance(trace: Trace, settings: ImportanceSettings) -> np.ndarray:
    """Which tokens of a trace the setting calls important, (N,) bool; step by step, as live."""
    steps = trace["step"]
    out = np.zeros(trace.num_tokens, dtype=bool)
    tracker = ImportanceTracker(settings)
    names = ("topk_attention", "attention_entropy", "context_attention")
    live = np.flatnonzero(steps == 0)  # row of each prompt's current token
    while len(live):
        out[live] = tracker.update({name: trace[name][live] for name in names})
        following = live + 1
        inside = following < trace.num_tokens
        continues = inside & (steps[np.where(inside, following, 0)] > 0)
        tracker.keep(np.flatnonzero(continues))
        live = following[continues]
    return out


def to_numpy(values: Any) -> np.ndarray:
    """A CPU numpy array, whatever came in."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
