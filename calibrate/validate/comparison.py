"""Predicted figures against rerun ones: cells, their intervals, and how many should hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from calibrate.derive.predict import (
    METRICS,
    RANGES,
    SOURCES,
    UNITS,
    Averaged,
    Economics,
    drawn_tokens,
    measured_tokens,
    metrics,
)
from calibrate.derive.roads import Roads
from calibrate.run.figure import as_figure, figure, share_figure
from calibrate.run.records import (
    Cell,
    Coverage,
    CoverageSummary,
    OperatingPoint,
    Repeats,
)
from calibrate.run.traces import Trace
from hlmtheory.clusters import ErrorTerms, RatioEstimate, error_terms, prediction_error
from hlmtheory.policies import Policy

# Sums of float32 probabilities over a vocabulary, relative to figures of size one or more.
ALIKE = 1e-3
"""Two figures whose errors point the same way to this angle, and miss by as many standard errors to
as much, say one thing: the payload of full verification is its skip rate, but for a few indices."""
ROUNDING = 1e-5

NUM_REPEATS = 10_000


@dataclass(frozen=True)
class Strata:
    """Strata of the calibration prompts and of the rerun's, numbered alike, (P,) each."""

    calibration: np.ndarray
    rerun: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """A cell with what its interval was made of.

    Attributes
    ----------
    cell : Cell
    error : ErrorTerms or None
        Of measured less predicted; None without a spread.
    margin : float
        Half of the interval's width, before it is cut at the ends of the figure's range.
    covered_unstratified : bool or None
        Whether the cell holds if prompts count as independent draws of one population.
    """

    cell: Cell
    error: ErrorTerms | None
    margin: float
    covered_unstratified: bool | None


def common_strata(calibration: Sequence[str], rerun: Sequence[str]) -> Strata | None:
    """The prompts' categories as strata; None where they cannot be.

    Both sides need a category for every prompt and the same share of each: only then does what the
    categories differ in cancel in the difference of the two. Without a category of two prompts
    there would be no spread to go by.

    Parameters
    ----------
    calibration, rerun : sequence of str
        Category of every prompt; empty where prompts have none.
    """
    before, now = Counter(calibration), Counter(rerun)
    if any(before[c] * len(rerun) != now[c] * len(calibration) for c in before | now):
        return None
    first = stratum_numbers(calibration)
    if first is None or not now:
        return None
    # A rerun of one prompt a stratum has no freedom: the calibration alone gives the spread.
    number = {category: i for i, category in enumerate(sorted(before))}
    return Strata(first, np.array([number[category] for category in rerun]))


def stratum_numbers(categories: Sequence[str]) -> np.ndarray | None:
    """Each prompt's category as a number, (P,); None without categories or with one prompt each."""
    names = sorted(set(categories))
    if len(names) in (0, len(categories)):
        return None
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[category] for category in categories])


def prediction_interval(value: float, error: ErrorTerms, confidence: float) -> tuple[float, float]:
    r"""Interval in which a rerun on other prompts is expected to fall; docs/theory.md, (36).

    .. math:: \hat\theta \pm t_\nu \sqrt{\mathrm{se}_n^2 + s^2 / m}

    with the terms of :func:`hlmtheory.clusters.prediction_error`. Where neither side varies (a
    policy that always skips) the interval is the value with room for float32 rounding.
    """
    quantile = float(stats.t.ppf(0.5 + confidence / 2, error.freedom))
    margin = quantile * error.standard_error + _room(value)
    return value - margin, value + margin


def _room(value: float) -> float:
    return ROUNDING * max(abs(value), 1.0)


def compare(
    point: OperatingPoint,
    policy: Policy,
    roads: Roads,
    rerun: Trace,
    num_prompt_tokens: np.ndarray,
    economics: Economics,
    confidence: float,
) -> list[Comparison]:
    """Comparisons of one operating point: every metric, predicted against measured.

    Parameters
    ----------
    point : OperatingPoint
        Its predictions are what is held against the rerun.
    policy : Policy
        The point's.
    roads : Roads
        That the predictions were made from: their sampling error is taken from it, and with that
        of the drafts that the calibration drew the rerun's.
    rerun : Trace
        Of the rerun under that point.
    num_prompt_tokens : float array (P,)
        Of each of its prompts, which the server must read.
    economics : Economics
        The one the predictions were made with.
    confidence : float
    """
    seen: tuple[Averaged, ...] = (
        roads.prediction(policy),
        drawn_tokens(roads.server, policy),
        measured_tokens(rerun, policy, num_prompt_tokens),
    )
    averaged, drawn, measured = (metrics(one, economics) for one in seen)
    strata = common_strata(roads.server.categories, rerun.categories)
    out: list[Comparison] = []
    said: list[tuple[float, ErrorTerms | None]] = []
    for metric in METRICS:
        predicted, found = point.predicted[metric], measured[metric]
        value = predicted.value
        if value is None or metric in point.at_most or not np.isfinite(found.value):
            out.append(Comparison(_not_judged(point, metric, found, confidence), None, 0.0, None))
            continue
        influence = (averaged[metric].influence, drawn[metric].influence, found.influence)
        error = difference_error(*influence, strata)
        low, high, covered = _judge(value, found.value, error, confidence)
        cell = Cell(
            policy=point.policy,
            rule=point.rule,
            metric=metric,
            source="implied" if _is_said(found.value - value, error, said) else SOURCES[metric],
            predicted=figure(value, *cut(low, high, RANGES[metric]), UNITS[metric]),
            measured=as_figure(found, UNITS[metric], confidence, *RANGES[metric]),
            covered=covered,
            # The prediction leaves room for rounding only, at both ends. A rerun in which a rare
            # event did not happen has no spread either, but can miss.
            fixed=low is not None and high is not None and high - low <= 4 * _room(value),
        )
        plain = _judge(value, found.value, difference_error(*influence, None), confidence)
        margin = 0.0 if high is None else high - value
        out.append(Comparison(cell, error, margin, plain[2]))
        if cell.source == "counted":
            said.append((found.value - value, error))
    return out


