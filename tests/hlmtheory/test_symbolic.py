"""The symbolic derivations hold, and the array functions compute what they derive.

Symbolic results are evaluated exactly, at rational points, and rounded once; the array functions
add at most a dozen terms of size one, each with an error of 2.2e-16. A tolerance of 1e-12 is far
above that and far below any error of a formula.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import sympy as sp

from hlmtheory import symbolic
from hlmtheory.acceptance import (
    rejection_probability,
    residual_distribution,
    total_variation,
)
from hlmtheory.channel import ergodic_rayleigh_rate_bps
from hlmtheory.cost import (
    mean_throughput_at_skip_rate_tok_s,
    speedup_ceiling,
    throughput_at_skip_rate_tok_s,
)
from hlmtheory.coupling import joint_law
from hlmtheory.policies.r_hlm import ResidualVerification
from hlmtheory.reconcile import throughput_gain, uplink_ratio_for_gain
from hlmtheory.risk import rejection_risk
from hlmtheory.thresholds import linear_threshold
from hlmtheory.truncation import (
    online_bound_denominator,
    online_truncation_size,
    tail_deviation,
    truncated_distribution,
    truncation_bias,
    truncation_bias_bound,
    truncation_bound_soft,
)
from hlmtheory.uncertainty import attenuation, sampled_uncertainty_variance
from hlmtheory.verification import (
    FullDistribution,
    TruncatedDistribution,
    bias_lower_bound,
    output_bias,
    output_law,
)

EXACT = 1e-12
FULL, RESIDUAL = FullDistribution(), ResidualVerification()
SIZES = (2, 3)
PATTERNS = [(v, signs) for v in SIZES for signs in symbolic.sign_patterns(v)]
SKIP_PATTERNS = [(v, signs) for v in SIZES for signs in symbolic.skip_sign_patterns(v)]


def rational_law(rng: np.random.Generator, vocab: int) -> list[sp.Rational]:
    parts = [int(n) for n in rng.integers(1, 60, size=vocab)]
    return [sp.Rational(n, sum(parts)) for n in parts]


def rational_gate(rng: np.random.Generator, vocab: int, sharp: bool) -> list[sp.Rational]:
    most = 1 if sharp else 13
    return [sp.Rational(int(n), most) for n in rng.integers(0, most + 1, size=vocab)]


def floats(values: list[sp.Rational]) -> np.ndarray:
    return np.array([float(value) for value in values])


# --- the derivations -----------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "signs"), PATTERNS)
def test_rejection_is_total_variation_and_risk_is_bias(vocab, signs):
    """(3) and (12) cancel to zero in every sign pattern."""
    laws = symbolic.small_laws(vocab)
    assert symbolic.mean_rejection(laws, signs).holds()
    for identity in symbolic.risk_is_bias(laws, signs):
        assert identity.holds(), identity.name
    assert symbolic.Identity("law", sum(symbolic.accept_resample_law(laws, signs)), 1).holds()


@pytest.mark.parametrize(("vocab", "signs"), SKIP_PATTERNS)
def test_the_floor_bounds_every_scheme_and_residual_verification_attains_it(vocab, signs):
    """(13) for an arbitrary answer of the server, (24) for a fractional gate."""
    laws = symbolic.small_laws(vocab)
    assert symbolic.floor_is_a_bound(laws, signs).holds()
    for identity in symbolic.residual_attains_the_floor(laws, signs):
        assert identity.holds(), identity.name
    assert symbolic.Identity("law", sum(symbolic.residual_law(laws, signs)), 1).holds()


def test_closed_forms_hold():
    gap = symbolic.bound_gap()
    identities = (
        gap.reached,
        gap.slack,
        *symbolic.attenuated_covariances(2),
        symbolic.tail_level_step(),
        *symbolic.coupling_integrals(),
        symbolic.gated_truncation_mixture(),
        symbolic.ergodic_rayleigh_rate().derivative_check(),
        symbolic.throughput_ratio(),
        symbolic.speed_ceiling().slack,
    )
    for identity in identities:
        assert identity.holds(), identity.name


def test_negative_control_wrong_formulas_do_not_cancel():
    """The same check refuses what a slip of the pen would give."""
    laws = symbolic.small_laws(3)
    signs = (True, False, False)
    right = symbolic.risk_is_bias(laws, signs)[-1]
    assert right.holds()
    # The floor (13) in place of the risk (11): true for sharp gates only.
    floor = symbolic.bias_floor(laws, signs)
    assert not symbolic.Identity("floor for risk", right.left, floor).holds()
    sharp = dict.fromkeys(laws.sigma, sp.Integer(1))
    assert symbolic.Identity("sharp", right.left.subs(sharp), floor.subs(sharp)).holds()
    # Resampling a gated draft from max(y - x, 0) does not reach the floor.
    full = symbolic.accept_resample_law(laws, signs)
    assert not symbolic.Identity("law", full[0], symbolic.residual_law(laws, signs)[0]).holds()
    # A wrong factor in the variance of u_K.
    variance = symbolic.attenuated_covariances(2)[1]
    assert not symbolic.Identity("noise", variance.left, 2 * variance.right).holds()


@pytest.mark.parametrize("vocab", SIZES)
def test_coupled_draws_keep_both_laws(vocab):
    """(41a), (41b): the margins are x and y, and the draws are not independent."""
    laws = symbolic.small_laws(vocab)
    for identity in symbolic.coupling_keeps_both_laws(laws):
        assert identity.holds(), identity.name
    joint = symbolic.coupled_joint_law(laws)
    assert not symbolic.Identity("independent", joint[0, 1], laws.x[0] * laws.y[1]).holds()


@pytest.mark.parametrize("vocab", SIZES)
def test_joint_law_is_the_derived_one(rng, vocab):
    laws = symbolic.small_laws(vocab)
    derived = symbolic.coupled_joint_law(laws)
    for _ in range(10):
        x, y = rational_law(rng, vocab), rational_law(rng, vocab)
        pairs = sorted(zip(x, y, strict=True), key=lambda pair: pair[1] / pair[0])
        x, y = [p for p, _ in pairs], [q for _, q in pairs]
        exact = derived.subs(laws.values(x, y, [0] * vocab)).evalf(20)
        np.testing.assert_allclose(
            joint_law(floats(x), floats(y)), np.array(exact, dtype=float), atol=EXACT
        )


# --- symbolic against numeric --------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [True, False], ids=["sharp", "fractional"])
@pytest.mark.parametrize("vocab", SIZES)
def test_array_functions_compute_the_derived_laws(rng, vocab, sharp):
    """Output laws, risk, floor and distances at random rational points."""
    laws = symbolic.small_laws(vocab)
    gaps = []
    for _ in range(25):
        x, y = rational_law(rng, vocab), rational_law(rng, vocab)
        sigma = rational_gate(rng, vocab, sharp)
        if x == y:
            continue
        point = laws.values(x, y, sigma)
        fx, fy, fs = floats(x), floats(y), floats(sigma)
        signs = symbolic.pattern_of([p - q for p, q in zip(x, y, strict=True)])
        skip_signs = symbolic.pattern_of([g * p - q for g, p, q in zip(sigma, x, y, strict=True)])

        def value(expression, at=point):
            return float(expression.subs(at))

        mean = symbolic.mean_rejection(laws, signs)
        assert fx @ rejection_probability(fx, fy) == pytest.approx(value(mean.left), abs=EXACT)
        assert total_variation(fx, fy) == pytest.approx(value(mean.right), abs=EXACT)
        law = [value(p) for p in symbolic.accept_resample_law(laws, signs)]
        np.testing.assert_allclose(output_law(FULL, fx, fy, fs), law, rtol=0, atol=EXACT)
        rho = value(symbolic.rejection_risk(laws, signs))
        assert rejection_risk(fx, fy, fs) == pytest.approx(rho, abs=EXACT)
        assert output_bias(FULL, fx, fy, fs) == pytest.approx(rho, abs=EXACT)
        if any(g != 1 for g in sigma):  # skipping everything leaves the server nothing
            law = [value(p) for p in symbolic.residual_law(laws, skip_signs)]
            np.testing.assert_allclose(output_law(RESIDUAL, fx, fy, fs), law, rtol=0, atol=EXACT)
        floor = value(symbolic.bias_floor(laws, skip_signs))
        assert bias_lower_bound(fx, fy, fs) == pytest.approx(floor, abs=EXACT)
        assert output_bias(RESIDUAL, fx, fy, fs) == pytest.approx(floor, abs=EXACT)
        gaps.append(rho - floor)
    assert min(gaps) >= -EXACT
    # Accept/resample is optimal for sharp gates, and only for them.
    assert (max(gaps) < EXACT) == sharp


def test_the_gap_to_the_floor_is_the_smaller_of_two_terms(rng):
    gap = symbolic.bound_gap()
    for _ in range(50):
        y, more, sigma = (sp.Rational(int(n), 40) for n in rng.integers(1, 40, size=3))
        point = {gap.x: y + more, gap.y: y, gap.sigma: sigma}
        reached, slack = gap.reached.right.subs(point), gap.slack.right.subs(point)
        derived = reached if sigma * (y + more) > y else slack
        assert derived == min(reached, slack)


def test_attenuation_agrees_with_the_covariances(rng):
    """lambda_K, a_K and r_K from exact covariances of a population of two tokens, K = 2."""
    cross, second = symbolic.attenuated_covariances(2)
    w, beta_a, beta_b = 0.3, 0.15, 0.85
    p, q = rng.uniform(size=2), rng.uniform(size=2)
    names = ("w", "beta_a", "beta_b", "p1", "p2", "q1", "q2")
    arguments = [sp.Symbol(name, positive=True) for name in names]
    values = (w, beta_a, beta_b, *p, *q)
    covariance, variance = (
        float(sp.lambdify(arguments, identity.left, "numpy")(*values))
        for identity in (cross, second)
    )
    u = 1 - np.array([p.mean(), q.mean()])
    share = np.array([w, 1 - w])
    var_u = float(share @ (u - share @ u) ** 2)
    noise = float(share @ sampled_uncertainty_variance(np.stack([p, q])))
    beta = np.array([beta_a, beta_b])
    var_beta = float(share @ (beta - share @ beta) ** 2)
    exact_cov = float(share @ ((beta - share @ beta) * u))
    found = attenuation(var_u, noise, exact_cov / var_u, exact_cov / math.sqrt(var_u * var_beta))
    assert found.slope == pytest.approx(covariance / variance, abs=EXACT)
    assert found.correlation == pytest.approx(
        covariance / math.sqrt(variance * var_beta), abs=EXACT
    )


def test_threshold_and_its_delta_method(rng):
    line = symbolic.linear_threshold()
    known = [line.slope, line.intercept, line.level]
    for _ in range(20):
        a, level = float(rng.uniform(0.2, 2)), float(rng.uniform(0.01, 0.99))
        b = float(rng.uniform(-0.3, 0.0))
        root = rng.normal(size=(2, 2)) / 10
        covariance = root @ root.T
        u_th = sp.lambdify(known, line.value)(a, b, level)
        assert linear_threshold("any", level, a, b).value == pytest.approx(u_th, rel=EXACT)
        # Derivatives by central differences of the numeric threshold: relative error of order h^2.
        point, h = np.array([a, b, level]), 1e-4

        def threshold(p):
            return linear_threshold("any", p[2], p[0], p[1], -np.inf, np.inf).value

        gradient = [
            (threshold(point + h * e) - threshold(point - h * e)) / (2 * h) for e in np.eye(3)
        ]
        derived = [
            sp.lambdify(known, d)(*point) for d in (line.d_slope, line.d_intercept, line.d_level)
        ]
        np.testing.assert_allclose(gradient, derived, rtol=1e-5)
        all_symbols = [*known, line.variance_slope, line.variance_intercept, line.covariance]
        variance = sp.lambdify(all_symbols, line.variance)(
            *point, covariance[0, 0], covariance[1, 1], covariance[0, 1]
        )
        expected = derived[:2] @ covariance @ derived[:2]
        # The expanded variance cancels terms of size u^2 V/a^2 against one another: relative 1e-9.
        assert expected == pytest.approx(variance, rel=1e-9)


def test_published_thresholds_are_exact_ratios():
    value = symbolic.linear_threshold()
    for a, b, expected in (("0.82", "-0.06", 3 / 41), ("0.815", "-0.066", 66 / 815)):
        point = {value.slope: sp.Rational(a), value.intercept: sp.Rational(b), value.level: 0}
        assert float(value.value.subs(point)) == pytest.approx(expected, abs=EXACT)


def test_soft_bound_lies_above_the_sharper_one_by_a_factor_in_its_range(rng):
    factor = symbolic.soft_bound_ratio()
    for eta in (0.3, 0.5, 1.0, 4.0):
        least, most = (float(e.subs(factor.eta, eta)) for e in (factor.least, factor.most))
        ratio = sp.lambdify([factor.draft_prob, factor.rejection_prob], factor.ratio.subs(
            factor.eta, eta
        ))  # fmt: skip
        draft, rejection = rng.uniform(size=(2, 200))
        draft[0], rejection[0] = 1, 0
        draft[1] = 0
        deviation = rng.uniform(0.1, 2, size=200)
        found = truncation_bound_soft(deviation, draft, rejection, eta) / truncation_bias_bound(
            deviation
        )
        np.testing.assert_allclose(found, ratio(draft, rejection), rtol=EXACT)
        assert found.min() == pytest.approx(least, rel=EXACT)
        assert found.max() == pytest.approx(most, rel=EXACT)
        # (19) is a bound only while its factor is at least one, from eta = ln(2)/2 on.
        assert (least >= 1) == (eta >= math.log(2) / 2)
    assert float(factor.least.subs(factor.eta, 1)) == pytest.approx(2.8854, abs=5e-5)


def test_tail_deviation_never_rises_and_both_halves_agree(rng):
    """N(k)/2 by the terms below the tail level, exactly, beside the array function."""
    for _ in range(20):
        vocab = int(rng.integers(2, 9))
        parts = sorted((int(n) for n in rng.integers(1, 60, size=vocab)), reverse=True)
        x = [Fraction(n, sum(parts)) for n in parts]
        halves = []
        for k in range(1, vocab):
            level = (1 - sum(x[:k])) / (vocab - k)
            below = sum(max(level - p, 0) for p in x[k:])
            assert below == sum(max(p - level, 0) for p in x[k:])
            halves.append(below)
        assert halves == sorted(halves, reverse=True)
        expected = [2 * float(half) for half in halves] + [0.0]
        np.testing.assert_allclose(
            tail_deviation(np.array([float(p) for p in x])), expected, atol=EXACT
        )


def test_ergodic_rate_and_the_divergence_under_block_fading():
    rate = symbolic.ergodic_rayleigh_rate()
    for snr_db in (-10.0, 0.0, 20.0):
        snr = 10 ** (snr_db / 10)
        derived = float(rate.rate.subs(rate.snr, snr).evalf(30))
        assert ergodic_rayleigh_rate_bps(1.0, snr_db=snr_db) == pytest.approx(derived, rel=EXACT)
        # The primitive vanishes at infinity: at g = 60 it is below 1e-24.
        assert abs(float(rate.primitive.subs({rate.snr: snr, rate.gain: 60}).evalf())) < 1e-24
    block = symbolic.rayleigh_block_time()
    assert block.limit() == sp.oo
    assert sp.simplify(block.growth() - sp.log(2) / block.snr) == 0
    assert block.tightness() == 1


def test_speed_ceilings_and_the_two_throughputs(rng):
    speed = symbolic.speed_ceiling()
    limit = 1 / ((1 - speed.skip_rate) * speed.payload_ratio)
    assert sp.simplify(speed.limit() - limit) == 0
    assert sp.simplify(
        speed.mean_throughput_slope() - speed.skip_rate / (speed.slm + speed.uncertainty)
    ) == 0  # fmt: skip
    for skip, payload, published in (("0.4593", "1", 1.85), ("0.748", "0.026", 152.6)):
        ceiling = float(speed.at(sp.Rational(skip), sp.Rational(payload)))
        assert ceiling == pytest.approx(speedup_ceiling(float(skip), float(payload)), rel=EXACT)
        assert ceiling == pytest.approx(published, abs=0.05)
    arguments = [
        speed.skip_rate, speed.payload_ratio, speed.slm, speed.uplink, speed.llm, speed.uncertainty,
    ]  # fmt: skip
    gain, other = (sp.lambdify(arguments, e) for e in (speed.gain, speed.mean_throughput_gain))
    for _ in range(20):
        p, c, up, llm, extra = rng.uniform(0.05, 0.95, size=5) * (1, 1, 50, 3, 1)
        assert throughput_gain(p, up, llm, c, "ratio-of-means", extra) == pytest.approx(
            gain(p, c, 1.0, up, llm, extra), rel=EXACT
        )
        assert throughput_gain(p, up, llm, c, "mean-of-throughputs", extra) == pytest.approx(
            other(p, c, 1.0, up, llm, extra), rel=EXACT
        )
        assert gain(p, c, 1.0, up, llm, extra) <= speedup_ceiling(p, c)
    # Published: 2.54 lies above the one and is met by the other, at 1.54/0.4593 device times.
    assert speedup_ceiling(0.4593) < 2.54
    assert uplink_ratio_for_gain(2.54, 0.4593, averaging="mean-of-throughputs") == pytest.approx(
        1.54 / 0.4593, rel=EXACT
    )
    two = symbolic.throughput_ratio().right
    p, skipped, sent = 0.6, 20.0, 130.0
    ratio = mean_throughput_at_skip_rate_tok_s(p, skipped, sent) / throughput_at_skip_rate_tok_s(
        p, skipped, sent
    )
    point = dict(zip(("p", "t_0", "t_1"), (p, skipped, sent), strict=True))
    values = {symbol: point[symbol.name] for symbol in two.free_symbols}
    assert ratio == pytest.approx(float(two.subs(values)), rel=EXACT)


# --- truncation under a gate ---------------------------------------------------------------------


def kernel(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Accept/resample against the truncation, from drafts (rows) to outputs (columns)."""
    reference = truncated_distribution(x, size)
    rejection = rejection_probability(reference, y)
    return np.diag(1 - rejection) + np.outer(rejection, residual_distribution(reference, y))


