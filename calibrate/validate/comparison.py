"""Predicted figures against rerun ones: cells, their intervals, and how many should hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from calibrate.derive.operating_points import policy_from_settings
from calibrate.derive.policy_tokens import (
    METRICS,
    UNITS,
    Economics,
    measured_tokens,
    metrics,
    predicted_tokens,
)
from calibrate.run.figure import as_figure, share_figure
from calibrate.run.folder import Figure
from calibrate.run.traces import Trace
from hlmtheory.clusters import ErrorTerms, error_terms, pooled_difference

# Sums of float32 probabilities over a vocabulary, relative to figures of size one or more.
ROUNDING = 1e-5

NUM_REPEATS = 10_000


@dataclass(frozen=True)
class Cell:
    """One predicted figure against its measurement.

    Attributes
    ----------
    policy, rule, metric : str
    predicted : Figure
        Interval for the *rerun's* figure: calibration and validation sampling both.
    measured : Figure
        With its own sampling interval, prompts taken as independent draws.
    covered : bool or None
        Whether the measured value lies inside the predicted interval; None where there is none.
    """

    policy: str
    rule: str
    metric: str
    predicted: Figure
    measured: Figure
    covered: bool | None

    @property
    def fixed(self) -> bool:
        """Whether the policy alone fixes the figure: the prediction leaves room for rounding only.

        A rerun in which a rare event did not happen has no spread either, but can miss.
        """
        low, high, value = self.predicted.low, self.predicted.high, self.predicted.value
        if low is None or high is None or value is None:
            return False
        return high - low <= 4 * _room(value)  # both ends, and rounding itself


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
        Of measured less predicted: calibration prompts, then the rerun's. None without a spread.
    covered_unstratified : bool or None
        Whether the cell holds if prompts count as independent draws of one population.
    """

    cell: Cell
    error: ErrorTerms | None
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
    r"""Interval in which a rerun on other prompts is expected to fall.

    .. math:: \hat\theta \pm t_\nu \, s \sqrt{1/n + 1/m}

    with the pooled spread s of :func:`hlmtheory.clusters.pooled_difference` and its nu degrees of
    freedom: docs/theory.md, (36). The spread between prompts is pooled, because a rerun in which a
    rare event did not happen would otherwise understate it exactly where it matters. Where neither
    side varies (a policy that always skips) the interval is the value with room for float32
    rounding.
    """
    quantile = float(stats.t.ppf(0.5 + confidence / 2, error.freedom))
    margin = quantile * error.standard_error + _room(value)
    return value - margin, value + margin


def _room(value: float) -> float:
    return ROUNDING * max(abs(value), 1.0)


def compare(
    point: dict[str, Any],
    calibration: Trace,
    rerun: Trace,
    economics: Economics,
    confidence: float,
) -> list[Comparison]:
    """Comparisons of one operating point: every metric, predicted against measured.

    Parameters
    ----------
    point : dict
        An entry of operating_points.json; its predictions are what is held against the rerun.
    calibration : Trace
        That the predictions were made from: their sampling error is taken from it.
    rerun : Trace
        Of the rerun under that point.
    economics : Economics
        The one the predictions were made with.
    confidence : float
    """
    policy = policy_from_settings(
        point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
    )
    predicted = metrics(predicted_tokens(calibration, policy, economics.vocab_size), economics)
    measured = metrics(measured_tokens(rerun, policy), economics)
    strata = common_strata(calibration.categories, rerun.categories)
    out = []
    for metric in METRICS:
        value, found = float(point["predicted"][metric]["value"]), measured[metric]
        influence = (predicted[metric].influence, found.influence)
        error = difference_error(*influence, strata)
        low, high, covered = _judge(value, found.value, error, confidence)
        cell = Cell(
            point["policy"],
            point["rule"],
            metric,
            Figure(value, low, high, UNITS[metric]),
            as_figure(found, UNITS[metric], confidence),
            covered,
        )
        plain = _judge(value, found.value, difference_error(*influence, None), confidence)
        out.append(Comparison(cell, error, plain[2]))
    return out


def difference_error(
    calibration: np.ndarray, rerun: np.ndarray, strata: Strata | None
) -> ErrorTerms | None:
    """Error of measured less predicted; None where one prompt a side leaves no spread."""
    first = error_terms(calibration, strata.calibration if strata else None)
    second = error_terms(rerun, strata.rerun if strata else None)
    return pooled_difference(first, second) if first.freedom + second.freedom else None


def _judge(
    value: float, measured: float, error: ErrorTerms | None, confidence: float
) -> tuple[float | None, float | None, bool | None]:
    if error is None:
        return None, None, None
    low, high = prediction_interval(value, error, confidence)
    return low, high, bool(low <= measured <= high)


