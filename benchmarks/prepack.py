"""A step with weights in the order of the processor's kernels beside one with them as they come.

Both forms of a pair take the same steps in turn, after the same prompts: medians in milliseconds.

    python -m benchmarks.prepack --pair qwen2.5-coder [--rows 64] [--steps 16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.workload import load_workload
from calibrate.decode.models import transformer_models


def main() -> None:
    """Step both models of both forms in turn and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16)
    given = parser.parse_args()
    works = [load_workload(given.pair, given.rows, 1, prepack=prepack) for prepack in (False, True)]
    contexts = [prompt.tokens[:-1] for prompt in works[0].prompts]
    tokens = torch.tensor([prompt.tokens[-1] for prompt in works[0].prompts])
    with torch.inference_mode():
        sessions = [
            [model.start(contexts, False) for model in transformer_models(work.pair)]
            for work in works
        ]
        # By model, then by form.
        times: list[list[list[float]]] = [[[], []], [[], []]]
        for step in range(given.steps + 2):
            for form in (0, 1) if step % 2 else (1, 0):
                for model, session in enumerate(sessions[form]):
                    begin = time.perf_counter()
                    session.step(tokens)
                    times[model][form].append(1e3 * (time.perf_counter() - begin))
    print(f"{given.pair}: {given.rows} rows, medians of {given.steps} steps in turn, ms")
    for name, both in zip(("device model", "server model"), times, strict=True):
        plain, packed = (statistics.median(one[2:]) for one in both)
        print(f"  {name}  {plain:7.1f} as loaded  {packed:7.1f} prepacked  {packed / plain:.2f}")


if __name__ == "__main__":
    main()
