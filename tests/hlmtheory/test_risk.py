"""Rejection risk, its curve, its intervals and the learned score.

Sums of float64 over at most a few thousand terms of order 1: 1e-12 leaves a thousandfold margin.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hlmtheory.acceptance import total_variation
from hlmtheory.clusters import mean_over_tokens, resample_prompts, sum_by_prompt
from hlmtheory.learned_score import cross_fitted_score
from hlmtheory.risk import (
    cluster_bootstrap_ratio,
    linear_risk,
    rejection_risk,
    sequence_bias_bound,
    skip_rate_at_risk,
    skip_risk_curve,
    skip_risk_sums,
    threshold_grid,
)
from hlmtheory.verification import FullDistribution, output_bias, output_law

WORST = 1e-12
Trace = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def random_trace(seed: int, num_prompts: int = 30, most: int = 40) -> Trace:
    """(score, beta, prompt_index, num_prompts): difficulty differs by prompt, so do lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, size=num_prompts)
    index = np.repeat(np.arange(num_prompts), lengths)
    difficulty = rng.beta(1, 2, size=num_prompts)[index]
    score = np.round(rng.uniform(size=len(index)), 2)  # ties
    beta = np.clip(score * difficulty * rng.uniform(0, 2, size=len(index)), 0, 1)
    return score, beta, index, num_prompts


def random_pair(rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.dirichlet(np.full(vocab, 0.4), size=2)
    return x, y


def test_rejection_risk_is_the_output_bias():
    """(12) for deterministic and for randomised gates, V from 2 to 2,000."""
    rng = np.random.default_rng(0)
    for vocab in np.geomspace(2, 2_000, 60).round().astype(int):
        x, y = random_pair(rng, int(vocab))
        for sigma in (rng.uniform(size=vocab), (rng.uniform(size=vocab) < 0.4).astype(float)):
            bias = output_bias(FullDistribution(), x, y, sigma)
            assert rejection_risk(x, y, sigma) == pytest.approx(bias, abs=WORST)
            tensors = (torch.from_numpy(a) for a in (x, y, sigma))
            assert float(rejection_risk(*tensors)) == pytest.approx(bias, abs=WORST)


def test_rejection_risk_limits():
    x, y = random_pair(np.random.default_rng(1), 30)
    assert rejection_risk(x, y, np.zeros(30)) == 0
    assert rejection_risk(x, y, np.ones(30)) == pytest.approx(total_variation(x, y), abs=WORST)
    assert rejection_risk(x, x, np.ones(30)) == 0


def test_rejection_risk_monte_carlo():
    """Mean of sigma(d) beta_d over 200,000 drafts, within four standard errors."""
    rng = np.random.default_rng(2)
    x, y = random_pair(rng, 20)
    sigma = rng.uniform(size=20)
    values = (sigma * np.maximum(0, 1 - y / x))[rng.choice(20, size=200_000, p=x)]
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - rejection_risk(x, y, sigma)) < 4 * error


@pytest.mark.parametrize("weighting", ["tokens", "prompts"])
def test_curve_is_its_definition(weighting):
    score, beta, index, num_prompts = random_trace(3)
    grid = np.array([-0.1, 0.0, 0.255, 0.5, 0.5, 1.0])
    curve = skip_risk_curve(score, beta, index, num_prompts, grid, weighting)
    for g, threshold in enumerate(grid):
        skipped = (score <= threshold).astype(float)
        for values, found in ((skipped, curve.skip_rate), (skipped * beta, curve.risk)):
            if weighting == "tokens":
                expected = values.mean()
            else:
                expected = np.mean([values[index == i].mean() for i in range(num_prompts)])
            assert found[g] == pytest.approx(expected, abs=WORST)
    assert (curve.num_tokens, curve.num_prompts) == (len(score), num_prompts)


