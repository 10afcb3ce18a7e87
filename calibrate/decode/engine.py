"""Batched HLM decoding under any policies, in shadow mode.

All prompts of a batch advance one token a step in both models. The server model runs for every
token, also where the policy would not have asked it, so that the rejection probability and the
exact output bias are known everywhere; what the policy would have sent is counted by the policy.

Several policies share their random numbers, so their answers to a prompt are one until some token
differs. Until then one row of the batch serves them all; there it forks, its caches copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calibrate.decode.finite import refuse_broken
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
from calibrate.decode.streams import PERTURBATION, step_noise, stream_key
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory import domain
from hlmtheory.policies import Policy
from hlmtheory.quantised_law import quantised_law
from hlmtheory.sampled_law import PLAIN, Sampling, penalised_logits, sampled_law
from hlmtheory.steps import Axes, LawStep
from hlmtheory.uncertainty import Temperatures, temperatures


@dataclass(frozen=True)
class DecodingSettings:
    """Everything, apart from models, prompts and policy, that decides the tokens and the columns.

    Attributes
    ----------
    sampling : Sampling
        Of both models. The uncertainty is of the logits behind the penalty, before the rest.
    max_new_tokens : int
    batch_size : int
        Never changes a token, apart from rounding.
    seed : int
    thetas : Temperatures
        Perturbation temperatures of the uncertainty.
    trace : {"full", "minimal"}
        Minimal leaves out the head, truncation and attention.
    prob_bits : int or None
        Round the device's law to this many bits a probability before anything is drawn from it,
        as it is on a link; None leaves it whole.
    """

    sampling: Sampling = PLAIN
    max_new_tokens: int = 64
    batch_size: int = 16
    seed: int = 0
    thetas: Temperatures = field(default_factory=temperatures)
    trace: str = "full"
    prob_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed is >= 1")
        if len(self.thetas.values) > PERTURBATION.stop - PERTURBATION.start:
            raise ValueError(f"thetas has {len(self.thetas.values)} values: at most 128")
        if self.trace not in ("full", "minimal"):
            raise ValueError(f"trace = {self.trace!r}: allowed are 'full', 'minimal'")

    def axes(self, vocab_size: int) -> Axes:
        """What the columns of these settings mean."""
        return Axes(vocab_size, self.sampling, self.thetas.values)


WITHOUT_DRAFT = ("log_partitions", "candidate_token", "entropy", "max_logit", "tv_distance")
"""Columns that are worked out once for every policy: no draft is in them."""

Observer = Callable[[LawStep], Columns]
"""Extra columns from a step with its draft and output: for studies."""


@dataclass(frozen=True)
class DecodedBatch:
    """One batch under one policy, decoded to the end.

    Attributes
    ----------
    columns : mapping of str to array (N, ...)
        One row a token, ordered by prompt and step; `row` indexes `prompt_ids`.
    prompt_ids, categories : sequence of str
        Of each prompt; a category is empty where the prompt has none.
    wall_s, forward_s : float
        Time of decoding, and the part of it inside the two models' forwards: of all the policies
        that were decoded together.
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
    on_note: Callable[[str], None] | None = None,
) -> Iterator[DecodedBatch]:
    """Decode prompts under one policy; see :func:`decode_together`."""
    policies = {policy.name: policy}
    for batch in decode_together(
        slm, llm, prompts, policies, settings, eos_token_ids, on_step, observer, on_note=on_note
    ):
        yield batch[policy.name]