def cut(
    low: float | None, high: float | None, ends: tuple[float, float]
) -> tuple[float | None, float | None]:
    """An interval without what lies beyond a figure's range, where no rerun can fall."""
    if low is None or high is None:
        return low, high
    return max(low, ends[0]), min(high, ends[1])


def _not_judged(
    point: OperatingPoint, metric: str, found: RatioEstimate, confidence: float
) -> Cell:
    """A cell of what is not predicted, bounded only, or not recorded in the rerun."""
    return Cell(
        policy=point.policy,
        rule=point.rule,
        metric=metric,
        source=SOURCES[metric],
        predicted=point.predicted[metric],
        measured=as_figure(found, UNITS[metric], confidence, *RANGES[metric]),
        covered=None,
        fixed=False,
    )


def difference_error(
    averaged: np.ndarray, drawn: np.ndarray, rerun: np.ndarray, strata: Strata | None
) -> ErrorTerms | None:
    """Error of measured less predicted from all influences; None where one prompt has no spread."""
    of_calibration = strata.calibration if strata else None
    first, second = (error_terms(influence, of_calibration) for influence in (averaged, drawn))
    third = error_terms(rerun, strata.rerun if strata else None)
    return prediction_error(first, second, third) if first.freedom and second.freedom else None


def _judge(
    value: float, measured: float, error: ErrorTerms | None, confidence: float
) -> tuple[float | None, float | None, bool | None]:
    if error is None:
        return None, None, None
    low, high = prediction_interval(value, error, confidence)
    return low, high, bool(low <= measured <= high)


def coverage(comparisons: Sequence[Comparison], confidence: float) -> CoverageSummary:
    """Covered cells out of those that say something of their own, and how many should be.

    Left out are figures that a policy fixes by itself, whose comparison is arithmetic, and those
    that others imply. The exact binomial interval of a share takes cells as independent, which
    those of one set of prompts are not; `if_predictions_hold` does not: see :func:`repeats`.
    `unstratified` counts with prompts taken as independent draws of one population.
    """
    tested = [one for one in comparisons if not one.cell.fixed and one.cell.source == "counted"]
    return CoverageSummary(
        **dict(_share([one.cell.covered for one in tested], confidence)),
        if_predictions_hold=repeats(tested, confidence),
        unstratified=_share([one.covered_unstratified for one in tested], confidence),
    )


def _is_said(
    missed: float, error: ErrorTerms | None, before: Sequence[tuple[float, ErrorTerms | None]]
) -> bool:
    """Whether miss and error are those of an earlier figure, in another unit, to ALIKE of it."""
    for other_missed, other in before:
        if error is None or other is None:
            continue
        lengths = error.standard_error * other.standard_error
        if abs(error.terms @ other.terms) < (1 - ALIKE**2 / 2) * lengths or lengths == 0:
            continue
        one, two = abs(missed) / error.standard_error, abs(other_missed) / other.standard_error
        if abs(one - two) <= ALIKE:
            return True
    return False


def _share(covered: Sequence[bool | None], confidence: float) -> Coverage:
    judged = [one for one in covered if one is not None]
    held = sum(judged)
    share = share_figure(held, len(judged), confidence)
    return Coverage(covered=held, total=len(judged), share=share)


def repeats(tested: Sequence[Comparison], confidence: float, seed: int = 0) -> Repeats | None:
    r"""What counts of covered cells to expect of predictions that hold; docs/theory.md, (36).

    .. math:: D_g = \sum_i z_i\, e_{ig}, \qquad z_i \sim N(0, 1)

    with e_ig the term of prompt i in the error of cell g, and the same z_i in all cells: prompts
    make the cells dependent here as they do in a rerun. Cells that are one figure said twice count
    as what they are. Repeated NUM_REPEATS times; normal errors are an assumption.

    Returns
    -------
    Repeats or None
        Over the repeats: mean share of covered cells, the interval that holds `confidence` of the
        shares, the probability of at most and of at least as many as were covered, and of an error
        as many standard errors wide as the widest (`widest_error`) in any cell. None without a
        spread.
    """
    judged = [
        (one.cell, one.error, one.margin)
        for one in tested
        if one.error is not None and one.error.standard_error > 0
    ]
    if not judged or len({len(error.terms) for _, error, _ in judged}) != 1:
        return None
    terms = np.column_stack([error.terms for _, error, _ in judged])  # (P, G)
    spread = np.array([error.standard_error for _, error, _ in judged])
    predicted, measured, margin = (
        np.array(values, dtype=float)
        for values in zip(
            *((c.predicted.value, c.measured.value, margin) for c, _, margin in judged),
            strict=True,
        )
    )
    normal = np.random.default_rng(seed).standard_normal((NUM_REPEATS, len(terms)))
    drawn = np.abs(normal @ terms)
    counts = np.sum(drawn <= margin, axis=1)
    covered = sum(bool(cell.covered) for cell, _, _ in judged)
    widest = float(np.max(np.abs(measured - predicted) / spread))
    shares = counts / len(judged)
    ends = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Repeats(
        num_repeats=NUM_REPEATS,
        share=figure(float(shares.mean()), *ends),
        probability_of_at_most=float(np.mean(counts <= covered)),
        probability_of_at_least=float(np.mean(counts >= covered)),
        widest_error=widest,
        probability_of_as_wide=float(np.mean(np.max(drawn / spread, axis=1) >= widest)),
    )