def test_the_two_weightings():
    """One long easy prompt, one short hard one: 0.1 of tokens against 0.5 of prompts."""
    index = np.repeat([0, 1], [9, 1])
    beta = (index == 1).astype(float)
    one = np.ones(1)
    arguments = (np.zeros(10), beta, index, 2, one)
    assert skip_risk_curve(*arguments).risk[0] == pytest.approx(0.1)
    assert skip_risk_curve(*arguments, weighting="prompts").risk[0] == pytest.approx(0.5)
    # Equal lengths: one and the same. A prompt without tokens counts for neither.
    score, beta = np.random.default_rng(4).uniform(size=(2, 60))
    index = np.repeat(np.arange(6), 10)
    by_tokens = skip_risk_curve(score, beta, index, 7)
    by_prompts = skip_risk_curve(score, beta, index, 7, weighting="prompts")
    np.testing.assert_allclose(by_tokens.risk, by_prompts.risk, atol=WORST)
    np.testing.assert_allclose(by_tokens.skip_rate, by_prompts.skip_rate, atol=WORST)
    assert by_tokens.num_prompts == 6


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["tokens", "prompts"]))
def test_curve_rises_and_ends_at_the_mean(seed, weighting):
    score, beta, index, num_prompts = random_trace(seed, 8, 12)
    curve = skip_risk_curve(score, beta, index, num_prompts, weighting=weighting)
    assert np.all(np.diff(curve.risk) >= -WORST)
    assert np.all(np.diff(curve.skip_rate) > 0)
    assert curve.skip_rate[-1] == pytest.approx(1, abs=WORST)
    assert skip_rate_at_risk(curve, 1.0) == pytest.approx(1, abs=WORST)


def test_default_grid_holds_every_choice():
    """The scores that occur are all the thresholds there are, thinned only past `most`."""
    score, beta, index, num_prompts = random_trace(5)
    curve = skip_risk_curve(score, beta, index, num_prompts)
    fine = skip_risk_curve(score, beta, index, num_prompts, np.linspace(0, 1, 5001))
    for alpha in (0.005, 0.01, 0.02, 0.05):
        assert skip_rate_at_risk(curve, alpha) == pytest.approx(skip_rate_at_risk(fine, alpha))
    thinned = threshold_grid(np.random.default_rng(6).uniform(size=5_000), most=100)
    assert 90 <= len(thinned) <= 100


def test_skip_rate_at_risk_counts_nothing_where_nothing_fits():
    curve = skip_risk_curve(np.zeros(4), np.full(4, 0.5), np.arange(4), 4)
    assert skip_rate_at_risk(curve, 0.1) == 0
    assert skip_rate_at_risk(curve, 0.5) == 1


def test_conditional_mean_is_the_best_score():
    """(15): no other score skips more at the same risk; the reverse score is the worst."""
    rng = np.random.default_rng(7)
    kinds = rng.integers(12, size=6_000)  # what the device knows
    mean = rng.uniform(size=12)
    beta = mean[kinds]
    index = np.arange(6_000) % 40
    best = skip_risk_curve(mean[kinds], beta, index, 40)
    for order in itertools.chain(
        [np.argsort(mean)[::-1]], (rng.permutation(12) for _ in range(40))
    ):
        rank = np.empty(12)
        rank[order] = np.arange(12)
        other = skip_risk_curve(rank[kinds], beta, index, 40)
        # At every point of the other curve the best one, joined by lines, skips at least as much.
        reachable = np.interp(other.risk, np.append(0, best.risk), np.append(0, best.skip_rate))
        assert np.all(reachable >= other.skip_rate - WORST)


def test_linear_risk_is_its_definition_and_bound():
    uncertainty = np.random.default_rng(8).beta(0.5, 1, size=500)
    grid = np.array([0.0, 0.05, 0.0732, 0.3, 0.8, 1.0])
    found = linear_risk(uncertainty, 0.82, -0.06, grid)
    for g, threshold in enumerate(grid):
        line = np.maximum(0, 0.82 * uncertainty - 0.06) * (uncertainty <= threshold)
        assert found.risk[g] == pytest.approx(line.mean(), abs=WORST)
        share = np.mean(uncertainty <= threshold)
        assert found.bound[g] == pytest.approx(max(0, 0.82 * threshold - 0.06) * share, abs=WORST)
    assert np.all(found.bound >= found.risk)
    # u_th = -b/a: the line claims no risk.
    assert linear_risk(uncertainty, 0.82, -0.06, np.array([0.06 / 0.82])).risk[0] < WORST


def test_linear_risk_closed_form():
    """u uniform on a fine grid, a = 1, b = 0: R(u) = u^2/2 up to the grid's 1/N."""
    uncertainty = (np.arange(10_000) + 0.5) / 10_000
    grid = np.array([0.2, 0.5, 1.0])
    np.testing.assert_allclose(
        linear_risk(uncertainty, 1.0, 0.0, grid).risk, grid**2 / 2, atol=1e-4
    )


