r"""The statements of docs/theory.md derived with sympy, for small vocabularies or in closed form.

Probabilities are symbols, and whatever holds max(., 0) is taken apart by sign: a *sign pattern*
says of each token whether its difference (x_v - y_v, or sigma_v x_v - y_v) counts as positive.
Within one pattern every law is a rational function, so an identity either cancels or does not, and
a statement holds for all laws if it holds in each of the 2^V patterns. The last token's probability
is one minus the others', so that sums of laws are one identically.

Nothing else imports this room.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp

Signs = tuple[bool, ...]


@dataclass(frozen=True)
class Identity:
    """Two expressions that a statement calls equal."""

    name: str
    left: sp.Expr
    right: sp.Expr

    def holds(self) -> bool:
        """Whether the difference cancels to zero."""
        difference = sp.together(self.left - self.right)
        # Rational functions, most of what is here, need no more than a multiplied-out numerator.
        return bool(sp.expand(sp.numer(difference)) == 0 or sp.simplify(difference) == 0)


@dataclass(frozen=True)
class SmallLaws:
    """Symbols of one context, (V,) each: the laws x and y and the skip probabilities sigma.

    Those are fractional, so that sharp gates are the special case 0 or 1.
    """

    x: tuple[sp.Expr, ...]
    y: tuple[sp.Expr, ...]
    sigma: tuple[sp.Expr, ...]

    @property
    def symbols(self) -> tuple[sp.Symbol, ...]:
        """The free symbols in the order x_1.., y_1.., sigma_1.., sigma_V."""
        return (*self.x[:-1], *self.y[:-1], *self.sigma)

    def values(
        self, x: Sequence[sp.Expr], y: Sequence[sp.Expr], sigma: Sequence[sp.Expr]
    ) -> dict[sp.Symbol, sp.Expr]:
        """Substitution of given numbers for the free symbols."""
        return dict(zip(self.symbols, (*x[:-1], *y[:-1], *sigma), strict=True))


def small_laws(vocab_size: int) -> SmallLaws:
    """Symbols for V >= 2 tokens."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size = {vocab_size}: allowed is >= 2")
    x, y = (sp.symbols(f"{name}1:{vocab_size}", positive=True) for name in "xy")
    sigma = sp.symbols(f"sigma1:{vocab_size + 1}", nonnegative=True)
    return SmallLaws((*x, 1 - sum(x)), (*y, 1 - sum(y)), tuple(sigma))


def sign_patterns(vocab_size: int) -> tuple[Signs, ...]:
    """Patterns of x - y: two laws that differ have positive tokens and others.

    Equal laws are the limit of any pattern.
    """
    return tuple(signs for signs in skip_sign_patterns(vocab_size) if any(signs))


def skip_sign_patterns(vocab_size: int) -> tuple[Signs, ...]:
    """Patterns of sigma x - y: its sum is m - 1 <= 0, so not all tokens are positive."""
    patterns = itertools.product((True, False), repeat=vocab_size)
    return tuple(signs for signs in patterns if not all(signs))


def pattern_of(differences: Sequence[sp.Expr]) -> Signs:
    """The pattern that numbers belong to."""
    return tuple(bool(value > 0) for value in differences)


def positive_parts(differences: Sequence[sp.Expr], signs: Signs) -> tuple[sp.Expr, ...]:
    """max(., 0) of each difference within a pattern."""
    return tuple(
        value if sign else sp.Integer(0) for value, sign in zip(differences, signs, strict=True)
    )


def _negative_parts(differences: Sequence[sp.Expr], signs: Signs) -> tuple[sp.Expr, ...]:
    return positive_parts([-d for d in differences], tuple(not s for s in signs))


def _differences(laws: SmallLaws) -> tuple[sp.Expr, ...]:
    return tuple(p - q for p, q in zip(laws.x, laws.y, strict=True))


