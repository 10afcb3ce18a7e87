"""A pair on a device, ready for the engine."""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.pairs.buffers import keep_large_buffers
from calibrate.pairs.cache import file_sha256
from calibrate.pairs.convert import first_line, refuse_missing_weights
from calibrate.pairs.layers import share_without_layers
from calibrate.pairs.quiet import quiet
from calibrate.pairs.sources import HubRepo, ModelSpec, PairSpec
from calibrate.pairs.store import ensure_folder, source_sha256
from calibrate.pairs.tokenizers import common_vocabulary, end_token_ids
from calibrate.run.errors import UserError

# Answers begin at a multiple of this in the cache, so that every context keeps the alignment it
# has alone: vectorised reductions then add the same numbers in the same order.
PADDING_MULTIPLE = 32
_PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a result was measured on.

    `sha256` is that of the source .gguf file; else of the weights files; else the hub commit.
    Parameters and layers are those in use, tied parameters counted once.
    """

    label: str
    sha256: str
    drop_layers: tuple[int, ...]
    num_parameters: int
    num_layers: int


@dataclass
class LoadedPair:
    """Two models on a device, and what they share.

    Models are in eval mode, without gradients. The tokenizer is the server model's, or the device
    model's where only that has a chat template. Both know `vocab_size` tokens: logits from there on
    are cut off. `max_context` is the shorter of the two, in tokens.
    """

    name: str
    slm: Any
    llm: Any
    tokenizer: Any
    vocab_size: int
    slm_identity: ModelIdentity
    llm_identity: ModelIdentity
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    max_context: int


def load_pair(
    spec: PairSpec,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: bool = False,
    prepack: bool | None = None,
) -> LoadedPair:
    """Load both models; what is not in the cache is fetched first, without a progress bar.

    A device model that is the server model without some layers shares its tensors, so the
    weights are read and held once.

    Parameters
    ----------
    dtype : str
        `auto` (see `default_dtype`), bfloat16, float16, float32 or float64.
    device : str
        `auto` (CUDA if there is any, else cpu) or a torch device.
    attention : bool
        Whether the device model must be able to give its attention weights.
    prepack : bool or None
        Whether weights are held in the order of the processor's kernels; if None, where the memory
        has room for them.

    Raises
    ------
    UserError
        A model cannot be fetched, read or placed, or the two do not share a tokenizer.
    """
    from calibrate.pairs.attention import allow_recording
    from calibrate.pairs.prepack import prepack_linear_layers

    keep_large_buffers()
    device = resolve_device(device)
    if dtype == "auto":
        dtype = default_dtype(device)
    elif dtype not in _DTYPES:
        raise UserError(f"dtype = {dtype!r}: allowed are auto, {', '.join(_DTYPES)}")

    llm_folder, slm_folder = ensure_folder(spec.llm), ensure_folder(spec.slm)
    shared = slm_folder == llm_folder
    slm_tokenizer, llm_tokenizer = _tokenizers(spec)
    if not shared:  # before two large models are read for nothing
        common_vocabulary(
            slm_tokenizer, llm_tokenizer, _declared_size(slm_folder), _declared_size(llm_folder)
        )
    llm = _load_model(llm_folder, spec.llm.label, dtype, device)
    slm = llm if shared else _load_model(slm_folder, spec.slm.label, dtype, device)
    if shared or spec.slm.drop_layers:
        slm = share_without_layers(slm, spec.slm.drop_layers)
    if spec.llm.drop_layers:
        llm = share_without_layers(llm, spec.llm.drop_layers)
    if attention:
        allow_recording(slm)
    vocab_size = common_vocabulary(slm_tokenizer, llm_tokenizer, _num_logits(slm), _num_logits(llm))
    pair = LoadedPair(
        name=spec.name,
        slm=slm,
        llm=llm,
        tokenizer=_with_template(slm_tokenizer, llm_tokenizer),
        vocab_size=vocab_size,
        slm_identity=_identity(spec.slm, slm_folder, slm),
        llm_identity=_identity(spec.llm, llm_folder, llm),
        eos_token_ids=end_token_ids((slm_tokenizer, llm_tokenizer), (slm, llm), vocab_size),
        dtype=dtype,
        device=device,
        max_context=min(longest_text(slm), longest_text(llm)),
    )
    if prepack is not False:
        prepack_linear_layers((slm, llm), always=prepack is True)
    return pair


@dataclass
class LoadedModel:
    """One model of a pair on a device, alone: what a device or a server runs.

    `vocab_size` is its number of logits; the pair may share fewer tokens.
    """

    model: Any
    tokenizer: Any
    vocab_size: int
    end_tokens: tuple[int, ...]
    label: str
    dtype: str
    device: str
    max_context: int


def load_model(
    spec: ModelSpec, *, dtype: str = "auto", device: str = "auto", attention: bool = False
) -> LoadedModel:
    """Load one model, fetched first if it is not in the cache.

    Raises
    ------
    UserError
        It cannot be fetched, read or placed.
    """
    from calibrate.pairs.attention import allow_recording
    from calibrate.pairs.prepack import prepack_linear_layers

    keep_large_buffers()
    device = resolve_device(device)
    if dtype == "auto":
        dtype = default_dtype(device)
    folder = ensure_folder(spec)
    tokenizer = load_tokenizer(folder, spec.label)
    model = _load_model(folder, spec.label, dtype, device)
    if spec.drop_layers:
        model = share_without_layers(model, spec.drop_layers)
    if attention:
        allow_recording(model)
    size = _num_logits(model)
    ends = end_token_ids((tokenizer,), (model,), size)
    prepack_linear_layers((model,))
    return LoadedModel(model, tokenizer, size, ends, spec.label, dtype, device, longest_text(model))


def resolve_device(device: str) -> str:
    """`auto` made a device, and any other name checked against what this machine has."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {device}: not usable here ({first_line(error)}); "
            "use auto or cpu, see 'hlm doctor'"
        ) from error
    return device


