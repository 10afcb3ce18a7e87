"""Whole answers against brute force: every answer of a chain whose laws depend on all before it.

Answers of at most 5 tokens of a vocabulary of 4, of which token 0 ends one: 364 answers and 121
contexts, summed in float64, so 1e-10 is far above rounding and far below any error of a formula.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from toy_models import law_step, softmax, stored

from hlmtheory.acceptance import total_variation
from hlmtheory.answers import answer_divergence, log_weights, tokens_in_agreement
from hlmtheory.coupling import coupled_output_law
from hlmtheory.policies import GatedPolicy, Policy, policy_from_settings
from hlmtheory.policies.base import Answer
from hlmtheory.policies.r_hlm import ResidualVerification
from hlmtheory.scores import score_named
from hlmtheory.steps import LawStep, Step
from hlmtheory.verification import output_law

EXACT = 1e-10
VOCAB, LENGTH, END = 4, 5, 0
CONTEXTS = [
    context
    for length in range(LENGTH)
    for context in itertools.product(range(1, VOCAB), repeat=length)
]
LEARNED = {"features": ["uncertainty", "entropy"], "mean": [0.5, 1], "scale": [0.3, 0.5],
           "coefficients": [2.0, 0.7], "intercept": 0.0}  # fmt: skip
RECORDED = ("slm", "llm", "hlm", "u-hlm", "ui-hlm", "r-hlm", "coupled", "ask-llm")
TRUNCATED = {
    "cu-hlm-offline": {"num_entries": 2},
    "cu-hlm-offline sent": {"num_entries": 2, "draft_from_sent": True},
}
GATES = {
    "uncertainty": 0.55, "uncertainty_sampled": 0.5, "entropy": 1.0, "one_minus_max_prob": 0.4,
    "learned": 0.55,
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Contexts with both laws, every token of each as its output: a row is (context, token)."""

    live: LawStep
    answers: list[tuple[int, ...]]

    @property
    def recorded(self) -> Step:
        return remember(stored(self.live))

    def law_of(self, table: np.ndarray, length: int = LENGTH) -> np.ndarray:
        """Probabilities of the answers, cut after `length`, from next-token laws (S, V)."""
        return np.array(
            [
                np.prod([table[CONTEXTS.index(one[:t]), one[t]] for t in range(len(one))])
                for one in cut(self.answers, length)
            ]
        )

    def weights(self, ratio: np.ndarray, length: int = LENGTH) -> np.ndarray:
        """ln W of every answer cut after `length`, by the project's own sums, (answers,)."""
        table = ratio.reshape(len(CONTEXTS), VOCAB)
        answers = cut(self.answers, LENGTH)
        rows = [[table[CONTEXTS.index(a[:t]), a[t]] for t in range(len(a))] for a in answers]
        index = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        return log_weights(np.concatenate(rows), index, len(rows), length)[:, -1]


