"""From a .gguf file to a folder that transformers loads in seconds: bfloat16 and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibrate.cache import Progress, check_room
from calibrate.errors import UserError
from calibrate.gguf_file import GgufLayout, read_layout
from calibrate.quiet import quiet

# Vocabularies (`tokenizer.ggml.pre`) that split text into single digits before anything else.
# transformers 5.23 builds a plain GPT-2 splitter for them, which cuts blanks before a digit
# differently: a blank line and a numbered list would reach the model in tokens it never saw.
_SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})


def convert_gguf(gguf: Path, folder: Path, label: str, progress: Progress | None) -> None:
    """Write the model of a .gguf file as bfloat16 safetensors, with its tokenizer, into a folder.

    Raises
    ------
    UserError
        The file is no GGUF, cut off, of a kind transformers does not know, or lacks weights.
    """
    layout = read_layout(gguf)
    check_room(2 * layout.num_elements, label)
    if progress is not None:
        progress(f"convert {label} to bfloat16 (once)", 0, None)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        raise UserError(
            f"transformers cannot read {label} (architecture "
            f"{layout.metadata.get('general.architecture', 'unknown')!r}): {first_line(error)}; "
            "give a folder or hub id with safetensors weights instead"
        ) from error
    refuse_missing_weights(info, label)
    _mend_splitter(tokenizer, layout)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if progress is not None:
        progress(f"convert {label} to bfloat16 (once)", 1, 1)


def refuse_missing_weights(loading_info: dict[str, Any], label: str) -> None:
    """Refuse a checkpoint with holes, which transformers would fill with random numbers."""
    missing = sorted(loading_info.get("missing_keys", ()))
    mismatched = sorted(str(key) for key in loading_info.get("mismatched_keys", ()))
    if missing or mismatched:
        raise UserError(
            f"{label} lacks {len(missing) + len(mismatched)} of its weights (first: "
            f"{(missing + mismatched)[0]}): give a complete checkpoint"
        )


def first_line(error: BaseException) -> str:
    """The first line of another library's message, short enough for ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _mend_splitter(tokenizer: Any, layout: GgufLayout) -> None:
    if layout.metadata.get("tokenizer.ggml.pre") not in _SINGLE_DIGIT_SPLITS:
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
