"""Fit, bootstrap and thresholds on a million made-up tuples: seconds and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.analysis [--num-tokens 1000000] [--num-prompts 10000]

What is timed is what `hlm calibrate` and `hlm derive` run after decoding: the summary of a trace
(line, relation, every score with its bootstrap of 2,000 resamples by prompt, the learned ones
on at most 200,000 tokens), and the thresholds of every rule at four risk budgets, once on the drawn
drafts and once averaged over 33 candidates each.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from calibrate.fit.estimators import NUM_RESAMPLES, compare_scores
from calibrate.fit.line import fit_line, relation
from calibrate.fit.thresholds import derive_thresholds
from calibrate.run.records import CalibrationRecord, DeriveRequest
from calibrate.run.traces import Trace
from hlmtheory.guarantees import conformal_threshold, learn_then_test_threshold
from hlmtheory.risk import SkipAtoms
from hlmtheory.scores import ExactUncertainty
from hlmtheory.steps import Axes

CERTIFIED = (conformal_threshold, learn_then_test_threshold)
RISKS = (0.005, 0.01, 0.02, 0.05)


def made_up_trace(num_tokens: int, num_prompts: int, seed: int = 0) -> Trace:
    """Tokens whose rejection rises with uncertainty and differs among prompts, as real ones do."""
    rng = np.random.default_rng(seed)
    index = np.sort(rng.integers(num_prompts, size=num_tokens))
    u = np.clip(rng.beta(0.5, 0.9, num_tokens) + 0.05 * rng.normal(size=num_prompts)[index], 0, 1)
    rejects = rng.uniform(size=num_tokens) < 0.1 + 0.7 * u
    beta = np.where(rejects, np.clip(u * rng.uniform(0.3, 1.3, num_tokens), 0, 1), 0.0)
    size = np.where(u < 1 / 1.3, 0.8 * u, 1.3 - 0.5 / np.maximum(u, 0.1) - 0.045 * u)
    draft_prob = np.clip(1 - u, 0.01, 1)
    columns = {
        "uncertainty": u,
        "uncertainty_sampled": rng.binomial(20, u) / 20,
        "entropy": 3 * u + rng.uniform(size=num_tokens),
        "step": np.arange(num_tokens) - np.searchsorted(index, index),
        "max_logit": 20 - 5 * u + rng.normal(size=num_tokens),
        "max_prob": np.clip(1 - 0.8 * u - 0.1 * rng.uniform(size=num_tokens), 0, 1),
        "margin": np.clip(1 - u - 0.2 * rng.uniform(size=num_tokens), 0, 1),
        "rejection_prob": beta,
        "tv_distance": (0.1 + 0.7 * u) * size,  # the mean of beta at this u
        "draft_prob": draft_prob,
        "draft_rank": rng.integers(32, size=num_tokens),
        "target_prob": draft_prob * (1 - beta),
        "prompt_index": index,
    }
    return Trace(columns, [f"p{i}" for i in range(num_prompts)], Axes(1000))


def made_up_atoms(trace: Trace, num_candidates: int = 33, seed: int = 0) -> SkipAtoms:
    """Each token's draft cut in candidates of random mass, score and rejection around its own."""
    rng = np.random.default_rng(seed)
    shape = (trace.num_tokens, num_candidates)
    mass = rng.exponential(size=shape)
    mass /= mass.sum(axis=1, keepdims=True)
    score = np.clip(trace["uncertainty"][:, None] + 0.2 * rng.normal(size=shape), 0, 1)
    rejection = mass * trace["rejection_prob"][:, None]
    return SkipAtoms.of_candidates(score, mass, rejection, trace.prompt_index, trace.num_prompts)


def main() -> None:
    """Time each stage once, in one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=1_000_000)
    parser.add_argument("--num-prompts", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    trace = made_up_trace(options.num_tokens, options.num_prompts)
    beta, index, num = trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        out = run()
        seconds[name] = time.perf_counter() - begin
        return out

    u = trace["uncertainty"]
    can_reject = trace["target_prob"] < trace["draft_prob"]
    line = timed("fit", lambda: fit_line(u, beta, can_reject, index, num))
    timed("relation", lambda: relation(u, beta, index, num, line))
    estimators, _ = timed("estimators", lambda: compare_scores(trace))
    request = DeriveRequest(policies=(), risks=RISKS)
    # Of a calibration, thresholds read the fit alone.
    calibration = CalibrationRecord.model_construct(fit=line)
    for name, make in (
        ("drafts", lambda: SkipAtoms.of_drafts(u, beta, index, num)),
        ("candidates", lambda: made_up_atoms(trace)),
    ):
        atoms = timed(f"{name}: pieces", make)
        thresholds = timed(
            f"{name}: thresholds",
            partial(
                derive_thresholds, atoms, ExactUncertainty(), trace, calibration, request,
                lambda alpha, atoms=atoms: [rule(atoms, alpha) for rule in CERTIFIED],
            ),
        )  # fmt: skip
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    total = sum(seconds.values())
    if options.json:
        print(json.dumps({"options": vars(options), "seconds": seconds, "total_s": total,
                          "peak_gib": peak_gib}, indent=1))  # fmt: skip
        return
    print(
        f"{trace.num_tokens:,} tokens of {num:,} prompts, {len(estimators)} scores, "
        f"{len(thresholds)} thresholds, "
        f"{NUM_RESAMPLES} resamples"
    )
    for name, value in seconds.items():
        print(f"  {name:36s} {value:6.2f} s")
    print(f"  {'in all':36s} {total:6.2f} s, peak {peak_gib:.2f} GiB")


if __name__ == "__main__":
    main()
