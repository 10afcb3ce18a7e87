"""Token times that were measured beside other work say so."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_models import TableModel

from calibrate.decode.timing import _waited_s, measure_timings
from calibrate.run.records import Figure, Timings
from calibrate.run.wording import busy_text
from hlmtheory.uncertainty import temperatures


def spin(seconds: float) -> float:
    """Work for so long; returns the share of it that was spent waiting for a processor."""
    begin, before = time.perf_counter(), _waited_s()
    while time.perf_counter() - begin < seconds:
        pass
    return (_waited_s() - before) / (time.perf_counter() - begin)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone counts it")
def test_a_processor_that_others_use_is_noticed() -> None:
    """Two others on one processor leave a third of it."""
    before = os.sched_getaffinity(0)
    here = {min(before)}
    program = f"import os\nos.sched_setaffinity(0, {here})\nprint(flush=True)\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for other in others:
            other.stdout.readline()
        os.sched_setaffinity(0, here)
        assert spin(0.5) > 0.3
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()
            other.stdout.close()


def timings(low: float, high: float, waited: float | None) -> Timings:
    time_ms = Figure(value=37.0, low=low, high=high, unit="ms")
    steady = Figure(value=1.0, low=0.98, high=1.02, unit="ms")
    return Timings(t_slm_ms=time_ms, t_llm_ms=steady, t_uncertainty_ms=steady, waited_share=waited)


def test_only_a_busy_machine_is_told() -> None:
    assert busy_text(timings(36, 38, 0.01)) == ""
    assert busy_text(timings(36, 38, None)) == ""
    assert "waited 60% of the time" in busy_text(timings(36, 38, 0.6))
    unsteady = busy_text(timings(30, 496, 0.0))
    assert "t_slm_ms is 37" in unsteady
    assert "t_llm_ms" not in unsteady
    assert "another profile" in unsteady
    assert "\n" not in unsteady


def test_the_measurement_says_how_long_it_waited(rng: np.random.Generator) -> None:
    model = TableModel(rng.normal(size=(1, 50)))
    found = measure_timings(model, model, (1, 2), temperatures(), num_steps=8)
    assert list(found.medians) == ["t_slm_ms", "t_llm_ms", "t_uncertainty_ms"]
    assert all(number.value > 0 for number in found.medians.values())
    assert found.waited_share is None or found.waited_share >= 0
