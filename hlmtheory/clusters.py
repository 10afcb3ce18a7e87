"""Inference with prompts as the unit: cluster-robust ratios and the cluster bootstrap.

Tokens of one prompt are dependent. Everything here first sums over the tokens of each prompt and
then treats the prompts as the independent observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import special


def sum_by_prompt(values: np.ndarray, prompt_index: np.ndarray, num_prompts: int) -> np.ndarray:
    """Sums (P,) or (P, G) of token values (N,) or (N, G), prompts (N,) in [0, num_prompts)."""
    if len(prompt_index) and not 0 <= np.min(prompt_index) <= np.max(prompt_index) < num_prompts:
        raise ValueError(
            f"prompt_index spans {np.min(prompt_index)} to {np.max(prompt_index)}: allowed is "
            f"0 to {num_prompts - 1}"
        )
    if values.ndim == 1:
        return np.bincount(prompt_index, weights=values, minlength=num_prompts)
    return np.stack([sum_by_prompt(v, prompt_index, num_prompts) for v in values.T], axis=1)


def answer_rows(prompt_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First rows and lengths of the answers, in their order: tokens of one stand together."""
    starts = np.flatnonzero(np.diff(prompt_index, prepend=-1) != 0)
    return starts, np.diff(np.append(starts, len(prompt_index)))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}: allowed is (0, 1); give 0.95 for 95 %")


@dataclass(frozen=True)
class RatioEstimate:
    r"""A mean over tokens, with its cluster-robust standard error.

    .. math:: \hat\theta = \frac{\sum_i A_i}{\sum_i B_i}, \qquad
              \mathrm{se}^2 = \frac{n}{n-1} \frac{\sum_i (A_i - \hat\theta B_i)^2}{(\sum_i B_i)^2}

    with A_i the sum over the tokens of prompt i and B_i their number (linearisation; prompts
    independent, token counts random).

    The standard error is NaN with fewer than two prompts. `influence` (P,) holds (A_i - value B_i)
    / sum B of every prompt, NaN of one without a value: what prompt i adds to the error, to first
    order. Empty where nobody worked it out.
    """

    value: float
    standard_error: float
    num_prompts: int
    influence: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Student-t interval with n - 1 degrees of freedom; None with fewer than two prompts.

        It holds less often than it says with few prompts, uneven lengths or rare events; measured
        in docs/theory.md, section 9, before (34).
        """
        _check_confidence(confidence)
        if self.num_prompts < 2 or not np.isfinite(self.standard_error):
            return None
        half = float(special.stdtrit(self.num_prompts - 1, 0.5 + confidence / 2))
        half *= self.standard_error
        return self.value - half, self.value + half


def estimate_of(value: float, influence: np.ndarray) -> RatioEstimate:
    """An estimate whose error is the sum of its prompts' influence (P,)."""
    error = error_terms(influence)
    spread = error.standard_error if error.freedom else float("nan")
    return RatioEstimate(value, spread, error.num_prompts, influence)


def ratio_of_sums(sums: np.ndarray, counts: np.ndarray) -> RatioEstimate:
    """Mean over tokens from each prompt's sum and number of tokens, (P,); none without tokens.

    Raises
    ------
    ValueError
        If no prompt has a token.
    """
    total = float(counts.sum())
    if total <= 0:
        raise ValueError("values holds no finite entry: give at least one token")
    value = float(sums.sum() / total)
    return estimate_of(value, np.where(counts > 0, (sums - value * counts) / total, np.nan))


def mean_over_tokens(
    values: np.ndarray, prompt_index: np.ndarray, num_prompts: int
) -> RatioEstimate:
    """Mean of token values (N,) with a standard error clustered by prompt; NaN tokens are left out.

    Raises
    ------
    ValueError
        If no token has a value.
    """
    known = np.isfinite(values)
    return ratio_of_sums(
        sum_by_prompt(np.where(known, values, 0.0), prompt_index, num_prompts),
        sum_by_prompt(known.astype(float), prompt_index, num_prompts),
    )


