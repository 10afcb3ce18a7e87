"""Prompt files: the shipped one keeps its promises, and bad ones are refused by line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from calibrate.run.errors import UsageError, UserError
from calibrate.run.prompts import (
    calibration_prompts,
    read_prompts,
    text_key,
    tokenize_prompts,
    validation_prompts,
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
    for split in (calibration_prompts(prompts, 16), validation_prompts(prompts, 16, set())):
        assert set(Counter(p.category for p in split).values()) == {2}


def test_the_halves_share_nothing() -> None:
    prompts = read_prompts(None)
    first = {text_key(p.text) for p in calibration_prompts(prompts, 10**6)}
    second = {text_key(p.text) for p in validation_prompts(prompts, 10**6, set())}
    assert not first & second


def test_nobody_validates_on_calibrated_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one two three\nfour five six\nseven eight nine\n")
    prompts = read_prompts(str(path))
    calibrated = {text_key(p.text) for p in calibration_prompts(prompts, 2)}
    assert [p.text for p in validation_prompts(prompts, 9, calibrated)] == ["seven eight nine"]
    with pytest.raises(UsageError, match="no prompt is left"):
        validation_prompts(prompts[:2], 9, calibrated)


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
