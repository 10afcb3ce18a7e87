"""A small run whose columns are known by construction, made by the project's own stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calibrate.decode.recording import (
    BIAS_SIZE_GRID,
    SIZE_GRID,
    THRESHOLD_GRID,
    TOPK_ATTENTION_GRID,
)
from calibrate.derive.derivation import derive_run
from calibrate.derive.operating_points import policy_from_settings
from calibrate.derive.policy_tokens import predicted_tokens
from calibrate.fit.calibration import summarise
from calibrate.run.folder import read_json, write_json
from calibrate.run.traces import read_trace, shard_paths, write_shard
from calibrate.validate.validation import compare_reruns
from hlmtheory.policies import POLICY_NAMES

VOCAB = 32_000
NUM_PROMPTS, NUM_STEPS = 12, 16
CATEGORIES = ("code", "prose")


def synthetic_columns(seed: int, num_prompts: int = NUM_PROMPTS) -> dict[str, np.ndarray]:
    """Columns of a full trace: beta rises with u, prompts differ, answers end at various steps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(NUM_STEPS // 2, NUM_STEPS + 1, size=num_prompts)
    lengths[0] = NUM_STEPS
    row = np.repeat(np.arange(num_prompts), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    num = len(row)
    u = np.clip(rng.beta(0.6, 0.6, num) + 0.05 * rng.normal(size=num_prompts)[row], 0, 1)
    beta = np.where(rng.uniform(size=num) < 0.2 + 0.6 * u, np.clip(u + 0.1, 0, 1), 0.0)
    draft_prob = np.clip(1 - u, 0.01, 1)
    inside = u[:, None] <= np.array(THRESHOLD_GRID)
    deviation = 1.6 * np.exp(-0.5 * np.log(np.array(SIZE_GRID)) * rng.uniform(0.8, 1.6, (num, 1)))
    bias = 0.3 * np.exp(-0.6 * np.log(np.array(BIAS_SIZE_GRID)) * rng.uniform(0.8, 1.6, (num, 1)))
    unrecorded = step % 4 != 0
    deviation[unrecorded] = bias[unrecorded] = np.nan
    attended = 20 + step
    entropy = np.log(attended - 1) * rng.uniform(0.6, 0.95, num)
    return {
        "row": row,
        "step": step,
        "draft_token": rng.integers(0, VOCAB, num),
        "output_token": rng.integers(0, VOCAB, num),
        "draft_prob": draft_prob,
        "target_prob": draft_prob * (1 - beta),
        "rejection_prob": beta,
        "uncertainty": u,
        "uncertainty_sampled": np.round(20 * np.clip(u + 0.05 * rng.normal(size=num), 0, 1)) / 20,
        "entropy": 3 * u + rng.uniform(size=num),
        "max_prob": 1 - 0.9 * u,
        "margin": 1 - u,
        "tv_distance": np.clip(beta.mean() + 0.05 * rng.normal(size=num), 0, 1),
        "skipped": np.zeros(num, dtype=bool),
        "accepted": rng.uniform(size=num) > beta,
        "policy_bias": np.zeros(num),
        "policy_entries": np.full(num, VOCAB),
        "skip_set_size": inside.astype(np.int16),
        "skip_set_mass": inside * draft_prob[:, None],
        "skip_set_bias": inside * (beta * draft_prob)[:, None],
        "skip_set_ask_bias": inside * (0.5 * draft_prob)[:, None],
        "tail_deviation": deviation,
        "truncation_bias": np.minimum(bias, 0.1),
        "attention_sink": rng.uniform(0.2, 0.5, num),
        "attention_entropy": entropy,
        "context_attention": rng.uniform(0.2, 0.6, num),
        "num_attended": attended,
        "topk_attention": np.exp(-entropy)[:, None]
        * rng.uniform(0.7, 2.0, (num, len(TOPK_ATTENTION_GRID))),
    }


def identity(name: str) -> dict[str, Any]:
    model = {"label": "M", "sha256": "ab" * 32, "drop_layers": []}
    return {
        "name": name, "slm": model, "llm": model, "vocab_size": VOCAB, "dtype": "float32",
        "device": "cpu",
    }  # fmt: skip


def make_run(run: Path, prompts_file: str = "p.jsonl", prompt_name: str = "prompt") -> None:
    """A calibrated and derived run, by the project's own stages from synthetic shards on."""
    columns = synthetic_columns(0)
    half = columns["row"] < NUM_PROMPTS // 2
    header = {"pair": identity("synthetic"), "settings": {}}
    for number, rows in enumerate((half, ~half)):
        part = {name: values[rows] for name, values in columns.items()}
        offset = number * NUM_PROMPTS // 2
        part["row"] = part["row"] - offset
        names = [f"{prompt_name}-{offset + i:02d}" for i in range(NUM_PROMPTS // 2)]
        path = run / "traces" / f"shard-{number:05d}.parquet"
        write_shard(path, part, names, header, CATEGORIES * (len(names) // 2))
    timing = {"low": None, "high": None, "unit": "ms"}
    info = {
        "pair": identity("synthetic"),
        "settings": {
            "prompts": prompts_file, "temperature": 1.0, "seed": 0, "max_new_tokens": NUM_STEPS,
        },
        "timings": {
            "t_slm_ms": {"value": 20.0, **timing},
            "t_llm_ms": {"value": 30.0, **timing},
            "t_uncertainty_ms": {"value": 1.0, **timing},
        },
        "command": ["hlm", "calibrate", "--prompts", prompts_file],
        "revision": "0" * 40,
        "versions": {"python": "3"},
        "wall_s": 1.0,
    }  # fmt: skip
    write_json(run / "run.json", info)
    write_json(run / "calibration.json", summarise(read_trace(shard_paths(run)), info))
    derive_run(run, policies=POLICY_NAMES, risks=(0.02, 0.05))


def add_validation(run: Path) -> None:
    """Reruns of every feasible point on other synthetic prompts, compared as the project does."""
    derived = read_json(run, "operating_points.json")
    fresh = run / "fresh.parquet"
    columns, rng = synthetic_columns(1), np.random.default_rng(2)
    names = [f"fresh-{i:02d}" for i in range(NUM_PROMPTS)]
    write_shard(fresh, columns, names, {})
    trace = read_trace([fresh])
    fresh.unlink()
    points = [point for point in derived["operating_points"] if point["feasible"]]
    for point in points:
        policy = policy_from_settings(
            point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
        )
        tokens = predicted_tokens(trace, policy, VOCAB)
        ran = {name: columns[name] for name in ("row", "step", "rejection_prob", "uncertainty")} | {
            "skipped": tokens.skipped > 0.5,
            "policy_bias": np.nan_to_num(tokens.bias),
            "policy_entries": np.nan_to_num(tokens.num_entries, nan=50.0).astype(np.int64),
        }
        path = run / "reruns" / f"{point['policy']}_{point['rule']}.parquet"
        if point["policy"] != "hlm":  # its outputs lead it into other contexts
            ran["uncertainty"] = np.clip(
                columns["uncertainty"] + 0.05 * rng.normal(size=trace.num_tokens), 0, 1
            )
        write_shard(path, ran, names, {"operating_point": point}, CATEGORIES * (NUM_PROMPTS // 2))
    compare_reruns(run, points, derived, {"seed": 1, "command": ["hlm", "validate"]})
