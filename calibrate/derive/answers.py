"""Whole answers of a derivation: the threshold that keeps a budget, and how distance grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from calibrate.derive.predict import (
    PolicyTokens,
    answer_divergence_estimate,
    is_bounded,
    predicted_tokens,
)
from calibrate.run.figure import SHARE, curve
from calibrate.run.records import AnswerCurve, OperatingPoint
from calibrate.run.traces import Trace
from calibrate.run.wording import UNKNOWN_ANSWERS
from hlmtheory.policies import GatedPolicy
from hlmtheory.risk import SkipAtoms
from hlmtheory.thresholds import Threshold

FAMILY = "answer"
NUM_TRIED, NUM_ROUNDS = 16, 3
"""Thresholds tried a round, and rounds: each looks between two neighbours of the one before."""
NUM_LENGTHS = 24
"""Lengths, at most, at which the distance of cut answers is kept."""


def answer_threshold(
    trace: Trace, policy: GatedPolicy, atoms: SkipAtoms, alpha: float
) -> Threshold:
    r"""The last threshold up to which answers stay within alpha of the server's.

    .. math:: u_{th} = \max\{u : E_Y[(1 - W_{u'})_+] \le \alpha\ \text{for every } u' \le u
              \text{ that was tried}\}

    docs/theory.md, (48). Thresholds are tried upwards and the search stops at the first that fails,
    for the distance need not rise with the threshold; then again between the two it stopped at. Of
    a policy that is known within bounds the upper bound is held against alpha.

    Parameters
    ----------
    trace : Trace
        Of the calibration.
    policy : GatedPolicy
    atoms : SkipAtoms
        What its gate sees of the trace.
    alpha : float
        Largest total variation of whole answers, in (0, 1).
    """

    def distance(threshold: float) -> float:
        tokens = predicted_tokens(trace, policy.with_threshold(threshold))
        return answer_divergence_estimate(tokens).value

    def found(value: float, feasible: bool, reason: str) -> Threshold:
        return Threshold(f"{FAMILY}-{alpha:g}", FAMILY, value, feasible, reason, alpha, "answers")

    scores = atoms.score[atoms.ends - 1]
    if np.isnan(distance(float(scores[0]))):
        return found(float("nan"), False, UNKNOWN_ANSWERS)
    top = policy.score.high if np.isfinite(policy.score.high) else float(scores[-1])
    if distance(top) <= alpha:
        return found(top, True, "budget is met even when every token is skipped")
    last = _last_within(scores, atoms.quantiles(NUM_TRIED), lambda u: distance(u) <= alpha)
    if last < 0:
        reason = (
            f"the least uncertain tokens (u = {scores[0]:.3g}) already bring answers "
            f"{distance(float(scores[0])):.3g} > {alpha:g} apart"
        )
        return found(float("nan"), False, reason)
    behind = scores[min(last + 1, len(scores) - 1)]  # the midpoint is furthest from both
    return found(float(scores[last] + behind) / 2, True, "")


def _last_within(scores: np.ndarray, first: np.ndarray, keeps: Callable[[float], bool]) -> int:
    """Place among the rising scores of the last one before the first that fails; -1 if none."""
    low, high = -1, len(scores)
    tried = np.searchsorted(scores, first)
    for _ in range(NUM_ROUNDS):
        for place in tried:
            if not keeps(float(scores[place])):
                high = int(place)
                break
            low = int(place)
        if high - low <= 1:
            break
        tried = np.unique(np.linspace(low, high, NUM_TRIED + 2).round().astype(int))
        tried = tried[(tried > low) & (tried < high)]
    return low


def answer_curve(
    point: OperatingPoint, tokens: PolicyTokens, confidence: float
) -> AnswerCurve | None:
    """Distance of a point's answers, cut after ever more tokens; None where it is not known."""
    longest = int(np.bincount(tokens.prompt_index).max())
    lengths = np.unique(np.geomspace(1, longest, NUM_LENGTHS).round().astype(int)).tolist()
    found = [answer_divergence_estimate(tokens, length) for length in lengths]
    if np.isnan(found[-1].value):
        return None
    return AnswerCurve(
        policy=point.policy,
        rule=point.rule,
        at_most=is_bounded(tokens),
        divergence=curve(lengths, found, confidence, *SHARE),
    )
