"""Batched HLM decoding under any policy, in shadow mode.

All prompts of a batch advance one token a step in both models. The server model runs for every
token, also where the policy would not have asked it, so that the rejection probability and the
exact output bias are known everywhere; what the policy would have sent is counted by the policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calibrate.decode.memory import release_freed_buffers
from calibrate.decode.models import LanguageModel
from calibrate.decode.recording import (
    HEAD,
    SCALARS,
    STRIDE,
    ColumnBuffer,
    Columns,
    attention_columns,
    phase,
    strided_columns,
    to_numpy,
)
from calibrate.decode.streams import PERTURBATION, StepNoise, Streams
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory import domain
from hlmtheory.policies import Policy
from hlmtheory.steps import Axes, LawStep
from hlmtheory.uncertainty import Temperatures, temperatures


@dataclass(frozen=True)
class DecodingSettings:
    """Everything, apart from models, prompts and policy, that decides the tokens and the columns.

    Attributes
    ----------
    temperature : float
        Sampling temperature of both models, > 0. The uncertainty is of the raw logits.
    max_new_tokens : int
    batch_size : int
        Never changes a token, apart from rounding.
    seed : int
    thetas : Temperatures
        Perturbation temperatures of the uncertainty.
    trace : {"full", "minimal"}
        Minimal leaves out the head, truncation and attention.
    """

    temperature: float = 1.0
    max_new_tokens: int = 64
    batch_size: int = 16
    seed: int = 0
    thetas: Temperatures = field(default_factory=temperatures)
    trace: str = "full"

    def __post_init__(self) -> None:
        domain.check_positive(float(self.temperature), "temperature")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed is >= 1")
        if len(self.thetas.values) > PERTURBATION.stop - PERTURBATION.start:
            raise ValueError(f"thetas has {len(self.thetas.values)} values: at most 128")
        if self.trace not in ("full", "minimal"):
            raise ValueError(f"trace = {self.trace!r}: allowed are 'full', 'minimal'")

    def axes(self, vocab_size: int) -> Axes:
        """What the columns of these settings mean."""
        return Axes(vocab_size, self.temperature, self.thetas.values)


Observer = Callable[[LawStep], Columns]
"""Extra columns from a step with its draft and output: for studies."""


@dataclass(frozen=True)
class DecodedBatch:
    """One batch, decoded to the end.

    Attributes
    ----------
    columns : mapping of str to array (N, ...)
        One row a token, ordered by prompt and step; `row` indexes `prompt_ids`.
    prompt_ids, categories : sequence of str
        Of each prompt; a category is empty where the prompt has none.
    wall_s, forward_s : float
        Time of decoding, and the part of it inside the two models' forwards.
    """

    columns: Columns
    prompt_ids: Sequence[str]
    categories: Sequence[str]
    wall_s: float
    forward_s: float


def decode(
    slm: LanguageModel,
    llm: LanguageModel,
    prompts: Sequence[TokenizedPrompt],
    policy: Policy,
    settings: DecodingSettings,
    eos_token_ids: Sequence[int],
    on_step: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
) -> Iterator[DecodedBatch]:
    """Decode prompts under a policy, batch by batch, longest prompts first.

    Parameters
    ----------
    slm, llm : LanguageModel
        Device and server model over one vocabulary.
    prompts : sequence of TokenizedPrompt
    policy : Policy
        Gate and verification rule.
    settings : DecodingSettings
    eos_token_ids : sequence of int
        A row ends after it has emitted one of these; they are drawn and verified like any token.
    on_step : callable, optional
        Called after every step with (tokens just emitted, tokens that the finished rows will
        never need), for progress bars.
    observer : callable, optional
        Extra columns at every step.

    Yields
    ------
    DecodedBatch
        One a batch, complete.
    """
    for batch in batches_by_length(prompts, settings.batch_size):
        with torch.inference_mode(), domain.unchecked():
            try:
                run = _BatchRun(slm, llm, batch, policy, settings, eos_token_ids, observer)
                decoded = run.to_end(on_step)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                raise UserError(
                    f"--batch-size {settings.batch_size}: a batch of {len(batch)} prompts does not "
                    "fit the memory; give a smaller one"
                ) from None
        del run  # its caches, before the next batch makes its own
        release_freed_buffers()
        yield decoded


def _out_of_memory(error: Exception) -> bool:
    """Torch has a class for it on accelerators only; on a processor it says so in words."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in str(error)


def batches_by_length(
    prompts: Sequence[TokenizedPrompt], batch_size: int
) -> list[list[TokenizedPrompt]]:
    """Prompts in batches, longest first.

    Like lengths together make less padding, and the batch that needs the most memory is the first.
    """
    order = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.prompt_id))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


