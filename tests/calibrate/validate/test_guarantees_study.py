"""Guarantees over many calibrations: on tokens whose risk is known, and against the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from calibrate.run.errors import UserError
from calibrate.run.folder import read_json
from calibrate.run.traces import Trace, write_shard
from calibrate.validate.guarantees import (
    RULES,
    SOURCES,
    PromptTokens,
    outcome,
    split_guarantees,
    write_splits,
)
from hlmtheory.guarantees import conformal_threshold, learn_then_test_threshold
from hlmtheory.thresholds import risk_budget_threshold

NUM_PROMPTS = 150
ALPHA = 0.05


def synthetic_trace(
    rng: np.random.Generator, num_prompts: int = NUM_PROMPTS, most: int = 40
) -> Trace:
    """Prompts of various lengths whose risk differs: beta rises with u and with the prompt."""
    lengths = rng.integers(most // 2, most + 1, size=num_prompts)
    index = np.repeat(np.arange(num_prompts), lengths)
    u = rng.beta(0.7, 0.7, size=len(index))
    level = rng.uniform(0.2, 1.2, size=num_prompts)[index]
    beta = np.clip(u * level * rng.uniform(0, 1, size=len(index)), 0, 1)
    columns = {"prompt_index": index, "uncertainty": u, "rejection_prob": beta}
    return Trace(columns, [str(number) for number in range(num_prompts)])


def drawn_trace(trace: Trace, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The tokens of a calibration as shipped rules take them: a prompt drawn twice is two."""
    parts = []
    for prompt, times in enumerate(drawn):
        parts += [np.flatnonzero(trace.prompt_index == prompt)] * int(times)
    rows = np.concatenate(parts)
    index = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return trace["uncertainty"][rows], trace["rejection_prob"][rows], index, len(parts)


def by_shipped_rule(rule: str, trace: Trace, drawn: np.ndarray, alpha: float, delta: float):
    """The obvious way: hand the drawn tokens to the rule that `hlm derive` uses."""
    u, beta, index, num = drawn_trace(trace, drawn)
    if rule == "risk":
        return risk_budget_threshold(u, beta, alpha)
    if rule == "conformal":
        return conformal_threshold(u, beta, index, num, alpha)
    return learn_then_test_threshold(u, beta, index, num, alpha, delta)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.002, 0.03, 0.2, 0.9])
def test_thresholds_are_those_of_the_shipped_rules(
    rng: np.random.Generator, rule: str, alpha: float
) -> None:
    """Halves and draws with replacement; budgets from infeasible to skipping everything."""
    trace = synthetic_trace(rng, 30, 12)
    # Scores that tie, as sampled uncertainties do.
    trace.columns["uncertainty"] = np.round(trace["uncertainty"], 2)
    tokens = PromptTokens(
        trace["uncertainty"], trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )
    everything = np.ones(30, dtype=np.int64)
    for _ in range(8):
        half = np.zeros(30, dtype=np.int64)
        half[rng.permutation(30)[:15]] = 1
        for drawn in (half, rng.multinomial(30, everything / 30)):
            found = outcome(tokens, rule, alpha, 0.05, drawn, everything)
            expected = by_shipped_rule(rule, trace, drawn, alpha, 0.05)
            assert (found.threshold is not None) == expected.feasible
            if found.threshold is None:
                assert found.risk == found.skip_rate == 0
                continue
            # Both are the mean of the same two scores.
            assert found.threshold == pytest.approx(expected.uncertainty_threshold, abs=1e-15)
            skipped = trace["uncertainty"] <= found.threshold
            lost = skipped * trace["rejection_prob"]
            by_prompt = [lost[trace.prompt_index == i].mean() for i in range(30)]
            risk = lost.mean() if rule == "risk" else np.mean(by_prompt)
            assert found.risk == pytest.approx(risk, abs=1e-12)
            assert found.skip_rate == pytest.approx(skipped.mean(), abs=1e-12)


