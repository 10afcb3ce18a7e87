"""A crowd of devices on one server: all are served, and about alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy_pair

from calibrate.derive.derivation import derive_run
from calibrate.fit.calibration import calibrate, prepare
from calibrate.run.records import DeriveRequest

ROOT = Path(__file__).parents[3]
POINTS = ("llm/none", "hlm/none", "u-hlm/risk-0.05", "coupled/risk-0.05")


@pytest.mark.long
def test_every_device_of_a_crowd_is_served(toy: Path, tmp_path: Path) -> None:
    request = toy_pair.request(toy, tmp_path / "run")
    calibrate(request, prepare(request), toy_pair.load(toy))
    names = tuple(point.partition("/")[0] for point in POINTS)
    derive_run(tmp_path / "run", DeriveRequest(policies=names, risks=(0.05,)))
    words = [word for point in POINTS for word in ("--point", point)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", str(tmp_path / "run"), "--users", "1,8,64",
         "--seconds", "3", "--json", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loads = json.loads(done.stdout)
    assert {(one["point"], one["num_users"]) for one in loads} == {
        (point, num) for point in POINTS for num in (1, 8, 64)
    }
    for one in loads:
        assert one["fairness"] > 0.8
        assert one["tokens_per_s"] * 3 > one["num_users"]  # a token each, at the very least
        assert 0 < one["busy_share"] < 1.2
        assert one["wait_ms"] > 0
        assert one["predicted_tokens_per_s"] > 0
