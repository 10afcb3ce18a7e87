"""The head says what the full vocabulary says: each policy, live and recorded, against loops.

Sums of up to 2,000 terms of total 1, and exp and log of numbers below 100: a few hundred eps, so
1e-9 is far above rounding and far below any error of a formula.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from toy_models import law_step, random_logits, softmax, stored

from hlmtheory.coupling import coupled_output_law
from hlmtheory.policies import Policy, policy_from_settings
from hlmtheory.sampled_law import PLAIN, Sampling
from hlmtheory.scores import SCORE_NAMES, Score, score_named
from hlmtheory.steps import COLUMNS, HEAD_SIZE, Axes, LawStep, Skip, Step, used_width
from hlmtheory.truncation import online_truncation_size
from hlmtheory.uncertainty import exact_uncertainty, perturbed_probabilities, temperatures
from hlmtheory.verification import output_law

EXACT = 1e-9
CHORD = 1 / 64  # tests/hlmtheory/test_truncation_bias.py
THETAS = temperatures()
LEARNED = {
    "features": ("uncertainty", "draft_prob", "entropy", "max_logit"),
    "mean": (0.4, 0.5, 1.0, 8.0),
    "scale": (0.3, 0.4, 0.9, 4.0),
    "coefficients": (1.3, -0.8, 0.5, -0.2),
    "intercept": -0.7,
}
LINE = {"theta": 0.3, "eta": 1.0, "slope": 0.8, "intercept": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "u-hlm": {},
    "r-hlm": {},
    "ask-llm": {},
    "coupled": {},
    "cu-hlm-offline": {"num_entries": 4},
    "cu-hlm-online": LINE,
}


def exact_sigma(score: Score, threshold: float, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sigma of every token of one context (V,), from the definition of each score."""
    vocab = len(z)
    ranks = np.argsort(np.argsort(-z, kind="stable"))
    p = perturbed_probabilities(z, np.arange(vocab), THETAS)  # (V, K)
    if score.name == "uncertainty":
        return (exact_uncertainty(z, np.arange(vocab), THETAS) <= threshold).astype(float)
    if score.name == "uncertainty_sampled":
        num = p.shape[1]
        most = int(np.floor(threshold * num + 1e-4))
        sigma = np.array([stats.poisson_binom.cdf(most, 1 - row) for row in p])
        return np.where((ranks < HEAD_SIZE) | (threshold >= 1), sigma, 0.0)
    if score.name == "learned":
        values = {
            "uncertainty": 1 - p.mean(1),
            "draft_prob": x,
            "entropy": stats.entropy(x),
            "max_logit": z.max(),
        }
        total = LEARNED["intercept"] + sum(
            w * (values[name] - m) / s
            for name, m, s, w in zip(
                *(LEARNED[key] for key in ("features", "mean", "scale", "coefficients")),
                strict=True,
            )
        )
        scores = np.where(ranks < HEAD_SIZE, 1 / (1 + np.exp(-total)), 1.0)
        return (scores <= threshold).astype(float)
    top = np.sort(x)[::-1]
    of_context = {
        "entropy": stats.entropy(x),
        "one_minus_max_prob": 1 - top[0],
        "one_minus_margin": 1 - top[0] + top[1],
        "max_logit": -z.max(),
    }[score.name]
    return np.full(vocab, float(of_context <= threshold))


def exact_outcome(
    policy: Policy, sigma: np.ndarray, x: np.ndarray, y: np.ndarray, size: int | None
) -> tuple[float, float, float, float]:
    """Skip probability, risk, bias and entries from the whole vocabulary of one context."""
    skip = float(sigma @ x)
    risk = float(sigma @ np.maximum(x - y, 0))
    if policy.name == "coupled":
        law = coupled_output_law(x, y, sigma)
    else:
        law = output_law(policy.rule, x, y, sigma, size)
    bias = float(np.abs(law - y).sum() / 2)
    if policy.name == "r-hlm":
        sent: float = np.count_nonzero(sigma * x)
    elif policy.name in ("ask-llm", "coupled"):
        sent = 0.0
    else:
        support = np.count_nonzero(x)
        sent = support if size is None else min(size, support)
    return skip, risk, bias, (1 - skip) * sent


