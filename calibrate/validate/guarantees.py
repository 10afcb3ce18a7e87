"""Do the guarantees hold on real tokens? Every rule derived many times, its risk then looked up.

A guarantee speaks of many calibrations, and there is one trace. Two ways to make many out of it:

- ``halves``: the prompts are split at random, the rule sees one half, and the mean over the other
  half stands in for the risk. That mean is itself an estimate, with a sampling error as large as
  the calibration's, and the two halves err in opposite directions, for together they are always the
  same prompts. So a rule that keeps its promise is seen to break it more often than it does.
- ``all-prompts``: the prompts of the trace *are* the population, and calibration prompts are drawn
  from it with replacement. The risk of a threshold is then known exactly, and draws are
  independent, which is all that (34) and (35) ask for. What it says is about this population.

Candidates are one fixed grid of thresholds, so that sums by prompt are worked out once for all
calibrations: quantiles of the mass, the last of which skips everything; for the rules that need a
grid which no calibration was looked at for, the score's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from calibrate.derive.certify import AUTO, certificates, grid_losses
from calibrate.derive.operating_points import plain_gate
from calibrate.derive.predict import policy_atoms
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import SHARE, mean_figure, share_figure
from calibrate.run.folder import provenance, read_record, write_record
from calibrate.run.records import GuaranteeRow, GuaranteesRecord
from hlmtheory.answer_cap import suggested_cap
from hlmtheory.guarantees import GridLosses, num_passing
from hlmtheory.kinds import Certified, TestMethod
from hlmtheory.risk import SkipAtoms, SkipRiskSums, skip_risk_sums
from hlmtheory.risk_tests import (
    betting_p_value,
    check_level,
    conformal_bound,
    p_value_of_counts,
    wsr_p_value,
)

RISKS = (0.005, 0.01, 0.02, 0.05)
NUM_DRAWS = 500
NUM_CANDIDATES = 4096
MAX_SUMS = 2**25
"""Sums by prompt and candidate that are kept at most: many prompts leave fewer candidates."""
MAX_DRAWN = 2**20
"""Prompts that are drawn at a time, over all calibrations of a block."""

Source = Literal["all-prompts", "halves"]
SOURCES: tuple[Source, ...] = ("all-prompts", "halves")


@dataclass(frozen=True)
class Rule:
    """One rule of the study.

    Attributes
    ----------
    name, family : str
        As rows carry them.
    certified : {"prompts", "tokens", "answers"}
        What its budget is about: (10), (33), (52).
    test : str or None
        Of Learn-then-Test.
    capped : bool
        Under the answer cap suggested for budget, confidence and number of prompts.
    on_grid : bool
        Whether its candidates are the score's fixed grid, tested in order.
    """

    name: str
    family: str
    certified: Certified
    test: TestMethod | None = None
    capped: bool = False
    on_grid: bool = True


RULES = (
    Rule("risk", "risk", "tokens", on_grid=False),
    Rule("conformal", "conformal", "prompts", on_grid=False),
    Rule("ltt", "ltt", "prompts", "betting", on_grid=False),
    Rule("ltt-wsr", "ltt", "prompts", "wsr"),
    Rule("ltt-tokens", "ltt", "tokens", "betting"),
    Rule("ltt-answers", "ltt", "answers", "betting"),
    Rule("ltt@cap", "ltt", "prompts", "betting", True),
    Rule("ltt-wsr@cap", "ltt", "prompts", "wsr", True),
    Rule("ltt-tokens@cap", "ltt", "tokens", "betting", True),
    Rule("asymptotic (t)", "asymptotic", "prompts", "t"),
)
CERTIFIED: dict[Certified, tuple[str, ...]] = {"prompts": (AUTO,), "tokens": (AUTO,), "answers": ()}
"""What certificates are about, and the caps that they are tried under."""
Grids = Callable[[Certified, float | None], GridLosses]
"""Losses on the score's grid by what is certified and answer cap."""

