"""Prepacked linear layers compute what the layers they replace did."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pairs import tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from calibrate.pairs import prepack
from calibrate.pairs.buffers import WORKING_SET_BYTES
from calibrate.pairs.layers import share_without_layers
from calibrate.pairs.loading import default_dtype
from calibrate.pairs.prepack import PrepackedLinear, prepack_linear_layers

pytestmark = pytest.mark.skipif(
    default_dtype("cpu") != "bfloat16", reason="this processor does not multiply bfloat16"
)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for any layer, whatever else runs here."""
    monkeypatch.setattr(prepack, "available_memory", lambda: 2**40)


def tiny_model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model.to(dtype)


def layers_of(model: Any, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 64, 300])
def test_a_layer_gives_the_sums_of_its_weight(rows: int, bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(200, 130, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    packed = PrepackedLinear(layer)
    x = torch.randn(2, rows, 200).bfloat16()
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    # One rounding to 8 bits, of a sum in float32 that is off by its terms' roundings at most.
    terms = x.double().abs() @ layer.weight.double().abs().T + 1
    assert ((packed(x).double() - exact).abs() <= 2**-8 * exact.abs() + 202 * 2**-24 * terms).all()
    assert torch.equal(packed.weight, layer.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_says_the_same_before_and_after(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.arange(36).reshape(3, 12) * 7 % 300
    names = layers_of(model, nn.Linear)
    before = model(input_ids=ids).logits
    prepack_linear_layers([model])
    assert layers_of(model, PrepackedLinear) == names
    assert not layers_of(model, nn.Linear)
    # Both are off the exact ones by roundings alone, and one is no further off than the other.
    exact = tiny_model(tie_word_embeddings=tied).double()(input_ids=ids).logits
    off, off_before = ((one - exact).abs().max() for one in (model(input_ids=ids).logits, before))
    assert off <= 2 * off_before
    # The embedding is looked up row by row and stays.
    assert model.get_input_embeddings().weight.shape == (300, 16)


def test_what_two_models_share_is_held_once() -> None:
    model = tiny_model()
    smaller = share_without_layers(model, (1,))
    prepack_linear_layers([smaller, model])
    kept = [0, *range(2, len(model.model.layers))]
    for own, theirs in zip(smaller.model.layers, kept, strict=True):
        assert own.mlp.up_proj is model.model.layers[theirs].mlp.up_proj
    assert smaller.lm_head is model.lm_head


def test_two_layers_of_one_weight_keep_their_own_biases() -> None:
    first, second = (nn.Linear(32, 32, dtype=torch.bfloat16).requires_grad_(False) for _ in "ab")
    second.weight = first.weight
    biases = first.bias, second.bias
    both = nn.ModuleList([first, second])
    prepack_linear_layers([both])
    assert both[0].bias is biases[0]
    assert both[1].bias is biases[1]


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_is_not_a_plain_layer_in_bfloat16_stays() -> None:
    model = tiny_model(torch.float32)
    prepack_linear_layers([model])
    assert not layers_of(model, PrepackedLinear)
    odd = nn.ModuleList([Doubled(32, 32, dtype=torch.bfloat16).requires_grad_(False)])
    prepack_linear_layers([odd])
    assert type(odd[0]) is Doubled


@pytest.mark.parametrize("fault", ["fails", "wrong"])
def test_a_layer_that_would_not_work_stays(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: PrepackedLinear, x: torch.Tensor) -> torch.Tensor:
        if fault == "fails":
            raise RuntimeError("could not create a primitive")
        return 1.1 * nn.functional.linear(x, self.weight, self.bias)

    monkeypatch.setattr(PrepackedLinear, "forward", forward)
    model = tiny_model()
    prepack_linear_layers([model])
    assert not layers_of(model, PrepackedLinear)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_stay_where_the_memory_would_not_hold_all(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    size = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, nn.Linear))
    free = 2 * WORKING_SET_BYTES + size - (not packed)
    monkeypatch.setattr(prepack, "available_memory", lambda: free)
    prepack_linear_layers([model])
    assert bool(layers_of(model, PrepackedLinear)) == packed
    assert bool(layers_of(model, nn.Linear)) != packed


@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight"])
def test_layers_stay_where_torch_lacks_an_operation(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        name: getattr(torch.ops.mkldnn, name)
        for name in ("_linear_pointwise", "_reorder_linear_weight")
        if name != missing
    }
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**known))
    model = tiny_model()
    prepack_linear_layers([model])
    assert not layers_of(model, PrepackedLinear)


def test_a_packed_model_is_not_made_another_precision() -> None:
    model = tiny_model()
    prepack_linear_layers([model])
    with pytest.raises(RuntimeError, match="with another dtype, or with prepack=False"):
        model.float()


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_saved_whole(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    prepack_linear_layers([model])
    model.cpu().to(torch.bfloat16).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    plain = tiny_model(tie_word_embeddings=tied).state_dict()
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
