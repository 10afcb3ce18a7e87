"""Prompt files: the shipped one keeps its promises, and bad ones are refused by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calibrate.run.errors import UsageError, UserError
from calibrate.run.prompts import (
    Order,
    Prompt,
    Split,
    draw_prompts,
    duplicate_texts,
    read_prompts,
    text_key,
    tokenize_prompts,
)


class WordTokenizer:
    """One token a word, no chat template."""

    chat_template = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_shipped_prompts_are_balanced() -> None:
    prompts = read_prompts(None)
    assert len(prompts) >= 320
    assert len({p.prompt_id for p in prompts}) == len(prompts)
    assert len({text_key(p.text) for p in prompts}) == len(prompts)
    counts = Counter((p.category, p.split) for p in prompts)
    assert len({category for category, _ in counts}) == 8
    assert set(counts.values()) == {20}
    for split in ("calibration", "validation"):
        assert set(Counter(p.category for p in draw_prompts(prompts, split, 16, 0)).values()) == {2}


def test_the_halves_share_nothing() -> None:
    prompts = read_prompts(None)
    for seed in range(5):
        calibration = draw_prompts(prompts, "calibration", 160, seed)
        validation = draw_prompts(prompts, "validation", 10**6, seed)
        assert calibration == by_id(p for p in prompts if p.split == "calibration")
        assert validation == by_id(p for p in prompts if p.split == "validation")
        assert not {text_key(p.text) for p in calibration} & {text_key(p.text) for p in validation}


# --- draws ---------------------------------------------------------------------------------------


def by_id(prompts: Iterable[Prompt]) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: prompt.prompt_id)


def file_of(sizes: Mapping[str, int]) -> list[Prompt]:
    """A file that is not divided, ordered by topic."""
    return [
        Prompt(f"{topic}-{i}", f"text {topic} {i}", topic, None)
        for topic, size in sizes.items()
        for i in range(size)
    ]


def two_draws(prompts: list[Prompt], num: int, seed: int, order: Order = "random") -> list[Counter]:
    """Topics of a calibration draw and of the validation draw that follows it."""
    first = draw_prompts(prompts, "calibration", num, seed, order)
    keys = {text_key(p.text) for p in first}
    second = draw_prompts(prompts, "validation", num, seed + 1, order, keys)
    assert not keys & {text_key(p.text) for p in second}
    return [
        Counter(p.category or p.prompt_id.partition("-")[0] for p in d) for d in (first, second)
    ]


@given(st.permutations(file_of({"a": 5, "b": 9})), st.integers(0, 2**63), st.booleans())
def test_the_order_of_lines_does_not_matter(
    lines: list[Prompt], seed: int, categorised: bool
) -> None:
    if not categorised:
        lines = [replace(line, category="") for line in lines]
    drawn = draw_prompts(lines, "calibration", 6, seed)
    assert drawn == draw_prompts(by_id(lines), "calibration", 6, seed)
    assert draw_prompts(lines, "calibration", 6, seed, "file") == lines[:6]


def test_a_file_ordered_by_topic_gives_both_draws_the_same_mix() -> None:
    prompts = file_of({"code": 40, "prose": 40})
    for seed in range(5):
        assert two_draws(prompts, 20, seed) == [{"code": 10, "prose": 10}] * 2
    # the negative control: cut off the file, they are of one topic each
    assert two_draws(prompts, 40, 0, "file") == [{"code": 40}, {"prose": 40}]


def test_without_categories_the_mix_is_the_same_on_average() -> None:
    """Hypergeometric: 20 of 80, half of them code."""
    prompts = [replace(p, category="") for p in file_of({"code": 40, "prose": 40})]
    counts = np.array([[c["code"] for c in two_draws(prompts, 20, seed)] for seed in range(200)])
    law = stats.hypergeom(80, 40, 20)
    assert np.all(np.abs(counts.mean(axis=0) - 10) < 4 * law.std() / np.sqrt(200))
    assert counts.std() > 0.8 * law.std()  # not stratified where nothing says how


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 12), min_size=1),
    st.integers(1, 60),
    st.integers(0, 2**32),
)
def test_shares_are_those_of_largest_remainder(sizes: dict[str, int], num: int, seed: int) -> None:
    drawn = Counter(p.category for p in draw_prompts(file_of(sizes), "calibration", num, seed))
    total = sum(sizes.values())
    num = min(num, total)
    assert sum(drawn.values()) == num
    exact = {topic: num * size / total for topic, size in sizes.items()}
    raised = [topic for topic in sizes if drawn[topic] > int(exact[topic] + 1e-9)]
    for topic in sizes:
        assert abs(drawn[topic] - exact[topic]) < 1
        remainder = exact[topic] % 1
        if topic not in raised:
            assert all(remainder <= exact[other] % 1 + 1e-9 for other in raised)


def test_lots_decide_between_equal_remainders() -> None:
    seen = {
        tuple(p.category for p in draw_prompts(file_of({"a": 3, "b": 3}), "calibration", 1, seed))
        for seed in range(20)
    }
    assert seen == {("a",), ("b",)}


@pytest.mark.parametrize("categorised", [False, True])
@pytest.mark.parametrize("split", ["calibration", "validation"])
def test_every_prompt_is_drawn_equally_often(split: Split, categorised: bool) -> None:
    prompts = file_of({"a": 6, "b": 6})
    if not categorised:
        prompts = [replace(p, category="") for p in prompts]
    num_seeds, num, total = 2000, 4, len(prompts)

    def statistic(order: Order) -> float:
        counts = Counter(
            p.prompt_id
            for seed in range(num_seeds)
            for p in draw_prompts(prompts, split, num, seed, order)
        )
        seen = np.array([counts[p.prompt_id] for p in prompts])
        share = num / total
        # Without replacement the counts have covariance n p (1 - p) m/(m - 1) (I - 1 1^T/m) in each
        # stratum of m, so that the sum of squares is a chi-square of m - 1 for each.
        stratum = total // 2 if categorised else total
        variance = num_seeds * share * (1 - share) * stratum / (stratum - 1)
        return float(((seen - num_seeds * share) ** 2).sum() / variance)

    freedom = total - 2 if categorised else total - 1
    assert stats.chi2.sf(statistic("random"), freedom) > 1e-3
    assert stats.chi2.sf(statistic("file"), freedom) < 1e-12  # the negative control


def test_the_two_draws_of_one_seed_are_independent() -> None:
    """Chi-square on a 2 x 2 table: is a prompt that one draw took taken by the other too?"""
    prompts = [replace(p, category="") for p in file_of({"a": 10})]
    table = np.zeros((2, 2))
    for seed in range(1000):
        taken = [
            prompts[0] in draw_prompts(prompts, split, 5, seed)
            for split in ("calibration", "validation")
        ]
        table[int(taken[0]), int(taken[1])] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_larger_limit_keeps_what_a_smaller_one_drew() -> None:
    prompts = [replace(p, category="") for p in file_of({"a": 30})]
    fewer, more = (draw_prompts(prompts, "calibration", num, 3) for num in (5, 12))
    assert {p.prompt_id for p in fewer} < {p.prompt_id for p in more}


def test_nobody_validates_on_calibrated_texts(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one two three\nfour five six\none two three\nseven eight nine\n")
    prompts = read_prompts(str(path))
    assert duplicate_texts(prompts) == [("line-00001", "line-00003")]
    assert duplicate_texts(prompts[:2]) == []
    calibrated = {text_key(p.text) for p in draw_prompts(prompts, "calibration", 2, 0, "file")}
    for order in ("random", "file"):
        drawn = draw_prompts(prompts, "validation", 9, 0, order, calibrated)
        assert [p.text for p in drawn] == ["seven eight nine"]
        with pytest.raises(UsageError, match="no prompt is left"):
            draw_prompts(prompts[:3], "validation", 9, 0, order, calibrated)


def test_a_half_that_is_not_there_is_refused() -> None:
    prompts = [p for p in read_prompts(None) if p.split == "calibration"]
    with pytest.raises(UsageError, match="none of the prompts is in the validation half"):
        draw_prompts(prompts, "validation", 9, 0)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompt"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "fine"}\n{"text": 3}', 'line 2: give an object with a "prompt"'),
        ('{"prompt": "  "}', "line 1: the prompt is empty"),
        ('{"prompt": "a b", "split": "test"}', "split = 'test'"),
        ('{"prompt": "a b", "id": "x"}\n{"prompt": "c d", "id": "x"}', "occurs twice"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(str(path))
    assert "\n" not in str(caught.value)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(path))


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a few words\n" + "word " * 100)
    prompts = read_prompts(str(path))
    assert len(tokenize_prompts(prompts, WordTokenizer(), 10, 110)) == 2
    with pytest.raises(UserError, match=r"'line-00002' has 100 tokens.*context of 109"):
        tokenize_prompts(prompts, WordTokenizer(), 10, 109)
