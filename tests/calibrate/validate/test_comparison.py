"""Predictions against reruns: strata, pooled errors, the law of a count, the shift of contexts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from calibrate.derive.roads import Roads
from calibrate.run.figure import figure
from calibrate.run.records import Cell, Figure, OperatingPoint
from calibrate.run.traces import Trace
from calibrate.validate.comparison import (
    NUM_REPEATS,
    Comparison,
    _is_said,
    common_strata,
    coverage,
    difference_error,
    prediction_interval,
    repeats,
    stratum_numbers,
)
from calibrate.validate.context_shift import (
    Shift,
    context_shift,
    pooled_shift,
)
from hlmtheory.clusters import ErrorTerms, error_terms, mean_over_tokens, prediction_error
from hlmtheory.policies import Policy, policy_class, policy_from_settings
from hlmtheory.steps import Axes


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def test_one_stratum_is_the_plain_standard_error(rng):
    prompt_index = np.repeat(np.arange(9), rng.integers(1, 6, 9))
    estimate = mean_over_tokens(rng.normal(size=len(prompt_index)), prompt_index, 9)
    for strata in (None, np.full(9, 3)):
        error = error_terms(estimate.influence, strata)
        assert error.standard_error == pytest.approx(estimate.standard_error, rel=1e-12)
        assert (error.num_prompts, error.freedom) == (9, 8)


def test_stratified_error_is_that_of_a_mean_of_stratum_means(rng):
    """Equal shares, one token a prompt: se^2 = sum of (1/C)^2 s_c^2 / n_c."""
    values = rng.normal(size=24) + np.repeat([0.0, 5.0, -3.0], 8)
    strata = np.repeat(np.arange(3), 8)
    error = error_terms(mean_over_tokens(values, np.arange(24), 24).influence, strata)
    by_stratum = [values[strata == c].var(ddof=1) / 8 / 9 for c in range(3)]
    assert error.standard_error == pytest.approx(sum(by_stratum) ** 0.5, rel=1e-12)
    assert error.freedom == 21


def test_a_stratum_of_one_prompt_counts_in_full():
    influence = np.array([0.3, 0.1, -0.1, np.nan, -0.3])
    error = error_terms(influence, np.array([0, 1, 1, 1, 2]))
    assert error.terms == pytest.approx([0.3, 2**0.5 * 0.1, -(2**0.5) * 0.1, 0.0, -0.3])
    assert (error.num_prompts, error.freedom) == (4, 1)


def test_numbering_of_strata_does_not_matter(rng):
    influence, strata = rng.normal(size=30), rng.integers(0, 4, 30)
    renamed = np.array([7, 2, 11, 5])[strata]
    same = error_terms(influence, renamed)
    assert same.terms == pytest.approx(error_terms(influence, strata).terms, abs=1e-15)


def spread(values: np.ndarray) -> tuple[float, int]:
    """s and degrees of freedom of values, one a prompt."""
    return float(values.std(ddof=1)), len(values) - 1


def errors(*sides: np.ndarray) -> ErrorTerms:
    """prediction_error of means of (averaged, drawn, rerun), one token a prompt."""
    estimates = (mean_over_tokens(side, np.arange(len(side)), len(side)) for side in sides)
    return prediction_error(*(error_terms(one.influence) for one in estimates))


def test_prediction_error_adds_the_prediction_and_the_drawn_rerun(rng):
    """One token a prompt: se^2 = s_a^2 / n + s^2 / m, s pooled over the drawn and the rerun."""
    averaged, drawn, rerun = rng.normal(size=30), 3 * rng.normal(size=30), 3 * rng.normal(size=18)
    error = errors(averaged, drawn, rerun)
    (s_a, nu), (s_d, _), (s_m, nu_m) = (spread(side) for side in (averaged, drawn, rerun))
    first = s_a**2 / 30
    second = (nu * s_d**2 + nu_m * s_m**2) / (nu + nu_m) / 18
    assert error.standard_error == pytest.approx((first + second) ** 0.5, rel=1e-12)
    welch = (first + second) ** 2 / (first**2 / nu + second**2 / (nu + nu_m))
    assert error.freedom == min(int(welch), nu + nu_m)
    assert len(error.terms) == 30 + 30 + 18


def test_equal_spreads_give_the_two_sample_t_test(rng):
    """The same values on both sides, averaged and drawn alike: pooling changes nothing."""
    values = rng.normal(size=24)
    error = errors(values, values, values)
    test = stats.ttest_ind(values + 1.0, values)
    assert 1.0 / error.standard_error == pytest.approx(test.statistic, rel=1e-12)
    assert error.freedom == test.df == 46


def test_a_rare_event_missing_in_the_rerun_keeps_its_spread(rng):
    drawn = np.zeros(40)
    drawn[3] = 1.0
    averaged = np.full(40, 1 / 40) + 1e-3 * rng.normal(size=40)
    error = errors(averaged, drawn, np.zeros(20))
    s, nu = spread(drawn)
    assert error.standard_error**2 >= nu * s**2 / (nu + 19) / 20


def test_no_freedom_is_refused_in_one_line():
    single, more = error_terms(np.array([0.0])), error_terms(np.array([0.1, -0.1]))
    with pytest.raises(ValueError, match="no degree of freedom in the prediction: give more"):
        prediction_error(single, single, more)
    assert difference_error(np.zeros(1), np.zeros(1), np.array([0.1, -0.1]), None) is None


def toy_chain(rng: np.random.Generator, num_prompts: int, num_steps: int = 12) -> np.ndarray:
    """Probability (P, T) that the draft is skipped, along chains of two kinds of context.

    Kinds follow one another with probability 0.8; prompts differ in how likely a draft is skipped
    in the first kind. The mean of the second kind is 0.25, of both 0.4875: the truth.
    """
    base = rng.uniform(0.6, 0.85, size=num_prompts)
    kind = rng.uniform(size=num_prompts) < 0.5
    out = np.empty((num_prompts, num_steps))
    for step in range(num_steps):
        out[:, step] = np.where(kind, base, 0.25)
        kind = np.where(rng.uniform(size=num_prompts) < 0.8, kind, ~kind)
    return out


def test_prediction_intervals_cover_and_averaged_spreads_cover_too_little(rng):
    """A rerun draws its drafts; a prediction is averaged over them. 95 % of reruns fall inside.

    Negative control: an interval whose rerun has the spread of averaged figures too.
    """
    num_runs, held = 2_000, {"drawn": 0, "averaged": 0}
    for _ in range(num_runs):
        p, q = toy_chain(rng, 40), toy_chain(rng, 16)
        drawn, rerun = (rng.uniform(size=law.shape) < law for law in (p, q))
        averaged, sampled, measured, smooth = (
            mean_over_tokens(a.ravel().astype(float), np.repeat(np.arange(len(a)), 12), len(a))
            for a in (p, drawn, rerun, q)
        )
        for name, sides in (
            ("drawn", (averaged, sampled, measured)),
            ("averaged", (averaged, averaged, smooth)),
        ):
            error = prediction_error(*(error_terms(side.influence) for side in sides))
            low, high = prediction_interval(averaged.value, error, 0.95)
            held[name] += low <= measured.value <= high
    # Nearly normal sums of 12 steps: within a percentage point, and binomial bounds at 1 in 1,000.
    assert stats.binom.ppf(1e-3, num_runs, 0.94) <= held["drawn"]
    assert held["drawn"] <= stats.binom.ppf(1 - 1e-3, num_runs, 0.96)
    assert held["averaged"] < 0.9 * num_runs


def stratified_draw(rng: np.random.Generator, per_stratum: int) -> tuple[np.ndarray, np.ndarray]:
    """Four categories a standard deviation apart, `per_stratum` prompts of each, one token each."""
    strata = np.repeat(np.arange(4), per_stratum)
    return rng.normal(size=len(strata)) + 1.5 * strata, strata


def test_stratified_intervals_cover_and_plain_ones_cover_too_much(rng):
    """Two sets of one mix: the interval of (36) by strata holds 95 %, the plain one far more."""
    num_runs, held = 4_000, {"strata": 0, "plain": 0}
    for _ in range(num_runs):
        (first, of_first), (second, of_second) = stratified_draw(rng, 10), stratified_draw(rng, 4)
        sides = [mean_over_tokens(x, np.arange(len(x)), len(x)) for x in (first, second)]
        for name, strata in (("strata", (of_first, of_second)), ("plain", (None, None))):
            first, second = (
                error_terms(side.influence, c) for side, c in zip(sides, strata, strict=True)
            )
            error = prediction_error(first, first, second)
            low, high = prediction_interval(sides[0].value, error, 0.95)
            held[name] += low <= sides[1].value <= high
    # Normal values and equal shares; Satterthwaite's degrees of freedom are good to half a point.
    assert stats.binom.ppf(1e-3, num_runs, 0.945) <= held["strata"]
    assert held["strata"] <= stats.binom.ppf(1 - 1e-3, num_runs, 0.955)
    assert held["plain"] > 0.995 * num_runs


def test_strata_need_the_same_share_of_every_category():
    strata = common_strata(["b", "a", "a", "b"], ["a", "b"])
    assert strata is not None
    assert strata.calibration.tolist() == [1, 0, 0, 1]
    assert strata.rerun.tolist() == [0, 1]
    assert common_strata(["a", "a", "b", "b"], ["a", "a", "b"]) is None
    assert common_strata(["a", "a", "b", "b"], ["a", "c"]) is None
    assert common_strata(["a", "a", "b", "b"], []) is None
    assert common_strata([], ["a", "a"]) is None
    assert common_strata([], []) is None
    assert common_strata(["a", "b"], ["b", "a"]) is None  # nothing left to judge a spread by
    assert stratum_numbers(["x", "x"]).tolist() == [0, 0]


def comparison(terms: np.ndarray, off: float) -> Comparison:
    """A cell whose measured value is `off` standard errors from its prediction."""
    error = ErrorTerms(terms, len(terms), len(terms) - 2)
    low, high = prediction_interval(0.5, error, 0.95)
    measured = 0.5 + off * error.standard_error
    cell = Cell(
        policy="u-hlm",
        rule="r",
        metric="skip_rate",
        source="counted",
        predicted=figure(0.5, low, high),
        measured=figure(measured),
        covered=low <= measured <= high,
        fixed=False,
    )
    return Comparison(cell, error, high - 0.5, cell.covered)


def normal_share(freedom: int) -> float:
    """P(|z| <= t quantile), a little over 95 %."""
    return float(2 * stats.norm.cdf(stats.t.ppf(0.975, freedom)) - 1)


def test_count_of_one_figure_said_forty_times(rng):
    """All cells hold or none does: every quantity is that of a single cell."""
    terms = rng.normal(size=60)
    result = repeats([comparison(terms, 1.0)] * 40, 0.95)
    expected = normal_share(58)
    error = 4 * (expected * (1 - expected) / NUM_REPEATS) ** 0.5
    assert result.share.value == pytest.approx(expected, abs=error)
    assert (result.share.low, result.share.high) == (0.0, 1.0)
    assert result.probability_of_at_least == pytest.approx(expected, abs=error)
    assert result.probability_of_at_most == 1.0
    assert result.widest_error == pytest.approx(1.0)
    wide = 2 * stats.norm.sf(1.0)
    assert result.probability_of_as_wide == pytest.approx(wide, abs=4 * 0.5 / NUM_REPEATS**0.5)


def test_count_of_independent_cells_is_binomial():
    """Each cell has a prompt of its own: 100 independent cells, of which 90 hold."""
    cells = [comparison(np.eye(100)[i], 3.0 if i < 10 else 0.5) for i in range(100)]
    result = repeats(cells, 0.95)
    expected = normal_share(98)
    assert result.share.value == pytest.approx(expected, abs=0.001)
    low, high = stats.binom.ppf([0.025, 0.975], 100, expected) / 100
    assert result.share.low == pytest.approx(low, abs=0.0101)
    assert result.share.high == pytest.approx(high, abs=0.0101)
    few = stats.binom.cdf(90, 100, expected)
    assert result.probability_of_at_most == pytest.approx(few, abs=4 * (few / NUM_REPEATS) ** 0.5)
    wide = 1 - (1 - 2 * stats.norm.sf(3.0)) ** 100
    assert result.probability_of_as_wide == pytest.approx(wide, abs=0.02)


def test_without_a_spread_there_is_no_count_to_expect():
    still = comparison(np.zeros(5), 0.0)
    assert repeats([still], 0.95) is None
    assert repeats([], 0.95) is None


def trace(uncertainty: np.ndarray, categories: tuple[str, ...] = ()) -> Trace:
    """One token a row and prompt of (P, steps) uncertainties, beta = u / 2."""
    num, steps = uncertainty.shape
    columns = {
        "uncertainty": uncertainty.ravel(),
        "rejection_prob": uncertainty.ravel() / 2,
        "step": np.tile(np.arange(steps), num),
        "prompt_index": np.repeat(np.arange(num), steps),
    }
    return Trace(columns, [f"p{i:02d}" for i in range(num)], Axes(100), categories)


def point(policy: str) -> OperatingPoint:
    return OperatingPoint(
        policy=policy, rule="risk-0.05", family="risk", variant="", score="uncertainty",
        budget=0.05, weighting="tokens", confidence=None, bound=None,
        uncertainty_threshold=Figure(value=0.5), feasible=True, reason="", settings={},
        predicted={},
    )  # fmt: skip


def shift_of(cal: Trace, own: Trace, *base: Trace, policy: str = "u-hlm"):
    ran = policy_from_settings(policy, {}, 0.5)
    found = context_shift(point(policy), ran, Roads(cal), own, base, 0.95)
    return None if found is None else found.record


def test_shift_of_contexts_is_the_paired_difference(rng):
    base = rng.uniform(size=(40, 6))
    own = np.clip(base + 0.1 * rng.normal(size=base.shape) + 0.05, 0, 1)
    shift = shift_of(trace(base), trace(own), trace(base))
    assert shift is not None
    by_prompt = own.mean(1) - base.mean(1)
    test = stats.ttest_1samp(by_prompt, 0.0).confidence_interval(0.95)
    assert shift.score.value == pytest.approx(by_prompt.mean(), abs=1e-12)
    assert (shift.score.low, shift.score.high) == pytest.approx((test.low, test.high))
    under = (own <= 0.5).mean() - (base <= 0.5).mean()
    assert shift.below_threshold.value == pytest.approx(under, abs=1e-12)
    risk = (own / 2 * (own <= 0.5)).mean() - (base / 2 * (base <= 0.5)).mean()
    assert shift.risk.value == pytest.approx(risk, abs=1e-12)


def test_the_same_outputs_shift_nothing(rng):
    same = trace(rng.uniform(size=(12, 4)), ("a", "b") * 6)
    shift = shift_of(same, same, same)
    assert shift is not None
    for found in (shift.below_threshold, shift.risk, shift.score):
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_what_categories_differ_in_is_no_error_of_a_shift(rng):
    """Every category shifts by its own amount, its prompts alike: the stratified error is 0."""
    base = rng.uniform(0.3, 0.4, size=(12, 5))
    moved = base + np.repeat([0.0, 0.2, 0.4], 4)[:, None]
    names = tuple(np.repeat(["a", "b", "c"], 4))
    with_names, without = trace(base, names), trace(base)
    strict = shift_of(with_names, trace(moved, names), with_names)
    loose = shift_of(without, trace(moved), without)
    assert strict.score.high - strict.score.low == pytest.approx(0, abs=1e-12)
    assert loose.score.high - loose.score.low > 0.1
    assert strict.score.value == loose.score.value == pytest.approx(0.2)


def test_the_reference_is_the_mean_of_all_that_follow_the_server(rng):
    """Against two references of the same prompts: paired with their mean, prompt by prompt."""
    first, second = (rng.uniform(size=(40, 8)) for _ in range(2))
    own = np.clip(first - 0.1, 0, 1)
    shift = shift_of(trace(first), trace(own), trace(first), trace(second))
    by_prompt = [(one <= 0.5).mean(1) for one in (own, first, second)]
    change = by_prompt[0] - (by_prompt[1] + by_prompt[2]) / 2
    test = stats.ttest_1samp(change, 0.0).confidence_interval(0.95)
    assert shift.below_threshold.value == pytest.approx(change.mean(), abs=1e-12)
    found = (shift.below_threshold.low, shift.below_threshold.high)
    assert found == pytest.approx((test.low, test.high))
    assert shift.num_references == 2
    # By quarters of the answer: two steps each.
    assert shift.by_step.grid == (0, 2, 4, 6)
    parts = [(one <= 0.5).reshape(40, 4, 2).mean((0, 2)) for one in (own, first, second)]
    expected = parts[0] - (parts[1] + parts[2]) / 2
    assert shift.by_step.value == pytest.approx(expected, abs=1e-12)


def shifts(cal: Trace, base: list[Trace], *owns: np.ndarray) -> list[Shift]:
    ran = policy_from_settings("u-hlm", {}, 0.5)
    found = [context_shift(point("u-hlm"), ran, Roads(cal), trace(own), base, 0.95) for own in owns]
    return [one for one in found if one is not None]


def test_one_test_of_all_reruns_takes_a_prompts_part_in_them_as_one_term(rng):
    """Ten reruns that say the same are one: no sharper than that one alone."""
    base = rng.uniform(size=(30, 4))
    moved, other, cal = np.clip(base - 0.05, 0, 1), rng.uniform(size=(30, 4)), trace(base)
    alone = pooled_shift(shifts(cal, [cal], moved), Roads(cal), cal, 0.95)
    ten = pooled_shift(shifts(cal, [cal], *[moved] * 10), Roads(cal), cal, 0.95)
    assert ten.below_threshold.value == pytest.approx(alone.below_threshold.value, abs=1e-12)
    assert ten.below_threshold.high == pytest.approx(alone.below_threshold.high, abs=1e-12)
    assert ten.p_value == pytest.approx(alone.p_value)
    change = [(one <= 0.5).mean(1) - (base <= 0.5).mean(1) for one in (moved, other)]
    both = pooled_shift(shifts(cal, [cal], moved, other), Roads(cal), cal, 0.95)
    expected = stats.ttest_1samp(np.mean(change, axis=0), 0.0)
    assert both.p_value == pytest.approx(expected.pvalue)
    assert both.below_threshold.value == pytest.approx(np.mean(change), abs=1e-12)
    assert pooled_shift([], Roads(cal), cal, 0.95) is None
    still = pooled_shift(shifts(cal, [cal], base), Roads(cal), cal, 0.95)
    assert (still.below_threshold.value, still.p_value) == (0.0, None)


def test_under_no_shift_the_pooled_test_rings_as_often_as_it_says(rng):
    """500 sets of three dependent reruns of one law: 5 % of the p-values below 0.05."""
    low = 0
    for _ in range(500):
        level = rng.uniform(-0.2, 0.2, size=(12, 1))
        draws = [np.clip(rng.uniform(size=(12, 5)) + level, 0, 1) for _ in range(5)]
        base = [trace(one) for one in draws[:2]]
        found = shifts(base[0], base, *draws[2:])
        low += pooled_shift(found, Roads(base[0]), base[0], 0.95).p_value < 0.05
    least, most = stats.binom.interval(0.9999, 500, 0.05)
    assert least <= low <= most


def test_a_figure_said_in_two_units_is_counted_once(rng):
    terms = rng.normal(size=20)
    said = [(0.2, ErrorTerms(terms, 20, 18))]
    assert _is_said(-6e3, ErrorTerms(-3e4 * terms, 20, 18), said)
    # Parallel errors about another miss: a wrong constant in one of them must not hide.
    assert not _is_said(-9e3, ErrorTerms(-3e4 * terms, 20, 18), said)
    assert not _is_said(0.2, ErrorTerms(terms + 0.01 * rng.normal(size=20), 20, 18), said)
    assert not _is_said(0.0, ErrorTerms(np.zeros(20), 20, 18), said)
    assert not _is_said(0.2, None, said)
    cells = [comparison(terms, 0.1), comparison(terms, 9.0)]
    implied = dataclasses.replace(
        cells[1], cell=cells[1].cell.model_copy(update={"source": "implied"})
    )
    assert (coverage(cells, 0.95).covered, coverage(cells, 0.95).total) == (1, 2)
    assert coverage([cells[0], implied], 0.95).total == 1


def test_shift_is_of_thresholds_and_of_the_same_prompts(rng):
    base = trace(rng.uniform(size=(5, 4)))
    assert shift_of(base, base, base, policy="slm") is None
    assert shift_of(base, base, base, policy="hlm") is None
    others = Trace(base.columns, [f"q{i}" for i in range(5)], base.axes)
    assert shift_of(base, base, others) is None
    assert shift_of(base, base) is None
    assert shift_of(base, base, others, base).num_references == 1


def test_a_reference_follows_the_server():
    def reference(name: str) -> bool:
        policy: type[Policy] = policy_class(name)
        return policy_from_settings(name, {}, 0.5 if policy.gated else None).follows_server

    names = ("slm", "llm", "hlm", "u-hlm", "r-hlm")
    assert [name for name in names if reference(name)] == ["llm", "hlm"]
