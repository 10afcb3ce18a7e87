"""Do the guarantees hold on real tokens? Every rule derived many times, its risk then looked up.

A guarantee speaks of many calibrations, and there is one trace. Two ways to make many out of it:

- ``halves``: the prompts are split at random, the rule sees one half, and the mean over the other
  half stands in for the risk. That mean is itself an estimate, with a sampling error as large as
  the calibration's, and the two halves err in opposite directions, for together they are always the
  same prompts. So a rule that keeps its promise is seen to break it more often than it does.
- ``all-prompts``: the prompts of the trace *are* the population, and calibration prompts are drawn
  from it with replacement. The risk of a threshold is then known exactly, and draws are
  independent, which is all that (34) and (35) ask for. What it says is about this population.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calibrate.run.errors import UserError
from calibrate.run.figure import mean_figure, share_figure
from calibrate.run.folder import Figure, provenance, write_json
from calibrate.run.traces import Trace, read_trace, shard_paths
from hlmtheory.domain import check_unit_interval
from hlmtheory.risk import Weighting
from hlmtheory.risk_tests import betting_p_value, check_level, conformal_bound

SPLITS_NAME = "splits.json"
RISKS = (0.005, 0.01, 0.02, 0.05)
NUM_SPLITS = 500
MAX_KEPT = 4096
"""Thresholds whose sums by prompt are kept: a bisection passes the same ones again and again."""

Source = Literal["all-prompts", "halves"]
SOURCES: tuple[Source, ...] = ("all-prompts", "halves")
RULES: dict[str, Weighting] = {"risk": "tokens", "conformal": "prompts", "ltt": "prompts"}
"""Rules as operating points name them, with the mean that each of them is about: (10), (33)."""


@dataclass(frozen=True)
class SplitRow:
    """How one rule at one budget did over many calibrations.

    Attributes
    ----------
    rule : str
        One of RULES; `risk` is the plug-in of docs/theory.md, (10).
    budget : float
        alpha.
    source : {"all-prompts", "halves"}
        Where calibrations and the true risk come from: the module's head.
    weighting : {"tokens", "prompts"}
        Of the risk, the rule's own.
    num_draws, num_calibration_prompts : int
        Calibrations, and prompts in each.
    violation_share, infeasible_share : Figure
        Shares of the calibrations whose threshold has a risk above the budget, and that have no
        threshold: those skip nothing, so they have no risk. Exact binomial intervals.
    skip_rate, risk : Figure
        Means over calibrations, infeasible ones with 0, of the skip rate over tokens and of the
        true risk.
    """

    rule: str
    budget: float
    source: Source
    weighting: Weighting
    num_draws: int
    num_calibration_prompts: int
    violation_share: Figure
    infeasible_share: Figure
    skip_rate: Figure
    risk: Figure


def split_guarantees(
    trace: Trace,
    risks: Sequence[float],
    num_splits: int,
    confidence: float,
    rng: np.random.Generator,
) -> tuple[SplitRow, ...]:
    """Derive every rule at every budget from many calibrations and look its risk up.

    docs/theory.md, (10), (34), (35). All rules and budgets see the same calibrations.

    Parameters
    ----------
    trace : Trace
        `uncertainty` and `rejection_prob` of a calibration; at least two prompts.
    risks : sequence of float
        Budgets alpha in (0, 1).
    num_splits : int
        Calibrations from each source, >= 1.
    confidence : float
        In (0, 1): 1 - delta of Learn-then-Test, and that of the intervals. These are for the draws
        alone: more draws make them shorter, more prompts do not.
    rng : numpy Generator

    Returns
    -------
    tuple of SplitRow
        By source, rule and budget.

    Raises
    ------
    ValueError
        If an argument is out of range.
    UserError
        If the trace has fewer than two prompts.
    """
    for alpha in risks:
        check_level(alpha, "risks")
    check_level(confidence, "confidence")
    if num_splits < 1:
        raise ValueError(f"num_splits = {num_splits}: allowed is >= 1")
    if trace.num_prompts < 2:
        raise UserError(f"{trace.num_prompts} prompt: splits need at least two; raise --limit")
    tokens = PromptTokens(
        trace["uncertainty"], trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )
    rows: list[SplitRow] = []
    for source in SOURCES:
        draws = list(_draws(source, trace.num_prompts, num_splits, rng))
        for rule, weighting in RULES.items():
            for alpha in risks:
                outcomes = [
                    outcome(tokens, rule, alpha, 1 - confidence, drawn, truth)
                    for drawn, truth in draws
                ]
                num_calibration = int(draws[0][0].sum())
                rows.append(
                    _row(rule, alpha, source, weighting, outcomes, num_calibration, confidence)
                )
    return tuple(rows)


def write_splits(
    run: Path,
    risks: Sequence[float] = RISKS,
    num_splits: int = NUM_SPLITS,
    confidence: float = 0.95,
    seed: int = 0,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Write RUN/splits.json from the run's calibration trace and return its content."""
    trace = read_trace(shard_paths(run), ["uncertainty", "rejection_prob"])
    rows = split_guarantees(trace, risks, num_splits, confidence, np.random.default_rng(seed))
    result: dict[str, Any] = {
        "num_splits": num_splits,
        "num_prompts": trace.num_prompts,
        "num_tokens": trace.num_tokens,
        "confidence": confidence,
        "seed": seed,
        **provenance(command),
        "rows": [asdict(row) for row in rows],
    }
    write_json(run / SPLITS_NAME, result)
    return result


@dataclass(frozen=True)
class Outcome:
    """One calibration: its threshold, None if infeasible, and what the threshold truly does."""

    threshold: float | None
    risk: float
    skip_rate: float


