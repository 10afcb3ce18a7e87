"""Traces: what is written is read, a file keeps its meaning, and what does not match is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from paper_records import run_record
from toy_models import law_step, random_logits, stored

from calibrate.derive.predict import predicted_tokens
from calibrate.run.errors import UserError
from calibrate.run.folder import write_record
from calibrate.run.prompts import MIN_PROMPTS
from calibrate.run.traces import (
    HEADER_KEY,
    Shard,
    finished_prompts,
    next_shard,
    next_shards,
    prompts_to_read,
    read_axes,
    read_calibration_trace,
    read_trace,
    sampled_prompts,
    shard_paths,
    shards_in,
    write_shard,
    write_table,
)
from hlmtheory.policies import policy_from_settings
from hlmtheory.sampled_law import Sampling
from hlmtheory.steps import Axes

VOCAB, NUM = 90, 24
AXES = Axes(VOCAB, Sampling(0.8), (0.0, 0.5, 1.0, 2.0), (1, 5, 20, 90), (1, 3))
SETTINGS = {
    "u-hlm": {},
    "r-hlm": {},
    "coupled": {},
    "ask-llm": {},
    "cu-hlm-offline": {"num_entries": 7},
    "cu-hlm-online": {"theta": 0.4, "eta": 1.0, "slope": 0.8, "intercept": 0.0},
    "ui-hlm": {"importance": {"variant": "topk", "k": 3, "gamma": 0.9}},
}


def columns_of(rng: np.random.Generator, axes: Axes) -> dict[str, np.ndarray]:
    """A full trace of 4 prompts x 6 tokens, every row with the columns that cost a pass."""
    from hlmtheory.steps import LawStep

    z, w = random_logits(rng, NUM, axes.vocab_size)
    step = law_step(rng, z, w, sampling=axes.sampling)
    known = {name: step[name] for name in ("draft_token", "output_token")}
    step = LawStep(axes, step.logits, step.x, step.y, step.noise, columns=known)
    recorded = stored(step)
    columns = {name: recorded[name] for name in recorded._columns}
    return columns | {
        "row": np.repeat(np.arange(4), 6),
        "step": np.tile(np.arange(6), 4),
        "topk_attention": rng.uniform(size=(NUM, len(axes.attention_sizes))),
        "attention_entropy": rng.uniform(0.2, 1.5, size=NUM),
        "context_attention": rng.uniform(size=NUM),
    }


def write(path: Path, rng, axes: Axes = AXES, ids=("d", "a", "c", "b"), **header) -> Path:
    write_shard(path, columns_of(rng, axes), ids, header, axes)
    return path


def rewrite_header(path: Path, change) -> None:
    """The same shard with another header."""
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[HEADER_KEY])
    change(header)
    write_table(path, table.replace_schema_metadata({HEADER_KEY: json.dumps(header)}))


# --- there and back ------------------------------------------------------------------------------


def test_what_is_written_is_read_in_order_of_prompt_and_step(tmp_path, rng):
    columns = columns_of(rng, AXES)
    shuffled = rng.permutation(NUM)
    path = tmp_path / "one.parquet"
    write_shard(
        path, {name: v[shuffled] for name, v in columns.items()}, list("dacb"), {"seed": 3}, AXES
    )
    trace = read_trace([path])
    assert trace.prompt_ids == list("abcd")
    assert (trace.num_prompts, trace.num_tokens) == (4, NUM)
    np.testing.assert_array_equal(trace["step"], np.tile(np.arange(6), 4))
    np.testing.assert_array_equal(trace.prompt_index, np.repeat(np.arange(4), 6))
    order = np.argsort(np.array(list("dacb")))[:, None] * 6 + np.arange(6)
    for name in ("draft_prob", "head_prob", "draft_token", "head_race"):
        expected = columns[name][order.ravel()]
        np.testing.assert_allclose(trace[name], expected, rtol=1e-6)
    assert trace["draft_prob"].dtype == np.float64
    assert trace["head_prob"].dtype == np.float32
    assert trace.axes == AXES == read_axes(path)
    assert Shard(path).header["seed"] == 3
    assert trace.step(slice(3, 7))["head_prob"].dtype == np.float64


def test_shards_add_up_and_say_which_prompts_are_done(tmp_path, rng):
    folder = tmp_path / "traces"
    folder.mkdir()
    write(folder / "shard-00000.parquet", rng, ids=tuple("hgfe"))
    write(folder / "shard-00001.parquet", rng)
    paths = shard_paths(tmp_path)
    assert [path.name for path in paths] == ["shard-00000.parquet", "shard-00001.parquet"]
    assert finished_prompts(shard_paths(tmp_path)) == set("abcdefgh")
    trace = read_trace(paths)
    assert trace.prompt_ids == list("abcdefgh")
    some = read_trace(paths, ["entropy"])
    assert set(some.columns) == {"entropy", "step", "prompt_index"}
    np.testing.assert_array_equal(some["entropy"], trace["entropy"])
    with pytest.raises(UserError, match="no column 'tv_distance'; calibrate with --trace full"):
        some["tv_distance"]


# --- a file keeps its meaning --------------------------------------------------------------------


def prediction(path: Path) -> dict[str, np.ndarray]:
    trace = read_trace([path])
    out = {}
    for name, settings in SETTINGS.items():
        found = predicted_tokens(trace, policy_from_settings(name, settings, 0.5))
        out[name] = np.stack([found.skip, found.risk, found.bias, found.entries])
    return out


def test_grids_changed_in_the_code_do_not_change_what_an_old_trace_says(tmp_path, rng, monkeypatch):
    """The axes come from the file: today's defaults, whatever they are, play no part."""
    path = write(tmp_path / "old.parquet", rng)
    before, axes = prediction(path), read_axes(path)
    assert all(np.isfinite(values).all() for values in before.values())
    code = {
        "sampling": Sampling(1.3, top_p=0.4),
        "thetas": (0.1, 0.2, 0.3),
        "truncation_sizes": (2, 3, 4, 64),
        "attention_sizes": (3, 1),
    }
    defaults = list(Axes.__init__.__defaults__)
    names = list(Axes.__dataclass_fields__)[1:]
    assert len(defaults) == len(names) == len(code)
    monkeypatch.setattr(Axes.__init__, "__defaults__", tuple(code[name] for name in names))
    for name in names:
        monkeypatch.setattr(Axes, name, code[name])
    assert Axes(9_000).thetas == code["thetas"]  # the code has changed
    assert read_axes(path) == axes
    for name, values in prediction(path).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)


