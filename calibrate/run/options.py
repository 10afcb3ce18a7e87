"""Values that options may have: each refusal one line with the option, its value and the range."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from calibrate.run.errors import UsageError


def at_least(name: str, value: float, least: float, way_out: str = "") -> None:
    """Refuse a smaller value, and NaN."""
    if not value >= least:
        tail = f"; {way_out}" if way_out else ""
        raise UsageError(f"{name} {value:g}: allowed is {least:g} or more{tail}")


def inside(name: str, values: Sequence[float] | None, low: float, high: float) -> None:
    """Refuse values at the bounds or beyond them."""
    for value in values or ():
        if not low < value < high:
            hint = ""
            if high == 1 < value < 100:
                hint = f"; it is a share: give {value / 100:g} for {value:g} %"
            raise UsageError(f"{name} {value:g}: allowed is above {low:g} and below {high:g}{hint}")


def one_of(name: str, value: str, *allowed: str) -> Any:
    """The value, if it is one of those allowed."""
    if value not in allowed:
        raise UsageError(f"{name} {value}: allowed are {', '.join(allowed)}")
    return value


def check_decoding(
    limit: int = 1,
    max_new_tokens: int = 1,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_threads: int | None = None,
) -> None:
    """Refuse what no decoding can run with."""
    at_least("--limit", limit, 1, "leave it out for the default")
    at_least("--max-new-tokens", max_new_tokens, 1)
    if batch_size is not None:
        at_least("--batch-size", batch_size, 1, "leave it out for the largest that fits")
    if num_threads is not None:
        at_least("--num-threads", num_threads, 1)
    if seed is not None:
        at_least("--seed", seed, 0)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: allowed are auto, cpu, mps, cuda and cuda:N")
    one_of("--dtype", dtype, "auto", "bfloat16", "float32")
