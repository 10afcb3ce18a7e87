"""Steps in tensors that never move, against those that grow; as a graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calibrate.decode import static_step
from calibrate.decode.models import TransformerModel
from calibrate.pairs.attention import allow_recording

VOCAB = 97
CONTEXTS = [[5, 8, 13], [21, 34, 55, 89, 1, 2, 3, 5, 8], [7], [11, 18, 29, 47, 76]]


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def model(request: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    made.set_attn_implementation("sdpa")
    allow_recording(made)
    return made.to(request.param)


def follow(model: TransformerModel, attention: bool, plan: list[list[int] | None]) -> list[Any]:
    """Outputs of a session along tokens and rows that are kept, in order."""
    with torch.inference_mode():
        session = model.start(CONTEXTS, attention)
        where = model.device
        tokens, out = torch.tensor([one[-1] for one in CONTEXTS], device=where), []
        for rows in plan:
            found = session.step(tokens)
            out.append(found)
            tokens = (found.logits.argmax(-1) + torch.arange(len(tokens), device=where)) % VOCAB
            if rows is not None:
                kept = torch.tensor(rows, device=where)
                session.keep(kept)
                tokens = (tokens[kept] + torch.arange(len(kept), device=where)) % VOCAB
    return out


@pytest.mark.parametrize("attention", [False, True])
def test_static_steps_are_the_growing_ones(model, attention, monkeypatch):
    """Rows dropped, moved, doubled beyond the room, columns beyond the room, and used again."""
    monkeypatch.setattr(static_step, "COLUMN_MULTIPLE", 20)
    monkeypatch.setattr(static_step, "ROW_MULTIPLE", 3)
    plan = [None, [2, 0, 3], None, [0, 0, 1, 2, 2, 1, 1, 0], *[None] * 12, [5, 1], None]
    growing = follow(TransformerModel(model, VOCAB, static=False), attention, plan)
    static = TransformerModel(model, VOCAB, static=True)
    for _ in range(2):
        found = follow(static, attention, plan)
        assert [len(one.logits) for one in found] == [len(one.logits) for one in growing]
        for mine, theirs in zip(found, growing, strict=True):
            torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-4)
            if not attention:
                assert mine.attention is None
                continue
            width = theirs.attention.shape[1]
            assert torch.equal(mine.attention_mask[:, :width], theirs.attention_mask)
            assert not mine.attention_mask[:, width:].any()
            torch.testing.assert_close(
                mine.attention[:, :width], theirs.attention, rtol=1e-4, atol=1e-5
            )


def test_eager_attention_takes_steps_that_grow(model):
    """It adds its mask: a boolean one would hide nothing."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        plan = [None, [2, 0, 3], None]
        found = follow(TransformerModel(model, VOCAB, static=True), False, plan)
        growing = follow(TransformerModel(model, VOCAB, static=False), False, plan)
    finally:
        model.set_attn_implementation(before)
    for mine, theirs in zip(found, growing, strict=True):
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_a_step_is_used_again_by_the_next_session_and_never_by_two_at_once(model):
    static = TransformerModel(model, VOCAB, static=True)
    with torch.inference_mode():
        first = static.start(CONTEXTS, False)
        second = static.start(CONTEXTS, False)
        steps = [one._step for one in (first, second)]
        assert steps[0] is not steps[1]
        tokens = torch.tensor([3, 4, 5, 6], device=static.device)
        alone = TransformerModel(model, VOCAB).start(CONTEXTS, False).step(tokens).logits
        for one in (first, second):
            torch.testing.assert_close(one.step(tokens).logits, alone, rtol=1e-4, atol=1e-4)
        del first, one
        third = static.start(CONTEXTS[:2], False)
        assert third._step in steps
        assert third._step is not second._step
        torch.testing.assert_close(third.step(tokens[:2]).logits, alone[:2], rtol=1e-4, atol=1e-4)
