"""`hlm plan`: how many prompts a budget or an interval needs, from the prompts that a run has.

The run's prompts are the population: calibrations of any size are drawn from them with replacement,
and the least size is taken at which the test passes often enough. What these prompts have not seen,
the plan does not know: after a calibration without a single loss it is an
optimist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy import special

from calibrate.derive.certify import CAPPED_TESTS, TESTS, grid_losses, holds
from calibrate.derive.operating_points import plain_gate
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import (
    PlanInterval,
    PlanRecord,
    PlanRow,
    RunRecord,
)
from hlmtheory.answer_cap import suggested_cap
from hlmtheory.clusters import ratio_of_sums
from hlmtheory.guarantees import GridLosses
from hlmtheory.kinds import Certified, TestMethod
from hlmtheory.risk_tests import (
    MONOTONE,
    conformal_bound,
    conformal_prompts_needed,
    least_number,
    p_value_of_counts,
    prompts_needed,
    wsr_p_value,
)

NUM_DRAWS = 200
MOST = 30_000
"""Prompts beyond which a plan gives up."""
SIZES = np.unique(np.ceil(np.geomspace(10, MOST, 100)).astype(int))
"""Sizes that are tried, 8 % apart."""
GOAL = 0.5
"""Share of the budget that the run's threshold spends, unless a skip rate is asked for."""


def plan_run(
    run: Path,
    budgets: Sequence[float],
    confidence: float = 0.95,
    power: float = 0.8,
    certified: Certified = "prompts",
    skip_rate: float | None = None,
    width: float = 0.05,
    score_name: str = "uncertainty",
    seed: int = 0,
) -> PlanRecord:
    """Prompts for certificates and intervals, and what they take on this machine.

    docs/theory.md, (53).

    Parameters
    ----------
    run : Path
        A calibrated run, the pilot.
    budgets : sequence of float
    confidence, power : float
        That of the certificate, and the chance of getting it.
    certified : {"prompts", "tokens", "answers"}
    skip_rate : float, optional
        That the certified threshold is to have at least; by default that of the threshold at which
        the pilot spends half the budget.
    width : float
        Of the interval of the skip rate, from end to end.
    score_name : str
    seed : int

    Raises
    ------
    UsageError, UserError
        If the run or the score do not allow it.
    """
    info = read_record(run, RunRecord)
    trace, policy, calibration = plain_gate(run, score_name)
    most = calibration.settings.max_new_tokens
    if trace.num_prompts < 2:
        raise UserError(f"{trace.num_prompts} prompt: a plan needs at least two; raise --limit")

    @cache
    def grid(cap: float | None) -> GridLosses:
        return grid_losses(trace, replace(policy, cap=cap), certified, most)

    plain, risks, filler = grid(None).sums, grid(None).risks(), grid(None).filler
    rates = plain.skipped.sum(axis=0) / plain.num_tokens.sum()
    ms_per_prompt = 1e3 * info.wall_s / info.num_prompts
    rows, intervals = [], []
    delta = 1 - confidence
    for alpha in budgets:
        place = max(int(np.searchsorted(risks, GOAL * alpha, side="right")) - 1, 0)
        goal = float(rates[place]) if skip_rate is None else skip_rate
        for name, test, capped in (
            *((one, one, False) for one in TESTS),
            *((f"{one}@cap", one, True) for one in CAPPED_TESTS if certified != "answers"),
            ("conformal", None, False),
        ):
            found = least_size(grid, alpha, delta, power, test, capped, goal, seed)
            num, cap = found or (None, None)
            rows.append(
                PlanRow(
                    budget=alpha,
                    rule=name,
                    test=test,
                    guaranteed=test is not None and holds(test, trace.categories),
                    cap=cap,
                    goal_skip_rate=goal,
                    without_loss=_without_loss(alpha, delta, test, capped, filler),
                    num_prompts=num,
                    wall_s=None if num is None else num * ms_per_prompt / 1e3,
                )
            )
        for metric, sums, wide in (
            ("skip_rate", plain.skipped, width),
            ("rejection_risk", plain.rejected, alpha),
        ):
            if metric == "rejection_risk" and certified == "answers":
                continue
            error = ratio_of_sums(sums[:, place], plain.num_tokens).standard_error
            num = prompts_for_width(error, trace.num_prompts, wide, confidence)
            intervals.append(
                PlanInterval(
                    metric=metric,
                    budget=alpha,
                    width=wide,
                    num_prompts=num,
                    wall_s=num * ms_per_prompt / 1e3,
                )
            )
    return PlanRecord(
        num_prompts=trace.num_prompts,
        num_tokens=trace.num_tokens,
        score=policy.score.name,
        certified=certified,
        confidence=confidence,
        power=power,
        most=MOST,
        ms_per_prompt=ms_per_prompt,
        rows=tuple(rows),
        intervals=tuple(intervals),
    )