def coverage(comparisons: Sequence[Comparison], confidence: float) -> dict[str, Any]:
    """Covered cells out of all, and how many should be if the predictions hold.

    `tested` leaves out the figures that a policy fixes by itself, whose comparison is arithmetic.
    The exact binomial interval of a share takes cells as independent, which those of one set of
    prompts are not; `if_predictions_hold` does not: see :func:`repeats`. `unstratified` counts the
    tested cells with prompts taken as independent draws of one population.
    """
    tested = [one for one in comparisons if not one.cell.fixed]
    free = [one.cell.covered for one in tested]
    return {
        **_share([one.cell.covered for one in comparisons], confidence),
        "tested": _share(free, confidence) | {"if_predictions_hold": repeats(tested, confidence)},
        "unstratified": _share([one.covered_unstratified for one in tested], confidence),
    }


def _share(covered: Sequence[bool | None], confidence: float) -> dict[str, Any]:
    judged = [one for one in covered if one is not None]
    share = share_figure(sum(judged), len(judged), confidence)
    return {"covered": sum(judged), "total": len(judged), "share": asdict(share)}


def repeats(tested: Sequence[Comparison], confidence: float, seed: int = 0) -> dict[str, Any]:
    r"""What counts of covered cells to expect of predictions that hold; docs/theory.md, (36).

    .. math:: D_g = \sum_i z_i\, e_{ig}, \qquad z_i \sim N(0, 1)

    with e_ig the term of prompt i in the error of cell g, and the same z_i in all cells: prompts
    make the cells dependent here as they do in a rerun. Cells that are one figure said twice count
    as what they are. Repeated NUM_REPEATS times; normal errors are an assumption.

    Returns
    -------
    dict
        Over the repeats: mean share of covered cells, the interval that holds `confidence` of the
        shares, the probability of at most and of at least as many as were covered, and of an error
        as many standard errors wide as the widest (`widest_error`) in any cell.
    """
    judged = [one for one in tested if one.error is not None and one.error.standard_error > 0]
    errors = [one.error for one in judged if one.error is not None]
    if not judged or len({len(error.terms) for error in errors}) != 1:
        return {}
    terms = np.column_stack([error.terms for error in errors])  # (P, G)
    spread = np.array([error.standard_error for error in errors])
    cells = [one.cell for one in judged]
    reach = np.array([float(cell.predicted.high or 0) - float(cell.predicted.value or 0)
                      for cell in cells])  # fmt: skip
    off = np.array([float(cell.measured.value or 0) - float(cell.predicted.value or 0)
                    for cell in cells])  # fmt: skip
    normal = np.random.default_rng(seed).standard_normal((NUM_REPEATS, len(terms)))
    drawn = np.abs(normal @ terms)
    counts = np.sum(drawn <= reach, axis=1)
    covered = sum(bool(cell.covered) for cell in cells)
    widest = float(np.max(np.abs(off) / spread))
    low, high = np.quantile(counts / len(cells), [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "num_repeats": NUM_REPEATS,
        "share": asdict(Figure(float(counts.mean() / len(cells)), float(low), float(high))),
        "probability_of_at_most": float(np.mean(counts <= covered)),
        "probability_of_at_least": float(np.mean(counts >= covered)),
        "widest_error": widest,
        "probability_of_as_wide": float(np.mean(np.max(drawn / spread, axis=1) >= widest)),
    }


def coverage_text(validation: dict[str, Any]) -> str:
    """What validation.json says of its coverage, in sentences."""
    summary = validation["coverage"]
    tested = summary["tested"]
    text = (
        f"{summary['covered']} of {summary['total']} measured figures fall inside their "
        f"{validation['confidence']:.0%} prediction intervals; of the {tested['total']} "
        f"that a policy does not fix by itself, {tested['covered']}"
    )
    hold = tested.get("if_predictions_hold")
    if hold:
        low, high = (100 * hold["share"][end] for end in ("low", "high"))
        text += (
            f" = {100 * tested['covered'] / tested['total']:.1f} %. They share prompts: "
            f"predictions that hold would cover {low:.0f} to {high:.0f} % of them in "
            f"{100 * validation['confidence']:g} of 100 repeats, "
            f"and as few with probability {hold['probability_of_at_most']:.2g}; "
            f"the widest error, {hold['widest_error']:.2g} standard errors, is matched with "
            f"probability {hold['probability_of_as_wide']:.2g}"
        )
    if validation.get("strata"):
        plain = summary["unstratified"]
        text += (
            ". Intervals take prompts by category, of which both sets have the same mix; "
            f"taken as independent draws, {plain['covered']} of {plain['total']} would be "
            "inside"
        )
    return f"{text}."
