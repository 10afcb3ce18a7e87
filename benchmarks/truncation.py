"""Time of truncation on one core at a large vocabulary, beside the definition on a small one.

    python -m benchmarks.truncation [--json]

Contexts are Zipf laws with exponents from 1.05 to 2.5 and log-normal noise, tokens in random order:
k* runs from one to thousands, as on real models. Times are medians of repeats, wall clock and
processor time of this process; the latter is the one to read on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hlmtheory import domain
from hlmtheory.order import largest
from hlmtheory.steps import HEAD_SIZE, Axes
from hlmtheory.truncation import (
    online_bound_denominator,
    online_truncation_size,
    tail_deviation,
    tail_deviation_at,
    truncated_distribution,
)
from hlmtheory.truncation_bias import truncation_table

VOCAB_SIZE = 151_936
BATCH_SIZE = 32
SMALL_VOCAB_SIZE = 200
NUM_SMALL = 300
THETA = 0.1
NUM_REPEATS = 9
SIZES = Axes(VOCAB_SIZE).truncation_sizes
TARGET_MS = 3.0


def contexts(rng: np.random.Generator, num: int, vocab_size: int) -> np.ndarray:
    """Distributions (num, V) in float64."""
    exponents = rng.uniform(1.05, 2.5, size=(num, 1))
    logs = -exponents * np.log(np.arange(1, vocab_size + 1)) + 0.5 * rng.standard_normal(
        (num, vocab_size)
    )
    weights = rng.permuted(np.exp(logs - logs.max(axis=-1, keepdims=True)), axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True)


def size_by_definition(x: np.ndarray, limit: float) -> int:
    """min{k : N(k) <= limit}, building all V truncations: O(V^2)."""
    for k in range(1, len(x) + 1):
        if np.abs(x - truncated_distribution(x, k)).sum() <= limit:
            return k
    return len(x)


def check_small(rng: np.random.Generator) -> dict[str, int]:
    """How many online sizes at a small vocabulary equal the definition's."""
    x = contexts(rng, NUM_SMALL, SMALL_VOCAB_SIZE)
    draft, beta = rng.uniform(size=(2, NUM_SMALL))
    limits = THETA * online_bound_denominator(draft, beta)
    expected = np.array(
        [size_by_definition(row, limit) for row, limit in zip(x, limits, strict=True)]
    )
    found = online_truncation_size(x, draft, beta, THETA)
    tensors = [torch.from_numpy(a) for a in (x, draft, beta)]
    found_torch = online_truncation_size(tensors[0], tensors[1], tensors[2], THETA).numpy()
    return {
        "vocab_size": SMALL_VOCAB_SIZE,
        "num_contexts": NUM_SMALL,
        "num_equal_numpy": int(np.sum(found == expected)),
        "num_equal_torch": int(np.sum(found_torch == expected)),
        "smallest_size": int(expected.min()),
        "largest_size": int(expected.max()),
    }


def median_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Median wall and processor time of one call, in milliseconds."""
    call()
    wall, cpu = [], []
    for _ in range(NUM_REPEATS):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"wall_ms": 1e3 * float(np.median(wall)), "cpu_ms": 1e3 * float(np.median(cpu))}


def measure() -> dict[str, Any]:
    """All figures of the benchmark."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    check = check_small(rng)
    x = contexts(rng, BATCH_SIZE, VOCAB_SIZE).astype(np.float32)
    y = contexts(rng, BATCH_SIZE, VOCAB_SIZE).astype(np.float32)
    draft, beta = rng.uniform(size=(2, BATCH_SIZE)).astype(np.float32)
    x_torch, y_torch, draft_torch, beta_torch = map(torch.from_numpy, (x, y, draft, beta))
    head = largest(x_torch, HEAD_SIZE)[1]
    # The engine has checked its distributions once and runs unchecked, like this.
    with domain.unchecked():
        sizes = online_truncation_size(x, draft, beta, THETA)
        # The definition in O(V log V) at full size: every N(k) in double precision.
        limits = THETA * online_bound_denominator(draft, beta)
        curves = [tail_deviation(row.astype(np.float64)) for row in x]
        exact = [1 + int(np.argmax(c <= b)) for c, b in zip(curves, limits, strict=True)]
        batches = {
            "online size, numpy": median_ms(lambda: online_truncation_size(x, draft, beta, THETA)),
            "online size, torch": median_ms(
                lambda: online_truncation_size(x_torch, draft_torch, beta_torch, THETA)
            ),
            f"N(k) at {len(SIZES)} sizes, torch": median_ms(
                lambda: tail_deviation_at(x_torch, SIZES)
            ),
            f"bias table of {len(SIZES)} sizes, torch": median_ms(
                lambda: truncation_table(x_torch, y_torch, head, SIZES)
            ),
        }
    return {
        "machine": platform.processor() or platform.machine(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "vocab_size": VOCAB_SIZE,
        "batch_size": BATCH_SIZE,
        "theta": THETA,
        "online_sizes": sorted(int(k) for k in sizes),
        "num_equal_full_curve": int(np.sum(np.asarray(sizes) == exact)),
        "check": check,
        "batch": batches,
        "ms_per_token": {
            name: {kind: value / BATCH_SIZE for kind, value in times.items()}
            for name, times in batches.items()
        },
        "target_ms_per_token": TARGET_MS,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    as_json = parser.parse_args().json
    result = measure()
    if as_json:
        print(json.dumps(result, indent=2))
        return
    check, sizes = result["check"], result["online_sizes"]
    print(
        f"check: V = {check['vocab_size']}, {check['num_contexts']} contexts, k* from "
        f"{check['smallest_size']} to {check['largest_size']}: equal to the O(V^2) definition in "
        f"{check['num_equal_numpy']} (numpy) and {check['num_equal_torch']} (torch)"
    )
    print(
        f"V = {VOCAB_SIZE:,}, batch {BATCH_SIZE}, float32, one core: k* from {sizes[0]} to "
        f"{sizes[-1]}, median {sizes[len(sizes) // 2]}; equal to the full curve in "
        f"{result['num_equal_full_curve']} of {BATCH_SIZE}"
    )
    print(f"{'':32}{'ms/token wall':>15}{'cpu':>8}{'ms/batch wall':>15}{'cpu':>8}")
    for name, times in result["batch"].items():
        per_token = result["ms_per_token"][name]
        print(
            f"{name:32}{per_token['wall_ms']:15.2f}{per_token['cpu_ms']:8.2f}"
            f"{times['wall_ms']:15.1f}{times['cpu_ms']:8.1f}"
        )
    print(f"target for the online size: at most {TARGET_MS:g} ms a token")


if __name__ == "__main__":
    main()
