"""`hlm device`: the device model, a policy, and a server that is asked when the policy says so.

A device decides with its own law alone. The tokens are those of :mod:`calibrate.decode.engine`
under the same policy, seed and settings, up to rounding: both run the same functions, and an
answer's random numbers belong to (seed, prompt, step).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from calibrate.decode.clock import synchronise
from calibrate.decode.engine import DecodingSettings
from calibrate.decode.finite import refuse_broken
from calibrate.decode.models import LanguageModel
from calibrate.decode.recording import attention_columns
from calibrate.decode.streams import step_noise, stream_key
from calibrate.run.errors import UserError
from calibrate.run.prompts import TokenizedPrompt
from calibrate.wire.client import Exchange, ServerLink
from calibrate.wire.protocol import Ask, Flag, Opening, payload_bits_of
from hlmtheory import domain
from hlmtheory.policies import Policy
from hlmtheory.quantised_law import codes_of, law_of, total_of
from hlmtheory.sampled_law import penalised_logits, sampled_law
from hlmtheory.steps import LawStep

PROB_BITS = 8
"""Bits of a probability on the wire, unless the settings say otherwise."""

AUDIT_STREAM = 7
"""Counter block of the coins that choose audits; tokens never depend on it."""


@dataclass(frozen=True)
class WireToken:
    """One token as the device saw it; times in milliseconds, by its own clock.

    Attributes
    ----------
    prompt_id, step, draft_token, output_token
        As in a trace; no draft (-1) where the server decodes alone.
    skipped, accepted, audited : bool
    uncertainty : float
        Of the draft; NaN where nobody looks at it.
    rejection_prob : float
        Of an audited draft; NaN else.
    num_unseen : int
        Tokens before it that went up with it.
    device_ms, score_ms, frame_ms, wait_ms : float
        The device's forward pass; law, draft and gate; building the frame; from its first byte to
        the reply's last.
    server_ms, queue_ms : float
        Of the wait, inside the server's forward pass and before it, by the server's clock.
    payload_bits, sent_bytes, received_bytes : int
        Up; and on the wire with all framing, both ways.
    """

    prompt_id: str
    step: int
    draft_token: int
    output_token: int
    skipped: bool
    accepted: bool
    audited: bool
    uncertainty: float
    rejection_prob: float
    num_unseen: int
    device_ms: float
    score_ms: float
    frame_ms: float
    wait_ms: float
    server_ms: float
    queue_ms: float
    payload_bits: int
    sent_bytes: int
    received_bytes: int

    @property
    def token_ms(self) -> float:
        """All of it."""
        return self.device_ms + self.score_ms + self.frame_ms + self.wait_ms


WIRE_UNITS = {
    name: "ms" if name.endswith("_ms") else "bit" if name.endswith("_bits") else
    "byte" if name.endswith("_bytes") else "" for name in WireToken.__dataclass_fields__
}  # fmt: skip


@dataclass(frozen=True)
class WireAnswer:
    """One prompt's answer over the wire.

    Attributes
    ----------
    tokens : tuple of WireToken
    first_ms : float
        From the prompt's arrival at the device to its first token: both prefills included.
    open_bytes : int
        Sent to open the session: the prompt, and what the session is.
    """

    tokens: tuple[WireToken, ...]
    first_ms: float
    open_bytes: int


class Device:
    """The device's end: its model, what it decides by, and the server it asks.

    Parameters
    ----------
    slm : LanguageModel or None
        None where the policy lets the server decode alone.
    policy : Policy
    settings : DecodingSettings
        Seed, sampling, length and `prob_bits`.
    vocab_size : int
    vocabulary : str
        SHA-256 of the tokens by their ids.
    end_tokens : sequence of int
        An answer ends with one of these, or with one that the server knows of.
    server : ServerLink or None
        None for the device alone.
    audit_rate : float
        Share of skipped drafts that are sent for checking.
    """

    def __init__(
        self,
        slm: LanguageModel | None,
        policy: Policy,
        settings: DecodingSettings,
        vocab_size: int,
        vocabulary: str,
        end_tokens: Sequence[int],
        server: ServerLink | None,
        audit_rate: float = 0.0,
    ) -> None:
        if (slm is None) != (policy.role == "server"):
            raise ValueError("slm: needed unless the server decodes alone")
        if (server is None) != (policy.role == "device"):
            raise ValueError("server: needed unless the device decodes alone")
        self.slm, self.policy, self.settings = slm, policy, settings
        self.prob_bits = settings.prob_bits or PROB_BITS
        self.vocab_size, self.vocabulary = vocab_size, vocabulary
        self.end_tokens, self.server = tuple(end_tokens), server
        self.audit_rate = audit_rate

    def decode(
        self, prompt: TokenizedPrompt, on_token: Callable[[WireToken], None] = lambda token: None
    ) -> WireAnswer:
        """One prompt to its end; `on_token` sees each token as it comes."""
        begin = time.perf_counter()
        out: list[WireToken] = []
        first_ms, open_bytes = float("nan"), 0
        with torch.inference_mode(), domain.unchecked():
            ends = set(self.end_tokens)
            if self.server is not None:
                open_bytes = self.server.open(self._opening(prompt), prompt.tokens)
                ends |= self.server.end_tokens
            steps = self._streamed if self.policy.role == "server" else self._drafted
            for token in steps(prompt):
                if not out:
                    first_ms = 1e3 * (time.perf_counter() - begin)
                out.append(token)
                on_token(token)
                if token.output_token in ends:
                    break
        return WireAnswer(tuple(out), first_ms, open_bytes)

    def _opening(self, prompt: TokenizedPrompt) -> Opening:
        return Opening(
            self.vocab_size,
            self.vocabulary,
            self.policy.name,
            self.policy.settings(),
            asdict(self.settings.sampling),
            self.prob_bits,
            stream_key(self.settings.seed, prompt.prompt_id),
            self.settings.max_new_tokens,
            self.end_tokens,
        )

    def _streamed(self, prompt: TokenizedPrompt) -> Iterator[WireToken]:
        assert self.server is not None
        for found in self.server.stream(0, prompt.tokens):
            nothing = _Decided(-1, False, float("nan"), 0.0, 0.0)
            yield _row(prompt, found.reply.position, nothing, found, 0, 0)

    def _drafted(self, prompt: TokenizedPrompt) -> Iterator[WireToken]:
        assert self.slm is not None
        policy, settings = self.policy, self.settings
        session = self.slm.start([prompt.tokens[:-1]], policy.needs_attention, fill=False)
        memory, key = policy.memory(), stream_key(settings.seed, prompt.prompt_id)
        context, known = list(prompt.tokens), len(prompt.tokens)
        audits = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, AUDIT_STREAM, 0]))
        for number in range(settings.max_new_tokens):
            begin = time.perf_counter()
            out = session.step(torch.tensor(context[-1:], device=self.slm.device))
            synchronise(self.slm.device)
            after = time.perf_counter()
            step, codes = self._step(out, context, number, key, prompt.prompt_id)
            step = step.with_columns(memory.update(step))
            step = step.drafted(policy.draft(step))
            memory.advance(step)
            skipped = bool(policy.skips(step)[0])
            draft = int(step["draft_token"][0])
            uncertainty = float(step["uncertainty"][0]) if policy.gated else float("nan")
            times = 1e3 * (after - begin), 1e3 * (time.perf_counter() - after)
            decided = _Decided(draft, skipped, uncertainty, *times)
            audited = skipped and audits.random() < self.audit_rate
            if (skipped and not audited) or self.server is None:
                token = _row(prompt, number, decided, None, 0, 0)
            else:
                unseen = np.array(context[known:], dtype=np.int64)
                built = time.perf_counter()
                ask = self._ask(step, codes, number, unseen, audited)
                frame_ms = 1e3 * (time.perf_counter() - built)
                found = self.server.ask(ask, context)
                bits = payload_bits_of(ask, self.vocab_size, self.prob_bits)
                token = _row(prompt, number, decided, found, bits, len(unseen), frame_ms)
                known = len(context) + 1
            context.append(token.output_token)
            yield token

    def _step(
        self, out: Any, context: Sequence[int], number: int, key: tuple[int, int], prompt_id: str
    ) -> tuple[LawStep, torch.Tensor]:
        """The step as the device knows it, and the codes of its law."""
        sampling, z = self.settings.sampling, out.logits[:, : self.vocab_size]
        refuse_broken(z, "device model", [prompt_id], number)
        if sampling.repetition_penalty != 1:
            seen = torch.tensor([[one for one in context if one < z.shape[-1]]], device=z.device)
            z = penalised_logits(z, seen, sampling.repetition_penalty)
        codes = codes_of(sampled_law(z, sampling), self.prob_bits)
        x = law_of(codes, total_of(codes, self.prob_bits), self.prob_bits, z)
        axes = self.settings.axes(self.vocab_size)
        columns: dict[str, torch.Tensor] = {"step": torch.tensor([number], device=z.device)}
        if out.attention is not None:
            columns |= attention_columns(out.attention, out.attention_mask, axes.attention_sizes)
        noise = step_noise([key], [number], z.shape[-1], z.device)
        candidates = self.policy.num_candidates(self.vocab_size)
        return LawStep(axes, z, x, None, noise, candidates, columns), codes

    def _ask(
        self, step: LawStep, codes: torch.Tensor, number: int, unseen: np.ndarray, audited: bool
    ) -> Ask:
        """What is sent of a step: codes of the law that the policy sends."""
        draft = int(step["draft_token"][0])
        if audited:
            tokens = torch.tensor([draft], device=codes.device)
        else:
            sent = self.policy.sent_law(step)
            tokens = torch.nonzero(sent[0])[:, 0]
            if not torch.equal(sent[0, tokens], step.x[0, tokens]):
                raise UserError(
                    f"policy {self.policy.name} with score {self.policy_score}: it sends products "
                    "of a probability and its coin, for which the protocol has no code; take "
                    "another score"
                )
        return Ask(
            number,
            unseen,
            draft if audited or self.policy.draft_sent else None,
            tokens.cpu().numpy(),
            codes[0, tokens].cpu().numpy(),
            float(total_of(codes, self.prob_bits)[0, 0]),
            Flag.AUDIT if audited else 0,
        )

    @property
    def policy_score(self) -> str:
        """Name of the gate's score."""
        return str(getattr(getattr(self.policy, "score", None), "name", "none"))