def _deviations(
    name: str,
    law: Sequence[sp.Expr],
    laws: SmallLaws,
    signs: Signs,
    rights: Sequence[tuple[sp.Expr, sp.Expr]],
    total: sp.Expr,
) -> tuple[Identity, ...]:
    """P - y of each token, the first of its `rights` if positive, and TV(P, y), the `total`."""
    out = []
    lefts = [p - q for p, q in zip(law, laws.y, strict=True)]
    for v, (left, right, sign) in enumerate(zip(lefts, rights, signs, strict=True), start=1):
        out.append(Identity(f"{name} P - y at token {v}", left, right[0 if sign else 1]))
    bias = sp.sympify(sum(positive_parts(lefts, signs)))
    return (*out, Identity(f"{name} TV(P, y)", bias, total))


# --- accept/resample -----------------------------------------------------------------------------


def mean_rejection(laws: SmallLaws, signs: Signs) -> Identity:
    r"""E[beta] = TV(x, y) within one sign pattern of x - y.

    docs/theory.md, (3). Left: :math:`\sum_v x_v \beta_v` with :math:`\beta_v = 1 - y_v/x_v` on the
    positive tokens; right: half the sum of :math:`|x_v - y_v|`, signs resolved.
    """
    rejection = [1 - q / p if s else 0 for p, q, s in zip(laws.x, laws.y, signs, strict=True)]
    left = sum(p * b for p, b in zip(laws.x, rejection, strict=True))
    absolute = [d if s else -d for d, s in zip(_differences(laws), signs, strict=True)]
    return Identity("(3) E[beta] = TV", sp.sympify(left), sum(absolute) / 2)


def accept_resample_law(laws: SmallLaws, signs: Signs) -> tuple[sp.Expr, ...]:
    r"""Output law of a gate with full-distribution accept/resample, in one pattern of x - y.

    .. math:: P_v = \sigma_v x_v + (1 - \sigma_v) \min(x_v, y_v) + Z\, r_v

    docs/theory.md, (2), (12), built from the events: skipped, accepted, resampled.
    """
    excess = positive_parts(_differences(laws), signs)
    missing = _negative_parts(_differences(laws), signs)
    rejected = sum((1 - g) * e for g, e in zip(laws.sigma, excess, strict=True))
    residual = [value / sum(missing) for value in missing]
    return tuple(
        g * p + (1 - g) * (p - e) + rejected * r
        for g, p, e, r in zip(laws.sigma, laws.x, excess, residual, strict=True)
    )


def rejection_risk(laws: SmallLaws, signs: Signs) -> sp.Expr:
    r"""rho = sum_v sigma_v max(x_v - y_v, 0) in one pattern of x - y; docs/theory.md, (11)."""
    excess = positive_parts(_differences(laws), signs)
    return sp.sympify(sum(g * e for g, e in zip(laws.sigma, excess, strict=True)))


def risk_is_bias(laws: SmallLaws, signs: Signs) -> tuple[Identity, ...]:
    r"""The theorem (12) in one pattern: each deviation of the output law, then their sum.

    .. math:: P_v - y_v = \sigma_v (x_v - y_v) \ge 0, \qquad
              P_v - y_v = -\frac{\rho}{T}(y_v - x_v) \le 0

    on the positive and the other tokens, T = TV(x, y). The right sides show their sign, so the
    positive ones add up to TV(P, y), which is rho. docs/theory.md, (12).
    """
    law, rho = accept_resample_law(laws, signs), rejection_risk(laws, signs)
    distance = sum(positive_parts(_differences(laws), signs))
    gaps = zip(laws.sigma, _differences(laws), strict=True)
    rights = [(g * d, rho / distance * d) for g, d in gaps]
    return _deviations("(12)", law, laws, signs, rights, rho)


# --- the lower bound and the rule that attains it ------------------------------------------------


@dataclass(frozen=True)
class BoundGap:
    r"""What accept/resample loses to the lower bound at one token, 0 < y < x and 0 <= sigma <= 1.

    `reached` is the gap (1 - sigma) y where sigma x > y, `slack` sigma (x - y) elsewhere.
    """

    x: sp.Symbol
    y: sp.Symbol
    sigma: sp.Symbol
    reached: Identity
    slack: Identity