def decode_together(
    slm: LanguageModel,
    llm: LanguageModel,
    prompts: Sequence[TokenizedPrompt],
    policies: Mapping[str, Policy],
    settings: DecodingSettings,
    eos_token_ids: Sequence[int],
    on_step: Callable[[int, int], None] | None = None,
    observer: Observer | None = None,
    minimal: Collection[str] = (),
    on_note: Callable[[str], None] | None = None,
) -> Iterator[dict[str, DecodedBatch]]:
    """Decode prompts under every policy, batch by batch, longest prompts first.

    Each policy gets the tokens that it would get alone, up to rounding: an answer's random numbers
    belong to (seed, prompt, step). A batch that does not fit the memory is halved, and halved again
    if need be.

    Parameters
    ----------
    slm, llm : LanguageModel
        Device and server model over one vocabulary.
    prompts : sequence of TokenizedPrompt
    policies : mapping of str to Policy
        Gates and verification rules, by a label each.
    settings : DecodingSettings
    eos_token_ids : sequence of int
        An answer ends after it has emitted one of these; they are drawn and verified like any
        token.
    on_step : callable, optional
        Called after every step with (tokens just emitted, tokens that the finished answers will
        never need), of all policies, for progress bars; with negative numbers when steps are taken
        back, because their batch is halved.
    observer : callable, optional
        Extra columns at every step.
    minimal : collection of str
        Labels of policies that need no more than a minimal trace where others get a full one.
    on_note : callable, optional
        Told a line when a batch is halved.

    Yields
    ------
    dict of str to DecodedBatch
        One a batch and policy, complete.

    Raises
    ------
    UserError
        If a single prompt does not fit the memory.
    """

    def begin(batch: Sequence[TokenizedPrompt]) -> _BatchRun:
        return _BatchRun(slm, llm, batch, policies, settings, eos_token_ids, observer, minimal)

    for batch in batches_by_length(prompts, settings.batch_size):
        yield _decode_batch(batch, begin, on_step, on_note)


def _decode_batch(
    batch: Sequence[TokenizedPrompt],
    begin: Callable[[Sequence[TokenizedPrompt]], _BatchRun],
    on_step: Callable[[int, int], None] | None,
    on_note: Callable[[str], None] | None,
) -> dict[str, DecodedBatch]:
    """One batch to its end, in halves if the memory does not hold it whole."""
    told: list[tuple[int, int]] = []

    def tell(emitted: int, spared: int) -> None:
        told.append((emitted, spared))
        if on_step is not None:
            on_step(emitted, spared)

    fits = True
    try:
        with torch.inference_mode(), domain.unchecked():
            decoded = begin(batch).to_end(tell)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        fits = False
    # The batch and its caches are gone: the next one, or a half, makes its own.
    release_freed_buffers()
    if fits:
        return decoded
    if len(batch) == 1:
        raise UserError(
            f"prompt {batch[0].prompt_id!r} does not fit the memory, even alone; give fewer "
            "--max-new-tokens, a shorter prompt or smaller models"
        )
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if on_step is not None and told:
        on_step(-sum(emitted for emitted, _ in told), -sum(spared for _, spared in told))
    half = (len(batch) + 1) // 2
    if on_note is not None:
        on_note(
            f"a batch of {len(batch)} prompts does not fit the memory: halved; --batch-size {half} "
            "saves the failed try"
        )
    halves = [_decode_batch(part, begin, on_step, on_note) for part in (batch[:half], batch[half:])]
    return {name: _joined([one[name] for one in halves]) for name in halves[0]}


def _joined(parts: Sequence[DecodedBatch]) -> DecodedBatch:
    """Batches decoded one after the other as one."""
    begins = np.cumsum([0, *(len(part.prompt_ids) for part in parts)])
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    columns["row"] = np.concatenate(
        [part.columns["row"] + begin for part, begin in zip(parts, begins, strict=False)]
    )
    return DecodedBatch(
        columns,
        [prompt_id for part in parts for prompt_id in part.prompt_ids],
        [category for part in parts for category in part.categories],
        sum(part.wall_s for part in parts),
        sum(part.forward_s for part in parts),
    )


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


class _Answers:
    """One policy's answers to the prompts of a batch: where each runs, and what is recorded.

    Attributes
    ----------
    full : bool
        Whether head, truncation and attention are recorded too.
    rows : int array (A,)
        Row of the batch that each live answer is in.
    prompts : int array (A,)
        Its prompt.
    """

    def __init__(self, policy: Policy, full: bool, num_prompts: int, max_new_tokens: int) -> None:
        self.policy = policy
        self.full = full
        self.memory = policy.memory()
        self.rows = np.arange(num_prompts)
        self.prompts = np.arange(num_prompts)
        self.columns = ColumnBuffer(num_prompts * max_new_tokens)

    def keep(self, live: np.ndarray, device: torch.device) -> None:
        """Drop the answers that ended, bool (A,)."""
        if not live.all():
            self.prompts = self.prompts[live]
            self.memory.keep(torch.from_numpy(np.flatnonzero(live)).to(device))


