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
calibrations: quantiles of the mass, the last of which skips everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from calibrate.derive.operating_points import score_of
from calibrate.derive.predict import CHUNK
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import mean_figure, share_figure
from calibrate.run.folder import provenance, read_record, write_record
from calibrate.run.records import CalibrationRecord, GuaranteeRow, GuaranteesRecord
from calibrate.run.traces import read_trace, shard_paths
from hlmtheory.risk import SkipAtoms, SkipRiskSums, Weighting, skip_risk_sums
from hlmtheory.risk_tests import betting_p_value, check_level, conformal_bound
from hlmtheory.scores import LearnedScore

RISKS = (0.005, 0.01, 0.02, 0.05)
NUM_DRAWS = 500
NUM_CANDIDATES = 4096
MAX_SUMS = 2**25
"""Sums by prompt and candidate that are kept at most: many prompts leave fewer candidates."""
MAX_DRAWN = 2**20
"""Prompts that are drawn at a time, over all calibrations of a block."""

Source = Literal["all-prompts", "halves"]
SOURCES: tuple[Source, ...] = ("all-prompts", "halves")
FAMILIES: dict[str, Weighting] = {"risk": "tokens", "conformal": "prompts", "ltt": "prompts"}
"""Rules as operating points name them, with the mean that each of them is about: (10), (33)."""

OnDraw = Callable[[int], None]


def study_guarantees(
    atoms: SkipAtoms,
    risks: Sequence[float] = RISKS,
    num_draws: int = NUM_DRAWS,
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
    on_draw: OnDraw | None = None,
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

    Returns
    -------
    tuple of GuaranteeRow
        By source, family and budget.

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
    rows: list[GuaranteeRow] = []
    for source in SOURCES:
        found: dict[tuple[str, float], list[Outcomes]] = {
            (family, alpha): [] for family in FAMILIES for alpha in risks
        }
        num_calibration = 0
        for drawn, others in _draws(source, atoms.num_prompts, num_draws, rng):
            num_calibration = drawn.shape[1]
            for family, alpha in found:
                last = last_passing(sums, family, alpha, 1 - confidence, drawn)
                found[family, alpha].append(outcomes(sums, FAMILIES[family], last, others))
            if on_draw is not None:
                on_draw(len(drawn))
        rows += [
            _row(family, alpha, source, blocks, num_calibration, confidence)
            for (family, alpha), blocks in found.items()
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
    learned = None
    if score_name == LearnedScore.name:
        learned = read_record(run, CalibrationRecord).learned
    score = score_of(score_name, learned)
    trace = read_trace(shard_paths(run))
    blocks = [slice(begin, begin + CHUNK) for begin in range(0, trace.num_tokens, CHUNK)]
    try:
        pieces = [score.atoms(trace.step(rows)) for rows in blocks]
    except ValueError as error:
        raise UserError(f"RUN {run}: {error}; calibrate with --trace full") from None
    found, mass, rejection = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    atoms = SkipAtoms.of_candidates(found, mass, rejection, trace.prompt_index, trace.num_prompts)
    rng = np.random.default_rng(seed)
    record = GuaranteesRecord(
        score=score.name,
        num_draws=num_draws,
        num_prompts=trace.num_prompts,
        num_tokens=trace.num_tokens,
        confidence=confidence,
        seed=seed,
        provenance=provenance(command),
        rows=study_guarantees(atoms, risks, num_draws, confidence, rng, on_draw),
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
    family : str
        One of FAMILIES.
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


@dataclass(frozen=True)
class Outcomes:
    """A block of calibrations: whether there is a threshold, and what it does, (D,) each."""

    feasible: np.ndarray
    risk: np.ndarray
    skip_rate: np.ndarray


def outcomes(
    sums: SkipRiskSums, weighting: Weighting, last: np.ndarray, others: np.ndarray | None
) -> Outcomes:
    """Risk of each calibration's threshold under a weighting, and its skip rate over tokens.

    Parameters
    ----------
    sums : SkipRiskSums
    weighting : {"tokens", "prompts"}
    last : int array (D,)
        Of :func:`last_passing`.
    others : int array (D, m) or None
        Prompts that both are taken over; all of them where None.
    """
    feasible, place = last >= 0, np.maximum(last, 0)
    if others is None:
        skip_rate, risk = sums.curve()[0][place], sums.curve(weighting)[1][place]
    else:
        lengths = sums.num_tokens[others]
        skipped, rejected = (part[others, place[:, None]] for part in (sums.skipped, sums.rejected))
        skip_rate = skipped.sum(axis=1) / lengths.sum(axis=1)
        risk = rejected.sum(axis=1) / lengths.sum(axis=1)
        if weighting == "prompts":
            risk = (rejected / np.maximum(lengths, 1.0)).mean(axis=1)
    return Outcomes(feasible, np.where(feasible, risk, 0.0), np.where(feasible, skip_rate, 0.0))


def _row(
    family: str,
    alpha: float,
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
        family=family,
        budget=alpha,
        source=source,
        weighting=FAMILIES[family],
        num_draws=len(risk),
        num_calibration_prompts=num_calibration,
        violation_share=share_figure(violations, len(risk), confidence),
        infeasible_share=share_figure(int(np.sum(~feasible)), len(risk), confidence),
        skip_rate=mean_figure(skip_rate, confidence),
        risk=mean_figure(risk, confidence),
    )