def bound_gap() -> BoundGap:
    r"""The term-by-term gap between (11) and (13).

    .. math:: \sigma (x - y) - (\sigma x - y)_+ = \min\{\sigma (x - y),\, (1 - \sigma)\, y\}

    docs/theory.md, (13): zero for sigma in {0, 1}, positive between, so accept/resample is optimal
    for sharp gates only.
    """
    x, y = sp.symbols("x y", positive=True)
    sigma = sp.Symbol("sigma", nonnegative=True)
    risk = sigma * (x - y)
    return BoundGap(
        x,
        y,
        sigma,
        Identity("(13) gap where sigma x > y", risk - (sigma * x - y), (1 - sigma) * y),
        Identity("(13) gap where sigma x <= y", risk - sp.Integer(0), sigma * (x - y)),
    )


def _skip_differences(laws: SmallLaws) -> tuple[sp.Expr, ...]:
    return tuple(g * p - q for g, p, q in zip(laws.sigma, laws.x, laws.y, strict=True))


def bias_floor(laws: SmallLaws, signs: Signs) -> sp.Expr:
    r"""rho_min = sum_v max(sigma_v x_v - y_v, 0) in one pattern of sigma x - y.

    docs/theory.md, (13): any scheme has P_v >= sigma_v x_v, so P_v - y_v >= sigma_v x_v - y_v on
    the positive tokens, whatever the rest is.
    """
    return sp.sympify(sum(positive_parts(_skip_differences(laws), signs)))


def floor_is_a_bound(laws: SmallLaws, signs: Signs) -> Identity:
    r"""(13) for an arbitrary scheme, in one pattern of sigma x - y.

    The scheme answers with any law q where it does not skip: P = sigma x + (1 - m) q. Left: the sum
    of P - y over the positive tokens, which TV(P, y) is not below. Right: rho_min plus a sum of
    products of non-negative factors.

    docs/theory.md, (13).
    """
    answer = sp.symbols(f"q1:{len(laws.x) + 1}", nonnegative=True)
    sent = 1 - sum(g * p for g, p in zip(laws.sigma, laws.x, strict=True))
    deviation = [
        g * p + sent * q - y for g, p, q, y in zip(laws.sigma, laws.x, answer, laws.y, strict=True)
    ]
    left = sum(positive_parts(deviation, signs))
    extra = sum(positive_parts([sent * q for q in answer], signs))
    return Identity("(13) TV >= rho_min", sp.sympify(left), bias_floor(laws, signs) + extra)


def residual_law(laws: SmallLaws, signs: Signs) -> tuple[sp.Expr, ...]:
    r"""Output law of residual verification in one pattern of sigma x - y.

    .. math:: P_v = \sigma_v x_v + (1 - m) \frac{(y_v - \sigma_v x_v)_+}{\sum_j (y_j - \sigma_j
              x_j)_+}, \qquad m = \sum_v \sigma_v x_v

    docs/theory.md, (24).
    """
    skipped = [g * p for g, p in zip(laws.sigma, laws.x, strict=True)]
    missing = _negative_parts(_skip_differences(laws), signs)
    sent = 1 - sum(skipped)
    return tuple(w + sent * e / sum(missing) for w, e in zip(skipped, missing, strict=True))


def residual_attains_the_floor(laws: SmallLaws, signs: Signs) -> tuple[Identity, ...]:
    r"""(24) in one pattern of sigma x - y, for any sigma, sharp or fractional.

    .. math:: \sum_j (y_j - \sigma_j x_j)_+ = 1 - m + \rho_{min}, \qquad
              P_v - y_v = \sigma_v x_v - y_v, \qquad
              P_v - y_v = -\frac{\rho_{min}}{1 - m + \rho_{min}} (y_v - \sigma_v x_v)

    on the positive and the other tokens: the signs show, and the positive ones add up to rho_min.
    """
    law, least = residual_law(laws, signs), bias_floor(laws, signs)
    differences = _skip_differences(laws)
    missing = sp.sympify(sum(_negative_parts(differences, signs)))
    sent = 1 - sum(g * p for g, p in zip(laws.sigma, laws.x, strict=True))
    rights = [(d, least / (sent + least) * d) for d in differences]
    mass = Identity("(24) residual mass", missing, sent + least)
    return (mass, *_deviations("(24)", law, laws, signs, rights, least))


