"""A pair of tiny models on disk: random weights made sharp, one a blurred copy of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibrate.fit.calibration import CalibrationRequest
from calibrate.run.records import GivenModels
from hlmtheory.sampled_law import Sampling

VOCAB_SIZE = 96


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Device and server model folders, float32 Llamas with a word tokenizer; seconds to make."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words |= {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    server = LlamaForCausalLM(config)
    with torch.no_grad():
        server.lm_head.weight.mul_(25.0)  # laws from nearly certain to nearly flat
    device = LlamaForCausalLM(config)
    device.load_state_dict(server.state_dict())
    with torch.no_grad():
        weight = device.lm_head.weight
        weight.add_(0.15 * weight.std() * torch.randn_like(weight))
    for name, model in (("device", device), ("server", server)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder / "device", folder / "server"


def write_prompts(path: Path, num: int = 40) -> Path:
    """A .txt file of short prompts, all different."""
    lines = [f"w{3 + i % 90} w{4 + (7 * i) % 90} w{5 + (11 * i) % 80}" for i in range(num)]
    path.write_text("\n".join(lines) + "\n")
    return path


def request(folder: Path, run: Path, **changes: Any) -> CalibrationRequest:
    """A calibration of the pair in `folder` on 12 of its prompts, 8 tokens each, in float32."""
    from calibrate.pairs.registry import resolve_pair

    models = {"slm": str(folder / "device"), "llm": str(folder / "server")}
    settings: dict[str, Any] = {
        "spec": resolve_pair(None, models["slm"], models["llm"], None), "order": "random",
        "prompts_source": str(folder / "prompts.txt"), "limit": 12, "max_new_tokens": 8,
        "batch_size": None, "seed": 0, "sampling": Sampling(), "device": "cpu", "dtype": "float32",
        "trace": "full", "run": run, "given": GivenModels(**models),
    }  # fmt: skip
    return CalibrationRequest(**settings | changes)


def load(folder: Path) -> Any:
    """The pair in `folder`, able to record its attention."""
    from calibrate.pairs.registry import load_pair

    spec = request(folder, folder).spec
    return load_pair(spec, dtype="float32", device="cpu", attention=True)