@dataclass(frozen=True)
class ErrorTerms:
    """Error of an estimate as a sum of independent terms (P,) of mean 0, one a prompt.

    Their sum of squares is the squared standard error; 0 for prompts without a value. `num_prompts`
    have one, and `freedom` are the degrees of freedom, those prompts less their strata.
    """

    terms: np.ndarray
    num_prompts: int
    freedom: int

    @property
    def standard_error(self) -> float:
        """Root of the sum of squares; 0 where nothing varies."""
        return float(np.sqrt(self.terms @ self.terms))


def error_terms(influence: np.ndarray, strata: np.ndarray | None = None) -> ErrorTerms:
    r"""Error of an estimate whose prompts were drawn stratum by stratum; docs/theory.md, (36).

    .. math:: \mathrm{se}^2 = \sum_c \frac{n_c}{n_c - 1} \sum_{i \in c} (e_i - \bar e_c)^2

    What strata differ in is no sampling error if each holds a fixed share of the prompts. A stratum
    of one prompt has no spread of its own: its e_i counts in full, as without strata. One stratum
    gives the standard error of :class:`RatioEstimate`, whose influence e (P,) is; NaN is left out.
    `strata` (P,) is the stratum of each prompt, one for all unless given.

    Valid when prompts are independent draws from their stratum, and the strata's shares are fixed.
    """
    known = np.isfinite(influence)
    strata = np.zeros(len(influence), dtype=np.int64) if strata is None else np.asarray(strata)
    _, of_prompt = np.unique(strata[known], return_inverse=True)
    values = influence[known]
    sizes = np.bincount(of_prompt)
    means = np.bincount(of_prompt, weights=values) / np.maximum(sizes, 1)
    alone = sizes == 1
    scale = np.sqrt(sizes / np.maximum(sizes - 1, 1))
    terms = np.zeros(len(influence))
    terms[known] = (values - np.where(alone, 0.0, means)[of_prompt]) * scale[of_prompt]
    return ErrorTerms(terms, len(values), len(values) - len(sizes))


def joint_error(*parts: ErrorTerms) -> ErrorTerms:
    r"""Error of a sum or difference of independent estimates, each from prompts of its own.

    .. math:: \mathrm{se}^2 = \sum_j \mathrm{se}_j^2, \qquad
              \nu = \frac{\mathrm{se}^4}{\sum_j \mathrm{se}_j^4/\nu_j}

    Satterthwaite's degrees of freedom, rounded down and 1 at least; parts that do not vary are left
    out of them, and where none varies they are those of the largest part.
    """
    variances = [(part.standard_error**2, part.freedom) for part in parts]
    total = sum(variance for variance, _ in variances)
    below = sum(variance**2 / max(freedom, 1) for variance, freedom in variances)
    freedom = int(total**2 / below) if below > 0 else max(part.freedom for part in parts)
    terms = np.concatenate([part.terms for part in parts])
    return ErrorTerms(terms, sum(part.num_prompts for part in parts), max(freedom, 1))


