"""Contexts of any length, appended to by any number of tokens, against one plain pass each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calibrate.decode.models import TransformerModel
from calibrate.wire.slots import SlotCaches

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def places(model: Any) -> list[int]:
    """Filled with the token places of every pass over the layers."""
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1], [1]),
        ([7], [7]),  # one row has no padding
        ([2, 1, 1], [6]),  # too little of it for a second pass
        ([9, 1, 1, 1, 1, 3], [16, 6]),  # of 54 places, two passes need 22
    ],
)
def test_appends_are_plain_passes_and_long_ones_do_not_pad_the_others(rng, model, counts, expected):
    with torch.inference_mode():
        caches = SlotCaches(TransformerModel(model, VOCAB), 8)
        contexts: dict[int, list[int]] = {}
        slots = [5, 0, 7, 2, 1, 3][: len(counts)]
        for slot in slots:
            contexts[slot] = rng.integers(0, VOCAB, int(rng.integers(3, 20))).tolist()
            caches.append([slot], [contexts[slot]])
        for _ in range(3):
            new = [rng.integers(0, VOCAB, num).tolist() for num in counts]
            seen = places(model)
            found = caches.append(slots, new)
            assert seen == expected
            for row, slot, tokens in zip(found, slots, new, strict=True):
                contexts[slot] += tokens
                plain = model(torch.tensor([contexts[slot]])).logits[0, -1]
                torch.testing.assert_close(row, plain, rtol=1e-4, atol=1e-4)
                assert caches.lengths[slot] == len(contexts[slot])
        caches.clear(slots[0])
        tokens = rng.integers(0, VOCAB, 4).tolist()
        again = caches.append(slots[:1], [tokens])
        plain = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(again[0], plain, rtol=1e-4, atol=1e-4)
