"""Sampling as a model's generation config has it: taken on request, else said not to be.

The file lies beside the weights; a .gguf file brings none of it. Its values mean what they mean in
transformers: without do_sample the likeliest token is taken, and with it top_k is 50 unless given.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.pairs.sources import ModelSpec, PairSpec
from calibrate.pairs.store import cached_folder, ensure_folder
from calibrate.run.errors import UsageError
from hlmtheory.sampled_law import Sampling

FILE = "generation_config.json"
OPTION = "--sampling generation-config"
FILTERS = ("temperature", "top_k", "top_p")
KEYS = ("do_sample", *FILTERS, "repetition_penalty")
TOP_K = 50

OTHERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "diversity_penalty"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0,)),
    **dict.fromkeys(
        (
            "min_p", "top_h", "bad_words_ids", "sequence_bias", "suppress_tokens",
            "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
            "exponential_decay_length_penalty", "force_words_ids", "constraints", "dola_layers",
            "watermarking_config", "token_healing", "stop_strings",
        ),
        (False,),
    ),
}  # fmt: skip
"""What else changes laws or ends an answer, with the values that do not; nor does null."""


def generation_config(folder: Path) -> dict[str, Any]:
    """What the config of a model's folder says, nulls left out; nothing without a file.

    Raises
    ------
    UsageError
        If the file is not a JSON object.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is not a JSON object; mend it, or take it away")
    return {key: value for key, value in found.items() if value is not None}


def _beyond(config: dict[str, Any]) -> dict[str, Any]:
    """What the config sets that no setting here can follow."""
    return {key: config[key] for key in sorted(OTHERS) if config.get(key, OTHERS[key][0]) not in
            OTHERS[key]}  # fmt: skip


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def config_sampling(spec: PairSpec) -> Sampling:
    """Sampling of the server model's config, for both laws; what is not here is fetched first.

    Raises
    ------
    UsageError
        If it says nothing of sampling, or asks for what cannot be applied, by name.
    """
    model = spec.llm
    config = generation_config(ensure_folder(model))
    if beyond := _beyond(config):
        raise UsageError(
            f"{OPTION}: that of {model.label} sets {_listed(beyond)}, which cannot be applied; "
            "give what can: --temperature, --top-k, --top-p, --repetition-penalty"
        )
    if not any(key in config for key in KEYS):
        raise UsageError(
            f"{OPTION}: that of {model.label} says nothing of sampling; give --temperature (0 "
            "takes the likeliest token), --top-k, --top-p or --repetition-penalty"
        )
    try:
        return _meaning(config)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{OPTION}: that of {model.label}: {error}") from None


def _meaning(config: dict[str, Any]) -> Sampling:
    penalty = float(config.get("repetition_penalty", 1.0))
    if not config.get("do_sample", False):
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    return Sampling(
        float(config.get("temperature", 1.0)),
        int(config.get("top_k", TOP_K)),
        float(config.get("top_p", 1.0)),
        penalty,
    )


def not_applied(spec: PairSpec, sampling: Sampling) -> list[str]:
    """One line for each model whose config asks for another sampling than this."""
    lines = []
    models = {"device": spec.slm, "server": spec.llm}
    for side, model in models.items():
        if (line := _not_applied(model, sampling)) is not None:
            lines.append(f"the {side} model's generation config has {line}")
    return lines


def _not_applied(model: ModelSpec, sampling: Sampling) -> str | None:
    folder = cached_folder(model)
    config = {} if folder is None else generation_config(folder)
    applied = {"do_sample": sampling.temperature > 0} | asdict(sampling)
    if sampling.temperature == 0 and not config.get("do_sample"):  # neither looks at the others
        config = {key: value for key, value in config.items() if key not in FILTERS}
    asked = {key: config[key] for key in KEYS if config.get(key, applied[key]) != applied[key]}
    differing = asked | _beyond(config)
    return f"{_listed(differing)}: not applied, {sampling} is" if differing else None
