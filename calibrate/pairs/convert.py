"""From a .gguf file to a folder that transformers loads in seconds: bfloat16 and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibrate.pairs.cache import Progress, check_room
from calibrate.pairs.gguf_file import GgufLayout, read_layout
from calibrate.pairs.quiet import quiet
from calibrate.run.errors import UserError

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
    num_bytes = 2 * layout.num_elements

    def report(done: int) -> None:
        if progress is not None:
            progress(f"convert {label} to bfloat16 (once)", min(done, num_bytes), num_bytes)

    report(0)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet(), _counted_tensors(report):
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
    except Exception as error:  # tokenizers raises just that
        raise UserError(
            f"transformers cannot read {label} (architecture "
            f"{layout.metadata.get('general.architecture', 'unknown')!r}): {first_line(error)}; "
            "give a folder or hub id with safetensors weights instead"
        ) from error
    refuse_missing_weights(info, label)
    _mend_splitter(tokenizer, layout)
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(first_line(error)) from error
    report(num_bytes)


@contextmanager
def _counted_tensors(report: Callable[[int], None]) -> Iterator[None]:
    """Let our progress stand in for the bar that transformers draws while it dequantises.

    That bar has no switch. Where transformers has none to replace, nothing is reported.
    """
    from transformers import modeling_gguf_pytorch_utils as dequantiser

    bar = getattr(dequantiser, "tqdm", None)

    def counted(tensors: Iterable[Any], **_: object) -> Iterator[Any]:
        done = 0
        for tensor in tensors:
            yield tensor
            done += 2 * int(getattr(tensor, "n_elements", 0))
            report(done)

    if bar is not None:
        dequantiser.tqdm = counted
    try:
        yield
    finally:
        if bar is not None:
            dequantiser.tqdm = bar


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
