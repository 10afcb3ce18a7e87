"""`hlm calibrate`: decode the calibration prompts under HLM, write traces, fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.fit.line import (
    EstimatorScore,
    LineFit,
    estimator_scores,
    fit_line,
    score_estimator,
)
from calibrate.run.errors import UserError
from calibrate.run.figure import as_figure
from calibrate.run.folder import (
    Figure,
    open_run,
    provenance,
    read_json,
    write_json,
)
from calibrate.run.prompts import (
    Prompt,
    TokenizedPrompt,
    calibration_prompts,
    read_prompts,
    text_key,
    tokenize_prompts,
)
from calibrate.run.traces import Trace, finished_prompts, read_trace, shard_paths, write_shard
from hlmtheory.clusters import mean_over_tokens

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodingSettings
    from calibrate.pairs.registry import LoadedPair, PairSpec

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked for, checked before any model is loaded.

    Attributes
    ----------
    spec : PairSpec
    prompts_source : str or None
        File or hub id; None for the shipped prompts.
    limit, max_new_tokens, seed : int
    batch_size : int or None
        None: as many as memory and lengths allow.
    temperature : float
    device, dtype, trace : str
    run : Path
    resume : bool
    command : list of str
    given : dict
        The options --slm, --llm and --drop-layers, so that a rerun finds the same models.
    """

    spec: PairSpec
    prompts_source: str | None
    limit: int
    max_new_tokens: int
    batch_size: int | None
    seed: int
    temperature: float
    device: str
    dtype: str
    trace: str
    run: Path
    resume: bool = False
    command: list[str] = field(default_factory=list)
    given: dict[str, str | None] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What decides the tokens of the trace, as it is stored in run.json."""
        return {
            "pair": self.spec.name,
            "given": self.given,
            "slm": _model_settings(self.spec.slm),
            "llm": _model_settings(self.spec.llm),
            "prompts": self.prompts_source or "shipped",
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "temperature": self.temperature,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "trace": self.trace,
            "policy": "hlm",
        }


def _model_settings(model: Any) -> dict[str, Any]:
    return {
        "label": model.label,
        "sha256": model.sha256,
        "drop_layers": list(model.drop_layers),
    }


def prepare(request: CalibrationRequest) -> list[Prompt]:
    """Check the prompts and the run folder; loads no model.

    Raises
    ------
    UserError, UsageError
        One line that says what is wrong.
    """
    prompts = calibration_prompts(read_prompts(request.prompts_source), request.limit)
    if not prompts:
        raise UserError(
            f"--prompts {request.prompts_source}: none of its prompts is in the calibration half"
        )
    open_run(request.run, request.settings(), request.resume)
    return prompts


def calibrate(
    request: CalibrationRequest,
    prompts: Sequence[Prompt],
    pair: LoadedPair,
    on_step: OnStep | None = None,
    on_total: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run the calibration of a prepared request and write run.json and calibration.json.

    Parameters
    ----------
    request : CalibrationRequest
    prompts : sequence of Prompt
        From :func:`prepare`.
    pair : LoadedPair
    on_step : callable, optional
        See :func:`calibrate.decode.engine.decode`.
    on_total : callable, optional
        Told the most tokens that may be decoded, before decoding starts.

    Returns
    -------
    dict
        The content of calibration.json.
    """
    from calibrate.decode.engine import DecodingSettings
    from calibrate.decode.memory import automatic_batch_size
    from calibrate.decode.models import TransformerModel
    from calibrate.decode.timing import measure_timings
    from hlmtheory.policies import make_policy

    tokenized = tokenize_prompts(prompts, pair.tokenizer, request.max_new_tokens, pair.max_context)
    settings = DecodingSettings(
        temperature=request.temperature,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size
        or automatic_batch_size(pair, tokenized, request.max_new_tokens),
        seed=request.seed,
        trace=request.trace,
    )
    slm = TransformerModel(pair.slm, pair.vocab_size)
    llm = TransformerModel(pair.llm, pair.vocab_size)
    timings = measure_timings(slm, llm, tokenized[0].tokens, settings.thetas)
    info: dict[str, Any] = {
        "complete": False,
        "pair": pair_identity(pair),
        "settings": request.settings(),
        "prompt_keys": [text_key(prompt.text) for prompt in prompts],
        **provenance(request.command),
        "timings": asdict(timings),
        "num_prompts": 0,
        "num_tokens": 0,
        "wall_s": 0.0,
        "forward_s": 0.0,
    }
    if request.resume and (request.run / "run.json").is_file():
        earlier = read_json(request.run, "run.json")
        _check_same_inputs(earlier, info)
        info |= {key: earlier[key] for key in ("wall_s", "forward_s")}
    write_json(request.run / "run.json", info)
    done = finished_prompts(request.run) if request.resume else set()
    left = [prompt for prompt in tokenized if prompt.prompt_id not in done]
    if on_total is not None:
        on_total(len(left) * request.max_new_tokens)
    decode_to_shards(request.run, slm, llm, left, make_policy("hlm"), settings, pair, info, on_step)
    trace = read_trace(shard_paths(request.run))
    if set(trace.prompt_ids) != {prompt.prompt_id for prompt in tokenized}:
        raise UserError(
            f"{request.run}: its shards do not hold the {len(tokenized)} prompts of this run; "
            "name another folder"
        )
    info |= {
        "complete": True,
        "num_prompts": trace.num_prompts,
        "num_tokens": trace.num_tokens,
    }
    summary = summarise(trace, info)
    write_json(request.run / "calibration.json", summary)
    write_json(request.run / "run.json", info)
    return summary


