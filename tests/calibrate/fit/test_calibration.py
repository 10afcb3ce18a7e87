"""Calibrations of a toy pair: what is drawn is stored, and what is resumed must be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import paper_records
import pytest
import toy_pair

from calibrate.decode import memory
from calibrate.derive.derivation import derive_run
from calibrate.derive.plan import plan_run
from calibrate.derive.roads import read_roads
from calibrate.fit import calibration
from calibrate.fit.calibration import calibrate, finished, prepare
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import read_record
from calibrate.run.prompts import draw_prompts, read_prompts, text_key
from calibrate.run.records import DeriveRequest, RunRecord
from calibrate.run.traces import (
    Shard,
    pilot_paths,
    read_axes,
    read_trace,
    sampled_prompts,
    shard_paths,
    stored_in,
)
from calibrate.work import worker
from calibrate.work.crew import Told

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def pair(toy: Path):
    return toy_pair.load(toy)


class Stop(Exception):
    """An interruption between two shards."""


def interrupted(monkeypatch: pytest.MonkeyPatch, request, pair) -> None:
    """Calibrate in batches of 4 and stop before the second shard is written."""
    written = []
    write = worker.write_shard

    def one_shard(*arguments) -> None:
        if written:
            raise Stop
        written.append(write(*arguments))

    monkeypatch.setattr(worker, "write_shard", one_shard)
    with pytest.raises(Stop):
        calibrate(request, prepare(request), pair)
    monkeypatch.undo()


def test_the_draw_is_stored_and_reaches_the_whole_file(toy, pair, tmp_path, monkeypatch) -> None:
    request = toy_pair.request(toy, tmp_path / "run", limit=6, max_new_tokens=3)
    prompts = prepare(request)
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    calibrate(request, prompts, pair)
    info = read_record(tmp_path / "run", RunRecord)
    everything = read_prompts(str(toy / "prompts.txt"))
    expected = draw_prompts(everything, "calibration", 6, 0)
    assert info.settings.order == "random"
    assert info.prompt_ids == tuple(prompt.prompt_id for prompt in expected)
    assert info.prompt_keys == tuple(text_key(prompt.text) for prompt in expected)
    assert info.prompt_ids != tuple(prompt.prompt_id for prompt in everything[:6])
    trace = read_trace(shard_paths(tmp_path / "run"))
    assert set(trace.prompt_ids) == set(info.prompt_ids)
    assert (info.complete, info.num_tokens) == (True, trace.num_tokens)
    by_file = prepare(toy_pair.request(toy, tmp_path / "other", limit=6, order="file"))
    assert by_file == everything[:6]
    # Fresh prompts have other texts, whatever the order.
    for order in ("random", "file"):
        fresh = draw_prompts(everything, "validation", 40, 1, order, set(info.prompt_keys))
        assert len(fresh) == 34
        assert not {text_key(prompt.text) for prompt in fresh} & set(info.prompt_keys)


def test_a_resumed_run_has_the_tokens_of_one_that_was_not(toy, pair, tmp_path, monkeypatch):
    request = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=4)
    interrupted(monkeypatch, request, pair)
    assert len(shard_paths(tmp_path / "run")) == 1
    assert not read_record(tmp_path / "run", RunRecord).complete
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    again = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=4, resume=True)
    calibrate(again, prepare(again), pair)
    whole = toy_pair.request(toy, tmp_path / "whole", max_new_tokens=4, batch_size=4)
    calibrate(whole, prepare(whole), pair)
    first, second = (read_trace(shard_paths(tmp_path / name)) for name in ("run", "whole"))
    assert first.prompt_ids == second.prompt_ids
    assert (first["output_token"] == second["output_token"]).all()


def test_shards_that_go_while_it_runs_are_told(toy, pair, tmp_path, monkeypatch):
    """Seen at the start of a resumed run, and not there any more when it is fitted."""
    run = tmp_path / "run"
    request = toy_pair.request(toy, run, batch_size=4, max_new_tokens=2)
    interrupted(monkeypatch, request, pair)
    again = replace(request, resume=True)
    first = shard_paths(run)[0]
    told = Told(job=lambda number, of: first.unlink() if number == of else None)
    with pytest.raises(UserError, match="holds 8 of the 12 prompts that were just there"):
        calibrate(again, prepare(again), pair, told)
    assert not read_record(run, RunRecord).complete
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    calibrate(again, prepare(again), pair)
    assert read_record(run, RunRecord).complete


@pytest.mark.parametrize(("now", "then"), [(9, [4, 4, 4]), (3, [3, 3, 2, 4])])
def test_a_resumed_run_decodes_no_more_together_than_before(
    toy, pair, tmp_path, monkeypatch, now, then
):
    """More may be free by then; in bfloat16 other batches are other rounding."""
    run = tmp_path / "run"
    request = toy_pair.request(toy, run, max_new_tokens=2)
    monkeypatch.setattr(memory, "automatic_batch_size", lambda *_: 4)
    interrupted(monkeypatch, request, pair)
    monkeypatch.setattr(memory, "automatic_batch_size", lambda *_: now)
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    again = replace(request, resume=True)
    calibrate(again, prepare(again), pair)
    sizes = [len(stored_in([path]).prompt_ids) for path in shard_paths(run)]
    assert sorted(sizes) == sorted(then)
    assert read_record(run, RunRecord).num_together == min(now, 4)


def test_the_pilot_leaves_the_servers_road_where_it_skips_what_would_be_rejected(
    toy, pair, tmp_path, monkeypatch
):
    """Common random numbers: the same steps up to there, other contexts behind."""
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    request = toy_pair.request(toy, tmp_path / "run", limit=20, max_new_tokens=12, pilot=16)
    steps = []
    calibrate(request, prepare(request), pair, Told(lambda *two: steps.append(sum(two))))
    assert sum(steps) == (20 + 16) * 12
    run = tmp_path / "run"
    info = read_record(run, RunRecord)
    server, pilot = (read_trace(paths(run)) for paths in (shard_paths, pilot_paths))
    assert info.pilot is not None
    assert pilot.prompt_ids == sorted(info.pilot.prompt_ids)
    assert info.pilot.num_tokens == pilot.num_tokens
    assert set(pilot.prompt_ids) < set(server.prompt_ids)
    below = server["uncertainty"] <= info.pilot.threshold
    risk = float(np.mean(below * server["rejection_prob"]))
    assert risk == pytest.approx(info.pilot.risk)
    assert 0 < risk <= 0.02
    paired, parted = server.of_prompts(pilot.prompt_ids), 0
    for i in range(pilot.num_prompts):
        mine, theirs = (one["output_token"][one.prompt_index == i] for one in (pilot, paired))
        rows = paired.prompt_index == i
        leaves = (paired["uncertainty"] <= info.pilot.threshold) & ~paired["accepted"].astype(bool)
        first = np.append(np.flatnonzero(leaves[rows]), len(theirs))[0]
        assert (mine[:first] == theirs[:first]).all()
        parted += first < len(theirs)
        assert first == len(theirs) or mine[first] != theirs[first]
    assert parted > 0


@pytest.fixture
def drawn(toy, pair, tmp_path):
    """A calibration that is longer than what is read of it: the request, the fit, what was told."""
    told = []
    settings = {"limit": 40, "max_new_tokens": 12, "pilot": 16, "batch_size": 10}
    settings["read_tokens"] = 240
    request = toy_pair.request(toy, tmp_path / "run", **settings)
    return request, calibrate(request, prepare(request), pair, Told(note=told.append)), told


def test_of_a_long_trace_some_prompts_are_drawn_and_read_ever_after(drawn):
    """The same for the fit, the pilot and whoever reads later."""
    request, fitted, told = drawn
    run = request.run
    info = read_record(run, RunRecord)
    every = read_trace(shard_paths(run))
    assert (info.num_prompts, info.num_tokens) == (40, every.num_tokens)
    most = 240 * 40 // every.num_tokens
    assert fitted.num_prompts == most < 40
    assert [one for one in told if f"{most} of 40 prompts, drawn at random" in one]
    roads = read_roads(run, fitted)
    assert roads.server.num_tokens == fitted.num_tokens
    same = every.of_prompts(roads.server.prompt_ids)
    assert (roads.server["uncertainty"] == same["uncertainty"]).all()
    assert roads.server.prompt_ids == sorted(sampled_prompts(info.prompt_ids, most, request.seed))
    assert roads.pilot is not None
    assert set(info.pilot.prompt_ids) <= set(roads.server.prompt_ids)
    assert roads.pilot.num_prompts == 16
    assert finished(replace(request, resume=True)) == fitted
    planned = plan_run(run, (0.2,))
    assert planned.ms_per_prompt == pytest.approx(1e3 * info.wall_s / 40)
    assert planned.num_prompts == most
    assert derive_run(run, DeriveRequest(policies=("u-hlm",))).num_tokens == fitted.num_tokens


def test_a_drawn_prompt_that_is_lost_or_doubled_is_told(drawn):
    request, fitted, _ = drawn
    first, *_ = shard_paths(request.run)
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match="a shard was lost or added"):
        read_roads(request.run, fitted)
    first.write_bytes(whole)
    (first.parent / "shard-00099.parquet").write_bytes(whole)
    with pytest.raises(UserError, match="occurs twice"):
        read_roads(request.run, fitted)


def test_more_of_what_is_recorded_is_read_without_decoding(drawn, pair, monkeypatch):
    request, fitted, _ = drawn
    info = read_record(request.run, RunRecord)
    before = {path: path.read_bytes() for path in request.run.rglob("*.parquet")}
    more = replace(request, resume=True, read_tokens=info.num_tokens)
    assert finished(more) is None
    monkeypatch.setattr(worker, "write_shard", None)  # nothing may be written
    whole = calibrate(more, prepare(more), pair)
    assert whole.num_prompts == 40 > fitted.num_prompts
    assert finished(more) == whole
    assert read_record(request.run, RunRecord).pilot == info.pilot
    assert {path: path.read_bytes() for path in request.run.rglob("*.parquet")} == before
    assert read_roads(request.run, whole).pilot is not None
    derive_run(request.run, DeriveRequest(policies=("u-hlm",)))
    with pytest.raises(UsageError, match=r"^--read-tokens 240: .*rests on 40 prompts, .* read 2"):
        finished(replace(more, read_tokens=240))


def test_a_pilot_in_work_stays_what_it_is_where_more_is_read(toy, pair, tmp_path, monkeypatch):
    """Its other half would have another threshold and other prompts."""
    settings = {"limit": 40, "max_new_tokens": 12, "pilot": 16, "batch_size": 8}
    request = toy_pair.request(toy, tmp_path / "run", read_tokens=240, **settings)
    write, written = worker.write_shard, []

    def some_shards(*arguments) -> None:
        if len(written) == 6:  # the five of the trace, and one of the pilot's two
            raise Stop
        written.append(write(*arguments))

    monkeypatch.setattr(worker, "write_shard", some_shards)
    with pytest.raises(Stop):
        calibrate(request, prepare(request), pair)
    monkeypatch.undo()
    planned = read_record(request.run, RunRecord).pilot
    assert planned is not None
    again = replace(request, resume=True, read_tokens=10_000)
    calibrate(again, prepare(again), pair)
    pilot = read_record(request.run, RunRecord).pilot
    assert (pilot.threshold, pilot.prompt_ids) == (planned.threshold, planned.prompt_ids)
    assert read_trace(pilot_paths(request.run)).prompt_ids == sorted(pilot.prompt_ids)
    info = read_record(request.run, RunRecord)
    for told, paths in ((info, shard_paths), (pilot, pilot_paths)):  # what both tries decoded
        shards = [Shard(path) for path in paths(request.run)]
        assert told.num_tokens == sum(shard.num_tokens for shard in shards)
        assert told.wall_s == pytest.approx(sum(shard.header["wall_s"] for shard in shards))
    fresh = toy_pair.request(toy, tmp_path / "fresh", read_tokens=10_000, **settings)
    calibrate(fresh, prepare(fresh), pair)
    other = read_record(fresh.run, RunRecord).pilot
    assert set(other.prompt_ids) != set(pilot.prompt_ids)


def test_an_interrupted_pilot_goes_on(toy, pair, tmp_path, monkeypatch):

    def summarised(trace, _):
        number = {"num_prompts": trace.num_prompts}
        return paper_records.calibration_record().model_copy(update=number)

    monkeypatch.setattr(calibration, "summarise", summarised)
    settings = {"batch_size": 8, "max_new_tokens": 6, "limit": 16}
    request = toy_pair.request(toy, tmp_path / "run", **settings)
    written = []
    write = worker.write_shard

    def some_shards(*arguments) -> None:
        if len(written) == 3:
            raise Stop
        written.append(write(*arguments))

    monkeypatch.setattr(worker, "write_shard", some_shards)
    with pytest.raises(Stop):
        calibrate(request, prepare(request), pair)
    monkeypatch.setattr(worker, "write_shard", write)
    kept = {path: path.read_bytes() for path in pilot_paths(tmp_path / "run")}
    assert len(kept) == 1
    again = toy_pair.request(toy, tmp_path / "run", resume=True, **settings)
    calibrate(again, prepare(again), pair)
    whole = toy_pair.request(toy, tmp_path / "whole", **settings)
    calibrate(whole, prepare(whole), pair)
    first, second = (read_trace(pilot_paths(tmp_path / name)) for name in ("run", "whole"))
    assert (first["output_token"] == second["output_token"]).all()
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert finished(again) is not None
    pilot_paths(tmp_path / "run")[1].unlink()
    assert finished(again) is None


def test_shards_of_other_axes_are_not_mixed_with_new_ones(toy, pair, tmp_path, monkeypatch):
    """One line with both values; the run stays as it is."""
    request = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2)
    interrupted(monkeypatch, request, pair)
    (shard,) = shard_paths(tmp_path / "run")
    sizes = read_axes(shard).attention_sizes
    before = shard.read_bytes()

    def of_another_version(shards):
        found = stored_in(shards)
        axes = {replace(axes, attention_sizes=(1, 3)): path for axes, path in found.axes.items()}
        return replace(found, axes=axes)

    monkeypatch.setattr(calibration, "stored_in", of_another_version)
    again = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2, resume=True)
    with pytest.raises(UserError, match=r"attention_sizes = \(1, 3\), this version") as caught:
        calibrate(again, prepare(again), pair)
    assert str(sizes) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert shard.read_bytes() == before
    assert shard_paths(tmp_path / "run") == [shard]


def test_a_resumed_run_reads_what_it_holds_twice(toy, pair, tmp_path, monkeypatch):
    """Once to know what is left, once to fit: at a hundred million tokens it is minutes each."""
    request = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2)
    interrupted(monkeypatch, request, pair)
    (shard,) = shard_paths(tmp_path / "run")
    opened = []
    plain = Shard.__init__

    def counting(self, path):
        opened.append(path)
        plain(self, path)

    monkeypatch.setattr(Shard, "__init__", counting)
    again = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2, resume=True)
    calibrate(again, prepare(again), pair)
    assert opened.count(shard) == 2
    assert len(set(opened)) > 1


def test_a_shard_that_does_not_arrive_is_told(toy, pair, tmp_path, monkeypatch):
    """As from another machine whose disk is not the one that was said to be shared."""
    monkeypatch.setattr(worker, "write_shard", lambda *_: None)
    request = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2)
    with pytest.raises(UserError, match="its shards do not hold the 12 prompts of this run"):
        calibrate(request, prepare(request), pair)


def test_a_finished_run_says_so_and_a_lost_shard_is_made_again(
    toy, pair, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(calibration, "summarise", lambda *_: paper_records.calibration_record())
    run = tmp_path / "run"
    request = toy_pair.request(toy, run, batch_size=4, max_new_tokens=4)
    assert finished(request) is None
    made = calibrate(request, prepare(request), pair)
    before = read_trace(shard_paths(run))
    again = toy_pair.request(toy, run, batch_size=4, max_new_tokens=4, resume=True)
    prepare(again)
    assert finished(again) == made
    info = read_record(run, RunRecord)
    spent = [Shard(path).header["wall_s"] for path in shard_paths(run)]
    assert info.wall_s == pytest.approx(sum(spent))
    shard_paths(run)[1].unlink()
    assert finished(again) is None
    calibrate(again, prepare(again), pair)
    after = read_trace(shard_paths(run))
    assert after.prompt_ids == before.prompt_ids
    assert (after["output_token"] == before["output_token"]).all()
    assert finished(again) == made


def test_what_a_kill_before_the_first_file_left_is_no_obstacle(toy, pair, tmp_path) -> None:
    run = tmp_path / "run"
    for resume in (False, True):
        run.mkdir()
        (run / ".lock").write_text("")
        (run / ".run.json.abc.part").write_text("{")
        request = toy_pair.request(toy, run, resume=resume)
        prepare(request)
        assert list(run.iterdir()) == []
        run.rmdir()


@pytest.mark.parametrize("what", ["prompt", "pair"])
def test_other_inputs_are_refused_with_both_values(toy, pair, tmp_path, monkeypatch, what):
    request = toy_pair.request(toy, tmp_path / "run", batch_size=4, max_new_tokens=2)
    interrupted(monkeypatch, request, pair)
    again = replace(request, resume=True)
    prompts = prepare(again)
    if what == "prompt":
        told = "text of prompt line-"
        prompts = [replace(prompts[0], text="w9 w9"), *prompts[1:]]
        values = f"was '[0-9a-f]+' in .*, now '{text_key('w9 w9')}'"
    else:
        told, values = "dtype", "was 'float32' in .*, now 'float64'"
        monkeypatch.setattr(pair, "dtype", "float64")
    with pytest.raises(UserError, match=f"--resume: {told}.* {values}; name another folder"):
        calibrate(again, prompts, pair)