def least_size(
    grid: Callable[[float | None], GridLosses],
    alpha: float,
    delta: float,
    power: float,
    test: TestMethod | None,
    capped: bool,
    goal: float,
    seed: int,
) -> tuple[int, float | None] | None:
    """The least of SIZES that certifies the goal with this power, and its cap; None beyond MOST.

    Certified is the last of the thresholds that pass in a row, so all up to the first with this
    skip rate have to. Skip rates rise with the threshold, under a cap too; losses under one need
    not.
    """
    for num in SIZES.tolist():
        cap = suggested_cap(alpha, delta, num) if capped else None
        held = grid(cap if cap is None or cap > alpha else None)
        losses, level = held.losses(alpha)
        rates = held.sums.skipped.sum(axis=0) / held.sums.num_tokens.sum()
        reach = np.flatnonzero(rates >= goal)
        if (
            len(reach)
            and passing_share(losses[:, : reach[0] + 1], level, delta, test, num, seed) >= power
        ):
            return num, held.cap
    return None


def passing_share(
    losses: np.ndarray,
    level: float,
    delta: float,
    test: TestMethod | None,
    num_prompts: int,
    seed: int = 0,
) -> float:
    """Share of calibrations of so many prompts at which every threshold passes.

    Drawn from the losses (P, G) of these prompts at all thresholds of a grid up to one: tested in
    order until the first that fails, that one is certified only if none before it fails. `test`
    None is the conformal rule, whose alpha is the level.
    """
    rng = np.random.default_rng(seed)
    if level >= 1:
        return 1.0
    if test == "wsr":
        rows = rng.integers(len(losses), size=(NUM_DRAWS, num_prompts))
        for place in np.argsort(-losses.mean(axis=0), kind="stable"):  # the likeliest to fail first
            if not len(rows):
                break
            rows = rows[wsr_p_value(losses[rows, place], level, delta) <= delta]
        return len(rows) / NUM_DRAWS
    if test is None or test in MONOTONE:
        losses = losses[:, thresholds_that_decide(losses)]
    counts = rng.multinomial(num_prompts, np.full(len(losses), 1 / len(losses)), size=NUM_DRAWS)
    if test is None:
        passed = conformal_bound(counts @ losses / num_prompts, num_prompts) <= level
    else:
        passed = p_value_of_counts(losses, counts, level, test) <= delta
    return float(np.mean(passed.all(axis=1)))


def thresholds_that_decide(losses: np.ndarray) -> list[int]:
    """Thresholds without those at which no prompt loses more than at another, of losses (P, G).

    A test that rises with every loss passes there wherever it passes at the other. Without an
    answer cap the last one is left alone.
    """
    kept: list[int] = []
    for place in reversed(range(losses.shape[1])):
        if not np.all(losses[:, [place]] <= losses[:, kept], axis=0).any():
            kept.append(place)
    return kept


def _without_loss(
    alpha: float, delta: float, test: TestMethod | None, capped: bool, filler: float
) -> int:
    """Prompts of which not one may lose anything; under the largest cap that is suggested for."""
    if test is None:
        return conformal_prompts_needed(alpha, filler)
    if not capped:
        return prompts_needed(alpha, delta, test, filler)
    for num in SIZES.tolist():
        cap = suggested_cap(alpha, delta, num) or 1.0
        if cap > alpha and prompts_needed(alpha / cap, delta, test, filler) <= num:
            return int(num)
    return MOST


def prompts_for_width(error: float, num_prompts: int, width: float, confidence: float) -> int:
    r"""Least n >= 2 at which the interval is no wider, its spread that of the pilot.

    .. math:: 2\, t_{n-1}\, \mathrm{se} \sqrt{N/n} \le w

    with se of the pilot's N prompts and Student's t as in the interval itself; the left side falls
    with n. docs/theory.md, (53).
    """

    def narrow(num: int) -> bool:
        quantile = float(special.stdtrit(num - 1, 0.5 + confidence / 2))
        return bool(2 * quantile * error * (num_prompts / num) ** 0.5 <= width)

    return least_number(narrow, 2)
