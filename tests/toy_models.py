"""Models and steps without a network: logits are given, so every law is known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from calibrate.decode.models import StepOutput
from hlmtheory.sampled_law import PLAIN, Sampling, sampled_law
from hlmtheory.steps import COLUMNS, HEAD_SIZE, Axes, LawStep, Step


class TableModel:
    """Logits of the next token as a function of the last one (or of nothing)."""

    def __init__(self, logits: np.ndarray) -> None:
        self.table = torch.tensor(np.atleast_2d(logits), dtype=torch.float32)  # (1 or V, V)
        self.vocab_size = self.table.shape[1]
        self.device = torch.device("cpu")

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> TableSession:
        return TableSession(self.table, attention, len(contexts))


class TableSession:
    def __init__(self, table: torch.Tensor, attention: bool, num_rows: int) -> None:
        self.table = table
        self.attention = attention
        self.forward_s = 0.0
        self.length = torch.ones(num_rows, dtype=torch.long)

    def step(self, tokens: torch.Tensor) -> StepOutput:
        rows = tokens if len(self.table) > 1 else torch.zeros_like(tokens)
        self.length = self.length + 1
        logits = self.table[rows]
        if not self.attention:
            return StepOutput(logits)
        # Attention whose place and focus depend on the last token, from uniform to sharp.
        width = int(self.length.max())
        positions = torch.arange(width)
        mask = positions < self.length[:, None]
        focus = (tokens[:, None] % 4) / 2
        weights = torch.exp(-focus * ((positions + tokens[:, None]) % 5)) * mask
        return StepOutput(logits, weights / weights.sum(-1, keepdim=True), mask)

    def keep(self, rows: torch.Tensor) -> None:
        self.length = self.length[rows]


class ArrayNoise:
    """Random numbers of B contexts from one generator, numpy or torch."""

    def __init__(self, rng: np.random.Generator, num: int, vocab: int, to=np.asarray) -> None:
        self.draft = to(rng.random((num, 2)))
        self.accept = to(rng.random(num))
        self.resample = to(rng.random((num, 2)))
        self.perturbation = to(rng.random((num, 128)))
        self._races = to(rng.standard_exponential((num, vocab)))

    def races(self):
        return self._races

    def rows(self, index):
        raise NotImplementedError


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_logits(rng: np.random.Generator, num: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (B, V) of device and server, from flat to sharp and from near to far."""
    z = rng.uniform(0.3, 6, size=(num, 1)) * rng.standard_normal((num, vocab))
    return z, z + rng.uniform(0, 1.5, size=(num, 1)) * rng.standard_normal((num, vocab))


def law_step(
    rng: np.random.Generator,
    logits: np.ndarray,
    target: np.ndarray,
    *,
    sampling: Sampling = PLAIN,
    head_size: int = HEAD_SIZE,
    drafts: np.ndarray | None = None,
    to=np.asarray,
) -> LawStep:
    """A live step of the float64 laws of these logits, (B, V) each, with a draft and an output.

    `to` makes arrays of another namespace, such as torch.from_numpy.
    """
    num, vocab = logits.shape
    x, y = sampled_law(logits, sampling), sampled_law(target, sampling)
    if drafts is None:
        drafts = np.array([rng.choice(vocab, p=row) for row in x])
    outputs = np.array([rng.choice(vocab, p=row) for row in y])
    noise = ArrayNoise(rng, num, vocab, to)
    step = LawStep(Axes(vocab, sampling), to(logits), to(x), to(y), noise, head_size)
    return step.with_columns({"draft_token": to(drafts), "output_token": to(outputs)})


def stored(step: LawStep, due: np.ndarray | None = None) -> Step:
    """What a trace keeps of a step, in the precision of its laws; NaN where not `due`."""
    columns = {
        name: np.asarray(step[name]).copy()
        for name, column in COLUMNS.items()
        if column.text and name in step
    }
    if due is not None:
        for name in ("truncation_table", "head_agreement", "head_race"):
            columns[name][~due] = np.nan
    return Step(step.axes, columns)
