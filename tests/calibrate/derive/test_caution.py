"""What is hardly meant is told in one line, and what is meant is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paper_records
import pytest

import cli
from calibrate.derive.caution import (
    link_cautions,
    pair_cautions,
    request_cautions,
    sample_cautions,
)
from calibrate.derive.presets import load_link
from calibrate.run.records import DeriveRequest, PairIdentity
from calibrate.run.resources import data_path
from hlmtheory.link import AwgnLink


def pair(slm: dict[str, Any], llm: dict[str, Any]) -> PairIdentity:
    one = paper_records.pair()
    return one.model_copy(
        update={
            "slm": one.slm.model_copy(update={"sha256": "a", "num_parameters": 10, **slm}),
            "llm": one.llm.model_copy(update={"sha256": "b", "num_parameters": 20, **llm}),
        }
    )


@pytest.mark.parametrize(
    ("slm", "llm", "words"),
    [
        ({}, {}, ""),
        ({"num_parameters": 30}, {}, "swapped"),
        ({}, {"sha256": "a"}, "the same"),
        ({"drop_layers": (1,)}, {"sha256": "a"}, ""),  # made of the server by leaving out a layer
        ({"sha256": None}, {"sha256": None}, ""),  # of no known hash
    ],
)
def test_pairs(slm: dict[str, Any], llm: dict[str, Any], words: str) -> None:
    told = pair_cautions(pair(slm, llm))
    assert [words in line for line in told] == [True] * bool(words)


@pytest.mark.parametrize(
    ("prompts", "tokens", "num"), [(160, 9000, 0), (2, 9000, 1), (160, 8, 1), (2, 8, 1)]
)
def test_samples(prompts: int, tokens: int, num: int) -> None:
    record = paper_records.calibration_record()
    record = record.model_copy(update={"num_prompts": prompts, "num_tokens": tokens})
    told = sample_cautions(record)
    assert len(told) == num
    assert all(f"{prompts} prompts with {tokens} tokens" in line for line in told)


def test_requests() -> None:
    assert request_cautions(DeriveRequest(policies=())) == []
    (theta,) = request_cautions(DeriveRequest(policies=(), thetas=(0.1, 5.0)))
    assert theta.startswith("--theta 5: ")
    (confidence,) = request_cautions(DeriveRequest(policies=(), confidence=0.1))
    assert "fail in 90 of 100" in confidence


def test_links() -> None:
    for path in data_path("links").glob("*.json"):
        assert link_cautions(path.stem, load_link(path.stem), 200_000) == []
    (told,) = link_cautions("mine", AwgnLink(20.0, 10.0), 32_000)
    assert told.startswith("--link mine: one token's index, 15 bit, takes ")


def test_derive_tells_them_on_stderr(
    judged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text('{"model": "awgn", "bandwidth_hz": 1, "snr_db": 3}')
    cli.derive(
        judged_run, name="odd", policy=["u-hlm"], link=str(slow), confidence=0.1, theta=[5.0],
        risk=[0.05],
    )  # fmt: skip
    told = capsys.readouterr().err.splitlines()
    warned = [line.split(":")[1].split()[0] for line in told if line.startswith("warning: ")]
    assert warned == ["12", "--theta", "--confidence", "--link"]
