"""Calibrate, derive, validate and draw at temperature 0 and under top-p; degenerate pairs too."""

from __future__ import annotations

import numpy as np
import pytest
import toy_pair

from calibrate.derive.derivation import derive_run
from calibrate.fit.calibration import calibrate, prepare
from calibrate.pairs.registry import load_pair, resolve_pair
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import read_record, write_record
from calibrate.run.prompts import prompt_sizes
from calibrate.run.records import DeriveRequest, GivenModels, RunRecord
from calibrate.run.traces import read_trace, shard_paths, shards_in
from calibrate.validate.attenuation import prepare_attenuation, write_attenuation
from calibrate.validate.validation import compare_reruns, decode_missing, prepare_validation
from hlmtheory.sampled_law import Sampling
from paper_figs.draw import draw_run
from paper_figs.report.report import write_report

POLICIES = (
    "slm", "llm", "hlm", "u-hlm", "r-hlm", "coupled", "cu-hlm-offline", "cu-hlm-online",
)  # fmt: skip


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(top_p=0.9)], ids=str)
def test_all_four_verbs_under(toy, tmp_path, sampling):
    run = tmp_path / "run"
    pair = toy_pair.load(toy)
    request = toy_pair.request(toy, run, sampling=sampling)
    summary = calibrate(request, prepare(request), pair)
    trace = read_trace(shard_paths(run))
    assert trace.axes.sampling == summary.settings.sampling == sampling
    assert ((trace["draft_prob"] > 0) & np.isfinite(trace["rejection_prob"])).all()
    assert (trace["rejection_prob"][trace["target_prob"] == 0] == 1).all()
    assert ((trace["head_prob"] > 0) & (trace["head_target_prob"] == 0)).any()
    derivation = derive_run(run, DeriveRequest(policies=POLICIES, risks=(0.15,)))
    points = {point.key: point for point in derivation.operating_points}
    gated = points["u-hlm/risk-0.15"].predicted
    assert gated["tv_bias"].value == pytest.approx(gated["rejection_risk"].value)
    assert 0 < gated["rejection_risk"].value <= 0.15
    plan = prepare_validation(run, rules=("risk-0.15",), limit=10)
    decode_missing(plan, pair)
    record = compare_reruns(plan, prompt_sizes(plan.prompts, pair.tokenizer))
    cells = [cell for cell in record.cells if cell.metric == "tv_bias"]
    assert len(cells) == len(POLICIES)
    assert all(cell.measured.value is not None for cell in cells)
    reruns = {key: read_trace(shards_in(path)) for key, path in plan.paths.items()}
    for key, rerun in reruns.items():
        skipped = rerun["skipped"].astype(bool)
        if key.startswith(("hlm", "u-hlm")):
            np.testing.assert_allclose(
                rerun["policy_entries"], np.where(skipped, 0, rerun["support_size"])
            )
    if sampling.temperature == 0:
        assert set(np.unique(trace["rejection_prob"])) == {0.0, 1.0}
        assert (trace["entropy"] == 0).all()
        assert summary.fit.slope.value > 0
        texts = {key: rerun["output_token"].tolist() for key, rerun in reruns.items()}
        assert texts["hlm/none"] == texts["llm/none"] != texts["slm/none"]
        same = {
            tuple(texts[f"{name}/risk-0.15"])
            for name in ("u-hlm", "r-hlm", "coupled", "cu-hlm-offline", "cu-hlm-online")
        }
        assert len(same) == 1
    assert len(list(draw_run(run, run / "figures"))) > 5
    assert str(sampling) in write_report(run).read_text()


def test_resume_under_another_filter_is_refused(toy, tmp_path):
    run = tmp_path / "half"
    request = toy_pair.request(toy, run, sampling=Sampling(top_p=0.9), trace="minimal")
    pair = toy_pair.load(toy)
    calibrate(request, prepare(request), pair)
    write_record(run, read_record(run, RunRecord).model_copy(update={"complete": False}))
    for changed, name in (
        (Sampling(top_p=0.8), "top_p"),
        (Sampling(top_p=0.9, top_k=3), "top_k"),
        (Sampling(0.5, top_p=0.9), "temperature"),
        (Sampling(top_p=0.9, repetition_penalty=1.2), "repetition_penalty"),
    ):
        again = toy_pair.request(toy, run, sampling=changed, trace="minimal", resume=True)
        with pytest.raises(UsageError, match=rf"^--resume: {name} was [^\n]* now [^\n]*$"):
            prepare(again)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(top_p=0.9)], ids=str)
def test_a_pair_that_never_disagrees_is_a_named_result(toy, tmp_path, sampling):
    """One model twice: no rejection, no line, no correlation; everything may be skipped."""
    run = tmp_path / "same"
    spec = resolve_pair(None, str(toy / "server"), str(toy / "server"), None)
    pair = load_pair(spec, dtype="float32", device="cpu", attention=True)
    given = GivenModels(slm=str(toy / "server"), llm=str(toy / "server"))
    request = toy_pair.request(toy, run, sampling=sampling, spec=spec, given=given)
    fit = calibrate(request, prepare(request), pair).fit
    assert (fit.slope.value, fit.intercept.value, fit.mean_rejection.value) == (0, 0, 0)
    assert fit.correlation.value is None
    for score in ("uncertainty", "uncertainty_sampled", "entropy", "learned"):
        asked = DeriveRequest(policies=("u-hlm", "r-hlm"), risks=(0.01,), score=score)
        points = derive_run(run, asked, name=score).operating_points
        reasons = {point.rule: point.reason for point in points if point.policy == "u-hlm"}
        assert reasons["risk-averse"].startswith("slope 0 is not positive")
        assert reasons["risk-0.01"] == "budget is met even when every token is skipped"
    with pytest.raises(UserError, match=r"^every draft has rejection probability 0: there is no"):
        write_attenuation(prepare_attenuation(run, 4, 4), pair)