def default_dtype(device: str) -> str:
    """bfloat16 where the processor multiplies it in hardware, else float32.

    Where it is emulated, bfloat16 is several times slower than float32 and no more exact.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float32"
    if kind == "cpu" and _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}:
        return "bfloat16"
    return "float32"


def _cpu_flags() -> set[str]:
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return {name for name, present in capabilities().items() if present is True}
    try:  # older torch, on Linux: x86 says "flags", ARM "Features"
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)).split())


def _load_model(folder: Path, label: str, dtype: str, device: str) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map={"": device} if device != "cpu" else None,
                local_files_only=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{label} does not fit on {device}: use --device cpu, or smaller models"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load {label} from {folder}: {first_line(error)}; give a folder with "
            "config.json, safetensors weights and a tokenizer, or a .gguf file"
        ) from error
    refuse_missing_weights(info, label)
    refuse_counted_positions(model, label)
    refuse_states(model, label)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, label: str) -> Any:
    """The tokenizer in a model's folder, without the model."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises just that
        raise UserError(
            f"cannot load the tokenizer of {label} from {folder}: {first_line(error)}; "
            "give a folder that holds tokenizer.json"
        ) from error


def pair_tokenizer(spec: PairSpec) -> Any:
    """What turns a pair's prompts into tokens, without its models.

    Raises
    ------
    UserError
        As :func:`load_pair`.
    """
    return _with_template(*_tokenizers(spec))


def _tokenizers(spec: PairSpec) -> tuple[Any, Any]:
    """Of device model and server model."""
    llm_folder, slm_folder = ensure_folder(spec.llm), ensure_folder(spec.slm)
    llm = load_tokenizer(llm_folder, spec.llm.label)
    return llm if slm_folder == llm_folder else load_tokenizer(slm_folder, spec.slm.label), llm


def _with_template(slm: Any, llm: Any) -> Any:
    """The server's tokenizer, unless the device's alone has a chat template."""
    return llm if llm.chat_template or not slm.chat_template else slm


def _declared_size(folder: Path) -> int:
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {folder}/config.json: {first_line(error)}") from error
    return int(config.get_text_config().vocab_size)


def _num_logits(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def longest_text(model: Any) -> int:
    """Tokens of the longest text that batches decode rightly.

    Attention windows count positions of the cache, padding and all: beyond one, padding would push
    tokens out of it that are still in sight.
    """
    config = model.config.get_text_config()
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return context
    return min(context, int(window) - PADDING_MULTIPLE)


def refuse_counted_positions(model: Any, label: str) -> None:
    """Positions must be told to the model: those it counts in the cache include the padding."""
    told = "position_ids" in inspect.signature(model.forward).parameters
    if not told or getattr(model.config.get_text_config(), "alibi", False):
        raise UserError(
            f"{label}: a {type(model).__name__} counts its positions itself (ALiBi), which padded "
            "batches would get wrong; models with rotary or learned positions are supported"
        )


def refuse_states(model: Any, label: str) -> None:
    """What a layer keeps must be keys and values: a state has run through the padding as well."""
    from transformers import DynamicCache

    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if not kinds <= _PLAIN_LAYERS:
        raise UserError(
            f"{label}: a {type(model).__name__} keeps a state beside keys and values (recurrent, "
            "convolutional or indexed layers), which padded batches would get wrong; models whose "
            "layers all attend to their context are supported"
        )


def _identity(spec: ModelSpec, folder: Path, model: Any) -> ModelIdentity:
    sha256 = source_sha256(spec)
    if sha256 is None:
        sha256 = folder.name if isinstance(spec.source, HubRepo) else weights_sha256(folder)
    return ModelIdentity(
        label=spec.label,
        sha256=sha256,
        drop_layers=spec.drop_layers,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=int(model.config.get_text_config().num_hidden_layers),
    )


def weights_sha256(folder: Path) -> str:
    """Hash of one weights file; of the list of hashes and names where there are several."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(files) == 1:
        return file_sha256(files[0])
    listing = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