def test_plug_in_breaks_its_budget_every_second_time_and_the_others_keep_their_word(
    rng: np.random.Generator,
) -> None:
    """On a known population: the plug-in is the negative control, it must fail."""
    num = 400
    rows = split_guarantees(synthetic_trace(rng), (ALPHA,), num, 0.95, rng)
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
    trace = synthetic_trace(rng)
    tokens = PromptTokens(
        trace["uncertainty"], trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )
    everything = np.ones(NUM_PROMPTS, dtype=np.int64)
    over = [
        outcome(
            tokens, "ltt", 0.08, 0.05, rng.multinomial(NUM_PROMPTS, everything / NUM_PROMPTS),
            everything,
        ).risk
        > ALPHA
        for _ in range(60)
    ]  # fmt: skip
    assert np.mean(over) > 0.5


def test_the_other_half_errs_opposite_to_the_calibration(rng: np.random.Generator) -> None:
    """Why ``halves`` overstates: with both halves fixed in sum, low here is high there."""
    trace = synthetic_trace(rng, 60)
    tokens = PromptTokens(
        trace["uncertainty"], trace["rejection_prob"], trace.prompt_index, trace.num_prompts
    )
    losses = tokens.losses(int(np.searchsorted(tokens.score, 0.5)))
    halves = []
    for _ in range(200):
        order = rng.permutation(60)
        halves.append((losses[order[:30]].mean(), losses[order[30:]].mean()))
    assert np.corrcoef(np.array(halves).T)[0, 1] == pytest.approx(-1, abs=1e-9)


def test_rows_are_complete_and_repeat_with_the_seed(rng: np.random.Generator) -> None:
    trace = synthetic_trace(rng, 20, 10)
    first, second = (
        split_guarantees(trace, (0.02, 0.1), 12, 0.9, np.random.default_rng(7)) for _ in range(2)
    )
    assert first == second
    keys = [(row.source, row.rule, row.budget) for row in first]
    assert keys == [(s, r, a) for s in SOURCES for r in RULES for a in (0.02, 0.1)]
    for row in first:
        assert row.num_draws == 12
        assert row.num_calibration_prompts == (20 if row.source == "all-prompts" else 10)
        share = row.violation_share
        count = round(12 * float(share.value or 0))
        interval = stats.binomtest(count, 12).proportion_ci(0.9, method="exact")
        assert (share.low, share.high) == (interval.low, interval.high)


def test_too_few_prompts_are_infeasible_and_harmless(rng: np.random.Generator) -> None:
    """Ten prompts cannot certify half a per cent: nothing is skipped, so nothing is broken."""
    rows = split_guarantees(synthetic_trace(rng, 10, 8), (0.005,), 10, 0.95, rng)
    for row in rows:
        if row.rule != "risk":
            assert row.infeasible_share.value == 1
            assert row.violation_share.value == row.skip_rate.value == row.risk.value == 0


def test_arguments_are_checked(rng: np.random.Generator) -> None:
    trace = synthetic_trace(rng, 6, 4)
    with pytest.raises(ValueError, match="risks = 0"):
        split_guarantees(trace, (0.0,), 5, 0.95, rng)
    with pytest.raises(ValueError, match="num_splits = 0"):
        split_guarantees(trace, (0.1,), 0, 0.95, rng)
    with pytest.raises(ValueError, match="confidence = 1"):
        split_guarantees(trace, (0.1,), 5, 1.0, rng)
    with pytest.raises(UserError, match="at least two"):
        split_guarantees(synthetic_trace(rng, 1, 4), (0.1,), 5, 0.95, rng)


def test_write_splits_reads_back(rng: np.random.Generator, tmp_path) -> None:
    trace = synthetic_trace(rng, 12, 6)
    columns = {name: trace[name] for name in ("uncertainty", "rejection_prob")}
    steps = np.concatenate([np.arange(n) for n in np.bincount(trace.prompt_index)])
    shard = {"row": trace.prompt_index, "step": steps, **columns}
    write_shard(tmp_path / "traces" / "shard-00000.parquet", shard, trace.prompt_ids, {})
    written = write_splits(tmp_path, (0.1,), num_splits=8, seed=3)
    found = read_json(tmp_path, "splits.json")
    assert (found["num_splits"], found["num_prompts"], found["seed"]) == (8, 12, 3)
    assert {"versions", "revision", "command"} < found.keys()
    assert len(found["rows"]) == len(written["rows"]) == len(SOURCES) * len(RULES)
    assert set(found["rows"][0]["violation_share"]) == {"value", "low", "high", "unit"}