def outcome_table(policy: Policy, step: Step) -> np.ndarray:
    """The policy's own outcome, (B, 4)."""
    found = policy.outcome(step)
    return np.stack(
        [np.asarray(getattr(found, name)) for name in ("skip", "risk", "bias", "entries")], -1
    )


def decided_rows(step: Step, threshold: float) -> np.ndarray:
    """Bool (B,): whether the head holds every token with u <= threshold that is ever drawn."""
    whole_vocabulary = step["head_prob"].shape[1] == step.axes.vocab_size
    all_drawn = whole_vocabulary | (step["head_prob"][:, -1] == 0)
    return (step["head_uncertainty"][:, -1] > threshold) | all_drawn | (threshold >= 1)


def all_uncertainties(z: np.ndarray) -> np.ndarray:
    """u of every token, (B, V)."""
    return exact_uncertainty(z, np.tile(np.arange(z.shape[1]), (len(z), 1)), THETAS)


def exact_table(policy: Policy, z, x, y, every_u, drafts, sizes) -> np.ndarray:
    """:func:`exact_outcome` of each context, (B, 4); the score is exact uncertainty."""
    rows = [
        exact_outcome(policy, (u <= policy.threshold).astype(float), *row)
        for u, *row in zip(every_u, x, y, sizes, strict=True)
    ]
    exact = np.array(rows)
    if policy.entries_vary:  # this size is the draft's own, and goes or stays with it
        exact[:, 3] = sizes * (every_u[np.arange(len(z)), drafts] > policy.threshold)
    return exact


FILTERED = (
    Sampling(0.0),
    Sampling(top_p=0.9),
    Sampling(top_k=3),
    Sampling(0.6, top_k=20, top_p=0.97),
)
CASES = [
    (name, vocab, number, to, PLAIN)
    for name in sorted(SETTINGS)
    for vocab, number, to in (
        (2, 10, np.asarray),
        (50, 10, torch.from_numpy),
        (200, 50, np.asarray),
        (600 if name == "coupled" else 2000, 5, np.asarray),
    )
] + [
    (name, vocab, 5, to, sampling)
    for name in sorted(SETTINGS)
    for vocab, to in ((2, np.asarray), (50, torch.from_numpy), (300, np.asarray))
    for sampling in FILTERED
]


@pytest.mark.parametrize(("name", "vocab", "num_thresholds", "to", "sampling"), CASES)
def test_head_and_live_step_say_what_the_vocabulary_says(
    rng, name, vocab, num_thresholds, to, sampling
):
    """Exact uncertainty as the score, random thresholds and 1; laws whole and filtered."""
    z, w = random_logits(rng, 6, vocab)
    step = law_step(rng, z, w, to=to, sampling=sampling)
    recorded = stored(step)
    x, y, every_u = np.asarray(step.x), np.asarray(step.y), all_uncertainties(z)
    drafts = np.asarray(step["draft_token"])
    for threshold in np.append(rng.uniform(high=0.96, size=num_thresholds), 1.0):
        policy = policy_from_settings(name, SETTINGS[name], float(threshold))
        truncates = name.startswith("cu-hlm")
        sizes = np.broadcast_to(np.asarray(policy.size(step)), 6) if truncates else [None] * 6
        exact = exact_table(policy, z, x, y, every_u, drafts, sizes)
        np.testing.assert_allclose(outcome_table(policy, step), exact, rtol=EXACT, atol=EXACT)
        assert decided_rows(recorded, float(threshold)).all()
        head = outcome_table(policy, recorded)
        if name == "cu-hlm-offline":  # exact up to the chords of its table
            assert (head[:, 2] >= exact[:, 2] - EXACT).all()
            assert (head[:, 2] <= exact[:, 2] + CHORD).all()
        if truncates:  # with a size of its own, linear between recorded ones
            head[:, 2] = exact[:, 2]
        if policy.entries_vary:
            head[:, 3] = exact[:, 3]
        np.testing.assert_allclose(head, exact, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(top_p=0.1), Sampling(top_k=20)])
