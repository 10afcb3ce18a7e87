"""Recorded attention against transformers' own weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from calibrate.decode.models import TransformerModel
from calibrate.pairs.attention import allow_recording, newest_attention, records
from calibrate.pairs.loading import longest_text, refuse_counted_positions, refuse_states
from calibrate.run.errors import UserError


def tiny_llama(num_kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


CONTEXTS = [[5, 9, 13, 2], list(range(20, 60)), [7, 7]]


def steps(model: LlamaForCausalLM, attention: bool):
    """Three steps of three contexts of unlike length, one of which ends."""
    session = TransformerModel(model, 97).start(CONTEXTS, attention)
    with torch.inference_mode():
        yield session.step(torch.tensor([3, 4, 5]))
        session.keep(torch.tensor([1, 2]))
        yield session.step(torch.tensor([6, 7]))
        yield session.step(torch.tensor([8, 9]))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_recorded_rows_are_the_eager_rows(num_kv_heads: int) -> None:
    fast, eager = tiny_llama(num_kv_heads), tiny_llama(num_kv_heads)
    allow_recording(fast)
    eager.set_attn_implementation("eager")
    assert records(fast)
    assert not records(eager)
    for ours, theirs in zip(steps(fast, True), steps(eager, True), strict=True):
        # float32, sums of at most 80 terms in another order
        torch.testing.assert_close(ours.attention, theirs.attention, rtol=0, atol=1e-5)
        assert ours.attention.shape == ours.attention_mask.shape
        assert not ours.attention[~ours.attention_mask].any()
        torch.testing.assert_close(ours.attention.sum(-1), torch.ones(len(ours.logits)))
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_recording_changes_no_logit() -> None:
    fast, plain = tiny_llama(), tiny_llama()
    allow_recording(fast)
    runs = [list(steps(fast, True)), list(steps(fast, False)), list(steps(plain, False))]
    for recorded, silent, untouched in zip(*runs, strict=True):
        assert torch.equal(recorded.logits, silent.logits)
        assert torch.equal(recorded.logits, untouched.logits)
        assert silent.attention is None


def test_capped_scores_fall_back_to_eager() -> None:
    """Negative control: what the formula does not cover is left to the model's own attention."""
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        attn_logit_softcapping=5.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    allow_recording(model)
    assert not records(model)
    assert model.config._attn_implementation == "eager"


def test_weights_of_one_query_in_closed_form() -> None:
    query = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2): two heads, one group
    key = torch.tensor([[[[2.0, 0.0], [0.0, 3.0], [9.0, 9.0]]]])  # (1, 1, 3, 2)
    mask = torch.tensor([[[[True, True, False]]]])
    first = torch.softmax(torch.tensor([2.0, 0.0]), -1)
    expected = torch.tensor([(first[0] + 0.5) / 2, (first[1] + 0.5) / 2, 0.0])
    torch.testing.assert_close(newest_attention(query, key, mask, 1.0)[0], expected)
    halved = newest_attention(query * 2**0.5, key, mask, None)  # 1/sqrt(2) by default
    torch.testing.assert_close(halved[0], expected)


def test_a_family_that_cannot_switch_is_refused() -> None:
    """Asked for weights all the same, it would add a boolean mask to its scores."""
    config = FalconConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    with pytest.raises(UserError, match="FalconForCausalLM cannot give its attention"):
        allow_recording(model)


def test_additive_masks_are_refused() -> None:
    query, key = torch.ones(1, 2, 1, 2), torch.ones(1, 1, 3, 2)
    with pytest.raises(UserError, match="adds numbers to its attention scores"):
        newest_attention(query, key, torch.zeros(1, 1, 1, 3), None)


def test_longest_text_in_a_window_is_decoded_as_if_alone() -> None:
    """Padding counts in the window: the longest text that loading allows still sees all of it."""
    config = MistralConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=96,
    )
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    num_new = 6
    longest = longest_text(model) - num_new
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(97, (num,), generator=generator).tolist() for num in (longest, 3)]
    new = torch.randint(97, (2, num_new), generator=generator)
    session = TransformerModel(model, 97).start(prompts, False)
    found = [session.step(new[:, step]).logits for step in range(num_new)]
    for row, prompt in enumerate(prompts):
        text = torch.tensor([[*prompt, *new[row].tolist()]])
        alone = model(input_ids=text).logits[0, -num_new:]
        together = torch.stack([logits[row] for logits in found])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_models_that_count_positions_themselves_are_refused() -> None:
    """ALiBi slopes follow cache positions, padding and all."""
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=1, n_head=4))
    with pytest.raises(UserError, match="BloomForCausalLM counts its positions itself"):
        refuse_counted_positions(model, "toy")
    rotary = MistralForCausalLM(MistralConfig(vocab_size=97, hidden_size=48, num_hidden_layers=1))
    refuse_counted_positions(rotary, "toy")


@pytest.mark.parametrize("kind", ["Qwen3Next", "FalconH1", "Jamba"])
def test_models_that_keep_a_state_are_refused(kind: str) -> None:
    """What runs through a padded prompt runs through the padding."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=48, num_hidden_layers=4
    )
    model = type(f"{kind}ForCausalLM", (), {"config": config})()
    with pytest.raises(UserError, match=f"{kind}ForCausalLM keeps a state beside keys and values"):
        refuse_states(model, "toy")


def test_windows_are_no_states() -> None:
    for config in (
        MistralConfig(num_hidden_layers=2, sliding_window=64),
        transformers.Gemma2Config(),
    ):
        refuse_states(type("Plain", (), {"config": config})(), "toy")
