"""Published numbers: the equations behind the audit, and what it says of the shipped numbers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.run.resources import data_path
from hlmtheory.audit import AuditRow, audit
from hlmtheory.cost import speedup_ceiling
from hlmtheory.published import MARKS, PublishedNumber, PublishedTable, imply
from hlmtheory.reconcile import (
    AVERAGINGS,
    device_time_ms,
    reconciliations,
    sent_ratio_for_step,
    throughput_gain,
    uplink_ratio_for_gain,
)

PUBLISHED = tuple(
    PublishedNumber(**number)
    for number in json.loads(data_path("published.json").read_text(encoding="utf-8"))["numbers"]
)
ROWS = audit(PUBLISHED)
share = st.floats(0.01, 0.99)
ratio = st.floats(0, 500)


def row(system: str, start: str) -> AuditRow:
    """The one row of a system whose quantity starts like this."""
    (found,) = [r for r in ROWS if r.system == system and r.quantity.startswith(start)]
    return found


def average_gain(times: np.ndarray, baseline: np.ndarray, averaging: str) -> float:
    """A throughput ratio from token times, by the definition of its name."""
    if averaging == "ratio-of-means":
        return float(baseline.mean() / times.mean())
    return float((1 / times).mean() / (1 / baseline).mean())


# --- equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_gain_from_token_times(averaging, rng):
    sent = rng.uniform(size=5000) < 0.4
    p, q, le, c, e = 1 - sent.mean(), 7.0, 2.0, 0.1, 0.3
    times = 1 + e + sent * (c * q + le)
    expected = average_gain(times, np.full(5000, 1 + q + le), averaging)
    assert throughput_gain(p, q, le, c, averaging, e) == pytest.approx(expected)


@given(share, ratio, ratio, st.floats(1e-4, 1), st.floats(0, 3))
def test_averagings_are_in_order_and_one_has_a_ceiling(p, q, le, c, e):
    means = throughput_gain(p, q, le, c, "ratio-of-means", e)
    throughputs = throughput_gain(p, q, le, c, "mean-of-throughputs", e)
    assert means <= throughputs * (1 + 1e-12)
    assert means <= speedup_ceiling(p, c) * (1 + 1e-12)


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(share, ratio, ratio, st.floats(1e-3, 1), st.floats(0, 3))
def test_solved_uplink_gives_the_gain_back(averaging, p, q, le, c, e):
    gain = throughput_gain(p, q, le, c, averaging, e)
    found = uplink_ratio_for_gain(gain, p, le, c, averaging, e)
    # The gain may be flat in q near its ceiling, so hold the gains together, not the q.
    if math.isnan(found):  # rounding may lift a gain within a few eps of an end past that end
        ends = (throughput_gain(p, 0.0, le, c, averaging, e), speedup_ceiling(p, c))
        assert min(abs(gain / end - 1) for end in ends) < 1e-9
    else:
        again = throughput_gain(p, found, le, c, averaging, e)
        assert again == pytest.approx(gain, rel=1e-9)


def test_unreachable_gains_have_no_uplink():
    assert math.isnan(uplink_ratio_for_gain(1.86, 0.4593))  # above the ceiling 1.849
    # With t_llm = 20 the server's time alone already gives more than 1.5.
    assert math.isnan(uplink_ratio_for_gain(1.5, 0.4593, 20.0))
    assert math.isnan(uplink_ratio_for_gain(1.5, 0.4593, 20.0, 1.0, "mean-of-throughputs"))
    assert uplink_ratio_for_gain(1.5, 0.4593, 0.0) > 0


@pytest.mark.parametrize("averaging", AVERAGINGS)
@given(share, share, st.floats(0.01, 100))
def test_step_gives_the_sent_ratio_back(averaging, first, second, r):
    p, more = sorted((first, second))
    if more - p < 1e-3:
        return
    step = throughput_gain(more, r, averaging=averaging) / throughput_gain(
        p, r, averaging=averaging
    )
    # The step is a ratio near 1 for close p: its rounding is magnified by up to 1 / (p' - p).
    assert sent_ratio_for_step(step, p, more, averaging) == pytest.approx(r, rel=1e-6)


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_device_time_from_a_throughput(averaging):
    times = np.array([50.0] * 3 + [50.0 * (1 + 4.0)] * 2)  # p = 0.6, r = 4
    speed = 1e3 / times.mean() if averaging == "ratio-of-means" else 1e3 * (1 / times).mean()
    assert device_time_ms(speed, 0.6, 4.0, averaging) == pytest.approx(50.0)


def test_averaging_over_answers_lies_between(rng):
    r, skip = 5.0, rng.beta(2, 2, size=200)
    p = skip.mean()
    over_answers = np.mean((1 + r) / (1 + (1 - skip) * r))
    assert throughput_gain(p, r) < over_answers
    assert over_answers < throughput_gain(p, r, averaging="mean-of-throughputs")


def test_equation_refusals():
    for match, call in (
        ("averaging", lambda: throughput_gain(0.5, 1.0, averaging="median")),
        ("skip_rate", lambda: throughput_gain(1.5, 1.0)),
        ("payload_ratio", lambda: throughput_gain(0.5, 1.0, 0.0, 1.5)),
        ("payload_ratio", lambda: throughput_gain(0.5, 1.0, 0.0, 0.0)),
        ("llm_ratio", lambda: uplink_ratio_for_gain(2.0, 0.5, -1.0)),
        ("gain", lambda: uplink_ratio_for_gain(0.0, 0.5)),
        ("step", lambda: sent_ratio_for_step(0.9, 0.2, 0.5)),
        ("higher_skip_rate", lambda: sent_ratio_for_step(1.1, 0.5, 0.2)),
        ("throughput_tok_s", lambda: device_time_ms(0.0, 0.5, 1.0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# --- the shipped numbers -------------------------------------------------------------------------


def test_every_number_is_marked():
    assert {number.mark for number in PUBLISHED} == set(MARKS)
    for number in PUBLISHED:
        assert "arXiv" in number.source
        assert (number.mark == "abstract") == number.source.startswith("abstract of")


def test_claims_of_section_ten():
    ceiling = row("U-HLM", "speed-up over HLM in mean token time")
    assert round(ceiling.implied, 2) == 1.85
    assert not ceiling.consistent
    ceiling = row("CU-HLM", "speed-up over HLM in mean token time, at the stated")
    assert round(ceiling.implied, 1) == 152.6
    assert not ceiling.consistent
    compression = row("CU-HLM", "vocabulary compression")
    assert f"{compression.implied:.1%}" == "99.9%"
    assert not compression.consistent
    entries = row("CU-HLM", "optimal k")
    assert round(entries.implied, 6) == 832
    assert not entries.consistent


def test_published_values_that_the_formulas_reproduce():
    for system, start in (
        ("CU-HLM", "payload of the full"),
        ("CU-HLM", "payload of the optimal"),
        ("U-HLM", "risk-averse"),
        ("U-HLM", "risk-prone"),
    ):
        assert row(system, start).consistent
    assert row("U-HLM", "risk-averse").implied == pytest.approx(0.06 / 0.82)
    assert row("CU-HLM", "U-HLM's risk-averse").implied == pytest.approx(0.066 / 0.815)
    assert row("U-HLM", "risk-prone").implied == pytest.approx(0.82 * 0.43 - 0.06)


def test_u_hlm_is_reconciled_by_mean_of_throughputs_alone():
    found = row("U-HLM", "speed-up over HLM as mean")
    assert found.implied == pytest.approx((2.54 - 1) / 0.4593)
    # Brute force over all times: nothing reaches it in mean token time.
    grid = np.geomspace(1e-3, 1e9, 200)
    assert np.max(throughput_gain(0.4593, grid[:, None], grid[None, :])) < 2.54


def test_cu_hlm_is_reconciled_by_mean_token_time_at_its_own_optimal_k():
    """Two readings give 206x: mean of throughputs, or the compression that k* = 30 implies."""
    at_best = row("CU-HLM", "speed-up over HLM in mean token time, at k* = 30")
    assert at_best.consistent
    gain = throughput_gain(0.748, at_best.implied, 0.0, 30 / 32_000)
    assert gain == pytest.approx(206)
    mean = row("CU-HLM", "speed-up over HLM as mean of throughputs")
    gain = throughput_gain(0.748, mean.implied, 0.0, 0.026, "mean-of-throughputs")
    assert gain == pytest.approx(206)


def test_no_one_setting_reconciles_u_hlm_and_cu_hlm():
    found = row("CU-HLM", "speed-up over HLM in the setting")
    r = row("U-HLM", "speed-up over HLM as mean").implied
    llm = np.linspace(0, r, 500)
    gains = throughput_gain(0.748, r - llm, llm, 0.026, "mean-of-throughputs")
    assert found.implied == pytest.approx(float(np.max(gains)))  # all of it uplink is the best case
    assert not found.consistent


def test_ui_hlm_comparison_is_reconciled_and_its_headline_is_not():
    for averaging in AVERAGINGS:
        found = row("UI-HLM", f"throughput beside U-HLM's, {averaging}")
        p, more, r = 0.4593, 0.4593 * 0.436 / 0.316, found.implied
        slm = device_time_ms(0.36, p, r, averaging)
        # Forward again, from token times: both throughputs and both savings come back.
        for skip, speed in ((p, 0.36), (more, 0.40)):
            if averaging == "ratio-of-means":
                found_speed = 1e3 / (slm * (1 + (1 - skip) * r))
            else:
                found_speed = 1e3 / slm * (skip + (1 - skip) / (1 + r))
            assert found_speed == pytest.approx(speed)
    headline = row("UI-HLM", "headline throughput")
    assert not headline.consistent
    # Under either averaging the third point would lie near 0.390 token/s.
    weight = (0.407 - 0.316) / (0.436 - 0.316)
    assert headline.implied == pytest.approx(0.36 + weight * 0.04, abs=1e-3)


def test_implied_intervals_hold_over_all_roundings(rng):
    """Corners are the extremes only of monotone functions: draw inside and look."""
    for _ in range(40):
        drawn = tuple(
            replace(n, value=n.value + n.rounding * rng.uniform(-1, 1), rounding=0.0)
            for n in PUBLISHED
        )
        for ours, other in zip(ROWS, audit(drawn), strict=True):
            slack = 1e-9 * abs(ours.implied)
            assert ours.implied_low is not None
            assert ours.implied_high is not None
            assert ours.implied_low - slack <= other.implied <= ours.implied_high + slack


def test_reconciliations_give_the_published_figures_back():
    found = reconciliations(PUBLISHED, (0.0, 0.3, 1.0, 5.0))
    solved = [entry for entry in found if entry.t_up is not None]
    assert {entry.system for entry in solved} == {
        "U-HLM", "CU-HLM", "CU-HLM at k* = 30", "UI-HLM",
    }  # fmt: skip
    skip = {"U-HLM": 0.4593, "CU-HLM": 0.748, "CU-HLM at k* = 30": 0.748, "UI-HLM": 0.4593}
    for entry in found:
        assert (entry.t_up is None) == bool(entry.reason)
        if entry.t_up is None:
            continue
        q, le = entry.t_up / entry.t_slm, entry.t_llm / entry.t_slm
        p = skip[entry.system]
        if entry.unit == "t_slm":
            gain = throughput_gain(p, q, le, entry.payload_ratio, entry.averaging)
            assert f"{gain:.4g}x" in entry.target
        else:
            speed = throughput_gain(p, q, le, 1.0, entry.averaging) * 1e3
            assert speed / (entry.t_slm * (1 + q + le)) == pytest.approx(0.36)
        means = throughput_gain(p, q, le, entry.payload_ratio)
        assert entry.ratio_of_means == pytest.approx(means)
    # Under mean token time U-HLM has no solution at any t_llm.
    assert not [e for e in solved if (e.system, e.averaging) == ("U-HLM", "ratio-of-means")]


def test_rows_are_json_without_nan():
    both = [asdict(entry) for entry in (*ROWS, *reconciliations(PUBLISHED))]
    json.dumps(both, allow_nan=False)


def test_a_different_number_changes_its_rows():
    """The negative control: numbers that fit are called consistent."""
    fitting = tuple(
        replace(n, value=1.5) if (n.paper, n.quantity) == ("U-HLM", "throughput_ratio") else n
        for n in PUBLISHED
    )
    (ceiling,) = [
        r for r in audit(fitting)
        if r.system == "U-HLM" and r.quantity.startswith("speed-up over HLM in mean")
    ]  # fmt: skip
    assert ceiling.consistent


# --- numbers and intervals -----------------------------------------------------------------------


def test_imply_is_exact_for_monotone_functions():
    a = PublishedNumber("U-HLM", "a", 2.0, 0.5, "", "abstract", "s")
    b = PublishedNumber("U-HLM", "b", 4.0, 1.0, "", "abstract", "s")
    found = imply(lambda x, y: x / y, a, b)
    corners = [x / y for x, y in itertools.product((1.5, 2.5), (3.0, 5.0))]
    assert (found.value, found.low, found.high) == (0.5, min(corners), max(corners))
    assert found.meets(replace(a, value=0.29, rounding=0.011))
    assert not found.meets(replace(a, value=0.29, rounding=0.009))


def test_imply_without_a_solution_within_rounding_has_no_upper_end():
    number = PublishedNumber("U-HLM", "a", 1.0, 0.5, "", "abstract", "s")
    found = imply(lambda x: x if x < 1.2 else math.nan, number)
    assert (found.low, found.high) == (0.5, math.inf)


def test_number_refusals():
    good = PUBLISHED[0]
    for match, change in (
        ("value", {"value": math.nan}),
        ("rounding", {"rounding": -1.0}),
        ("mark", {"mark": "guessed"}),
    ):
        with pytest.raises(ValueError, match=match):
            replace(good, **change)
    with pytest.raises(ValueError, match="twice"):
        PublishedTable((good, good))
    with pytest.raises(ValueError, match="'skip_rate' of U-HLM"):
        audit(tuple(n for n in PUBLISHED if n.quantity != "skip_rate"))