# --- shared randomness ---------------------------------------------------------------------------


def coupling_integrals() -> tuple[Identity, ...]:
    r"""The integrals over the race's time tau and over the ratio w.

    .. math:: \int_0^\infty e^{-\tau(1 + H)} d\tau = \frac{1}{1 + H}, \qquad
              \int_0^\infty \tau e^{-\tau(1 + H)} d\tau = \frac{1}{(1 + H)^2}, \qquad
              \int_u^v \frac{dw}{(X w + Y)^2} = \frac{v - u}{(X u + Y)(X v + Y)}

    docs/theory.md, (41a), (41b).
    """
    tau, excess, w, behind, ahead, low, gap = sp.symbols("tau H w X Y u g", positive=True)
    weight = sp.exp(-tau * (1 + excess))
    piece = sp.integrate((behind * w + ahead) ** -2, (w, low, low + gap))
    steps = gap / ((behind * low + ahead) * (behind * (low + gap) + ahead))
    return (
        Identity("(41a)", sp.integrate(weight, (tau, 0, sp.oo)), 1 / (1 + excess)),
        Identity("(41b)", sp.integrate(tau * weight, (tau, 0, sp.oo)), (1 + excess) ** -2),
        Identity("(41b) between two knots", piece, steps),
    )


def coupled_joint_law(laws: SmallLaws) -> sp.Matrix:
    r"""P(d = i, o = v) for tokens numbered by rising y/x, which is every case after renumbering.

    docs/theory.md, (41a), (41b): then Phi_v - Phi_i counts for i < v only.
    """
    x, y = laws.x, laws.y
    ratios = [q / p for p, q in zip(x, y, strict=True)]
    levels = [r * sum(x[: v + 1]) + sum(y[v + 1 :]) for v, r in enumerate(ratios)]  # 1 + H(r_v)
    knots = list(zip([sp.Integer(0), *ratios], [sp.Integer(1), *levels], strict=True))
    pieces = [(v - u) / (a * b) for (u, a), (v, b) in itertools.pairwise(knots)]
    phi = list(itertools.accumulate(pieces))

    def entry(i: int, v: int) -> sp.Expr:
        if i == v:
            return y[v] / levels[v]
        return x[i] * y[v] * (phi[v] - phi[i]) if i < v else sp.Integer(0)

    return sp.Matrix(len(x), len(x), entry)


def coupling_keeps_both_laws(laws: SmallLaws) -> tuple[Identity, ...]:
    """Rows of the joint law add up to x, columns to y: docs/theory.md, (41a), (41b)."""
    joint = coupled_joint_law(laws)
    rows = [Identity(f"(41) row {i + 1}", sum(joint.row(i)), p) for i, p in enumerate(laws.x)]
    columns = [Identity(f"(41) column {v + 1}", sum(joint.col(v)), q) for v, q in enumerate(laws.y)]
    return (*rows, *columns)


# --- uncertainty and thresholds ------------------------------------------------------------------