def test_a_head_with_the_whole_support_decides_at_every_threshold(rng, sampling):
    """Flat contexts, where unfiltered heads say nothing above 1 - 1/32: (38)."""
    z, w, drafts = flat_context(rng, 150)
    step = law_step(rng, z, w, sampling=sampling, drafts=drafts)
    recorded = stored(step)
    assert (recorded["head_prob"][:, -1] == 0).all()
    x, y, every_u = step.x, step.y, all_uncertainties(z)
    for threshold in (0.98, 0.994, 0.9965):
        assert (recorded["head_uncertainty"][:, -1] <= threshold).all() == (threshold > 0.98)
        for name in ("u-hlm", "r-hlm", "ask-llm", "coupled"):
            policy = policy_from_settings(name, {}, threshold)
            exact = exact_table(policy, z, x, y, every_u, drafts, [None] * 150)
            found = outcome_table(policy, recorded)
            np.testing.assert_allclose(found, exact, rtol=EXACT, atol=EXACT)


def test_a_wrong_threshold_fails_the_same_comparison(rng):
    """Negative control: a head read at another threshold is not the law of the first."""
    z, w = random_logits(rng, 40, 60)
    recorded = stored(law_step(rng, z, w))
    one, other = (outcome_table(policy_from_settings("u-hlm", {}, t), recorded) for t in (0.4, 0.5))
    assert (np.abs(one - other).max(axis=0) > 1e-3).all()