class _BatchRun:
    """State of one batch while it is decoded."""

    def __init__(
        self,
        slm: LanguageModel,
        llm: LanguageModel,
        batch: Sequence[TokenizedPrompt],
        policies: Mapping[str, Policy],
        settings: DecodingSettings,
        eos_token_ids: Sequence[int],
        observer: Observer | None,
        minimal: Collection[str],
    ) -> None:
        self.begin = time.perf_counter()
        self.settings = settings
        self.observer = observer
        self.prompt_ids = [prompt.prompt_id for prompt in batch]
        self.categories = [prompt.category for prompt in batch]
        num, length = len(batch), settings.max_new_tokens
        full = {name: settings.trace == "full" and name not in minimal for name in policies}
        self.answers = {
            name: _Answers(policy, full[name], num, length) for name, policy in policies.items()
        }
        self.want_attention = any(
            full[name] or policy.needs_attention for name, policy in policies.items()
        )
        self.axes = settings.axes(slm.vocab_size)
        self.num_candidates = max(
            policy.num_candidates(slm.vocab_size) for policy in policies.values()
        )
        contexts = [prompt.tokens[:-1] for prompt in batch]
        self.slm = slm.start(contexts, self.want_attention)
        self.llm = llm.start(contexts, False)
        self.device = slm.device
        self.tokens = torch.tensor([prompt.tokens[-1] for prompt in batch], device=self.device)
        self.seen = _tokens_seen(contexts, slm.vocab_size, settings.sampling, self.device)
        self.eos = np.array(list(eos_token_ids), dtype=np.int64)
        self.keys = [stream_key(settings.seed, prompt_id) for prompt_id in self.prompt_ids]
        self.row_prompt = np.arange(num)
        self.phase = np.array([phase(prompt.prompt_id) for prompt in batch])

    def to_end(self, on_step: Callable[[int, int], None] | None) -> dict[str, DecodedBatch]:
        """Step until every answer has ended or the length limit is reached."""
        for step in range(self.settings.max_new_tokens):
            emitted = sum(len(one.rows) for one in self.answers.values())
            ended = self._step(step)
            if on_step is not None:
                on_step(emitted, ended * (self.settings.max_new_tokens - step - 1))
            if not len(self.row_prompt):
                break
        times = (time.perf_counter() - self.begin, self.slm.forward_s + self.llm.forward_s)
        return {name: self._decoded(one, times) for name, one in self.answers.items()}

    def _decoded(self, answers: _Answers, times: tuple[float, float]) -> DecodedBatch:
        columns = answers.columns.filled()
        order = np.lexsort((columns["step"], columns["row"]))
        ordered = {name: values[order] for name, values in columns.items()}
        return DecodedBatch(ordered, self.prompt_ids, self.categories, *times)

    def _step(self, number: int) -> int:
        """Advance every answer by one token; returns how many ended."""
        law = self._law_step(number)
        ended = 0
        following: list[np.ndarray] = []  # (row, token) of each live answer
        for answers in self.answers.values():
            if not len(answers.rows):
                following.append(np.zeros((0, 2), dtype=np.int64))
                continue
            whole = np.array_equal(answers.rows, np.arange(len(self.row_prompt)))
            own = law if whole else law.rows(torch.from_numpy(answers.rows).to(self.device))
            output = to_numpy(self._answer(answers, own, number))
            live = ~np.isin(output, self.eos)
            ended += int((~live).sum())
            following.append(np.column_stack([answers.rows, output])[live])
            answers.keep(live, self.device)
        self._fork(following)
        return ended

    def _answer(self, answers: _Answers, step: LawStep, number: int) -> torch.Tensor:
        """One token of one policy, recorded."""
        policy = answers.policy
        step = step.with_columns(answers.memory.update(step))
        step = step.drafted(policy.draft(step))
        answers.memory.advance(step)
        answer = policy.answer(step)
        step = step.with_columns({"output_token": answer.output})
        step = step.with_columns(answers.memory.observe(step))
        expected = policy.outcome(step)
        columns: dict[str, torch.Tensor | np.ndarray] = {
            "row": answers.prompts,
            "step": step["step"],
            **{name: step[name] for name in SCALARS},
            **({"support_size": step["support_size"]} if self.axes.sampling.filtered else {}),
            "skipped": policy.skips(step),
            "accepted": answer.accepted,
            "policy_skip_prob": expected.skip,
            "policy_risk": expected.risk,
            "policy_bias": expected.bias,
            "policy_log_ratio": policy.log_ratio(step)[0],
            "policy_entries": policy.drawn_entries(step),
        }
        if answers.full:
            due = (number - self.phase[answers.prompts]) % STRIDE == 0
            columns |= {name: step[name] for name in HEAD} | strided_columns(step, due)
            columns |= {name: step[name] for name in self.attention}
        if self.observer is not None:
            columns |= self.observer(step)
        answers.columns.append({name: to_numpy(values) for name, values in columns.items()})
        return answer.output

    def _fork(self, following: Sequence[np.ndarray]) -> None:
        """One row for each different (row, token) that goes on, its context copied if need be."""
        children, child = np.unique(np.concatenate(following), axis=0, return_inverse=True)
        slots = _places(children[:, 0])
        parents = np.empty(len(children), dtype=np.int64)
        parents[slots] = children[:, 0]
        tokens = np.empty(len(children), dtype=np.int64)
        tokens[slots] = children[:, 1]
        bounds = np.cumsum([len(part) for part in following])[:-1]
        for answers, mine in zip(
            self.answers.values(), np.split(child.reshape(-1), bounds), strict=True
        ):
            answers.rows = slots[mine]
        if len(parents) and not np.array_equal(parents, np.arange(len(self.row_prompt))):
            index = torch.from_numpy(parents).to(self.device)
            self.slm.keep(index)
            self.llm.keep(index)
            self.seen = self.seen[index]
        self.row_prompt = self.row_prompt[parents]
        self.tokens = torch.from_numpy(tokens).to(self.device)

    def _law_step(self, number: int) -> LawStep:
        """Both models advanced, their laws, and the attention behind them."""
        slm_out, llm_out = self.slm.step(self.tokens), self.llm.step(self.tokens)
        z, w = slm_out.logits, llm_out.logits  # (B, V)
        for logits, model in ((z, "device model"), (w, "server model")):
            refuse_broken(logits, model, [self.prompt_ids[i] for i in self.row_prompt], number)
        sampling = self.settings.sampling
        if sampling.repetition_penalty != 1:
            self.seen = torch.cat([self.seen, self.tokens[:, None]], dim=-1)
            z, w = (penalised_logits(one, self.seen, sampling.repetition_penalty) for one in (z, w))
        x, y = sampled_law(z, sampling), sampled_law(w, sampling)
        if self.settings.prob_bits is not None:
            x = quantised_law(x, self.settings.prob_bits)
        self.attention: dict[str, torch.Tensor] = {}
        if slm_out.attention is not None:
            self.attention = attention_columns(
                slm_out.attention, slm_out.attention_mask, self.axes.attention_sizes
            )
        keys = [self.keys[prompt] for prompt in self.row_prompt]
        noise = step_noise(keys, [number] * len(keys), z.shape[-1], self.device)
        known = {"step": torch.full_like(self.tokens, number), **self.attention}
        law = LawStep(self.axes, z, x, y, noise, self.num_candidates, known)
        return law.with_columns({name: law[name] for name in WITHOUT_DRAFT})


def _places(parents: np.ndarray) -> np.ndarray:
    """A place 0 to C - 1 for each of C rows, such that few of them leave their parent's."""
    num = len(parents)
    places = np.full(num, -1)
    first = np.flatnonzero(np.append(True, parents[1:] != parents[:-1])[:num])
    stays = first[parents[first] < num]
    places[stays] = parents[stays]
    free = np.setdiff1d(np.arange(num), parents[stays])
    places[places < 0] = free
    return places


def _tokens_seen(
    contexts: Sequence[Sequence[int]], vocab_size: int, sampling: Sampling, device: torch.device
) -> torch.Tensor:
    """Tokens of each context, (B, L), for the penalty: rows filled up with tokens of their own.

    No column without a penalty. Tokens from V on have no logit to penalise.
    """
    if sampling.repetition_penalty == 1:
        return torch.zeros(len(contexts), 0, dtype=torch.long, device=device)
    rows = [[token for token in context if token < vocab_size] for context in contexts]
    width = max(map(len, rows))
    return torch.tensor([row + row[:1] * (width - len(row)) for row in rows], device=device)