@dataclass(frozen=True)
class _Decided:
    draft: int
    skipped: bool
    uncertainty: float
    device_ms: float
    score_ms: float


def _row(
    prompt: TokenizedPrompt,
    number: int,
    decided: _Decided,
    found: Exchange | None,
    bits: int,
    num_unseen: int,
    frame_ms: float = 0.0,
) -> WireToken:
    reply = None if found is None else found.reply
    return WireToken(
        prompt_id=prompt.prompt_id,
        step=number,
        draft_token=decided.draft,
        output_token=decided.draft if reply is None else reply.token,
        skipped=decided.skipped,
        accepted=reply is not None and reply.accepted,
        audited=decided.skipped and reply is not None,
        uncertainty=decided.uncertainty,
        rejection_prob=float("nan") if reply is None else reply.rejection,
        num_unseen=num_unseen,
        device_ms=decided.device_ms,
        score_ms=decided.score_ms,
        frame_ms=frame_ms + (0.0 if found is None else found.frame_ms),
        wait_ms=0.0 if found is None else found.wait_ms,
        server_ms=0.0 if reply is None else 1e-3 * reply.server_us,
        queue_ms=0.0 if reply is None else 1e-3 * reply.waited_us,
        payload_bits=bits,
        sent_bytes=0 if found is None else found.sent_bytes,
        received_bytes=0 if found is None else found.received_bytes,
    )