class PromptTokens:
    """Tokens of the prompts in order of their score: sums by prompt at any threshold.

    Parameters
    ----------
    score, rejection_prob : float array (N,)
        In [0, 1].
    prompt_index : int array (N,)
    num_prompts : int
    """

    def __init__(
        self,
        score: np.ndarray,
        rejection_prob: np.ndarray,
        prompt_index: np.ndarray,
        num_prompts: int,
    ) -> None:
        check_unit_interval(score, "score")
        check_unit_interval(rejection_prob, "rejection_prob")
        order = np.argsort(score, kind="stable")
        self.score = np.asarray(score, dtype=np.float64)[order]
        self.rejection_prob = np.asarray(rejection_prob, dtype=np.float64)[order]
        self.prompt_index = prompt_index[order]
        self.num_tokens = np.bincount(prompt_index, minlength=num_prompts)
        # Tokens skipped when the threshold is at each score that occurs, (M,).
        self.num_below = np.flatnonzero(np.append(np.diff(self.score) > 0, True)) + 1
        self._kept: dict[int, np.ndarray] = {}

    def rejected(self, num_below: int) -> np.ndarray:
        """Sum of beta over the `num_below` least uncertain tokens, by prompt, (P,)."""
        found = self._kept.get(num_below)
        if found is None:
            found = np.bincount(
                self.prompt_index[:num_below],
                weights=self.rejection_prob[:num_below],
                minlength=len(self.num_tokens),
            )
            if len(self._kept) < MAX_KEPT:
                self._kept[num_below] = found
        return found

    def losses(self, num_below: int) -> np.ndarray:
        """Loss of each prompt, its own mean over tokens: docs/theory.md, (33)."""
        return np.minimum(self.rejected(num_below) / np.maximum(self.num_tokens, 1), 1.0)

    def last_passing(self, passes: Callable[[int], bool], drawn: np.ndarray) -> float | None:
        """The largest threshold that passes, halfway to the next score drawn; None without one.

        Parameters
        ----------
        passes : callable
            Whether skipping that many of the least uncertain tokens passes; monotone.
        drawn : int array (P,)
            How often the calibration has each prompt.
        """
        low, high = -1, len(self.num_below)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if passes(int(self.num_below[middle])) else (low, middle)
        if low == len(self.num_below) - 1:
            return max(1.0, float(self.score[-1]))
        below = self.num_below[low] if low >= 0 else 0
        inside = np.flatnonzero(drawn[self.prompt_index[:below]])
        if len(inside) == 0:
            return None
        # The first score that fails is one that was drawn: nothing else changes what passes.
        return float((self.score[inside[-1]] + self.score[below]) / 2)


def outcome(
    tokens: PromptTokens,
    rule: str,
    alpha: float,
    delta: float,
    drawn: np.ndarray,
    truth: np.ndarray,
) -> Outcome:
    """Derive one rule from one calibration and look up what its threshold does.

    The same thresholds as :mod:`hlmtheory.thresholds` and :mod:`hlmtheory.guarantees` give on the
    drawn prompts, from sums that all calibrations share; a test holds the two together.

    Parameters
    ----------
    tokens : PromptTokens
    rule : str
        One of RULES.
    alpha, delta : float
    drawn, truth : int array (P,)
        How often each prompt is in the calibration, and in the population of the risk.
    """
    num_drawn = int(drawn.sum())
    num_tokens = float(drawn @ tokens.num_tokens)

    def passes(num_below: int) -> bool:
        if rule == "risk":
            return bool(drawn @ tokens.rejected(num_below) <= alpha * num_tokens)
        losses = tokens.losses(num_below)
        if rule == "conformal":
            return bool(conformal_bound(drawn @ losses / num_drawn, num_drawn) <= alpha)
        return bool(betting_p_value(np.repeat(losses, drawn), alpha) <= delta)

    threshold = tokens.last_passing(passes, drawn)
    if threshold is None:
        return Outcome(None, 0.0, 0.0)
    num_below = int(np.searchsorted(tokens.score, threshold, side="right"))
    total = float(truth @ tokens.num_tokens)
    skipped = float(truth[tokens.prompt_index[:num_below]].sum())
    if RULES[rule] == "tokens":
        risk = float(truth @ tokens.rejected(num_below)) / total
    else:
        risk = float(truth @ tokens.losses(num_below)) / float(truth.sum())
    return Outcome(threshold, risk, skipped / total)


def _draws(
    source: Source, num_prompts: int, num_draws: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts of each calibration, and those that its risk is taken over, as counts (P,)."""
    everything = np.ones(num_prompts, dtype=np.int64)
    for _ in range(num_draws):
        if source == "all-prompts":
            yield rng.multinomial(num_prompts, everything / num_prompts), everything
        else:
            half = np.zeros_like(everything)
            half[rng.permutation(num_prompts)[: num_prompts // 2]] = 1
            yield half, everything - half


def _row(
    rule: str,
    alpha: float,
    source: Source,
    weighting: Weighting,
    outcomes: Sequence[Outcome],
    num_calibration: int,
    confidence: float,
) -> SplitRow:
    risk = np.array([found.risk for found in outcomes])
    # A risk that equals its budget may come out a rounding error above it.
    violations = int(np.sum(risk > alpha * (1 + 1e-12)))
    infeasible = sum(found.threshold is None for found in outcomes)
    return SplitRow(
        rule,
        alpha,
        source,
        weighting,
        len(outcomes),
        num_calibration,
        share_figure(violations, len(outcomes), confidence),
        share_figure(infeasible, len(outcomes), confidence),
        mean_figure(np.array([found.skip_rate for found in outcomes]), confidence),
        mean_figure(risk, confidence),
    )