def test_sequence_bound_holds_exactly():
    """(14) by enumeration: V = 3, T = 3, contexts are prefixes, every answer's probability."""
    rng = np.random.default_rng(9)
    for _ in range(20):
        laws: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]] = {}
        for length in range(3):
            for prefix in itertools.product(range(3), repeat=length):
                x, y = random_pair(rng, 3)
                sigma = (rng.uniform(size=3) < 0.5).astype(float)
                risk = float(rejection_risk(x, y, sigma))
                laws[prefix] = (output_law(FullDistribution(), x, y, sigma), y, risk)
        distance = expected = 0.0
        for answer in itertools.product(range(3), repeat=3):
            ours = theirs = 1.0
            for t in range(3):
                law, y, _ = laws[answer[:t]]
                ours, theirs = ours * law[answer[t]], theirs * y[answer[t]]
            distance += abs(ours - theirs) / 2
            expected += ours * sum(laws[answer[:t]][2] for t in range(3))
        assert distance <= expected + WORST


def test_sequence_bound_sums_by_prompt():
    found = sequence_bias_bound(np.array([0.1, 0.2, 0.9, 0.4]), np.array([0, 0, 2, 2]), 3)
    np.testing.assert_allclose(found, [0.3, 0, 1.3])


def test_bootstrap_is_its_definition():
    """The matrix product against resampling prompts in a loop with the very same draws."""
    score, beta, index, num_prompts = random_trace(10)
    sums = skip_risk_sums(score, beta, index, num_prompts, np.array([0.2, 0.6]))
    found = cluster_bootstrap_ratio(
        sums.rejected, sums.num_tokens, 300, np.random.default_rng(11), 0.9
    )
    counts = resample_prompts(num_prompts, 300, np.random.default_rng(11))
    ratios = np.array([(w @ sums.rejected) / (w @ sums.num_tokens) for w in counts.astype(float)])
    np.testing.assert_allclose(found.low, np.quantile(ratios, 0.05, axis=0), atol=WORST)
    np.testing.assert_allclose(found.high, np.quantile(ratios, 0.95, axis=0), atol=WORST)
    np.testing.assert_allclose(
        found.value, sums.rejected.sum(axis=0) / sums.num_tokens.sum(), atol=WORST
    )


def test_bootstrap_agrees_with_linearisation():
    """2,000 prompts: both are asymptotic, and differ by the bootstrap's own noise and 1/n."""
    _, beta, index, num_prompts = random_trace(12, 2_000)
    sums = sum_by_prompt(beta, index, num_prompts)
    lengths = sum_by_prompt(np.ones(len(beta)), index, num_prompts)
    found = cluster_bootstrap_ratio(sums, lengths, 4_000, np.random.default_rng(13))
    estimate = mean_over_tokens(beta, index, num_prompts)
    low, high = estimate.interval()
    width = high - low
    assert found.value[0] == pytest.approx(estimate.value)
    # A 2.5 % quantile of 4,000 normal draws has a standard error of 0.042 sigma = 0.011 widths.
    assert found.low[0] == pytest.approx(low, abs=0.05 * width)
    assert found.high[0] == pytest.approx(high, abs=0.05 * width)


def test_bootstrap_by_prompt_covers_and_by_token_does_not():
    """500 data sets of 40 prompts with a shared difficulty; the truth is 0.5."""
    rng = np.random.default_rng(14)
    by_prompt = by_token = 0
    for _ in range(500):
        difficulty = rng.uniform(size=40)
        beta = (rng.uniform(size=(40, 15)) < difficulty[:, None]).astype(float)
        found = cluster_bootstrap_ratio(beta.sum(axis=1), np.full(40, 15.0), 200, rng)
        by_prompt += int(found.low[0] <= 0.5 <= found.high[0])
        error = beta.std() / np.sqrt(beta.size)
        by_token += int(abs(beta.mean() - 0.5) <= 1.96 * error)
    # Percentile intervals of 40 prompts are a little short: 92 % is what they promise here.
    assert by_prompt >= stats.binom.ppf(1e-4, 500, 0.92)
    assert by_token <= stats.binom.ppf(1 - 1e-4, 500, 0.75)


def test_bootstrap_leaves_out_empty_ratios():
    tops, bottoms = np.array([1.0, 2.0, 0.0]), np.array([2.0, 4.0, 0.0])
    found = cluster_bootstrap_ratio(
        np.stack([tops, 0 * tops], axis=1),
        np.stack([bottoms, 0 * bottoms], axis=1),
        50,
        np.random.default_rng(15),
    )
    np.testing.assert_array_equal(found.value, [0.5, np.nan])
    np.testing.assert_array_equal(found.low, [0.5, np.nan])


