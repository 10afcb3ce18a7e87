"""Milliseconds a step and tokens a second against how many prompts are decoded together.

    python -m benchmarks.batch_size --pair qwen2.5-coder [--sizes 8,16,32,64,128]

Full traces of prompts of middling length; steps alone, without reading the prompts. Every size
takes its turn in every round, and the median over all its steps is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from itertools import pairwise

from benchmarks.workload import load_workload
from calibrate.decode.engine import decode
from calibrate.decode.models import transformer_models
from hlmtheory.policies import calibration_policy

ROUNDS, STEPS = 2, 8


def main() -> None:
    """Measure every size and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--sizes", default="8,16,32,64,128")
    given = parser.parse_args()
    sizes = sorted(int(one) for one in given.sizes.split(","))
    work = load_workload(given.pair, sizes[-1], STEPS, sizes[-1], attention=True)
    models = transformer_models(work.pair)
    by_length = sorted(work.prompts, key=lambda prompt: len(prompt.tokens))
    steps: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            begin = (len(by_length) - size) // 2
            settings = replace(work.settings("full"), batch_size=size)
            ends: list[float] = []

            def on_step(emitted: int, spared: int, ends: list[float] = ends) -> None:
                del emitted, spared
                ends.append(time.perf_counter())

            prompts = by_length[begin : begin + size]
            for _ in decode(*models, prompts, calibration_policy(), settings, (), on_step):
                pass
            steps[size] += [end - start for start, end in pairwise(ends)]
    for size, seconds in steps.items():
        median = statistics.median(seconds)
        print(f"{size:4d} together: {1e3 * median:6.0f} ms a step, {size / median:6.1f} token/s")


if __name__ == "__main__":
    main()
