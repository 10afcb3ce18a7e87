"""Models of a few kilobytes, in the shapes that they are fetched in."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.pairs.sources import ModelSpec, WheelParts

PARTS = (b"first half,", b" second half")
WHOLE_SHA256 = hashlib.sha256(b"".join(PARTS)).hexdigest()
WHEELS = WheelParts("tiny-model-part{part}", "1.0", "tiny_model/data/part{part:02d}.bin", 2, 3000)
TINY = ModelSpec("tiny", WHEELS, WHOLE_SHA256)


def write_wheel(folder: Path, distribution: str, files: dict[str, bytes]) -> None:
    """A wheel that pip accepts: its files, METADATA, WHEEL and RECORD."""
    name = distribution.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for member, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{member},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for member, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(member, content)


def leftovers(folder: Path) -> list[str]:
    """Files in a cache, but for the empty lock files."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


NUM_LAYERS = 4


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 257,
        "bos_token_id": 256,
    }
    return LlamaConfig(**{**settings, **changes})


def write_gguf(path: Path, pre_tokenizer: str = "smollm") -> dict[str, np.ndarray]:
    """A whole llama .gguf file with float32 weights and a byte tokenizer; returns its tensors."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    config = tiny_config()
    rng = np.random.default_rng(0)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    tokens += ["ĠĠ", "ĊĊ"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 300)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1] + [5] * 40)
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    width, inner, kv_width = config.hidden_size, config.intermediate_size, 8
    shapes = {"token_embd": (300, width), "output_norm": (width,), "output": (300, width)}
    for i in range(NUM_LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (width, width),
            f"blk.{i}.attn_k": (kv_width, width),
            f"blk.{i}.attn_v": (kv_width, width),
            f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.attn_norm": (width,),
            f"blk.{i}.ffn_norm": (width,),
            f"blk.{i}.ffn_gate": (inner, width),
            f"blk.{i}.ffn_up": (inner, width),
            f"blk.{i}.ffn_down": (width, inner),
        }
    tensors = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