class _BatchRun:
    """State of one batch while it is decoded."""

    def __init__(
        self,
        slm: LanguageModel,
        llm: LanguageModel,
        batch: Sequence[TokenizedPrompt],
        policy: Policy,
        settings: DecodingSettings,
        eos_token_ids: Sequence[int],
        observer: Observer | None,
    ) -> None:
        self.begin = time.perf_counter()
        self.policy = policy
        self.settings = settings
        self.observer = observer
        self.prompt_ids = [prompt.prompt_id for prompt in batch]
        self.categories = [prompt.category for prompt in batch]
        self.streams = Streams(settings.seed, self.prompt_ids)
        self.want_attention = settings.trace == "full" or policy.needs_attention
        self.axes = settings.axes(slm.vocab_size)
        self.num_candidates = policy.num_candidates(slm.vocab_size)
        contexts = [prompt.tokens[:-1] for prompt in batch]
        self.slm = slm.start(contexts, self.want_attention)
        self.llm = llm.start(contexts, False)
        self.device = slm.device
        self.tokens = torch.tensor([prompt.tokens[-1] for prompt in batch], device=self.device)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=self.device)
        self.rows = np.arange(len(batch))
        self.phase = np.array([phase(prompt.prompt_id) for prompt in batch])
        self.memory = policy.memory()
        self.columns = ColumnBuffer(len(batch) * settings.max_new_tokens)

    def to_end(self, on_step: Callable[[int, int], None] | None) -> DecodedBatch:
        """Step until every row has ended or the length limit is reached."""
        for step in range(self.settings.max_new_tokens):
            emitted = len(self.rows)
            ended = self._step(step)
            spared = int(ended.sum()) * (self.settings.max_new_tokens - step - 1)
            if on_step is not None:
                on_step(emitted, spared)
            if bool(ended.all()):
                break
            if bool(ended.any()):
                self._drop(ended)
        columns = self.columns.filled()
        order = np.lexsort((columns["step"], columns["row"]))
        return DecodedBatch(
            {name: values[order] for name, values in columns.items()},
            self.prompt_ids,
            self.categories,
            time.perf_counter() - self.begin,
            self.slm.forward_s + self.llm.forward_s,
        )

    def _drop(self, ended: np.ndarray) -> None:
        left = np.flatnonzero(~ended)
        index = torch.from_numpy(left).to(self.device)
        self.slm.keep(index)
        self.llm.keep(index)
        self.streams.keep(left.tolist())
        self.memory.keep(index)
        self.tokens = self.tokens[index]
        self.rows = self.rows[left]

    def _step(self, number: int) -> np.ndarray:
        """Advance every row by one token; returns which rows ended."""
        policy = self.policy
        step = self._law_step(number)
        step = step.with_columns(self.memory.update(step))
        step = step.drafted(policy.draft(step))
        self.memory.observe(step)
        answer = policy.answer(step)
        step = step.with_columns({"output_token": answer.output})
        expected = policy.outcome(step)
        columns: dict[str, torch.Tensor | np.ndarray] = {
            "row": self.rows,
            "step": step["step"],
            **{name: step[name] for name in SCALARS},
            "skipped": policy.skips(step),
            "accepted": answer.accepted,
            "policy_skip_prob": expected.skip,
            "policy_risk": expected.risk,
            "policy_bias": expected.bias,
            "policy_entries": policy.drawn_entries(step),
        }
        if self.settings.trace == "full":
            due = (number - self.phase[self.rows]) % STRIDE == 0
            columns |= {name: step[name] for name in HEAD} | strided_columns(step, due)
            columns |= self.attention
        if self.observer is not None:
            columns |= self.observer(step)
        self.columns.append({name: to_numpy(values) for name, values in columns.items()})
        self.tokens = answer.output
        return to_numpy(torch.isin(self.tokens, self.eos))

    def _law_step(self, number: int) -> LawStep:
        """Both models advanced, their laws, and the attention behind them."""
        slm_out, llm_out = self.slm.step(self.tokens), self.llm.step(self.tokens)
        z, temperature = slm_out.logits, self.settings.temperature  # (B, V)
        x, y = _law(z / temperature), _law(llm_out.logits / temperature)
        self.attention: dict[str, torch.Tensor] = {}
        if slm_out.attention is not None:
            self.attention = attention_columns(
                slm_out.attention, slm_out.attention_mask, self.axes.attention_sizes
            )
        noise: StepNoise = self.streams.next_step(z.shape[-1], self.device)
        known = {"step": torch.full_like(self.tokens, number), **self.attention}
        return LawStep(self.axes, z, x, y, noise, self.num_candidates, known)


def _law(logits: torch.Tensor) -> torch.Tensor:
    """Softmax; torch's own, in single precision, sums to 1 only within 1e-5 at V = 50,000."""
    law = torch.softmax(logits, dim=-1)
    return law.div_(law.sum(-1, keepdim=True))