def test_gate_and_truncation_cost_at_most_their_sum(rng):
    """rho_min <= TV <= rho + tau <= rho + N(k)/2, for sharp and fractional gates."""
    rule = TruncatedDistribution()
    nearest = -1.0
    for index in range(250):
        vocab = int(rng.integers(2, 12))
        x, y = rng.dirichlet(np.full(vocab, (0.3, 1.0)[index % 2]), size=2)
        size = int(rng.integers(1, vocab + 1))
        sigma = (
            rng.uniform(size=vocab) if index % 3 else (rng.uniform(size=vocab) < 0.4).astype(float)
        )
        bias = float(output_bias(rule, x, y, sigma, size))
        rho, tau = float(rejection_risk(x, y, sigma)), float(truncation_bias(x, y, size))
        assert bias >= float(bias_lower_bound(x, y, sigma)) - EXACT
        assert bias <= rho + tau + EXACT
        assert tau <= truncation_bias_bound(tail_deviation(x)[size - 1]) + EXACT
        # The part counted twice is what is skipped and would have been rejected.
        overlap = sigma @ (x * rejection_probability(truncated_distribution(x, size), y))
        assert abs(bias - tau) <= overlap + EXACT
        if min(rho, tau) > 0.01:
            nearest = max(nearest, bias - rho - tau)
        mixed = sigma * x + ((1 - sigma) * x) @ kernel(x, y, size)
        np.testing.assert_allclose(output_law(rule, x, y, sigma, size), mixed, atol=EXACT)
    assert nearest > -1e-3  # no smaller sum would do: some case meets it


