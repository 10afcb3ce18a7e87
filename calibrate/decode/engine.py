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
from calibrate.decode.models import LanguageModel, StepOutput
from calibrate.decode.recording import (
    TRUNCATION_STRIDE,
    ColumnBuffer,
    Columns,
    ImportanceTracker,
    attention_columns,
    skip_set_columns,
    to_numpy,
    truncation_columns,
    truncation_phase,
)
from calibrate.decode.streams import ACCEPT, DRAFT, PERTURBATION, RESAMPLE, Streams
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory import domain
from hlmtheory.acceptance import rejection_probability, total_variation
from hlmtheory.gates import AlwaysSkip, NeverSkip
from hlmtheory.policies import Policy
from hlmtheory.sampling import sample_inverse_cdf
from hlmtheory.uncertainty import (
    Temperatures,
    entropy,
    exact_uncertainty,
    log_partitions,
    margin,
    perturbed_probabilities,
    sampled_uncertainty,
    sampled_uncertainty_variance,
    temperatures,
)
from hlmtheory.verification import output_bias


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
        Minimal leaves out skip sets, truncation and attention columns.
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


Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray], Columns]
"""Extra columns from (slm_logits (B, V), draft (B,), x (B, V), uniforms): for studies."""


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
        self.want_attention = settings.trace == "full" or policy.gate.needs_importance
        contexts = [prompt.tokens[:-1] for prompt in batch]
        self.slm = slm.start(contexts, self.want_attention)
        self.llm = llm.start(contexts, False)
        self.device = slm.device
        self.tokens = torch.tensor([prompt.tokens[-1] for prompt in batch], device=self.device)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=self.device)
        self.rows = np.arange(len(batch))
        self.phase = np.array([truncation_phase(prompt.prompt_id) for prompt in batch])
        self.tracker = (
            ImportanceTracker(policy.importance) if policy.importance is not None else None
        )
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
        if self.tracker is not None:
            self.tracker.keep(index)
        self.tokens = self.tokens[index]
        self.rows = self.rows[left]

    def _step(self, step: int) -> np.ndarray:
        """Advance every row by one token; returns which rows ended."""
        slm_out = self.slm.step(self.tokens)
        llm_out = self.llm.step(self.tokens)
        z = slm_out.logits  # (B, V)
        x = torch.softmax(z / self.settings.temperature, dim=-1)
        y = torch.softmax(llm_out.logits / self.settings.temperature, dim=-1)
        raw_uniforms = self.streams.next_step()
        uniforms = torch.from_numpy(raw_uniforms).to(self.device)

        rule, gate = self.policy.rule, self.policy.gate
        size: torch.Tensor | int | None = None
        if rule.drafts_from_sent:
            size = self.policy.fixed_size(x.shape[-1])
            draft = sample_inverse_cdf(rule.reference_law(x, size), uniforms[:, DRAFT])
        else:
            draft = sample_inverse_cdf(x, uniforms[:, DRAFT])
        at_draft = draft[:, None]
        x_d = x.gather(1, at_draft)[:, 0]
        y_d = y.gather(1, at_draft)[:, 0]

        thetas = self.settings.thetas
        log_z = log_partitions(z, thetas)  # (B, K)
        p_draft = perturbed_probabilities(z, at_draft, thetas, log_z)[:, 0]  # (B, K)
        uncertainty = exact_uncertainty(z, at_draft, thetas, log_z)[:, 0]
        draws = uniforms[:, PERTURBATION][:, : len(thetas.values)]
        sampled = sampled_uncertainty(p_draft, draws.to(p_draft.dtype))

        important = self._important(slm_out)
        skipped = gate.skip(uncertainty, sampled, important)
        if not rule.drafts_from_sent:
            size = self.policy.sizes(x, x_d, uncertainty)
        reference = rule.reference_law(x, size)
        reference_d = reference.gather(1, at_draft)[:, 0]
        accepted = uniforms[:, ACCEPT] < rule.acceptance(reference_d, y_d)

        sigma = self._skip_probability(z, log_z, important)  # (B, V), or None: nothing skips
        skipped_mass = (
            torch.zeros_like(x)
            if sigma is None
            else sigma * (reference if rule.drafts_from_sent else x)
        )
        output = draft.clone()
        asks = torch.nonzero(~(skipped | accepted))[:, 0]
        if len(asks):
            weights = rule.resample_weights(reference[asks], y[asks], skipped_mass[asks])
            # No residual mass: rounding sent a draft here that x = y would have accepted.
            weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, y[asks])
            output[asks] = sample_inverse_cdf(weights, uniforms[asks][:, RESAMPLE])
        self.tokens = output

        lossless = sigma is None and rule.name == "full"
        zero = torch.zeros_like(x_d)
        skip_size = zero if sigma is None else (sigma > 0).sum(-1)
        columns: dict[str, torch.Tensor | np.ndarray] = {
            "row": self.rows,
            "step": np.full(len(self.rows), step),
            "draft_token": draft,
            "output_token": output,
            "draft_prob": x_d,
            "target_prob": y_d,
            "rejection_prob": rejection_probability(x_d, y_d),
            "uncertainty": uncertainty,
            "uncertainty_sampled": sampled,
            "uncertainty_variance": sampled_uncertainty_variance(p_draft),
            "entropy": entropy(x),
            "max_prob": x.max(-1).values,
            "margin": margin(x),
            "tv_distance": total_variation(x, y),
            "skipped": skipped,
            "accepted": accepted,
            "policy_skip_prob": zero if sigma is None else (sigma * x).sum(-1),
            "policy_bias": zero
            if lossless
            else output_bias(rule, x, y, torch.zeros_like(x) if sigma is None else sigma, size),
            "policy_entries": rule.num_entries(x.shape[-1], size, skip_size.to(torch.int64)),
        }
        if self.settings.trace == "full":
            columns |= skip_set_columns(z, x, y, thetas, log_z)
            due = (step - self.phase[self.rows]) % TRUNCATION_STRIDE == 0
            columns |= truncation_columns(torch.from_numpy(due).to(self.device), x, y)
            if slm_out.attention is not None:
                columns |= attention_columns(slm_out.attention, slm_out.attention_mask)
        if self.observer is not None:
            columns |= self.observer(z, draft, x, raw_uniforms)
        self.columns.append({name: to_numpy(values) for name, values in columns.items()})
        return torch.isin(output, self.eos).cpu().numpy()

    def _important(self, slm_out: StepOutput) -> torch.Tensor | None:
        if self.tracker is None:
            return None
        return self.tracker.update(attention_columns(slm_out.attention, slm_out.attention_mask))

    def _skip_probability(
        self, z: torch.Tensor, log_z: torch.Tensor, important: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Sigma over the vocabulary, (B, V); None where the gate never skips."""
        gate, vocab = self.policy.gate, z.shape[-1]
        if isinstance(gate, NeverSkip):
            return None
        if isinstance(gate, AlwaysSkip):
            return torch.ones_like(z)
        # Uncertainty falls with the logit, so the skip set is a prefix of the sorted vocabulary.
        num_candidates = min(vocab, gate.max_skip_set_size(vocab) + 1)
        top = z.topk(num_candidates).indices
        p_top = perturbed_probabilities(z, top, self.settings.thetas, log_z)  # (B, M, K)
        sigma = torch.zeros_like(z)
        sigma.scatter_(1, top, gate.skip_probability(p_top, important).to(z.dtype))
        if important is not None:
            sigma = torch.where(important[:, None], sigma, torch.ones_like(sigma))
        return sigma