def cut(answers: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """All answers of at most `length` tokens, the longer ones cut, in a fixed order."""
    return sorted({one[:length] for one in answers})


def remember(step: Any) -> Any:
    """Attention that the context alone decides, and what a policy makes of it."""
    important = np.repeat(np.arange(len(CONTEXTS)) % 3 > 0, VOCAB)
    return step.with_columns(
        {
            "important": important,
            "topk_attention": np.where(important, 1.0, 0.5)[:, None] * np.ones(5),
            "attention_entropy": 0.0 * important,
        }
    )


@pytest.fixture(scope="module")
def chain() -> Chain:
    rng = np.random.default_rng(11)
    num = len(CONTEXTS)
    z = rng.uniform(0.5, 2.5, (num, 1)) * rng.standard_normal((num, VOCAB))
    w = z + rng.uniform(0.2, 1.2, (num, 1)) * rng.standard_normal((num, VOCAB))
    z, w = (np.repeat(one, VOCAB, axis=0) for one in (z, w))
    step = remember(law_step(rng, z, w))
    step = step.with_columns({"output_token": np.tile(np.arange(VOCAB), num)})
    answers = [
        one
        for length in range(1, LENGTH + 1)
        for one in itertools.product(range(VOCAB), repeat=length)
        if END not in one[:-1] and (one[-1] == END or length == LENGTH)
    ]
    return Chain(step, sorted(answers))


def build(name: str, score: str = "uncertainty", threshold: float | None = None) -> Policy:
    settings = TRUNCATED.get(name, {})
    gate = score_named(score, LEARNED)
    threshold = GATES[score] if threshold is None else threshold
    return policy_from_settings(name.split()[0], settings, threshold, gate)


def sigma_of(policy: Policy, step: LawStep) -> np.ndarray:
    return np.asarray(policy.skip_probability(step).over_vocabulary(step))


def reference_law(policy: Policy, step: LawStep) -> np.ndarray:
    """The law of the output, (S, V), by formulas that sum over the vocabulary."""
    sigma = sigma_of(policy, step)
    if policy.name == "llm":
        law = step.y
    elif policy.name == "coupled":
        law = coupled_output_law(step.x, step.y, sigma)
    else:
        law = output_law(policy.rule, step.x, step.y, sigma, policy.size(step))
    return np.asarray(law)[::VOCAB]


def ratio_of(policy: Policy, step: Any) -> np.ndarray:
    low, high = policy.log_ratio(step)
    np.testing.assert_allclose(low, high, atol=EXACT)
    return np.asarray(low)


CASES = [
    *((name, score, "recorded") for name in RECORDED for score in GATES),
    *((name, "uncertainty", "live") for name in (*RECORDED, *TRUNCATED)),
]


@pytest.mark.parametrize(("name", "score", "kind"), CASES)
def test_weights_give_the_distance_of_the_answers_laws(chain, name, score, kind):
    """At every length, from the server's answers and from the policy's own."""
    policy = build(name, score)
    law, target = reference_law(policy, chain.live), np.asarray(chain.live.y)[::VOCAB]
    ratio = ratio_of(policy, chain.live if kind == "live" else chain.recorded)
    np.testing.assert_allclose(np.exp(ratio).reshape(-1, VOCAB), law / target, atol=EXACT)
    full = chain.law_of(law), chain.law_of(target)
    assert [one.sum() for one in full] == pytest.approx([1, 1], abs=EXACT)
    for length in range(1, LENGTH + 1):
        theirs, servers = chain.law_of(law, length), chain.law_of(target, length)
        distance = np.abs(theirs - servers).sum() / 2
        weight = chain.weights(ratio, length)
        assert full[1] @ answer_divergence(weight) == pytest.approx(distance, abs=EXACT)
        assert full[0] @ answer_divergence(-weight) == pytest.approx(distance, abs=EXACT)
    if name in ("llm", "hlm"):
        assert (ratio == 0).all()
    else:
        assert distance > 0.02


@pytest.mark.parametrize("name", TRUNCATED)
def test_what_the_columns_do_not_hold_is_unknown(chain, name):
    """A truncated law needs sums over the vocabulary that no trace keeps: never a guess."""
    low, high = build(name).log_ratio(chain.recorded)
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_a_size_of_every_draft_is_unknown_live_too(chain):
    settings = {"theta": 0.1, "eta": 1.0, "slope": 0.8, "intercept": -0.06}
    policy = policy_from_settings("cu-hlm-online", settings, 0.5)
    assert np.isnan(policy.log_ratio(chain.live)).all()


def test_any_score_of_an_answer_changes_by_no_more(chain, rng):
    """And the score that tells answers best changes by just as much."""
    law = chain.law_of(reference_law(build("u-hlm"), chain.live))
    server = chain.law_of(np.asarray(chain.live.y)[::VOCAB])
    distance = total_variation(law, server)
    scores = rng.uniform(size=(1000, len(law)))
    assert np.abs(scores @ (law - server)).max() <= distance
    assert (law > server) @ (law - server) == pytest.approx(distance, abs=EXACT)


def test_drawn_coins_only_bound_the_distance(chain):
    """u_K is drawn anew at each step: the weight is of the law averaged over its coin.

    Told with their drafts and coins answers lie further apart, so a weight of what was drawn gives
    an upper bound only: (46). Answers of two tokens, all drafts and coins of both.
    """
    policy = build("u-hlm", "uncertainty_sampled", 0.8)
    x, y, sigma = (
        np.asarray(one)[::VOCAB]
        for one in (chain.live.x, chain.live.y, sigma_of(policy, chain.live))
    )
    residual = np.maximum(y - x, 0)
    residual /= residual.sum(-1, keepdims=True)
    accepted = np.minimum(x, y)[..., None] * np.eye(VOCAB)
    verified = accepted + np.maximum(x - y, 0)[..., None] * residual[:, None]  # (S, draft, output)
    coin = np.stack([1 - sigma, sigma], axis=1)[..., None]
    # Under hlm the coin is thrown, and nobody looks at it.
    hlm = coin * verified[:, None]
    ours = np.stack([verified, x[..., None] * np.eye(VOCAB)], axis=1) * coin
    np.testing.assert_allclose(hlm.sum((1, 2)), y, atol=EXACT)
    np.testing.assert_allclose(ours.sum((1, 2)), reference_law(policy, chain.live), atol=EXACT)
    told = np.abs(ours[0, :, :, END] - hlm[0, :, :, END]).sum()
    for token in range(1, VOCAB):
        following = CONTEXTS.index((token,))
        pairs = (np.multiply.outer(one[0, :, :, token], one[following]) for one in (ours, hlm))
        told += np.abs(np.subtract(*pairs)).sum()
    server, law = (chain.law_of(one, 2) for one in (y, reference_law(policy, chain.live)))
    assert told / 2 > total_variation(law, server) + 0.003


def test_common_beginnings_under_common_random_numbers(chain):
    """hlm and u-hlm with the same draft, coin and resampling: they agree but where a skipped draft
    would have been rejected. Followed through every (draft, coin, resample) of the chain."""
    policy = build("u-hlm")
    step = chain.live
    x, y, sigma = (np.asarray(one)[::VOCAB] for one in (step.x, step.y, sigma_of(policy, step)))
    expected, frontier = 0.0, {(): 1.0}
    for _ in range(LENGTH):
        following: dict[tuple[int, ...], float] = {}
        for context, mass in frontier.items():
            p, q, s = (one[CONTEXTS.index(context)] for one in (x, y, sigma))
            residual = np.maximum(q - p, 0) / np.maximum(q - p, 0).sum()
            for draft in range(VOCAB):
                accepted = min(1.0, q[draft] / p[draft])
                same = {draft: p[draft] * accepted}  # skipped or accepted: hlm emits it as well
                for other in range(VOCAB):  # asked and rejected: both draw the same resample
                    lost = p[draft] * (1 - s[draft]) * (1 - accepted) * residual[other]
                    same[other] = same.get(other, 0.0) + lost
                for token, share in same.items():
                    expected += mass * share
                    if token != END:
                        key = (*context, token)
                        following[key] = following.get(key, 0.0) + mass * share
        frontier = following
    ratio = ratio_of(policy, chain.recorded).reshape(len(CONTEXTS), VOCAB)
    rows = [[ratio[CONTEXTS.index(a[:t]), a[t]] for t in range(len(a))] for a in chain.answers]
    index = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    server = np.array(
        [np.prod([y[CONTEXTS.index(a[:t]), a[t]] for t in range(len(a))]) for a in chain.answers]
    )
    theirs = server * [np.exp(sum(row)) for row in rows]
    flat = np.concatenate(rows)
    for log_ratio, law in ((flat, server), (-flat, theirs)):
        found = law @ tokens_in_agreement(log_ratio, index, len(rows))
        assert found == pytest.approx(expected, abs=EXACT)


def test_steps_told_apart_one_by_one_are_no_bound():
    """1 - E_Y[prod (1 - bias)] may lie below the distance; only min(1, ratio) multiplies: (47)."""
    # First token a or b; where the policy never says a, it is right behind a and wrong behind b.
    server = {"aa": 0.25, "ab": 0.25, "ba": 0.25, "bb": 0.25}
    policy = {"aa": 0.0, "ab": 0.0, "ba": 1.0, "bb": 0.0}
    distance = sum(abs(server[one] - policy[one]) for one in server) / 2
    bias = {"": 0.5, "a": 0.0, "b": 0.5}
    steps = sum(p * (1 - bias[""]) * (1 - bias[one[0]]) for one, p in server.items())
    assert distance == 0.75
    assert 1 - steps < distance
    assert bias[""] + 0.5 * (bias["a"] + bias["b"]) >= distance


def test_more_skips_may_bring_answers_nearer():
    """The distance of answers need not rise with the threshold, though every step's bias does."""
    y = {"": (0.5, 0.5), "a": (0.9, 0.1), "b": (0.9, 0.1)}

    def distance(shift: float) -> float:
        p = {"": (0.5 + shift, 0.5 - shift), "a": (0.8, 0.2), "b": (0.95, 0.05)}
        return (
            sum(
                abs(p[""][i] * p[c][j] - y[""][i] * y[c][j])
                for i, c in enumerate("ab")
                for j in range(2)
            )
            / 2
        )

    assert distance(0.02) < distance(0.0)


def test_answers_end_where_they_end():
    index = np.array([1, 1, 1, 0])
    found = log_weights(np.array([0.1, -0.3, 0.4, -2.0]), index, 3)
    np.testing.assert_allclose(found, [[-2, -2, -2], [0.1, -0.2, 0.2], [0, 0, 0]], atol=EXACT)
    np.testing.assert_allclose(
        log_weights(np.array([0.1, -0.3, 0.4, -2.0]), index, 3, 2)[1], [0.1, -0.2]
    )
    agreed = tokens_in_agreement(np.array([0.1, -0.3, 0.4, -2.0]), index, 3)
    np.testing.assert_allclose(agreed, [np.exp(-2), 1 + 2 * np.exp(-0.3), 0])
    with pytest.raises(ValueError, match=r"^prompt_index returns to a prompt"):
        log_weights(np.zeros(3), np.array([0, 1, 0]), 2)


def test_what_one_law_never_emits_weighs_nothing_or_everything():
    weight = log_weights(np.array([-np.inf, 0.5]), np.array([0, 0]), 1)
    assert answer_divergence(weight).tolist() == [[1.0, 1.0]]
    assert answer_divergence(np.array([np.inf, 0.0, np.nan]))[:2].tolist() == [0.0, 0.0]
    assert np.isnan(answer_divergence(np.array([np.nan]))).all()


class Odd(GatedPolicy):
    """Answers by itself and does not say with what law."""

    name = "odd"

    def answer(self, step: LawStep) -> Answer:
        return super().answer(step)


class OddRule(GatedPolicy):
    """Verifies by another rule, and leaves the law to the rule."""

    name = "odd-rule"

    @property
    def rule(self) -> ResidualVerification:
        return ResidualVerification()


def test_a_policy_of_ones_own_is_never_guessed_at(chain):
    assert np.isnan(Odd(threshold=0.5).log_ratio(chain.live)).all()
    own, ours = OddRule(threshold=0.5), build("r-hlm", threshold=0.5)
    np.testing.assert_allclose(own.log_ratio(chain.live), ours.log_ratio(chain.live), atol=EXACT)
    assert np.isnan(own.log_ratio(chain.recorded)).all()


@pytest.mark.parametrize("sharpness", [1.5, 3.0])
def test_beyond_the_head_the_race_is_bracketed(rng, sharpness):
    """V of 400, of which 32 are recorded: the ratio of `coupled` lies within its bounds."""
    num, vocab = 600, 400
    z = sharpness * rng.standard_normal((num, vocab))
    w = z + 0.5 * rng.standard_normal((num, vocab))
    step = law_step(rng, z, w)
    policy = build("coupled", threshold=0.93)
    live, (low, high) = policy.log_ratio(step)[0], policy.log_ratio(stored(step))
    assert (low <= live + EXACT).all()
    assert (high >= live - EXACT).all()
    skipping = np.asarray(policy.skip_probability(step).mass(step)) > 0
    assert skipping.mean() > 0.2
    assert (low[~skipping] == 0).all()
    width = (high - low)[skipping]
    assert width.max() > 1e-3  # the tail is not nothing
    assert width.mean() < 0.2


def test_where_the_head_does_not_decide_nothing_is_said(rng):
    z = 0.05 * rng.standard_normal((40, 400))
    step = law_step(rng, z, z + rng.standard_normal((40, 400)))
    for name in ("u-hlm", "r-hlm", "ask-llm", "coupled"):
        found = build(name, threshold=0.9985).log_ratio(stored(step))
        assert np.isnan(found).any()


def test_laws_in_float32_give_the_same_ratio(rng):
    import torch

    z = 3 * rng.standard_normal((200, 50))
    w = z + rng.standard_normal((200, 50))
    step = law_step(rng, z, w)
    single = LawStep(
        step.axes, *(torch.from_numpy(one).float() for one in (z, softmax(z), softmax(w))),
        columns={name: torch.from_numpy(step[name]) for name in ("draft_token", "output_token")},
    )  # fmt: skip
    for name in ("slm", "u-hlm", "r-hlm", "coupled", "ask-llm", "cu-hlm-offline"):
        policy = build(name, threshold=0.6) if name != "slm" else build(name)
        found = policy.log_ratio(single)[0]
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), policy.log_ratio(step)[0], atol=2e-4)


