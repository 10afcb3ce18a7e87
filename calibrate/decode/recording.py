"""What a trace keeps of each step: the columns of hlmtheory.steps, gathered a batch at a time."""

from __future__ import annotations

import zlib
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
from hlmtheory.steps import COLUMNS, LawStep

Columns: TypeAlias = dict[str, np.ndarray]

SCALARS = (
    "draft_token", "output_token", "draft_prob", "target_prob", "rejection_prob", "draft_rank",
    "uncertainty", "uncertainty_sampled", "uncertainty_variance", "entropy", "max_prob", "margin",
    "max_logit", "tv_distance", "output_prob", "output_target_prob", "output_uncertainty",
)  # fmt: skip
"""Columns of every trace."""

HEAD = ("head_prob", "head_target_prob", "head_uncertainty", "log_partitions", "tail_deviation")
"""Columns of a full trace beside them."""

STRIDED = ("truncation_table", "head_agreement", "head_race")
"""Columns that cost a pass over the vocabulary, recorded every STRIDE-th step of a prompt."""

STRIDE = 4


def phase(prompt_id: str) -> int:
    """First step at which a prompt's STRIDED columns are recorded: 0 to STRIDE - 1.

    A hash of the id, so that over many prompts every step counts alike.
    """
    return zlib.crc32(prompt_id.encode()) % STRIDE


def strided_columns(step: LawStep, due: np.ndarray) -> dict[str, torch.Tensor]:
    """STRIDED columns of the rows that are due, bool (B,); NaN in the others, which means skip."""
    rows = torch.from_numpy(np.flatnonzero(due)).to(step.x.device)
    known = {name: step[name][rows] for name in ("draft_token", "candidate_token")}
    part = LawStep(
        step.axes, step.logits[rows], step.x[rows], step.y[rows], columns=known
    )  # fmt: skip
    out = {}
    for name in STRIDED:
        found = part[name].to(torch.float32) if len(rows) else None
        axis = COLUMNS[name].axis
        width = step["head_prob"].shape[1] if axis == "head" else len(getattr(step.axes, axis))
        values = torch.full((len(due), width), float("nan"), device=step.x.device)
        if found is not None:
            values[rows] = found
        out[name] = values
    return out


def attention_columns(
    attention: torch.Tensor, mask: torch.Tensor | None, sizes: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Statistics of the attention row that the importance of a context is made of."""
    if mask is None:
        mask = torch.ones_like(attention, dtype=torch.bool)
    row = normalised_attention(attention, mask)
    return {
        "attention_sink": attention_sink(attention),
        "attention_entropy": attention_entropy(row),
        "context_attention": context_attention(attention, mask),
        "num_attended": mask.sum(-1),
        "topk_attention": torch.stack([topk_attention(row, k) for k in sizes], -1),
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


def to_numpy(values: Any) -> np.ndarray:
    """A CPU numpy array, whatever came in."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