def _check_same_inputs(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume on other prompts or other models than the finished shards'."""
    before = {key: earlier.get(key) for key in ("prompt_keys", "pair")}
    after = json.loads(json.dumps({key: now[key] for key in before}))
    for key, what in (("prompt_keys", "prompts"), ("pair", "models")):
        if before[key] != after[key]:
            raise UserError(
                f"--resume: the {what} are not those of the interrupted run; name another folder"
            )


def decode_to_shards(
    run: Path,
    slm: Any,
    llm: Any,
    prompts: Sequence[TokenizedPrompt],
    policy: Any,
    settings: DecodingSettings,
    pair: LoadedPair,
    info: dict[str, Any],
    on_step: OnStep | None,
) -> None:
    """Decode prompts and write one shard a batch; run.json follows each: a stop loses nothing."""
    from calibrate.decode.engine import decode

    header = {key: info[key] for key in ("pair", "settings", "versions", "revision", "command")}
    numbers = [int(path.stem.rpartition("-")[2]) for path in shard_paths(run)]
    offset = max(numbers, default=-1) + 1
    batches = decode(slm, llm, prompts, policy, settings, pair.eos_token_ids, on_step)
    for number, batch in enumerate(batches, start=offset):
        path = run / "traces" / f"shard-{number:05d}.parquet"
        write_shard(path, batch.columns, batch.prompt_ids, header, batch.categories)
        info["wall_s"] += batch.wall_s
        info["forward_s"] += batch.forward_s
        write_json(run / "run.json", info)


def pair_identity(pair: LoadedPair) -> dict[str, Any]:
    """Names and hashes of both models, as stored beside every result."""
    return {
        "name": pair.name,
        "slm": asdict(pair.slm_identity),
        "llm": asdict(pair.llm_identity),
        "vocab_size": pair.vocab_size,
        "dtype": pair.dtype,
        "device": pair.device,
    }


def summarise(trace: Trace, info: dict[str, Any], confidence: float = 0.95) -> dict[str, Any]:
    """Everything calibration.json holds, from a trace and its run.json."""
    index, num_prompts = trace.prompt_index, trace.num_prompts
    beta = trace["rejection_prob"]
    line: LineFit = fit_line(
        trace["uncertainty"],
        beta,
        trace["target_prob"] < trace["draft_prob"],
        index,
        num_prompts,
        confidence,
    )
    estimators: list[EstimatorScore] = [
        score_estimator(name, score, beta, index, num_prompts, confidence)
        for name, score in estimator_scores(trace).items()
    ]

    def mean(values: np.ndarray, unit: str = "") -> Figure:
        return as_figure(mean_over_tokens(values, index, num_prompts), unit, confidence)

    attention: dict[str, Figure] = {}
    if "attention_entropy" in trace:
        attention = {
            "entropy": mean(trace["attention_entropy"], "nat"),
            "sink": mean(trace["attention_sink"]),
            "context": mean(trace["context_attention"]),
        }
    return {
        "pair": info["pair"],
        "settings": info["settings"],
        "num_prompts": num_prompts,
        "num_tokens": trace.num_tokens,
        "confidence": confidence,
        "fit": asdict(line),
        "estimators": [asdict(estimator) for estimator in estimators],
        "attention": {key: asdict(value) for key, value in attention.items()},
        "timings": info["timings"],
    }