# --- the answer cap ------------------------------------------------------------------------------


def capped_law(chain: Chain, policy: GatedPolicy, step: LawStep) -> np.ndarray:
    """Probabilities of all answers, by following every (token, skipped) of every step."""
    free = replace(policy, cap=None)
    opened = reference_law(free, step)
    sigma = sigma_of(free, step)[::VOCAB]
    draft = np.asarray(free.rule.reference_law(step.x, free.size(step)))[::VOCAB]
    taken = sigma * (draft if free.rule.drafts_from_sent else np.asarray(step.x)[::VOCAB])
    nothing = np.zeros_like(np.asarray(step.x))
    closed = output_law(free.rule, step.x, step.y, nothing, free.size(step))[::VOCAB]
    out = []
    for answer in chain.answers:
        counts = {0: 1.0}
        for t, token in enumerate(answer):
            row, following = CONTEXTS.index(answer[:t]), {}
            for count, mass in counts.items():
                ways = [(count, closed[row, token])]
                if (count + 1) / (t + 1) <= policy.cap:
                    skipped = taken[row, token]
                    ways = [(count + 1, skipped), (count, opened[row, token] - skipped)]
                for number, share in ways:
                    following[number] = following.get(number, 0.0) + mass * share
            counts = following
        out.append(sum(counts.values()))
    return np.array(out)