@pytest.mark.parametrize("model", ["boosting", "logistic"])
def test_learned_score_learns_the_conditional_mean(model):
    """E[beta | f] = f_0 here; the other feature is noise."""
    rng = np.random.default_rng(16)
    index = np.repeat(np.arange(60), 50)
    features = rng.uniform(size=(3_000, 2))
    mean = 1 / (1 + np.exp(-4 * (features[:, 0] - 0.5)))
    beta = np.clip(mean + 0.2 * rng.standard_normal(3_000), 0, 1)
    score = cross_fitted_score(features, beta, index, model, seed=3)
    assert np.corrcoef(score, mean)[0, 1] > 0.95
    assert 0 <= score.min() <= score.max() <= 1
    again = cross_fitted_score(features, beta, index, model, seed=3)
    np.testing.assert_array_equal(score, again)


@pytest.mark.parametrize("model", ["boosting", "logistic"])
def test_learned_score_does_not_know_its_own_prompt(model):
    """beta is a constant of the prompt, and a feature names the prompt: nothing can be learned.

    A score fitted on the same prompts would correlate almost perfectly (the trees) with beta.
    """
    rng = np.random.default_rng(17)
    index = np.repeat(np.arange(100), 30)
    beta = rng.uniform(size=100)[index]
    features = np.stack([index / 100, rng.uniform(size=3_000)], axis=1)
    score = cross_fitted_score(features, beta, index, model)
    by_prompt = np.array([score[index == i].mean() for i in range(100)])
    correlation = np.corrcoef(by_prompt, beta[::30])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(100)


def test_learned_score_of_certain_acceptance():
    index = np.repeat(np.arange(4), 5)
    features = np.random.default_rng(18).uniform(size=(20, 2))
    for model in ("boosting", "logistic"):
        np.testing.assert_allclose(
            cross_fitted_score(features, np.zeros(20), index, model, num_folds=2), 0, atol=WORST
        )


def test_importing_stays_light():
    code = (
        "import sys, hlmtheory.learned_score, hlmtheory.guarantees; "
        "print(sorted({'torch', 'sklearn', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


HALF, TWO = np.full(2, 0.5), np.arange(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection_risk(HALF, HALF, 3 * HALF), r"skip_probability = 1.5: allowed is \[0"),
        (lambda: rejection_risk(HALF, HALF, np.ones(3)), "skip_probability has"),
        (lambda: rejection_risk(HALF, HALF * np.nan, HALF), "y holds NaN"),
        (lambda: skip_risk_curve(HALF, HALF + 1, TWO, 2), "rejection_prob = 1.5"),
        (lambda: skip_risk_curve(HALF * np.nan, HALF, TWO, 2), "score holds NaN"),
        (lambda: skip_risk_curve(HALF, HALF, TWO, 1), "prompt_index spans 0..1: allowed is 0"),
        (lambda: skip_risk_curve(HALF, HALF[:1], TWO, 2), "give one entry a token"),
        (lambda: skip_risk_curve(HALF, HALF, TWO, 2, np.array([1.0, 0])), "thresholds fall"),
        (lambda: skip_risk_curve(HALF, HALF, TWO, 2, None, "words"), "weighting = 'words'"),
        (lambda: threshold_grid(np.zeros(0)), "score is empty"),
        (lambda: linear_risk(HALF, -1.0, 0.0, HALF), "slope = -1.0: allowed is >= 0"),
        (lambda: cluster_bootstrap_ratio(HALF[:1], HALF[:1], 9, np.random.default_rng()), "two"),
        (lambda: cluster_bootstrap_ratio(HALF, HALF, 0, np.random.default_rng()), "num_resamples"),
        (lambda: cluster_bootstrap_ratio(HALF, -HALF, 9, np.random.default_rng()), "denominators"),
        (lambda: cross_fitted_score(HALF[:, None], HALF, TWO, num_folds=3), "num_folds = 3"),
        (lambda: cross_fitted_score(HALF, HALF, TWO, num_folds=2), "give .N, F."),
        (lambda: cross_fitted_score(HALF[:, None], HALF, TWO, "svm", 2), "model = 'svm'"),
    ],
)
def test_refusals_name_argument_value_and_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