def test_rounding_what_residual_verification_sends_costs_its_error_at_most(rng):
    """(24) with w in place of sigma x: at most the larger one-sided sum of the error more."""
    costs = []
    for index in range(400):
        vocab = int(rng.integers(2, 9))
        x, y = rng.dirichlet(np.ones(vocab), size=2)
        skipped = x * (rng.uniform(size=vocab) < 0.5)
        told = np.round(skipped * 8) / 8 if index % 2 else skipped * rng.uniform(0, 1, size=vocab)
        missing = np.maximum(y - told, 0)
        if missing.sum() == 0:
            continue
        law = skipped + (1 - skipped.sum()) * missing / missing.sum()
        cost = float(np.maximum(law - y, 0).sum() - np.maximum(skipped - y, 0).sum())
        error = skipped - told
        assert cost <= max(np.maximum(error, 0).sum(), np.maximum(-error, 0).sum()) + EXACT
        costs.append(cost)
    assert max(costs) > 0.01


def online_biases(x: np.ndarray, y: np.ndarray, theta: float) -> tuple[float, float, float]:
    """Of a size that depends on the draft: true bias, mean recorded bias, proved bound."""
    vocab = len(x)
    rejection = np.full(vocab, 0.2)
    sizes = online_truncation_size(np.tile(x, (vocab, 1)), x, rejection, theta)
    limits = theta * online_bound_denominator(x, rejection)
    assert (tail_deviation(x)[sizes - 1] <= limits + EXACT).all()
    kernels = [kernel(x, y, int(size)) for size in sizes]
    whole = kernel(x, y, vocab)
    law = sum(x[d] * kernels[d][d] for d in range(vocab))
    recorded = sum(x[d] * float(total_variation(x @ kernels[d], y)) for d in range(vocab))
    bound = sum(x[d] * np.abs(kernels[d][d] - whole[d]).sum() / 2 for d in range(vocab))
    return float(total_variation(law, y)), recorded, float(bound)


def test_online_size_has_a_bias_on_either_side_of_the_recorded_one(rng):
    """The recorded figure is an estimate, no bound; the sum of the kernels' distances is one."""
    above = below = 0
    for _ in range(80):
        vocab = int(rng.integers(6, 30))
        x, other = np.sort(rng.dirichlet(np.full(vocab, 0.3), size=2))[:, ::-1]
        y = 0.5 * x + 0.5 * rng.permutation(other)
        true, recorded, bound = online_biases(x, y, 0.5)
        assert true <= bound + EXACT
        above += true > recorded + 1e-3
        below += true < recorded - 1e-3
    assert above > 0
    assert below > 0


def test_a_vocabulary_of_one_and_no_temperatures_are_refused():
    with pytest.raises(ValueError, match=r"^vocab_size = 1: allowed is >= 2"):
        symbolic.small_laws(1)
    with pytest.raises(ValueError, match=r"^num_temperatures = 0: allowed is >= 1"):
        symbolic.attenuated_covariances(0)
