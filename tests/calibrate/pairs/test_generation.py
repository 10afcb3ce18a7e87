"""A model's generation config: said, taken on request with its own meaning, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_pair
from transformers import GenerationConfig

from calibrate.pairs.generation import OTHERS, config_sampling, not_applied
from calibrate.pairs.sources import LocalFolder, ModelSpec, PairSpec
from calibrate.run.errors import UsageError
from hlmtheory.sampled_law import PLAIN, Sampling

QWEN = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1,
    "eos_token_id": [1, 2], "pad_token_id": 0, "transformers_version": "4.37.0",
}  # fmt: skip


def pair_of(folder: Path, server: dict | str | None, device: dict | None = None) -> PairSpec:
    """A pair of folders with these generation configs."""
    specs = []
    for side, config in (("device", device), ("server", server)):
        path = folder / side
        path.mkdir(exist_ok=True)
        (path / "generation_config.json").unlink(missing_ok=True)
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (path / "generation_config.json").write_text(text)
        specs.append(ModelSpec(side, LocalFolder(path)))
    return PairSpec("pair", *specs, "", "")


@pytest.mark.parametrize(
    ("config", "meaning"),
    [
        (QWEN, Sampling(0.7, 20, 0.8, 1.1)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 50, 0.9)),
        ({"do_sample": True, "top_k": 0}, PLAIN),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, Sampling(0.0)),
        ({"repetition_penalty": 1.2, "top_k": None}, Sampling(0.0, repetition_penalty=1.2)),
        (QWEN | {"min_p": None, "num_beams": 1, "min_length": 0}, Sampling(0.7, 20, 0.8, 1.1)),
    ],
)  # fmt: skip
def test_values_mean_what_they_mean_in_transformers(tmp_path, config, meaning):
    assert config_sampling(pair_of(tmp_path, config)) == meaning


def test_the_defaults_are_those_of_transformers():
    """Without do_sample no sampling; with it 50 of top_k; and all we call neutral is neutral."""
    defaults = GenerationConfig()._get_default_generation_params()
    assert defaults["do_sample"] is False
    assert defaults["top_k"] == 50
    for key in ("temperature", "top_p", "repetition_penalty"):
        assert defaults[key] == 1
    for key, neutral in OTHERS.items():
        assert defaults.get(key) is None or defaults[key] in neutral, key
    known = GenerationConfig().to_dict()
    assert {key for key in OTHERS if key not in known} <= {"force_words_ids", "constraints"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "that of server says nothing of sampling; give --temperature"),
        (None, "that of server says nothing of sampling"),
        (QWEN | {"no_repeat_ngram_size": 3}, "sets no_repeat_ngram_size = 3, which cannot"),
        (QWEN | {"min_p": 0.05, "typical_p": 0.9}, r"sets min_p = 0.05, typical_p = 0.9, which"),
        (QWEN | {"bad_words_ids": [[3]]}, r"sets bad_words_ids = \[\[3\]\], which"),
        (QWEN | {"num_beams": 4}, "sets num_beams = 4, which"),
        (QWEN | {"temperature": 70}, "that of server: temperature = 70: allowed"),
        (QWEN | {"temperature": "warm"}, "that of server: could not convert"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path, config, says):
    with pytest.raises(UsageError, match=rf"^--sampling generation-config: [^\n]*{says}[^\n]*$"):
        config_sampling(pair_of(tmp_path, config))


@pytest.mark.parametrize("text", ["[1]", "not json", ""])
def test_a_broken_file_is_one_line(tmp_path, text):
    with pytest.raises(UsageError, match=r"generation_config\.json: is not a JSON object"):
        config_sampling(pair_of(tmp_path, text))


def test_what_is_not_applied_is_said_in_one_line_a_model(tmp_path):
    pair = pair_of(tmp_path, QWEN | {"min_p": 0.1}, {"do_sample": True, "top_p": 1.0})
    assert not_applied(pair, PLAIN) == [
        "the server model's generation config has temperature = 0.7, top_k = 20, top_p = 0.8, "
        "repetition_penalty = 1.1, min_p = 0.1: not applied, T = 1 is"
    ]
    (line,) = not_applied(pair_of(tmp_path, QWEN), Sampling(0.7, 20, 0.9, 1.1))
    assert line.endswith("has top_p = 0.8: not applied, T = 0.7, top-k 20, top-p 0.9, "
                         "repetition penalty 1.1 is")  # fmt: skip
    assert not_applied(pair_of(tmp_path, QWEN), Sampling(0.7, 20, 0.8, 1.1)) == []
    greedy = {"do_sample": False, "temperature": 0.7}
    assert not_applied(pair_of(tmp_path, greedy), Sampling(0.0)) == []
    assert len(not_applied(pair_of(tmp_path, greedy), PLAIN)) == 1
    assert not_applied(pair_of(tmp_path, None), PLAIN) == []


def test_the_command_line_takes_it_for_both_laws_and_resume_keeps_it(tmp_path, capsys):
    """hlm calibrate --sampling generation-config, an option in the place of one of its values."""
    import sys
    from unittest import mock

    import cli
    from calibrate.run.folder import read_record
    from calibrate.run.records import RunRecord
    from calibrate.run.traces import read_axes, shard_paths

    device, server = toy_pair.make_pair(tmp_path)
    toy_pair.write_prompts(tmp_path / "prompts.txt")
    (server / "generation_config.json").write_text(json.dumps(QWEN | {"top_k": None}))
    words = [
        "hlm", "calibrate", "--slm", str(device), "--llm", str(server), "--limit", "3",
        "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4", "--dtype", "float32",
        "--device", "cpu", "--output-path", str(tmp_path / "run"), "--trace", "minimal", "--json",
    ]  # fmt: skip

    def hlm(*more: str) -> tuple[int, str]:
        with mock.patch.object(sys, "argv", [*words, *more]), pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    code, said = hlm("--sampling", "generation-config", "--top-p", "0.6")
    assert code == 0, said
    sampling = Sampling(0.7, 50, 0.6, 1.1)
    record = read_record(tmp_path / "run", RunRecord)
    assert record.settings.sampling == sampling
    assert read_axes(shard_paths(tmp_path / "run")[0]).sampling == sampling
    assert f"for both laws: {sampling}" in said
    assert f"has top_p = 0.8: not applied, {sampling} is" in said
    (tmp_path / "run" / "run.json").unlink()
    code, said = hlm("--sampling", "everything")
    assert (code, "--sampling everything" in said) == (2, True)
