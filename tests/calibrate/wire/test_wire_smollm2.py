"""Real models over a wire give the tokens of one process, where rounding does not part them."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_pair

from calibrate.derive.derivation import derive_run
from calibrate.fit.calibration import calibrate, prepare
from calibrate.pairs.loading import load_model
from calibrate.pairs.registry import load_pair, resolve_pair
from calibrate.run.records import DeriveRequest, GivenModels
from calibrate.validate.wire import prepare_wire, run_wire

POINTS = ("llm/none", "u-hlm/risk-0.05", "r-hlm/risk-0.05", "coupled/risk-0.05")


@pytest.mark.model
@pytest.mark.long
def test_float32_gives_the_tokens_of_one_process(toy: Path, tmp_path: Path) -> None:
    spec = resolve_pair("smollm2", None, None, None)
    request = toy_pair.request(
        toy, tmp_path / "run", spec=spec, given=GivenModels(), prompts_source=None, limit=16,
        max_new_tokens=8, pilot=0,
    )  # fmt: skip
    calibrate(request, prepare(request), load_pair(spec, dtype="float32", attention=True))
    policies = tuple(dict.fromkeys(point.partition("/")[0] for point in POINTS))
    derive_run(tmp_path / "run", DeriveRequest(policies=policies, risks=(0.05,)))
    plan = prepare_wire(tmp_path / "run", "default", POINTS, ["fast"], limit=2)
    model = load_model(spec.slm, dtype="float32", device="cpu")
    record = run_wire(plan, model, lambda token: None, lambda text: None)
    (link,) = record.links
    assert {f"{run.policy}/{run.rule}" for run in link.runs} == set(POINTS)
    for run in link.runs:
        assert run.same_tokens_share == 1
        assert run.framing_as_stated
        assert run.num_tokens >= 2