def flat_context(rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One flat context, once with each token of the vocabulary as its draft: logits, all drafts."""
    z = 0.4 * rng.standard_normal(vocab)
    w = z + 0.5 * rng.standard_normal(vocab)
    return np.tile(z, (vocab, 1)), np.tile(w, (vocab, 1)), np.arange(vocab)


@pytest.mark.parametrize("threshold", [0.96, 0.975, 0.985, 0.992, 0.9965])
def test_beyond_the_head_skip_and_risk_are_right_on_average_over_the_draft(rng, threshold):
    """The sum over every draft with its probability: no sampling error."""
    vocab = 150
    z, w, drafts = flat_context(rng, vocab)
    recorded = stored(law_step(rng, z, w, drafts=drafts))
    x, y = softmax(z[0]), softmax(w[0])
    sigma = (all_uncertainties(z[:1])[0] <= threshold).astype(float)
    beyond = sigma.sum() > HEAD_SIZE
    for name in ("u-hlm", "r-hlm", "ask-llm"):
        policy = policy_from_settings(name, {}, threshold)
        skip, risk, bias, _ = exact_outcome(policy, sigma, x, y, None)
        found = outcome_table(policy, recorded)
        np.testing.assert_allclose(x @ found[:, :2], [skip, risk], atol=EXACT)
        if name != "ask-llm":
            np.testing.assert_allclose(x @ found[:, 2], bias, atol=EXACT)
        # Off the head a single draft says less than all of them.
        assert (np.ptp(found[:, 0]) > 1e-6) == (beyond and sigma.sum() < vocab) or beyond
    count = policy_from_settings("r-hlm", {}, threshold).skip_probability(recorded).count(recorded)
    assert x @ count == pytest.approx(sigma.sum(), abs=1e-6)


def test_a_live_step_looks_far_enough_for_its_gate(rng):
    """As many candidates as the bound (24) says: nothing is beyond them, at any threshold."""
    vocab = 400
    z, w, drafts = flat_context(rng, vocab)
    for threshold in (0.96, 0.99, 0.9965, 0.9999):
        policy = policy_from_settings("u-hlm", {}, threshold)
        wide = law_step(
            rng, z[:3], w[:3], head_size=policy.num_candidates(vocab), drafts=drafts[:3]
        )
        sigma = (all_uncertainties(z[:3]) <= threshold).astype(float)
        skip = policy.skip_probability(wide)
        np.testing.assert_array_equal(skip.over_vocabulary(wide), sigma)
        assert not skip.undecided.any()
        np.testing.assert_allclose(skip.mass(wide), (sigma * softmax(z[:3])).sum(-1), atol=EXACT)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.7), *FILTERED])
@pytest.mark.parametrize("name", [one for one in SCORE_NAMES if one != "uncertainty"])
def test_any_score_gates_and_the_head_says_so(rng, name, sampling):
    """Skip, risk, bias and entries of u-hlm, r-hlm, ask-llm and coupled, gated by each score.

    V = 40, so that eight tokens lie beyond the head, where u_K counts as 1.
    """
    vocab, num = 40, 8
    z, w = random_logits(rng, num, vocab)
    score = score_named(name, LEARNED)
    live = law_step(rng, z, w, sampling=sampling, head_size=vocab)
    recorded = stored(law_step(rng, z, w, sampling=sampling, drafts=live["draft_token"]))
    x, y = live.x, live.y
    seen = np.asarray(score.of_draft(live))
    grid = rng.uniform(size=12) if score.high == 1 else rng.uniform(seen.min(), seen.max(), 12)
    compared = 0
    for threshold in grid:
        sigma = np.array([exact_sigma(score, threshold, *row) for row in zip(z, x, strict=True)])
        tail = np.take_along_axis(sigma * x, np.argsort(-x, -1)[:, HEAD_SIZE:], -1).sum(-1)
        decides = tail < 1e-12
        compared += decides.sum()
        for policy_name in ("u-hlm", "r-hlm", "ask-llm", "coupled"):
            policy = policy_from_settings(policy_name, {}, float(threshold), score)
            exact = np.array(
                [exact_outcome(policy, *row, None) for row in zip(sigma, x, y, strict=True)]
            )
            columns = [0, 1, 2, 3]
            if name == "uncertainty_sampled" and policy_name == "r-hlm":
                columns = [0, 1, 2]  # every token has some sigma > 0 until it rounds to 0
            for step, rows in ((live, slice(None)), (recorded, decides)):
                found = outcome_table(policy, step)
                np.testing.assert_allclose(
                    found[rows][:, columns], exact[rows][:, columns], rtol=1e-8, atol=1e-8,
                    err_msg=f"{policy_name} at {threshold}",
                )  # fmt: skip
    assert compared > 20


def test_sampled_gate_sends_what_lies_beyond_the_head(rng):
    """Monte Carlo over drafts and perturbations in a flat context: within 4 standard errors."""
    vocab, num = 100, 3_000
    z = 0.5 * rng.standard_normal(vocab)
    w = z + 0.5 * rng.standard_normal(vocab)
    x, y = softmax(z), softmax(w)
    score = score_named("uncertainty_sampled")
    threshold = 0.95
    sigma = exact_sigma(score, threshold, z, x)
    assert x[np.argsort(-z)[HEAD_SIZE:]].sum() > 0.3
    drafts = rng.choice(vocab, size=num, p=x)
    step = law_step(rng, np.tile(z, (num, 1)), np.tile(w, (num, 1)), drafts=drafts)
    policy = policy_from_settings("u-hlm", {}, threshold, score)
    found = outcome_table(policy, stored(step))[:, :2]
    drawn = policy.drawn(step)
    exact = [sigma @ x, sigma @ np.maximum(x - y, 0)]
    np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), atol=1e-9)
    values = np.stack([drawn.skip, drawn.risk], -1)
    error = values.std(0) / num**0.5
    assert (np.abs(values.mean(0) - exact) < 4 * error).all()
    assert (4 * error < 0.04).all()


def test_drawn_outcomes_average_to_the_expected_ones(rng):
    """Over every draft with its probability: skip, risk and what is sent, at each policy."""
    vocab = 30
    z, w, drafts = flat_context(rng, vocab)
    z, w = 6 * z, 6 * w
    step = law_step(rng, z, w, drafts=drafts)
    x = softmax(z[0])
    for name, settings in SETTINGS.items():
        policy = policy_from_settings(name, settings, 0.7)
        expected, drawn = outcome_table(policy, step), policy.drawn(step)
        averaged = [x @ np.asarray(getattr(drawn, one)) for one in ("skip", "risk", "entries")]
        np.testing.assert_allclose(averaged, x @ expected[:, [0, 1, 3]], atol=EXACT)
        assert set(np.unique(drawn.skip)) == {0.0, 1.0}


def test_baselines_skip_all_or_nothing(rng):
    z, w = random_logits(rng, 5, 90)
    live = law_step(rng, z, w)
    distance = np.abs(softmax(z) - softmax(w)).sum(-1) / 2
    for step in (live, stored(live)):
        for name, row in (
            ("slm", (1.0, distance, distance, 0.0)),
            ("llm", (0.0, 0.0, 0.0, 0.0)),
            ("hlm", (0.0, 0.0, 0.0, 90.0)),
        ):
            found = outcome_table(policy_from_settings(name), step)
            expected = np.stack(np.broadcast_arrays(*row, np.zeros(5))[:4], -1)
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_online_size_recorded_lies_between_the_neighbours_on_the_grid(rng):
    z, w = random_logits(rng, 200, 3000)
    step = law_step(rng, z, w)
    policy = policy_from_settings("cu-hlm-online", SETTINGS["cu-hlm-online"], 0.4)
    beta = np.clip(0.8 * step["uncertainty"], 0, 1)
    exact = online_truncation_size(step.x, step["draft_prob"], beta, 0.3, 1.0)
    np.testing.assert_array_equal(policy.size(step), exact)
    read, grid = policy.size(stored(step)), np.array(step.axes.truncation_sizes)
    place = np.searchsorted(grid, exact)
    high = grid[np.minimum(place, len(grid) - 1)]
    low = np.where(place > 0, grid[np.maximum(place - 1, 0)], 1)
    assert ((read >= low) & (read <= high)).all()
    assert len(np.unique(read)) > 20


# --- the record itself ---------------------------------------------------------------------------


def test_columns_are_what_they_say(rng):
    z, w = random_logits(rng, 6, 70)
    step = law_step(rng, z, w, sampling=Sampling(0.8))
    x, y = step.x, step.y
    order = np.argsort(-z, -1)[:, :HEAD_SIZE]
    rows = np.arange(6)
    draft, output = step["draft_token"], step["output_token"]
    every_u = all_uncertainties(z)
    expected = {
        "draft_prob": x[rows, draft],
        "target_prob": y[rows, draft],
        "rejection_prob": np.maximum(1 - y[rows, draft] / x[rows, draft], 0),
        "uncertainty": every_u[rows, draft],
        "output_prob": x[rows, output],
        "output_target_prob": y[rows, output],
        "output_uncertainty": every_u[rows, output],
        "entropy": stats.entropy(x, axis=-1),
        "max_prob": x.max(-1),
        "margin": np.sort(x, -1)[:, -1] - np.sort(x, -1)[:, -2],
        "max_logit": z.max(-1),
        "tv_distance": np.abs(x - y).sum(-1) / 2,
        "head_prob": np.take_along_axis(x, order, -1),
        "head_target_prob": np.take_along_axis(y, order, -1),
        "head_uncertainty": np.take_along_axis(every_u, order, -1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(step[name], values, atol=1e-12, err_msg=name)
    for row, token in enumerate(draft):
        inside = np.flatnonzero(order[row] == token)
        assert step["draft_rank"][row] == (inside[0] if len(inside) else -1)
    assert (np.diff(step["head_prob"], axis=1) <= 0).all()


def test_every_column_of_a_text_is_live_or_decided_by_the_engine():
    decided = {name for name, column in COLUMNS.items() if column.text and column.compute is None}
    assert decided == {
        "prompt_id", "step", "draft_token", "output_token", "attention_sink", "attention_entropy",
        "context_attention", "num_attended", "topk_attention", "skipped", "accepted",
        "policy_skip_prob", "policy_risk", "policy_bias", "policy_entries", "policy_log_ratio",
    }  # fmt: skip


def test_axes_survive_json_and_refuse_other_keys():
    axes = Axes(300, Sampling(0.7), (0.0, 1.0), (1, 5, 700), (2,))
    assert axes.truncation_sizes == (1, 5, 300)
    assert axes.truncation_entries[:2] == ((1, "rejected"), (1, "residual"))
    assert len(axes.truncation_entries) == 3 * 19
    entry = axes.to_dict()
    assert Axes.from_dict(json.loads(json.dumps(entry))) == axes
    with pytest.raises(ValueError, match=r"^axes: grid is unknown$"):
        Axes.from_dict(entry | {"grid": 1})
    for name in ("thetas", "temperature"):
        with pytest.raises(ValueError, match=rf"^axes: {name} is missing$"):
            Axes.from_dict({key: entry[key] for key in entry.keys() - {name}})


def test_a_step_says_what_it_does_not_know(rng):
    step = law_step(rng, *random_logits(rng, 2, 9))
    with pytest.raises(ValueError, match=r"^column 'attention_sink' cannot be worked out"):
        step["attention_sink"]
    assert "attention_sink" not in step
    assert "tv_distance" in step
    recorded = stored(step)
    with pytest.raises(ValueError, match=r"^column 'skipped' is not recorded"):
        recorded["skipped"]
    bare = LawStep(step.axes, step.logits, step.x, step.y)
    with pytest.raises(ValueError, match=r"^noise is None"):
        _ = bare.noise


def test_floats_of_a_record_come_in_double_precision_and_rows_stay_apart():
    columns = {"x": np.arange(6, dtype=np.float32), "n": np.arange(6)}
    step = Step(Axes(9), columns, slice(2, 4))
    assert step["x"].dtype == np.float64
    np.testing.assert_array_equal(step["x"], [2, 3])
    more = step.with_columns({"y": np.array([7, 8])})
    np.testing.assert_array_equal(more["y"], [7, 8])
    np.testing.assert_array_equal(more["n"], [2, 3])
    assert "y" not in step


def test_used_width_and_skips_by_hand():
    assert used_width(np.array([[1.0, 0, 0, 0], [0, 0, 0.5, 0]])) == 3
    assert used_width(np.zeros((2, 4))) == 1
    columns = {
        "head_prob": np.array([[0.6, 0.3]]),
        "head_target_prob": np.array([[0.4, 0.1]]),
        "head_uncertainty": np.array([[0.2, 0.5]]),
        "rejection_prob": np.array([0.5]),
        "draft_prob": np.array([0.1]),
        "draft_rank": np.array([-1]),
        "tv_distance": np.array([0.45]),
    }
    step = Step(Axes(12), columns)
    no, yes = np.array([False]), np.array([True])
    skip = Skip(np.array([[1.0, 0.5]]), no, no, np.array([0.0]))
    assert skip.mass(step)[0] == pytest.approx(0.75)
    assert skip.risk(step)[0] == pytest.approx(0.2 + 0.1)
    assert skip.floor(step)[0] == pytest.approx(0.2 + 0.05)
    assert skip.count(step)[0] == 2
    undecided = Skip(np.array([[1.0, 1.0]]), no, yes, np.array([1.0]))
    assert undecided.mass(step)[0] == 1
    assert undecided.risk(step)[0] == pytest.approx(0.5)
    assert undecided.count(step)[0] == pytest.approx(2 + 10)
    assert undecided.only(no).mass(step)[0] == undecided.only(no).count(step)[0] == 0
    whole = Skip(np.array([[0.0]]), yes, no, np.array([0.0]))
    assert [f(step)[0] for f in (whole.mass, whole.risk, whole.floor, whole.count)] == [
        1, 0.45, 0.45, 12,
    ]  # fmt: skip
