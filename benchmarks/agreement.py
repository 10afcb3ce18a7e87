"""How far the engine's fast paths are from the plain ones, tuple by tuple.

Fast: prompts in batches, fused attention kernels with the recorded row computed beside them. Plain:
one prompt at a time, transformers' eager attention in both models. Same pair, prompts and random
numbers, so in exact arithmetic every tuple is the same. Rounding moves the law a little, and with
it a draw now and then; from there on a prompt's texts are two draws of the same law, so values are
compared up to the first token that differs.

    python -m benchmarks.agreement --pair smollm2 --dtype float32
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.workload import Workload, load_workload
from calibrate.decode.engine import decode
from calibrate.decode.models import transformer_models
from hlmtheory.policies import calibration_policy

VALUES = ("uncertainty", "rejection_prob", "tv_distance")


def tuples(work: Workload, trace: str) -> dict[str, dict[str, np.ndarray]]:
    """Columns of every prompt, by step."""
    slm, llm = transformer_models(work.pair)
    found = {}
    for batch in decode(slm, llm, work.prompts, calibration_policy(), work.settings(trace), ()):
        for row, prompt_id in enumerate(batch.prompt_ids):
            own = batch.columns["row"] == row
            order = np.argsort(batch.columns["step"][own])
            found[prompt_id] = {
                name: batch.columns[name][own][order]
                for name in ("draft_token", "output_token", *VALUES)
            }
    return found


def agreement(
    fast: dict[str, dict[str, np.ndarray]], plain: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Shares of equal prompts and tokens, and the largest differences up to the first other."""
    num_tokens = num_same = num_equal = 0
    widest = dict.fromkeys(VALUES, 0.0)
    means: dict[str, list[float]] = {name: [] for name in VALUES}
    for prompt_id, ours in fast.items():
        theirs = plain[prompt_id]
        same = np.logical_and.accumulate(
            (ours["draft_token"] == theirs["draft_token"])
            & (ours["output_token"] == theirs["output_token"])
        )
        num_tokens += len(same)
        num_same += int(same.sum())
        num_equal += bool(same.all())
        for name in VALUES:
            gap = np.abs(ours[name][same].astype(float) - theirs[name][same])
            widest[name] = max(widest[name], float(gap.max(initial=0.0)))
            means[name] += gap.tolist()
    return {
        "num_prompts": len(fast),
        "prompts_with_equal_tokens": num_equal / len(fast),
        "tokens_before_the_first_difference": num_same / num_tokens,
        "largest_difference": widest,
        "mean_difference": {name: float(np.mean(gaps)) for name, gaps in means.items()},
    }


def main() -> None:
    """Decode the same prompts both ways and print how they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    work = load_workload(
        options.pair, options.limit, options.max_new_tokens, attention=True, dtype=options.dtype
    )
    fast = tuples(work, "full")
    for model in (work.pair.slm, work.pair.llm):
        model.set_attn_implementation("eager")
    plain = tuples(replace(work, batch_size=1), "minimal")
    print(json.dumps(vars(options) | agreement(fast, plain), indent=1))


if __name__ == "__main__":
    main()