def attenuated_covariances(num_temperatures: int) -> tuple[Identity, ...]:
    r"""Errors in variables, by enumerating every outcome of u_K in a population of two tokens.

    .. math:: \mathrm{Cov}(\beta, u_K) = \mathrm{Cov}(\beta, u), \qquad
              \mathrm{Var}(u_K) = \mathrm{Var}(u) + E\Big[\frac1{K^2}\sum_k p_k(1 - p_k)\Big]

    docs/theory.md, (6). The two tokens have shares w and 1 - w, and any beta and p_k; for K >= 1
    temperatures the outcomes are 2^K.
    """
    if num_temperatures < 1:
        raise ValueError(f"num_temperatures = {num_temperatures}: allowed is >= 1")
    w, beta_a, beta_b = sp.symbols("w beta_a beta_b", positive=True)
    population = [
        (w, beta_a, sp.symbols(f"p1:{num_temperatures + 1}", positive=True)),
        (1 - w, beta_b, sp.symbols(f"q1:{num_temperatures + 1}", positive=True)),
    ]
    k = sp.Integer(num_temperatures)
    mean_u = sum(share * (1 - sum(p) / k) for share, _, p in population)
    mean_beta = sum(share * beta for share, beta, _ in population)
    var_u = sum(share * (1 - sum(p) / k - mean_u) ** 2 for share, _, p in population)
    noise = sum(share * sum(pk * (1 - pk) for pk in p) / k**2 for share, _, p in population)
    cov_u = sum(share * (b - mean_beta) * (1 - sum(p) / k) for share, b, p in population)
    second, cross = sp.Integer(0), sp.Integer(0)
    for share, beta, p in population:
        for misses in itertools.product((0, 1), repeat=num_temperatures):
            chance = sp.prod([1 - pk if miss else pk for pk, miss in zip(p, misses, strict=True)])
            u_sampled = sum(misses) / k
            second += share * chance * (u_sampled - mean_u) ** 2
            cross += share * chance * (beta - mean_beta) * u_sampled
    return (
        Identity("(6) Cov(beta, u_K) = Cov(beta, u)", cross, cov_u),
        Identity("(6) Var(u_K) = Var(u) + E Var(u_K | s, d)", second, var_u + noise),
    )


@dataclass(frozen=True)
class LinearThreshold:
    """The threshold u_th of a line, its value and derivatives, from symbols a, b, l.

    `variance` is the delta method's at a known level, from (co)variances of the fitted (a, b).
    """

    slope: sp.Symbol
    intercept: sp.Symbol
    level: sp.Symbol
    value: sp.Expr
    d_slope: sp.Expr
    d_intercept: sp.Expr
    d_level: sp.Expr
    variance_slope: sp.Symbol
    variance_intercept: sp.Symbol
    covariance: sp.Symbol
    variance: sp.Expr


def linear_threshold() -> LinearThreshold:
    r"""Solve a u + b = l for u and differentiate.

    docs/theory.md, (8) at l = 0, (9) at l = Delta. Valid when a > 0.
    """
    slope = sp.Symbol("a", positive=True)
    intercept, level, u = sp.symbols("b l u", real=True)
    (value,) = sp.solve(slope * u + intercept - level, u)
    gradient = sp.Matrix([sp.diff(value, slope), sp.diff(value, intercept)])
    variance_slope, variance_intercept = sp.symbols("V_a V_b", nonnegative=True)
    covariance = sp.Symbol("C_ab", real=True)
    matrix = sp.Matrix([[variance_slope, covariance], [covariance, variance_intercept]])
    return LinearThreshold(
        *(slope, intercept, level, value),
        *(gradient[0], gradient[1], sp.diff(value, level)),
        *(variance_slope, variance_intercept, covariance),
        sp.expand((gradient.T * matrix * gradient)[0]),
    )


# --- truncation ----------------------------------------------------------------------------------


def gated_truncation_mixture() -> Identity:
    r"""A gated policy's output at a token that the server may reject, as a mixture.

    .. math:: x(1 - \hat\beta) + \sigma x \hat\beta = (1 - \sigma) Q + \sigma x, \qquad
              Q = x (1 - \hat\beta)

    with Q the output without the gate, where the residual law vanishes. As max(., 0) is convex it
    gives TV(output, y) <= rho + tau: docs/theory.md, (23), the theorem below it.
    """
    x, rejection, sigma = sp.symbols("x beta sigma", nonnegative=True)
    ungated = x * (1 - rejection)
    gated = ungated + sigma * x * rejection
    return Identity("gate and truncation", gated, (1 - sigma) * ungated + sigma * x)


def tail_level_step() -> Identity:
    r"""How the tail level falls when the largest tail entry joins the head.

    .. math:: c_k - c_{k+1} = \frac{x_{k+1} - c_k}{V - k - 1} \ge 0

    docs/theory.md, (17): from it N(k)/2 = sum_{i>k} max(c_k - x_i, 0) never rises with k.
    """
    head, entry, vocab, k = sp.symbols("S_k x V k", positive=True)
    level = (1 - head) / (vocab - k)
    following = (1 - head - entry) / (vocab - k - 1)
    return Identity("(17) tail level", level - following, (entry - level) / (vocab - k - 1))


