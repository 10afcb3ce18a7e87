"""Guarantees over many calibrations: on tokens whose risk is known, and against the rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from paper_records import calibration_record, run_record
from scipy import stats

from calibrate.derive.plan import plan_run
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import read_record, write_record
from calibrate.run.records import GuaranteesRecord
from calibrate.run.traces import write_shard
from calibrate.validate import guarantees as study
from calibrate.validate.guarantees import (
    RULES,
    SOURCES,
    last_in_sequence,
    last_passing,
    outcomes,
    study_guarantees,
    write_guarantees,
)
from hlmtheory.guarantees import (
    GridLosses,
    conformal_threshold,
    fixed_sequence_threshold,
    learn_then_test_threshold,
)
from hlmtheory.risk import SkipAtoms, SkipRiskSums, skip_risk_sums
from hlmtheory.steps import Axes
from hlmtheory.thresholds import risk_budget_threshold

NUM_PROMPTS = 150
ALPHA = 0.05


def synthetic_atoms(
    rng: np.random.Generator, num_prompts: int = NUM_PROMPTS, most: int = 40, ties: int = 9
) -> SkipAtoms:
    """Prompts of various lengths whose risk differs: beta rises with u and with the prompt.

    Every draft is two candidates of random mass.
    """
    lengths = rng.integers(most // 2, most + 1, size=num_prompts)
    index = np.repeat(np.arange(num_prompts), lengths)
    score = np.round(rng.beta(0.7, 0.7, size=(len(index), 2)), ties)
    mass = rng.dirichlet([1.0, 1.0], size=len(index))
    level = rng.uniform(0.2, 1.2, size=num_prompts)[index, None]
    beta = np.clip(score * level * rng.uniform(0, 1, size=score.shape), 0, 1)
    return SkipAtoms.of_candidates(score, mass, mass * beta, index, num_prompts)


def drawn_atoms(atoms: SkipAtoms, drawn: np.ndarray) -> SkipAtoms:
    """The tokens of a calibration as rules take them: a prompt drawn twice is two."""
    rows = [np.flatnonzero(atoms.prompt_index == prompt) for prompt in drawn]
    index = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    flat = np.concatenate(rows)
    return SkipAtoms(
        atoms.score[flat], atoms.mass[flat], atoms.rejection[flat], index, atoms.num_tokens[drawn]
    )


CLASSIC = [rule for rule in RULES if not rule.on_grid]


@pytest.mark.parametrize("family", [rule.family for rule in CLASSIC])
@pytest.mark.parametrize("alpha", [0.002, 0.03, 0.2, 0.9])
def test_thresholds_are_those_of_the_rules(
    rng: np.random.Generator, family: str, alpha: float
) -> None:
    """Halves and draws with replacement; budgets from infeasible to skipping everything."""
    atoms = synthetic_atoms(rng, 30, 12, ties=2)
    sums = skip_risk_sums(atoms, atoms.quantiles(40))
    rules = {
        "risk": lambda a: risk_budget_threshold(a, alpha, thresholds=sums.thresholds),
        "conformal": lambda a: conformal_threshold(a, alpha, thresholds=sums.thresholds),
        "ltt": lambda a: learn_then_test_threshold(a, alpha, 0.05, thresholds=sums.thresholds),
    }
    for drawn in (
        rng.integers(30, size=(8, 30)),
        rng.permuted(np.tile(np.arange(30), (8, 1)), axis=1)[:, :15],
    ):
        found = last_passing(sums, family, alpha, 0.05, drawn)
        for prompts, last in zip(drawn, found, strict=True):
            expected = rules[family](drawn_atoms(atoms, prompts))
            assert (last >= 0) == expected.feasible
            if expected.feasible:
                assert sums.thresholds[last] == expected.value


@pytest.mark.parametrize("test", ["betting", "wsr", "hoeffding-bentkus", "t"])
@pytest.mark.parametrize(
    ("certified", "cap"),
    [("tokens", None), ("tokens", 0.4), ("prompts", None), ("prompts", 0.4), ("answers", None)],
)
def test_sequences_are_those_of_the_rule(rng: np.random.Generator, test, certified, cap) -> None:
    """Many calibrations at once against one at a time, with losses that rise and fall."""
    lengths = rng.integers(5, 13, size=40).astype(float)
    most = 1.0 if certified == "answers" else (cap or 1.0) * lengths[:, None]
    sparse = rng.uniform(size=(40, 25)) < np.linspace(0, 0.6, 25)
    rejected = most * rng.beta(0.3, 3, size=(40, 25)) * sparse
    rejected[3, 20] = np.max(most)  # a stake lost whole
    sums = SkipRiskSums(np.linspace(0, 1, 25), rejected, rejected, lengths)
    grid = GridLosses(sums, certified, 12, cap)
    drawn = rng.integers(40, size=(12, 50))
    places = set()
    for alpha in (0.02, 0.1, 0.3, 0.5):
        found = last_in_sequence(grid, alpha, 0.05, test, drawn)
        for prompts, last in zip(drawn, found, strict=True):
            part = SkipRiskSums(
                sums.thresholds, rejected[prompts], rejected[prompts], lengths[prompts]
            )
            one = GridLosses(part, certified, 12, cap)
            expected = fixed_sequence_threshold(one, alpha, 0.05, test)
            assert (last >= 0) == expected.feasible
            if expected.feasible:
                assert sums.thresholds[last] == expected.value
        places |= set(found.tolist())
    assert len(places) >= 2


@pytest.mark.parametrize("weighting", ["tokens", "prompts"])
def test_risks_are_looked_up_as_defined(rng: np.random.Generator, weighting) -> None:
    """Over all prompts and over some, against loops; nothing skipped where nothing is feasible."""
    atoms = synthetic_atoms(rng, 12, 9)
    sums = skip_risk_sums(atoms, atoms.quantiles(30))
    last = np.array([-1, 0, 11, 29])
    some = rng.permuted(np.tile(np.arange(12), (4, 1)), axis=1)[:, :5]
    for others in (None, some):
        found = outcomes(sums, weighting, last, others)
        for row, place in enumerate(last):
            if place < 0:
                assert not found.feasible[row]
                assert found.risk[row] == found.skip_rate[row] == 0
                continue
            skipped = atoms.score <= sums.thresholds[place]
            prompts = range(12) if others is None else others[row]
            mine = [skipped & (atoms.prompt_index == prompt) for prompt in prompts]
            lost = np.array([atoms.rejection[rows].sum() for rows in mine])
            lengths = atoms.num_tokens[list(prompts)]
            mean = lost.sum() / lengths.sum() if weighting == "tokens" else (lost / lengths).mean()
            assert found.risk[row] == pytest.approx(mean, abs=1e-12)
            rate = sum(atoms.mass[rows].sum() for rows in mine) / lengths.sum()
            assert found.skip_rate[row] == pytest.approx(rate, abs=1e-12)


def test_plug_in_breaks_its_budget_every_second_time_and_the_others_keep_their_word(
    rng: np.random.Generator,
) -> None:
    """On a known population: the plug-in is the negative control, it must fail."""
    num = 400
    rows = study_guarantees(synthetic_atoms(rng), (ALPHA,), num, 0.95, rng)
    known = {row.rule: row for row in rows if row.source == "all-prompts"}
    plug_in = known["risk"].violation_share
    # About one half; the population's own skewness moves it by less than a tenth here.
    assert 0.4 < float(plug_in.value or 0) < 0.6
    assert float(plug_in.low or 0) > 0.05, "far above delta, whatever the draws"
    # Learn-then-Test: at most delta, up to the binomial error of the draws (one in a thousand).
    allowed = stats.binom.ppf(0.999, num, 0.05) / num
    assert float(known["ltt"].violation_share.value or 0) <= allowed
    assert known["ltt"].infeasible_share.value == 0, "a rule that never skips would pass for free"
    assert float(known["ltt"].skip_rate.value or 0) > 0.1
    # Conformal promises the mean risk; its interval is that of the draws.
    assert float(known["conformal"].risk.low or 0) <= ALPHA
    assert float(known["conformal"].risk.value or 0) < float(known["risk"].risk.value or 0)


def test_a_threshold_chosen_against_the_budget_is_caught(rng: np.random.Generator) -> None:
    """Negative control of the counting: calibrated for 8 %, it breaks 5 % nearly always."""
    atoms = synthetic_atoms(rng)
    sums = skip_risk_sums(atoms)
    drawn = rng.integers(NUM_PROMPTS, size=(60, NUM_PROMPTS))
    last = last_passing(sums, "ltt", 0.08, 0.05, drawn)
    assert np.mean(outcomes(sums, "prompts", last, None).risk > ALPHA) > 0.5


def test_the_other_half_errs_opposite_to_the_calibration(rng: np.random.Generator) -> None:
    """Why ``halves`` overstates: with both halves fixed in sum, low here is high there."""
    losses = skip_risk_sums(synthetic_atoms(rng, 60), np.array([0.5])).rates()[1][:, 0]
    halves = []
    for _ in range(200):
        order = rng.permutation(60)
        halves.append((losses[order[:30]].mean(), losses[order[30:]].mean()))
    assert np.corrcoef(np.array(halves).T)[0, 1] == pytest.approx(-1, abs=1e-9)


def test_rows_are_complete_and_repeat_with_the_seed(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block or several, which are other draws of the same number."""
    atoms = synthetic_atoms(rng, 20, 10)
    told: list[int] = []
    first, second = (
        study_guarantees(atoms, (0.02, 0.1), 12, 0.9, np.random.default_rng(7), told.append)
        for _ in range(2)
    )
    assert first == second
    assert sum(told) == 2 * 2 * 12
    monkeypatch.setattr(study, "MAX_DRAWN", 20 * 5)
    assert [row.num_draws for row in study_guarantees(atoms, (0.1,), 12, rng=rng)] == [12] * 6
    keys = [(row.source, row.rule, row.budget) for row in first]
    assert keys == [(s, r.name, a) for s in SOURCES for r in CLASSIC for a in (0.02, 0.1)]
    for row in first:
        assert row.num_calibration_prompts == (20 if row.source == "all-prompts" else 10)
        share = row.violation_share
        count = round(12 * float(share.value or 0))
        interval = stats.binomtest(count, 12).proportion_ci(0.9, method="exact")
        assert (share.low, share.high) == (interval.low, interval.high)