OnDraw = Callable[[int], None]


def study_guarantees(
    atoms: SkipAtoms,
    risks: Sequence[float] = RISKS,
    num_draws: int = NUM_DRAWS,
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
    on_draw: OnDraw | None = None,
    grids: Grids | None = None,
) -> tuple[GuaranteeRow, ...]:
    """Derive every rule at every budget from many calibrations and look its risk up.

    docs/theory.md, (10), (34), (35). All rules and budgets see the same calibrations. A calibration
    without a threshold skips nothing, so it has no risk and breaks no budget.

    Parameters
    ----------
    atoms : SkipAtoms
        Of a calibration with at least two prompts.
    risks : sequence of float
        Budgets alpha in (0, 1).
    num_draws : int
        Calibrations from each source, >= 1.
    confidence : float
        In (0, 1): 1 - delta of Learn-then-Test, and that of the intervals. These are for the draws
        alone: more draws make them shorter, more prompts do not.
    rng : numpy Generator, optional
        Seeded with 0 unless given.
    on_draw : callable, optional
        Told after each block how many calibrations more are done, of 2 x num_draws.
    grids : callable, optional
        For the rules that need them, which are left out otherwise; called once for each argument.

    Returns
    -------
    tuple of GuaranteeRow
        By source, rule and budget; without those under a cap where a budget needs none.

    Raises
    ------
    ValueError
        If an argument is out of range.
    UserError
        If there are fewer than two prompts.
    """
    for alpha in risks:
        check_level(alpha, "risks")
    check_level(confidence, "confidence")
    if num_draws < 1:
        raise ValueError(f"num_draws = {num_draws}: allowed is >= 1")
    if atoms.num_prompts < 2:
        raise UserError(f"{atoms.num_prompts} prompt: redraws need at least two; raise --limit")
    rng = np.random.default_rng(0) if rng is None else rng
    most = max(2, min(NUM_CANDIDATES, MAX_SUMS // atoms.num_prompts))
    sums = skip_risk_sums(atoms, atoms.quantiles(most))
    rules = RULES if grids is not None else [rule for rule in RULES if not rule.on_grid]
    grids = cache(grids) if grids is not None else grids
    rows: list[GuaranteeRow] = []
    for source in SOURCES:
        num = atoms.num_prompts if source == "all-prompts" else atoms.num_prompts // 2
        caps = {alpha: suggested_cap(alpha, 1 - confidence, num) for alpha in risks}
        found: dict[tuple[Rule, float], list[Outcomes]] = {
            (rule, alpha): []
            for rule in rules
            for alpha in risks
            if not rule.capped or (caps[alpha] or 0.0) > alpha
        }
        for drawn, others in _draws(source, atoms.num_prompts, num_draws, rng):
            for rule, alpha in found:
                if rule.on_grid and rule.test is not None and grids is not None:
                    grid = grids(rule.certified, caps[alpha] if rule.capped else None)
                    last = last_in_sequence(grid, alpha, 1 - confidence, rule.test, drawn)
                    held = grid.sums
                else:
                    last = last_passing(sums, rule.family, alpha, 1 - confidence, drawn)
                    held = sums
                found[rule, alpha].append(outcomes(held, rule.certified, last, others))
            if on_draw is not None:
                on_draw(len(drawn))
        rows += [
            _row(rule, alpha, caps[alpha], source, blocks, num, confidence)
            for (rule, alpha), blocks in found.items()
        ]
    return tuple(rows)


def write_guarantees(
    run: Path,
    score_name: str = "uncertainty",
    risks: Sequence[float] = RISKS,
    num_draws: int = NUM_DRAWS,
    confidence: float = 0.95,
    seed: int = 0,
    command: Sequence[str] = (),
    on_draw: OnDraw | None = None,
    replace: bool = False,
) -> GuaranteesRecord:
    """Write RUN/guarantees.json from the run's calibration trace and return its content.

    A study of other settings that the run holds is replaced on request only.

    Raises
    ------
    UsageError
        For an unknown score, or a learned one that the calibration did not fit, or a study of other
        settings that would be lost.
    UserError
        If the run has no trace, or one that lacks the score's columns.
    """
    if not replace:
        _check_same_study(run, score_name, risks, num_draws, seed)
    trace, gate, calibration = plain_gate(run, score_name)
    atoms = policy_atoms(trace, gate)
    most = calibration.settings.max_new_tokens

    def grids(certified: Certified, cap: float | None) -> GridLosses:
        return grid_losses(trace, dataclasses.replace(gate, cap=cap), certified, most)

    bounded = bool(np.isfinite(gate.score.low))
    rng = np.random.default_rng(seed)
    record = GuaranteesRecord(
        score=gate.score.name,
        num_draws=num_draws,
        num_prompts=trace.num_prompts,
        num_tokens=trace.num_tokens,
        confidence=confidence,
        seed=seed,
        provenance=provenance(command),
        certificates=tuple(
            one
            for certified, caps in CERTIFIED.items()
            for one in certificates(trace, gate, risks, confidence, certified, caps, most)
        )
        if bounded
        else (),
        rows=study_guarantees(
            atoms, risks, num_draws, confidence, rng, on_draw, grids if bounded else None
        ),
    )
    write_record(run, record)
    return record


def _check_same_study(
    run: Path, score: str, risks: Sequence[float], num_draws: int, seed: int
) -> None:
    """Raise UsageError where the run holds a study of other settings: it is not overwritten."""
    if not (run / GuaranteesRecord.file_name).is_file():
        return
    held = read_record(run, GuaranteesRecord)
    budgets = tuple(sorted({row.budget for row in held.rows}))
    before = (held.score, budgets, held.num_draws, held.seed)
    now = (score, tuple(sorted(set(risks))), num_draws, seed)
    for name, old, new in zip(
        ("--score", "--risk", "--num-draws", "--seed"), before, now, strict=True
    ):
        if old != new:
            raise UsageError(
                f"{name} {new}: {held.file_name} in {run} has {old}; --replace replaces it"
            )


def _draws(
    source: Source, num_prompts: int, num_draws: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Prompts of each calibration (D, n), and those that its risk is taken over; None for all."""
    block = max(1, MAX_DRAWN // num_prompts)
    for begin in range(0, num_draws, block):
        num = min(block, num_draws - begin)
        if source == "all-prompts":
            yield rng.integers(num_prompts, size=(num, num_prompts)), None
        else:
            order = rng.permuted(np.tile(np.arange(num_prompts), (num, 1)), axis=1)
            yield order[:, : num_prompts // 2], order[:, num_prompts // 2 :]


def last_passing(
    sums: SkipRiskSums, family: str, alpha: float, delta: float, drawn: np.ndarray
) -> np.ndarray:
    """The last threshold of the grid that a rule lets pass in each calibration, (D,); -1 for none.

    The rules of :mod:`hlmtheory.thresholds` and :mod:`hlmtheory.guarantees` on the drawn prompts
    with the grid as candidates, many calibrations at once; a test holds the two together.

    Parameters
    ----------
    sums : SkipRiskSums
        Of all prompts.
    family : {"risk", "conformal", "ltt"}
    alpha, delta : float
    drawn : int array (D, n)
        Prompts of each calibration; one may occur several times.
    """
    lengths = sums.num_tokens[drawn]

    def passes(place: np.ndarray) -> np.ndarray:
        rejected = sums.rejected[drawn, place[:, None]]  # (D, n)
        if family == "risk":
            return np.asarray(rejected.sum(axis=1) / lengths.sum(axis=1) <= alpha)
        losses = np.minimum(rejected / np.maximum(lengths, 1.0), 1.0)
        if family == "conformal":
            return conformal_bound(losses.mean(axis=1), drawn.shape[1]) <= alpha
        return betting_p_value(losses, alpha) <= delta

    low = np.full(len(drawn), -1)
    high = np.full(len(drawn), len(sums.thresholds))
    while np.any(high - low > 1):
        middle = (low + high) // 2
        passed = passes(np.maximum(middle, 0)) & (high - low > 1)
        # Where both have met, middle is low, and stays it.
        low, high = (
            np.where(passed, middle, low),
            np.where(passed, high, np.maximum(middle, low + 1)),
        )
    return low


def last_in_sequence(
    grid: GridLosses, alpha: float, delta: float, test: TestMethod, drawn: np.ndarray
) -> np.ndarray:
    """The last threshold before the first that a test does not reject, (D,); -1 for none.

    :func:`hlmtheory.guarantees.fixed_sequence_threshold` for many calibrations at once; a test
    holds the two together. A draw is its counts of prompts wherever their order does not matter.

    Parameters
    ----------
    grid : GridLosses
        Of all prompts.
    alpha, delta : float
    test : str
    drawn : int array (D, n)
    """
    losses, level = grid.losses(alpha)  # (P, G)
    if level >= 1:
        return np.full(len(drawn), losses.shape[1] - 1)
    if test == "wsr":
        found = np.stack([wsr_p_value(losses[one].T, level, delta) for one in drawn])
    else:
        counts = np.stack([np.bincount(one, minlength=len(losses)) for one in drawn]).astype(float)
        found = p_value_of_counts(losses, counts, level, test)
    return num_passing(found <= delta) - 1


@dataclass(frozen=True)
class Outcomes:
    """A block of calibrations: whether there is a threshold, and what it does, (D,) each."""

    feasible: np.ndarray
    risk: np.ndarray
    skip_rate: np.ndarray


def outcomes(
    sums: SkipRiskSums, certified: Certified, last: np.ndarray, others: np.ndarray | None
) -> Outcomes:
    """Risk of each calibration's threshold as it is certified, and its skip rate over tokens.

    Parameters
    ----------
    sums : SkipRiskSums
    certified : {"tokens", "prompts", "answers"}
    last : int array (D,)
        Of :func:`last_passing` or :func:`last_in_sequence`.
    others : int array (D, m) or None
        Prompts that both are taken over; all of them where None.
    """
    feasible, place = last >= 0, np.maximum(last, 0)
    if others is None:
        others = np.arange(len(sums.num_tokens))[None, :]
    lengths = sums.num_tokens[others]
    skipped, rejected = (part[others, place[:, None]] for part in (sums.skipped, sums.rejected))
    skip_rate = skipped.sum(axis=1) / lengths.sum(axis=1)
    if certified == "tokens":
        risk = rejected.sum(axis=1) / lengths.sum(axis=1)
    elif certified == "prompts":
        risk = (rejected / np.maximum(lengths, 1.0)).mean(axis=1)
    else:
        risk = rejected.mean(axis=1)
    return Outcomes(feasible, np.where(feasible, risk, 0.0), np.where(feasible, skip_rate, 0.0))


def _row(
    rule: Rule,
    alpha: float,
    cap: float | None,
    source: Source,
    blocks: Sequence[Outcomes],
    num_calibration: int,
    confidence: float,
) -> GuaranteeRow:
    feasible, risk, skip_rate = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("feasible", "risk", "skip_rate")
    )
    # A risk that equals its budget may come out a rounding error above it.
    violations = int(np.sum(risk > alpha * (1 + 1e-12)))
    return GuaranteeRow(
        rule=rule.name,
        family=rule.family,
        test=rule.test,
        budget=alpha,
        cap=cap if rule.capped else None,
        source=source,
        weighting=rule.certified,
        num_draws=len(risk),
        num_calibration_prompts=num_calibration,
        violation_share=share_figure(violations, len(risk), confidence),
        infeasible_share=share_figure(int(np.sum(~feasible)), len(risk), confidence),
        skip_rate=mean_figure(skip_rate, confidence, "", *SHARE),
        risk=mean_figure(risk, confidence, "", *SHARE),
    )