def prediction_error(averaged: ErrorTerms, drawn: ErrorTerms, rerun: ErrorTerms) -> ErrorTerms:
    r"""Error of a rerun's figure less its prediction; docs/theory.md, (36).

    .. math:: \mathrm{se}^2 = \mathrm{se}_n^2 + \frac{s^2}{m}, \qquad
              s^2 = \frac{\nu_n\, n\, \mathrm{se}_{n,drawn}^2 + \nu_m\, m\, \mathrm{se}_m^2}
                        {\nu_n + \nu_m}

    se_n is the prediction's own, averaged over drafts wherever that is possible; a rerun draws each
    draft, so the spread s of its prompts is that of the *drawn* figure, pooled over both sets: a
    set in which a rare event did not happen would understate it. Degrees of freedom by
    Satterthwaite's formula, at most nu_n + nu_m.

    Parameters
    ----------
    averaged, drawn : ErrorTerms
        Of the prediction, and of what the drafts drawn on the same n prompts give.
    rerun : ErrorTerms
        Of the measured figure, m prompts.

    The terms are the n averaged ones, then those of s / sqrt(m): n drawn ones and m measured ones.

    Raises
    ------
    ValueError
        If the prediction has no degree of freedom.
    """
    if averaged.freedom == 0:
        raise ValueError("no degree of freedom in the prediction: give more prompts than strata")
    most = drawn.freedom + rerun.freedom
    scales = (drawn.freedom * drawn.num_prompts / rerun.num_prompts / most, rerun.freedom / most)
    sampled = [side.terms * scale**0.5 for side, scale in zip((drawn, rerun), scales, strict=True)]
    first, second = averaged.terms @ averaged.terms, sum(part @ part for part in sampled)
    spread = first**2 / averaged.freedom + second**2 / most
    freedom = min(most, int((first + second) ** 2 / spread)) if spread > 0 else most
    terms = np.concatenate([averaged.terms, *sampled])
    return ErrorTerms(terms, averaged.num_prompts + rerun.num_prompts, freedom)


def resample_prompts(
    num_prompts: int, num_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Multinomial counts (R, P): how often each prompt occurs in each bootstrap resample."""
    counts = np.empty((num_resamples, num_prompts), dtype=np.float32)
    for row in counts:  # n prompts drawn with replacement, several times faster than multinomials
        drawn = generator.integers(num_prompts, size=num_prompts, dtype=np.int32)
        row[:] = np.bincount(drawn, minlength=num_prompts)
    return counts


def bootstrap_totals(prompt_sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Totals (R, G) of per-prompt sums (P, G) in every resample (R, P), in float64."""
    block = 256  # resamples at a time: only these are copied to float64
    sums = np.asarray(prompt_sums, dtype=np.float64)
    parts = [
        counts[begin : begin + block].astype(np.float64) @ sums
        for begin in range(0, len(counts), block)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, sums.shape[1]))


def percentile_interval(
    values: np.ndarray, num_prompts: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of a statistic (R,) of :func:`bootstrap_totals`, NaN where undefined.

    None with fewer than two prompts resampled or over a tenth of the values undefined.
    """
    _check_confidence(confidence)
    known = values[np.isfinite(values)]
    if num_prompts < 2 or len(known) < 0.9 * len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def jackknife_correlation_interval(
    prompt_sums: np.ndarray,
    correlation: Callable[[np.ndarray], np.ndarray],
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    r"""Interval of a correlation from leaving out one prompt at a time, on Fisher's scale.

    .. math:: z = \mathrm{artanh}(r), \quad
              \mathrm{se}^2 = \frac{n-1}{n} \sum_i (z_{(i)} - \bar z)^2, \quad
              \tanh(z \pm t_{n-1}\,\mathrm{se})

    The bootstrap adds noise to binned means and so biases their correlation down; the jackknife
    hardly disturbs them. None with fewer than three prompts or an undefined correlation.

    Parameters
    ----------
    prompt_sums : float array (P, G)
    correlation : callable
        Maps totals (..., G) to values (...) in [-1, 1].
    confidence : float
    """
    _check_confidence(confidence)
    num = prompt_sums.shape[0]
    if num < 3:
        return None
    total = prompt_sums.sum(0, keepdims=True)
    limit = 1 - 1e-12
    z = np.arctanh(np.clip(correlation(total), -limit, limit))[0]
    left_out = np.arctanh(np.clip(correlation(total - prompt_sums), -limit, limit))
    if not (np.isfinite(z) and np.isfinite(left_out).all()):
        return None
    error = ((num - 1) / num * np.sum((left_out - left_out.mean()) ** 2)) ** 0.5
    quantile = float(special.stdtrit(num - 1, 0.5 + confidence / 2))
    return float(np.tanh(z - quantile * error)), float(np.tanh(z + quantile * error))