def test_the_same_columns_read_under_other_axes_say_something_else(tmp_path, rng):
    """Negative control: were the axes taken from elsewhere, the numbers would change."""
    path = write(tmp_path / "old.parquet", rng)
    before = prediction(path)

    def change(header):
        header["axes"] |= {
            "truncation_sizes": [1, 10, 40, 80],
            "attention_sizes": [3, 1],
        }

    rewrite_header(path, change)
    after = prediction(path)
    for name in ("cu-hlm-offline", "cu-hlm-online", "ui-hlm"):
        assert np.abs(after[name] - before[name]).max() > 1e-3
    for name in ("u-hlm", "r-hlm", "coupled", "ask-llm"):
        np.testing.assert_array_equal(after[name], before[name])


# --- what does not match is refused --------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AXES.to_dict()))
def test_a_header_without_an_axis_is_refused(tmp_path, rng, name):
    path = write(tmp_path / "one.parquet", rng)
    rewrite_header(path, lambda header: header["axes"].pop(name))
    with pytest.raises(UserError, match=rf"^\S*one\.parquet: axes: {name} is missing; calibrate"):
        read_trace([path])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda header: header["axes"].update(grid=[1]), "axes: grid is unknown; calibrate again$"),
        (lambda header: header.pop("axes"), "axes: .* is missing; calibrate again$"),
        (lambda header: header.update(schema_version=1), "schema version 1, this is"),
        (lambda header: header["axes"].update(temperature=-1), "temperature = -1: allowed"),
        (lambda header: header["axes"].update(top_p=0), "top_p = 0: allowed"),
        (lambda header: header["axes"].update(thetas=3), "calibrate again$"),
        (lambda header: header.update(axes=None), "calibrate again$"),
        (lambda header: header.update(axes=[1]), "calibrate again$"),
    ],
)
def test_other_headers_are_refused_in_one_line(tmp_path, rng, change, says):
    path = write(tmp_path / "one.parquet", rng)
    rewrite_header(path, change)
    with pytest.raises(UserError, match=rf"^\S*one\.parquet: [^\n]*{says}"):
        read_trace([path])


