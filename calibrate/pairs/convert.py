"""From a .gguf file to a folder that transformers loads in seconds: bfloat16 and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from calibrate.pairs.cache import Progress, check_room
from calibrate.pairs.quiet import quiet
from calibrate.run.errors import UserError

# Vocabularies (`tokenizer.ggml.pre`) that split text into single digits before anything else.
# transformers 5.23 builds a plain GPT-2 splitter for them, which cuts blanks before a digit
# differently: a blank line and a numbered list would reach the model in tokens it never saw.
_SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})


class GgufHeader(NamedTuple):
    """What conversion needs to know of a .gguf file; entries that it lacks are None."""

    num_elements: int
    architecture: str | None
    pre_tokenizer: str | None


def read_header(path: Path) -> GgufHeader:
    """Read the header of a .gguf file and map its weights, so that a file cut off is noticed.

    Raises
    ------
    UserError
        The file is not GGUF, cut off or damaged.
    """
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file: it begins with {start!r}, not b'GGUF'; give a .gguf "
                "file, a model folder or a hub id"
            )
        reader = GGUFReader(path)
        architecture, pre_tokenizer = (
            None if (field := reader.get_field(key)) is None else str(field.contents())
            for key in ("general.architecture", "tokenizer.ggml.pre")
        )
        num_elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path} is cut off or damaged at its {path.stat().st_size} bytes "
            f"({first_line(error)}); download it again"
        ) from error
    if reader.byte_order != "I":
        raise UserError(f"{path} has another byte order than this machine: convert it again")
    return GgufHeader(num_elements, architecture, pre_tokenizer)


def convert_gguf(gguf: Path, folder: Path, label: str, progress: Progress | None) -> None:
    """Write the model of a .gguf file as bfloat16 safetensors, with its tokenizer, into a folder.

    Raises
    ------
    UserError
        The file is no GGUF, cut off, of a kind transformers does not know, or lacks weights.
    """
    num_bytes: int | None = None

    def report(done: int) -> None:
        if progress is not None:
            progress(f"convert {label} to bfloat16 (once)", min(done, num_bytes or 0), num_bytes)

    report(0)  # a large vocabulary takes seconds to read
    header = read_header(gguf)
    num_bytes = 2 * header.num_elements
    check_room(num_bytes, label)
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
            f"{header.architecture!r}): {first_line(error)}; "
            "give a folder or hub id with safetensors weights instead"
        ) from error
    refuse_missing_weights(info, label)
    if header.pre_tokenizer in _SINGLE_DIGIT_SPLITS:
        _split_digits(tokenizer)
    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(first_line(error)) from error  # how both libraries say that it is full
        raise
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


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