def along_answers(chain: Chain, policy: Policy, step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios of all answers as the policy meets them, step by step, and their answers."""
    memory, out = policy.memory(), []
    live = np.arange(len(chain.answers))
    for t in range(LENGTH):
        rows = np.array(
            [VOCAB * CONTEXTS.index(a[:t]) + a[t] for a in (chain.answers[i] for i in live)]
        )
        if isinstance(step, LawStep):
            laws = (one[rows] for one in (step.logits, step.x, step.y))
            known = ("draft_token", "output_token", "important")
            now: Step = LawStep(step.axes, *laws, columns={one: step[one][rows] for one in known})
        else:
            now = Step(step.axes, {name: step[name] for name in step._columns}, rows)
        now = now.with_columns({"step": np.full(len(rows), t)})
        now = now.with_columns(memory.update(now))
        memory.advance(now)
        now = now.with_columns(memory.observe(now))
        low, high = policy.log_ratio(now)
        np.testing.assert_allclose(low, high, atol=EXACT)
        out += zip(live, low, strict=True)
        going = np.array([len(chain.answers[i]) > t + 1 for i in live])
        memory.keep(np.flatnonzero(going))
        live = live[going]
    order = np.lexsort((np.arange(len(out)), [one[0] for one in out]))
    index, ratio = (np.array([out[i][k] for i in order]) for k in (0, 1))
    return ratio, index.astype(int)


@pytest.mark.parametrize("cap", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "score", "kind"),
    [
        *((name, "uncertainty", "recorded") for name in ("u-hlm", "r-hlm", "coupled", "ask-llm")),
        ("u-hlm", "uncertainty_sampled", "recorded"),
        ("r-hlm", "entropy", "recorded"),
        ("ui-hlm", "uncertainty", "recorded"),
        *((name, "uncertainty", "live") for name in ("u-hlm", "coupled", *TRUNCATED)),
    ],
)
def test_a_capped_gate_weighs_all_that_it_may_have_skipped(chain, name, score, kind, cap):
    """Tokens do not say which drafts were skipped: (46d) sums over it."""
    policy = replace(build(name, score), cap=cap)
    law = capped_law(chain, policy, chain.live)
    server = chain.law_of(np.asarray(chain.live.y)[::VOCAB])
    assert law.sum() == pytest.approx(1, abs=EXACT)
    ratio, index = along_answers(chain, policy, chain.live if kind == "live" else chain.recorded)
    weight = log_weights(ratio, index, len(law))[:, -1]
    np.testing.assert_allclose(np.exp(weight) * server, law, atol=EXACT)
    assert server @ answer_divergence(weight) == pytest.approx(
        total_variation(law, server), abs=EXACT
    )
    free = chain.law_of(reference_law(replace(policy, cap=None), chain.live))
    assert cap > 0.3 or np.abs(free - law).max() > 1e-3