@pytest.mark.parametrize(
    "other",
    [
        Axes(VOCAB, Sampling(0.9), AXES.thetas, (1, 5, 20, 90), (1, 3)),
        Axes(VOCAB, Sampling(0.8), (0.0, 0.5, 1.0, 2.5), (1, 5, 20, 90), (1, 3)),
        Axes(VOCAB, Sampling(0.8), AXES.thetas, (1, 5, 20, 80), (1, 3)),
        Axes(VOCAB, Sampling(0.8), AXES.thetas, (1, 5, 20, 90), (1, 2)),
        Axes(VOCAB + 1, Sampling(0.8), AXES.thetas, (1, 5, 20, 90), (1, 3)),
    ],
)
def test_shards_of_different_axes_in_one_run_are_refused(tmp_path, rng, other):
    first = write(tmp_path / "000.parquet", rng)
    second = write(tmp_path / "001.parquet", rng, other, tuple("hgfe"))
    with pytest.raises(
        UserError, match=r"^\S*001\.parquet: its axes are not those of 000\.parquet"
    ):
        read_trace([first, second])


@pytest.mark.parametrize("name", ["log_partitions", "tail_deviation", "topk_attention"])
def test_columns_that_are_not_as_wide_as_their_axis_are_refused(tmp_path, rng, name):
    path = tmp_path / "one.parquet"
    columns = columns_of(rng, AXES)
    columns[name] = columns[name][:, :-1]
    write_shard(path, columns, list("dacb"), {}, AXES)
    with pytest.raises(UserError, match=rf"^\S*one\.parquet: {name} has \d+ columns and its axis"):
        read_trace([path])


def test_files_that_are_no_shards_are_refused(tmp_path, rng):
    with pytest.raises(UserError, match="no finished trace shard"):
        read_trace([])
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a trace shard, cut off or changed"):
        read_trace([path])
    whole = write(tmp_path / "whole.parquet", rng)
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a trace shard, cut off or changed"):
        read_trace([whole])
    assert not [one for one in tmp_path.iterdir() if one.suffix != ".parquet"]


def test_one_changed_byte_is_told_wherever_it_is(tmp_path, rng):
    path = write(tmp_path / "one.parquet", rng)
    whole = path.read_bytes()
    for place in [0, len(whole) - 1, *rng.integers(0, len(whole), size=40)]:
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"one\.parquet: .* checksum does not match"):
            read_trace([path])


def test_tokens_that_occur_twice_or_are_lost_are_told(tmp_path, rng):
    folder = tmp_path / "traces"
    first = write(folder / "shard-00000.parquet", rng)
    second = write(folder / "shard-00001.parquet", rng, ids=tuple("bfgh"))
    with pytest.raises(UserError, match="step 0 of prompt 'b' occurs twice"):
        read_trace([first, second])
    second.unlink()
    write_record(tmp_path, run_record())
    told = SimpleNamespace(num_prompts=4, num_tokens=24)
    assert read_calibration_trace(tmp_path, told).num_tokens == 24
    told.num_tokens = 48
    with pytest.raises(UserError, match=r"24 tokens of 4 prompts, calibration\.json is of 48"):
        read_calibration_trace(tmp_path, told)


def test_prompts_are_drawn_alike_by_seed_whatever_their_order() -> None:
    """Every prompt as often as any other, more of a seed with all of fewer, never under a floor."""
    ids = [f"p{i:03d}" for i in range(200)]
    drawn = set(sampled_prompts(ids, 40, 3))
    assert len(drawn) == 40
    assert set(sampled_prompts(ids[::-1], 40, 3)) == drawn
    assert set(sampled_prompts(ids, 60, 3)) > drawn
    assert set(sampled_prompts(ids, 40, 4)) != drawn
    assert sampled_prompts(ids, 200, 3) == ids
    times = np.zeros(200)
    for seed in range(500):
        times[[int(name[1:]) for name in sampled_prompts(ids, 40, seed)]] += 1
    spread = np.sqrt(500 * 0.2 * 0.8)  # of a binomial count around 100
    assert np.abs(times - 100).max() < 5 * spread
    assert np.std(times) == pytest.approx(spread, rel=0.2)
    assert len(prompts_to_read(ids, 20_000, 5_050, 0)) == 50
    assert len(prompts_to_read(ids, 20_000, 1, 0)) == MIN_PROMPTS
    assert prompts_to_read(ids, 20_000, 20_000, 0) == ids


@pytest.mark.parametrize("name", ["shard-00001 (1).parquet", "copy of shard-00000.parquet"])
def test_a_copied_shard_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    for one in ("shard-00000.parquet", "shard-00001.parquet"):
        (tmp_path / one).write_text("")
    assert [path.name for path in next_shards(tmp_path, 2)] == [
        "shard-00002.parquet",
        "shard-00003.parquet",
    ]
    (tmp_path / name).write_text("")
    for look in (shards_in, next_shard):
        with pytest.raises(UserError, match="no name of a shard"):
            look(tmp_path)
