"""Batch sizes that fit, from a model's own shape."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate.decode import memory
from calibrate.decode.memory import MAX_ROWS, automatic_batch_size, even_batch_size
from calibrate.run.prompts import TokenizedPrompt


@given(st.integers(1, 2000), st.integers(1, 300))
def test_batches_are_even_and_within_the_limit(num_prompts: int, most: int) -> None:
    size = even_batch_size(num_prompts, most)
    assert 1 <= size <= most
    num_batches = -(-num_prompts // size)
    assert num_batches == -(-num_prompts // most)  # no batch more than the limit asks for
    last = num_prompts - (num_batches - 1) * size
    assert size - last < num_batches


def a_pair(num_layers: int = 24, vocab_size: int = 150_000):
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = SimpleNamespace(config=config, parameters=lambda: iter([torch.zeros(1)]))
    return SimpleNamespace(slm=model, llm=model, vocab_size=vocab_size, device="cpu")


def prompts(num: int, length: int) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(f"p{i}", tuple(range(length))) for i in range(num)]


def test_longer_prompts_and_less_memory_make_smaller_batches(monkeypatch) -> None:
    def free(num_bytes: float) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda: int(num_bytes))

    free(2**34)
    pair = a_pair()
    short = automatic_batch_size(pair, prompts(1000, 20), 32)
    longer = automatic_batch_size(pair, prompts(1000, 400), 32)
    longest = automatic_batch_size(pair, prompts(1000, 4000), 32)
    assert MAX_ROWS >= short > longer > longest >= 1
    free(2**29)
    assert automatic_batch_size(pair, prompts(1000, 400), 32) < longer
    free(0)
    assert automatic_batch_size(pair, prompts(1000, 400), 32) == 1
    free(2**34)
    assert automatic_batch_size(a_pair(num_layers=48), prompts(1000, 400), 32) < longer
    assert automatic_batch_size(pair, [], 32) == 1


def test_workers_that_share_a_machine_share_its_memory(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2**33)
    pair, asked = a_pair(), prompts(1000, 400)
    alone = automatic_batch_size(pair, asked, 32)
    shared = automatic_batch_size(pair, asked, 32, 1, 4, 2**28)
    monkeypatch.setattr(memory, "available_memory", lambda: (2**33 - 2**30) // 4)
    assert shared == automatic_batch_size(pair, asked, 32) < alone
    monkeypatch.setattr(memory, "available_memory", lambda: 2**36)
    assert automatic_batch_size(pair, asked, 32, 1, 4, 2**28) == alone  # there is enough for all
