"""Commands on the toy pair, and what a run that they made holds against an undisturbed one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from fault_table import Fault

from calibrate.run.traces import Shard, read_trace, shards_in

NUM_PROMPTS, NUM_TOKENS = 16, 4  # as few as a pilot takes
POLICIES = ("hlm", "u-hlm", "r-hlm", "slm")
OF_POLICIES = tuple(word for name in POLICIES for word in ("--policy", name))


def calibration(toy: Path, run: Path, *more: str) -> tuple[str, ...]:
    return (
        "calibrate", "--slm", str(toy / "device"), "--llm", str(toy / "server"), "--prompts",
        str(toy / "prompts.txt"), "--limit", str(NUM_PROMPTS), "--max-new-tokens", str(NUM_TOKENS),
        "--batch-size", "4", "--pilot", str(NUM_PROMPTS), "--dtype", "float32", "--device", "cpu",
        "--output-path", str(run), *more,
    )  # fmt: skip


def derivation(run: Path) -> tuple[str, ...]:
    return ("derive", str(run), "--risk", "0.05", *OF_POLICIES)


def validation(run: Path) -> tuple[str, ...]:
    return (
        "validate", str(run), "--rule", "risk-0.05", "--limit", "8", "--batch-size", "4",
    )  # fmt: skip


def tokens_of(run: Path) -> Counter[tuple[str, str, int, int]]:
    """How often each token is there, by folder, prompt and step."""
    found: Counter[tuple[str, str, int, int]] = Counter()
    for path in run.rglob("*.parquet"):
        rows = Shard(path).read(["prompt_id", "step", "output_token"]).to_pylist()
        found.update((path.parent.name, *row.values()) for row in rows)
    return found


def hold(row: Fault, run: Path, right: Path) -> None:
    """Count what a run lacks, has twice, or has otherwise than the undisturbed one."""
    found, wanted = tokens_of(run), tokens_of(right)
    row.lost += (wanted - found).total()
    row.doubled += sum(times - 1 for times in found.values())
    same = not found.keys() - wanted.keys() and all(
        columns_agree(run / folder, right / folder)
        for folder in sorted({path.parent.relative_to(right) for path in right.rglob("*.parquet")})
    )
    row.harmless += same
    row.silent += not same


def columns_agree(folder: Path, right: Path) -> bool:
    """Whether two traces have the same columns; batches of other sizes round otherwise."""
    one, other = read_trace(shards_in(folder)), read_trace(shards_in(right))
    return one.prompt_ids == other.prompt_ids and all(
        np.allclose(values, other[name], rtol=1e-4, atol=1e-6, equal_nan=True)
        if values.dtype.kind == "f"
        else np.array_equal(values, other[name])
        for name, values in one.columns.items()
    )