@dataclass(frozen=True)
class SoftBoundRatio:
    """How far CU-HLM's bound lies above N(k)/2: the ratio U_TV/(N/2) = 2/D.

    `least` and `most` are over all x_d and beta_d in [0, 1], functions of eta.
    """

    draft_prob: sp.Symbol
    rejection_prob: sp.Symbol
    eta: sp.Symbol
    ratio: sp.Expr
    least: sp.Expr
    most: sp.Expr


def soft_bound_ratio() -> SoftBoundRatio:
    r"""The factor between (19) and (22), and its range.

    .. math:: \frac{2}{D} \in \Big[\frac{2\eta}{\ln 2},\ \frac{2\eta}{\ln(1 + e^{-\eta})}\Big]

    docs/theory.md, (22). The least is at x_d = 1, beta_d = 0; the most at x_d = 0.
    """
    draft, rejection = sp.symbols("x_d beta_d", nonnegative=True)
    eta = sp.Symbol("eta", positive=True)

    def soft(z: sp.Expr) -> sp.Expr:
        return sp.log(1 + sp.exp(eta * z)) / eta

    ratio = 2 / ((1 - draft) * soft(sp.Integer(-1)) + draft * soft(-rejection))
    return SoftBoundRatio(
        draft,
        rejection,
        eta,
        ratio,
        sp.simplify(ratio.subs({draft: 1, rejection: 0})),
        sp.simplify(ratio.subs(draft, 0)),
    )


# --- link ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErgodicRate:
    """The mean of ln(1 + SNR g) over an exponential gain g, by its primitive.

    `snr` is the mean SNR, `rate` the ergodic rate for unit bandwidth, bit/s/Hz.
    """

    gain: sp.Symbol
    snr: sp.Symbol
    integrand: sp.Expr
    primitive: sp.Expr
    rate: sp.Expr

    def derivative_check(self) -> Identity:
        """The primitive differentiates to the integrand."""
        derivative = sp.expand_func(sp.diff(self.primitive, self.gain))
        return Identity("(26) primitive", derivative, self.integrand)


def ergodic_rayleigh_rate() -> ErgodicRate:
    r"""Ergodic Rayleigh rate: integration by parts, once.

    .. math:: \int e^{-g} \ln(1 + \bar\gamma g)\, dg
              = -e^{-g}\ln(1 + \bar\gamma g) - e^{1/\bar\gamma} E_1(g + 1/\bar\gamma)

    It vanishes at infinity, so the integral from 0 is :math:`e^{1/\bar\gamma} E_1(1/\bar\gamma)`,
    times log2(e) for bits. docs/theory.md, (26).
    """
    gain, snr = sp.symbols("g gamma", positive=True)
    integrand = sp.exp(-gain) * sp.log(1 + snr * gain)
    primitive = -integrand - sp.exp(1 / snr) * sp.expint(1, gain + 1 / snr)
    rate = -primitive.subs(gain, 0) / sp.log(2)
    return ErgodicRate(gain, snr, integrand, primitive, rate)


@dataclass(frozen=True)
class BlockFading:
    """E[B/C] under Rayleigh block fading of mean SNR `snr`, from a least gain g_0 on.

    The integrand e^-g / log2(1 + SNR g) is that of the mean of 1/C for unit bandwidth, the minorant
    a smaller function of g, ln 2 e^-g / (SNR g), and the lower bound its integral from g_0 on.
    """

    gain: sp.Symbol
    snr: sp.Symbol
    integrand: sp.Expr
    minorant: sp.Expr
    lower_bound: sp.Expr

    def limit(self) -> sp.Expr:
        """The lower bound as g_0 falls to 0: infinite."""
        return sp.limit(self.lower_bound, self.gain, 0, "+")

    def growth(self) -> sp.Expr:
        """Limit of the lower bound over ln(1/g_0): it diverges like a logarithm."""
        return sp.limit(self.lower_bound / sp.log(1 / self.gain), self.gain, 0, "+")

    def tightness(self) -> sp.Expr:
        """Limit of integrand over minorant as g falls to 0: 1, so no better growth is lost."""
        return sp.limit(self.integrand / self.minorant, self.gain, 0, "+")


