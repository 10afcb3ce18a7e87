"""Scores side by side: figures against their definitions, intervals, the learned model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.analysis import made_up_trace
from calibrate.fit import estimators
from calibrate.fit.estimators import LEARNED_FEATURES, compare_score, compare_scores
from calibrate.run.traces import Trace
from hlmtheory.risk import SkipAtoms, skip_rate_at_risk, skip_risk_sums
from hlmtheory.scores import PLAIN_SCORES, score_named

FEW = 60


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "NUM_RESAMPLES", 200)


def drafts(trace: Trace, name: str) -> SkipAtoms:
    score = score_named(name).of_draft(trace.step())
    return SkipAtoms.of_drafts(
        score, trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )


def test_figures_are_their_definitions() -> None:
    """Few distinct scores, so that bins lose nothing."""
    trace = made_up_trace(2_000, FEW)
    score, beta = trace["uncertainty_sampled"], trace["rejection_prob"]
    found = compare_score("name", "label", drafts(trace, "uncertainty_sampled"))
    assert found.correlation.value == pytest.approx(np.corrcoef(score, beta)[0, 1], abs=1e-10)
    # Every token is a rejected one with weight beta and an accepted one with weight 1 - beta.
    truth = np.repeat([1, 0], len(beta))
    weights = np.concatenate([beta, 1 - beta])
    area = roc_auc_score(truth, np.tile(score, 2), sample_weight=weights)
    assert found.auroc.value == pytest.approx(area, abs=1e-10)
    for level, rate in found.skip_rate_at_risk.items():
        fits = [t for t in np.unique(score) if (beta * (score <= t)).mean() <= float(level)]
        assert rate.value == pytest.approx((score <= max(fits)).mean() if fits else 0.0)
    assert found.skip_rate[0] == found.risk[0] == 0
    assert found.skip_rate[-1] == pytest.approx(1)
    assert found.risk[-1] == pytest.approx(beta.mean())
    assert (found.name, found.label) == ("name", "label")


def test_curve_is_thinned_and_exact_where_it_stands() -> None:
    trace = made_up_trace(3_000, FEW)
    atoms = drafts(trace, "entropy")
    found = compare_score("entropy", "entropy", atoms)
    assert len(found.risk) == len(found.skip_rate) <= 200
    whole = skip_risk_sums(atoms, np.unique(atoms.score)).curve()
    for rate, risk in zip(found.skip_rate[1:], found.risk[1:], strict=True):
        place = int(np.argmin(np.abs(whole[0] - rate)))
        assert (whole[0][place], whole[1][place]) == pytest.approx((rate, risk), abs=1e-12)
    at = skip_rate_at_risk(np.array(found.skip_rate), np.array(found.risk), 0.02)
    assert at == pytest.approx(found.skip_rate_at_risk["0.02"].value)


def test_pieces_of_a_draft_count_as_the_draft() -> None:
    trace = made_up_trace(1_000, FEW)
    whole = drafts(trace, "uncertainty")
    u, beta = trace["uncertainty"][:, None], trace["rejection_prob"][:, None]
    share = np.tile([0.25, 0.75], (1_000, 1))
    cut = SkipAtoms.of_candidates(
        np.tile(u, (1, 2)), share, share * beta, trace.prompt_index, trace.num_prompts
    )
    one, other = (compare_score("u", "u", atoms) for atoms in (whole, cut))
    for name in ("correlation", "auroc"):
        for part in ("value", "low", "high"):
            assert getattr(getattr(one, name), part) == pytest.approx(
                getattr(getattr(other, name), part), abs=1e-9
            )


def test_intervals_are_of_prompts(rng) -> None:
    """Copies of every token make no interval shorter."""
    trace = made_up_trace(1_000, FEW)
    once = compare_score("u", "u", drafts(trace, "uncertainty"))
    columns = {name: np.repeat(values, 5, axis=0) for name, values in trace.columns.items()}
    copies = Trace(columns, trace.prompt_ids, trace.axes)
    again = compare_score("u", "u", drafts(copies, "uncertainty"))
    width = once.auroc.high - once.auroc.low
    assert again.auroc.high - again.auroc.low == pytest.approx(width, rel=1e-6)
    assert once.auroc.low < once.auroc.value < once.auroc.high


def test_differences_are_paired_by_resampled_prompts() -> None:
    """Of the exact uncertainty from itself nothing; of a near copy, less than of either alone."""
    trace = made_up_trace(2_000, FEW)
    found = {entry.name: entry for entry in compare_scores(trace)[0]}
    for level, rate in found["uncertainty"].skip_rate_at_risk.items():
        own = found["uncertainty"].less_uncertainty[level]
        assert (own.value, own.low, own.high) == (0, 0, 0)
        other = found["entropy"]
        less = other.less_uncertainty[level]
        difference = other.skip_rate_at_risk[level].value - rate.value
        assert less.value == pytest.approx(difference, abs=1e-12)
    rng = np.random.default_rng(5)
    near = trace["uncertainty"] + 0.01 * rng.normal(size=trace.num_tokens)
    exact = estimators._skip_rates(drafts(trace, "uncertainty"))
    atoms = SkipAtoms.of_drafts(
        near, trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )
    copy = compare_score("near", "near", atoms, 0.95, exact)
    alone, paired = copy.skip_rate_at_risk["0.05"], copy.less_uncertainty["0.05"]
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    assert paired.low <= 0 <= paired.high


def test_every_score_of_the_trace_is_compared_and_only_those() -> None:
    trace = made_up_trace(1_500, FEW)
    found, model = compare_scores(trace)
    names = [score.name for score in PLAIN_SCORES] + ["learned", "learned_boosting"]
    assert [entry.name for entry in found] == names
    assert all(entry.label for entry in found)
    assert all(entry.correlation.value > 0.2 for entry in found)
    assert model is not None
    del trace.columns["max_logit"], trace.columns["margin"]
    found, model = compare_scores(trace)
    assert [entry.name for entry in found] == [
        "uncertainty", "uncertainty_sampled", "entropy", "one_minus_max_prob"
    ]  # fmt: skip
    assert model is None


def test_learned_model_is_the_score_that_it_names() -> None:
    """What is stored, read back as a score, ranks as a fit to all tokens does."""
    trace = made_up_trace(2_000, FEW)
    found, model = compare_scores(trace)
    assert model is not None
    assert model.features == LEARNED_FEATURES
    columns = trace.columns | {"draft_rank": np.zeros(trace.num_tokens, dtype=int)}
    step = Trace(columns, trace.prompt_ids, trace.axes).step()
    score = score_named("learned", model.model_dump()).of_draft(step)
    learned = next(entry for entry in found if entry.name == "learned")
    in_sample = np.corrcoef(score, trace["rejection_prob"])[0, 1]
    # Cross-fitting six coefficients on 2,000 tokens costs little, and never gains.
    assert in_sample - 0.03 < learned.correlation.value < in_sample + 0.005


def test_learned_model_needs_prompts_and_is_thinned_beyond_a_limit(monkeypatch) -> None:
    found, model = compare_scores(made_up_trace(300, 9))
    assert model is None
    assert not any(entry.name.startswith("learned") for entry in found)
    trace = made_up_trace(1_500, FEW)
    monkeypatch.setattr(estimators, "LEARNED_MAX_TOKENS", 800)
    thinned = compare_scores(trace)[1]
    kept = trace.prompt_index % 2 == 0
    assert thinned is not None
    assert thinned.mean[0] == pytest.approx(trace["uncertainty"][kept].mean())
    monkeypatch.setattr(estimators, "LEARNED_MAX_TOKENS", 100)
    assert compare_scores(trace)[1] is None


def test_constant_score_is_a_result() -> None:
    flat = SkipAtoms.of_drafts(np.full(40, 0.5), np.linspace(0, 1, 40), np.arange(40) % 8, 8)
    found = compare_score("flat", "flat", flat)
    assert found.correlation.value is None
    assert found.auroc.value == pytest.approx(0.5)
    assert found.skip_rate_at_risk["0.01"].value == 0


def test_importing_stays_light() -> None:
    code = (
        "import sys, calibrate.fit.summary, calibrate.fit.thresholds; "
        "print(sorted({'torch', 'sklearn', 'statsmodels', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