def test_too_few_prompts_are_infeasible_and_harmless(rng: np.random.Generator) -> None:
    """Ten prompts cannot certify half a per cent: nothing is skipped, so nothing is broken."""
    for row in study_guarantees(synthetic_atoms(rng, 10, 8), (0.005,), 10, 0.95, rng):
        if row.family != "risk":
            assert row.infeasible_share.value == 1
            assert row.violation_share.value == row.skip_rate.value == row.risk.value == 0


def test_arguments_are_checked(rng: np.random.Generator) -> None:
    atoms = synthetic_atoms(rng, 6, 4)
    with pytest.raises(ValueError, match="risks = 0"):
        study_guarantees(atoms, (0.0,), 5)
    with pytest.raises(ValueError, match="num_draws = 0"):
        study_guarantees(atoms, (0.1,), 0)
    with pytest.raises(ValueError, match="confidence = 1"):
        study_guarantees(atoms, (0.1,), 5, 1.0)
    with pytest.raises(UserError, match="at least two"):
        study_guarantees(synthetic_atoms(rng, 1, 4), (0.1,), 5)


def test_written_record_reads_back(rng: np.random.Generator, tmp_path: Path) -> None:
    """A score of the context, whose pieces are whole contexts with their total variation."""
    rows = np.repeat(np.arange(12), 6)
    tv = rng.uniform(size=72)
    columns = {
        "row": rows,
        "step": np.tile(np.arange(6), 12),
        "entropy": rng.uniform(0, 3, size=72),
        "tv_distance": tv,
        "output_prob": rng.uniform(size=72),
        "output_target_prob": rng.uniform(size=72),
        "rejection_prob": tv,
        "accepted": rng.uniform(size=72) < 0.5,
        "draft_rank": np.zeros(72, dtype=int),
    }
    ids = [str(number) for number in range(12)]
    write_shard(tmp_path / "traces" / "shard-00000.parquet", columns, ids, {}, Axes(50))
    write_record(tmp_path, run_record())
    told = {"num_prompts": 12, "num_tokens": 72}
    write_record(tmp_path, calibration_record().model_copy(update=told))
    written = write_guarantees(tmp_path, "entropy", (0.1,), num_draws=8, seed=3)
    assert read_record(tmp_path, GuaranteesRecord) == written
    assert (written.score, written.num_draws, written.num_tokens) == ("entropy", 8, 72)
    capped = [row for row in written.rows if row.cap is not None]
    assert {row.rule for row in capped} <= {rule.name for rule in RULES if rule.capped}
    assert len(written.rows) == len(SOURCES) * sum(not rule.capped for rule in RULES) + len(capped)
    assert {one.certified for one in written.certificates} == {"prompts", "tokens", "answers"}
    assert [one.guaranteed for one in written.certificates if one.test == "t"] == [False] * 3
    lacks = rf"^RUN {tmp_path}: .*head_uncertainty.* calibrate with --trace full$"
    with pytest.raises(UserError, match=lacks):
        write_guarantees(tmp_path, replace=True)
    with pytest.raises(UserError, match=lacks):
        plan_run(tmp_path, (0.1,))
    assert plan_run(tmp_path, (0.5,), score_name="entropy").num_tokens == 72
    with pytest.raises(UsageError, match="score = 'luck'"):
        write_guarantees(tmp_path, "luck", replace=True)
    write_record(tmp_path, calibration_record())
    for asked in (
        lambda: plan_run(tmp_path, (0.1,)),
        lambda: write_guarantees(tmp_path, replace=True),
    ):
        with pytest.raises(UserError, match="a shard was lost or added"):
            asked()
    write_record(tmp_path, calibration_record().model_copy(update=told))
    assert write_guarantees(tmp_path, "entropy", (0.1,), num_draws=8, seed=3).rows == written.rows
    for change, says in (
        ({"seed": 4}, "--seed 4: guarantees.json in .* has 3"),
        ({"num_draws": 9}, "--num-draws 9"),
        ({"risks": (0.2,)}, "--risk"),
    ):
        other = {"risks": (0.1,), "num_draws": 8, "seed": 3} | change
        with pytest.raises(UsageError, match=f"^{says}.*; --replace replaces it$"):
            write_guarantees(tmp_path, "entropy", **other)
        assert read_record(tmp_path, GuaranteesRecord).seed == 3
    write_guarantees(tmp_path, "entropy", (0.1,), num_draws=8, seed=4, replace=True)
    assert read_record(tmp_path, GuaranteesRecord).seed == 4
