"""Tokens that all contexts begin with are run once, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from calibrate.decode.models import TransformerModel
from calibrate.run.prompts import Prompt, template_prefix, tokenize_prompts

VOCAB = 97
PREFIX = [4, 9, 16, 25, 36]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def steps(model: TransformerModel, contexts: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Logits of three steps, (3, B, V), and how many token places the layers have run."""
    places = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal places
        places += kwargs["input_ids"].numel()

    handle = model.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with torch.inference_mode():
            session = model.start(contexts, False)
            prefill = places
            tokens = torch.arange(len(contexts)) + 3
            return torch.stack([session.step(tokens + i).logits for i in range(3)]), prefill
    finally:
        handle.remove()


def test_contexts_with_the_prefix_and_without(rng, model):
    tails = [rng.integers(0, VOCAB, num).tolist() for num in (1, 3, 40, 7, 90, 2)]
    contexts = [PREFIX + tail for tail in tails]
    contexts += [[50, *PREFIX], PREFIX, PREFIX[:2]]  # elsewhere, nothing behind it, cut off
    plain, all_places = steps(TransformerModel(model, VOCAB), contexts)
    sharing = TransformerModel(model, VOCAB, PREFIX)
    shared, places = steps(sharing, contexts)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)
    again, places_again = steps(sharing, contexts)
    assert torch.equal(again, shared)
    assert places_again == places - len(PREFIX)  # once for all batches
    long = [PREFIX + tail for tail in tails[2:5] * 4]
    assert steps(sharing, long)[1] == steps(TransformerModel(model, VOCAB), long)[1] - 12 * len(
        PREFIX
    )
    wrong = TransformerModel(model, VOCAB, [4, 9, 16, 25, 37])
    assert steps(wrong, long)[1] == steps(TransformerModel(model, VOCAB), long)[1]
    assert all_places > 0


def test_a_context_is_computed_alike_whatever_it_runs_with(rng, model):
    sharing = TransformerModel(model, VOCAB, PREFIX)
    mine = [*PREFIX, 1, 2, 3]
    others = [PREFIX + rng.integers(0, VOCAB, num).tolist() for num in (5, 60, 33, 2)]
    others += [[8, 7], [6, 5, 4]]
    alone = steps(sharing, [mine])[0][:, 0]
    together = steps(sharing, [mine, *others])[0][:, 0]
    assert torch.equal(alone, together)


def test_a_window_shares_nothing_and_is_right(rng):
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    window = MistralForCausalLM(config).eval().requires_grad_(False)
    contexts = [PREFIX + rng.integers(0, VOCAB, num).tolist() for num in (3, 9, 12, 4)]
    plain, places = steps(TransformerModel(window, VOCAB), contexts)
    shared, same = steps(TransformerModel(window, VOCAB, PREFIX), contexts)
    assert torch.equal(plain, shared)
    assert same == places


class Chat:
    """A tokenizer of letters with a template that begins and ends a prompt."""

    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<sys>{messages[0]['content']}<end>"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Plain(Chat):
    chat_template = None


def test_the_prefix_is_the_templates():
    assert template_prefix(Chat()) == [ord(letter) for letter in "<sys>"]
    assert template_prefix(Plain()) == []
    (one,) = tokenize_prompts([Prompt("a", "Zebra", "", None)], Chat(), 3, 99)
    assert list(one.tokens)[:5] == template_prefix(Chat())
