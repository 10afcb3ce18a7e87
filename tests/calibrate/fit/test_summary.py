"""calibration.json from a trace: complete, read back as it was written, attention by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.analysis import made_up_trace
from calibrate.fit import estimators
from calibrate.fit.summary import refuse_disagreement, summarise
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record, write_record
from calibrate.run.records import (
    CalibrationRecord,
    Figure,
    GivenModels,
    ModelIdentity,
    PairIdentity,
    Provenance,
    RunRecord,
    RunSettings,
    Timings,
)
from calibrate.run.traces import Trace


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "NUM_RESAMPLES", 200)


def run_record(trace: Trace) -> RunRecord:
    model = ModelIdentity(label="toy", sha256=None, drop_layers=(), num_parameters=10, num_layers=1)
    settings = RunSettings(
        pair="toy", given=GivenModels(), prompts="shipped", order="random", limit=30,
        max_new_tokens=8, batch_size=None, temperature=1.0, seed=0, dtype="float32", device="cpu",
        trace="full",
    )  # fmt: skip
    time = Figure(value=1.0, low=0.9, high=1.1, unit="ms")
    return RunRecord(
        complete=True,
        pair=PairIdentity(
            name="toy", slm=model, llm=model, vocab_size=1000, dtype="float32", device="cpu"
        ),
        settings=settings,
        prompt_ids=tuple(trace.prompt_ids),
        prompt_keys=(),
        provenance=Provenance(versions={}, revision=None, command=()),
        timings=Timings(t_slm_ms=time, t_llm_ms=time, t_uncertainty_ms=time),
        num_threads=1,
        num_prompts=trace.num_prompts,
        num_tokens=trace.num_tokens,
        wall_s=1.0,
        forward_s=0.5,
    )


def attended(trace: Trace, rng: np.random.Generator) -> Trace:
    """With attention columns; the first step of each prompt attends one position and the sink."""
    num_attended = trace["step"] + 2
    columns = trace.columns | {
        "num_attended": num_attended,
        "attention_entropy": rng.uniform(size=trace.num_tokens)
        * np.log(np.maximum(num_attended - 1, 1)),
        "attention_sink": rng.uniform(size=trace.num_tokens),
        "context_attention": rng.uniform(size=trace.num_tokens),
    }
    return Trace(columns, trace.prompt_ids, trace.axes)


def test_summary_is_written_and_read_back(rng, tmp_path: Path) -> None:
    trace = attended(made_up_trace(600, 30), rng)
    info = run_record(trace)
    found = summarise(trace, info)
    write_record(tmp_path, found)
    assert read_record(tmp_path, CalibrationRecord) == found
    assert (found.pair, found.settings, found.timings) == (info.pair, info.settings, info.timings)
    assert found.learned is not None
    assert len(found.estimators) == 8


def test_attention_by_step_is_the_mean_of_each_step(rng) -> None:
    trace = attended(made_up_trace(600, 30), rng)
    found = summarise(trace, run_record(trace)).attention
    assert found is not None
    assert found.sink.value == pytest.approx(trace["attention_sink"].mean())
    assert found.entropy.unit == "nat"
    steps = trace["step"]
    assert found.sink_by_step.grid == tuple(range(steps.max() + 1))
    for step, value in zip(found.sink_by_step.grid, found.sink_by_step.value, strict=True):
        assert value == pytest.approx(trace["attention_sink"][steps == step].mean())
    curve = found.normalised_entropy_by_step
    assert curve.grid[0] == 1, "one position has no normalised entropy"
    share = trace["attention_entropy"] / np.log(np.maximum(trace["num_attended"] - 1, 2))
    assert curve.value[4] == pytest.approx(share[steps == 5].mean())
    assert curve.low[4] < curve.value[4] < curve.high[4]


def test_minimal_traces_and_few_prompts_leave_parts_out(rng) -> None:
    trace = made_up_trace(200, 8)
    for name in ("entropy", "margin", "max_logit"):
        del trace.columns[name]
    found = summarise(trace, run_record(trace))
    assert found.attention is None
    assert found.learned is None
    assert [entry.name for entry in found.estimators] == [
        "uncertainty", "uncertainty_sampled", "one_minus_max_prob"
    ]  # fmt: skip


def test_drafts_that_are_not_the_laws_are_refused() -> None:
    trace = made_up_trace(6000, 30)
    refuse_disagreement(trace)
    beta = np.minimum(trace["rejection_prob"] + 0.05, 1)
    wrong = Trace(trace.columns | {"rejection_prob": beta}, trace.prompt_ids, trace.axes)
    said = r"mean rejection probability 0\.\d+, mean total variation 0\.\d+ of 6000 tokens: equal"
    with pytest.raises(UserError, match=said):
        refuse_disagreement(wrong)