def rayleigh_block_time() -> BlockFading:
    r"""The trap of (26): without an outage threshold the mean upload time is infinite.

    .. math:: \int_{g_0}^\infty \frac{e^{-g}}{\log_2(1 + \bar\gamma g)}\, dg
              \ge \frac{\ln 2}{\bar\gamma} E_1(g_0) \to \infty

    because ln(1 + z) <= z. docs/theory.md, (26).
    """
    gain, snr = sp.symbols("g gamma", positive=True)
    integrand = sp.exp(-gain) * sp.log(2) / sp.log(1 + snr * gain)
    minorant = sp.log(2) * sp.exp(-gain) / (snr * gain)
    return BlockFading(gain, snr, integrand, minorant, sp.log(2) / snr * sp.expint(1, gain))


# --- throughput ----------------------------------------------------------------------------------


def throughput_ratio() -> Identity:
    r"""The two throughputs of (28) under two token times.

    .. math:: E[1/t]\,E[t] = 1 + p(1 - p)\frac{(t_1 - t_0)^2}{t_0 t_1}
    """
    p, skipped, sent = sp.symbols("p t_0 t_1", positive=True)
    left = (p / skipped + (1 - p) / sent) * (p * skipped + (1 - p) * sent)
    return Identity("(28)", left, 1 + p * (1 - p) * (sent - skipped) ** 2 / (skipped * sent))


@dataclass(frozen=True)
class SpeedCeiling:
    """Speed-up over HLM in mean token time, its ceiling, and the mean of throughputs beside it.

    From p, c and the four times: `gain` is the ratio of mean token times, `mean_throughput_gain`
    that of means of 1/t, `ceiling` 1/((1 - p) c). `slack` has on its left denominator - (1 - p) c
    numerator of `gain`, on its right the same as a sum of terms that are not negative for p, c in
    [0, 1], which proves gain <= ceiling.
    """

    skip_rate: sp.Symbol
    payload_ratio: sp.Symbol
    slm: sp.Symbol
    uplink: sp.Symbol
    llm: sp.Symbol
    uncertainty: sp.Symbol
    gain: sp.Expr
    mean_throughput_gain: sp.Expr
    ceiling: sp.Expr
    slack: Identity

    def limit(self) -> sp.Expr:
        """The gain as the uplink time outgrows all others: the ceiling."""
        return sp.limit(self.gain, self.uplink, sp.oo)

    def mean_throughput_slope(self) -> sp.Expr:
        """Limit of the other gain over the uplink time: above 0, so it has no ceiling."""
        return sp.limit(self.mean_throughput_gain / self.uplink, self.uplink, sp.oo)

    def at(self, skip_rate: sp.Expr, payload_ratio: sp.Expr) -> sp.Expr:
        """The ceiling at given numbers."""
        return self.ceiling.subs({self.skip_rate: skip_rate, self.payload_ratio: payload_ratio})


def speed_ceiling() -> SpeedCeiling:
    r"""Largest speed-up in mean token time from skip rate and payload alone.

    .. math:: \frac{t_{slm} + t_{up} + t_{llm}}{t_{slm} + t_u + (1 - p)(c\,t_{up} + t_{llm})}
              \le \frac{1}{(1 - p)\,c}

    docs/theory.md, section 10: 1.85 at p = 0.4593, c = 1; 152.6 at p = 0.748, c = 0.026.
    """
    p, c, slm, uplink, llm, extra = sp.symbols("p c t_slm t_up t_llm t_u", positive=True)
    baseline = slm + uplink + llm
    sent = c * uplink + llm
    mean_time = slm + extra + (1 - p) * sent
    ceiling = 1 / ((1 - p) * c)
    terms = slm * (1 - (1 - p) * c) + extra + (1 - p) * (1 - c) * llm
    return SpeedCeiling(
        *(p, c, slm, uplink, llm, extra),
        baseline / mean_time,
        baseline * (p / (slm + extra) + (1 - p) / (slm + extra + sent)),
        ceiling,
        Identity("section 10", mean_time - baseline / ceiling, terms),
    )
