"""A crowd of devices on one server: all are served, and about alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
POINTS = ("coupled/risk-0.05",)


@pytest.mark.model
@pytest.mark.long
def test_every_device_of_a_crowd_is_served() -> None:
    words = [word for point in POINTS for word in ("--point", point)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", "data/results/smollm2", "--users", "1,16",
         "--seconds", "4", "--json", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loads = json.loads(done.stdout)
    assert {(one["point"], one["num_users"]) for one in loads} == {
        (point, num) for point in POINTS for num in (1, 16)
    }
    for one in loads:
        assert one["fairness"] > 0.8
        assert one["tokens_per_s"] * 4 > one["num_users"]  # a token each, at the very least
        assert 0 < one["busy_share"] < 1.2
        assert one["wait_ms"] > 0
        assert one["predicted_tokens_per_s"] > 0
