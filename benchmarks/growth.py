"""How time and memory grow: with prompts, with the batch, with the vocabulary.

    python -m benchmarks.growth [--json docs/growth.json] [--figure docs/figures/growth.png]

A made-up pair whose forwards cost next to nothing decodes losslessly with full traces and writes
shards, so what is seen is the engine itself. Each point is a process of its own on one core, whose
peak is set against one that has only warmed up: first calls import and set up a good deal.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calibrate.run.folder import atomic_path, write_text

NUM_REPEATS = 3
PROMPTS = (100, 1_000, 10_000)
BATCHES = (1, 4, 16, 64)
VOCABULARIES = (1_000, 10_000, 50_000, 152_000)


@dataclass(frozen=True)
class Load:
    """One point."""

    num_prompts: int
    batch_size: int
    vocab_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Row:
    """What it cost: medians of fresh processes.

    Attributes
    ----------
    seconds : float
    ms_per_token : float
    memory_mib : float
        Peak of the process above that of one that only warms up.
    memory_range_mib : (float, float)
        Least and largest: how freed buffers fit the next ones differs from run to run.
    """

    load: Load
    seconds: float
    ms_per_token: float
    memory_mib: float
    memory_range_mib: tuple[float, float]


WARM_UP = Load(2, 2, 1_000, 2)


def measure_here(load: Load) -> tuple[float, int, float]:
    """Warm up, then decode a load in this process: seconds, tokens and peak memory in MiB."""
    decode_load(WARM_UP)
    seconds, tokens = decode_load(load) if load.num_prompts else (0.0, 0)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return seconds, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def decode_load(load: Load) -> tuple[float, int]:
    """Decode one load in this process; seconds and tokens."""
    import torch

    from calibrate.decode.engine import DecodingSettings, decode
    from calibrate.decode.models import StepOutput
    from calibrate.pairs.buffers import keep_large_buffers
    from calibrate.run.prompts import TokenizedPrompt
    from calibrate.run.traces import write_shard
    from hlmtheory.policies import calibration_policy

    torch.set_num_threads(1)  # on a busy machine two threads mostly wait for each other
    keep_large_buffers()

    class TableSession:
        """Logits looked up by the last token: a forward that costs one copy."""

        forward_s = 0.0

        def __init__(self, table: torch.Tensor) -> None:
            self.table = table

        def step(self, tokens: torch.Tensor) -> StepOutput:
            return StepOutput(self.table[tokens % len(self.table)])

        def keep(self, rows: torch.Tensor) -> None:
            del rows

    class TableModel:
        """See TableSession."""

        def __init__(self, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            self.table = 4 * torch.randn(16, load.vocab_size, generator=generator)
            self.vocab_size = load.vocab_size
            self.device = torch.device("cpu")

        def start(
            self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
        ) -> TableSession:
            del contexts, attention, fill
            return TableSession(self.table)

    prompts = [TokenizedPrompt(f"p{i:06d}", (i % 13, i % 7)) for i in range(load.num_prompts)]
    settings = DecodingSettings(max_new_tokens=load.max_new_tokens, batch_size=load.batch_size)
    axes = settings.axes(load.vocab_size)
    begin, num_tokens = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        batches = decode(TableModel(0), TableModel(1), prompts, calibration_policy(), settings, ())
        for number, batch in enumerate(batches):
            path = Path(folder) / f"shard-{number:05d}.parquet"
            write_shard(path, batch.columns, list(batch.prompt_ids), {}, axes)
            num_tokens += len(batch.columns["row"])
    return time.perf_counter() - begin, num_tokens


def measure(load: Load) -> tuple[float, int, float]:
    """Seconds, tokens and peak memory in MiB of one load in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", json.dumps(asdict(load))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, tokens, peak = json.loads(done.stdout)
    return seconds, tokens, peak


def rows_of(loads: Sequence[Load]) -> list[Row]:
    """Measure every load, one after the other."""
    baseline = statistics.median(measure(Load(0, 1, 1, 1))[2] for _ in range(NUM_REPEATS))
    rows = []
    for load in loads:
        runs = [measure(load) for _ in range(NUM_REPEATS)]
        seconds = statistics.median(run[0] for run in runs)
        above = sorted(run[2] - baseline for run in runs)
        row = Row(
            load,
            seconds,
            1e3 * seconds / runs[0][1],
            statistics.median(above),
            (above[0], above[-1]),
        )
        print(
            f"  {load.num_prompts:6d} prompts, batch {load.batch_size}, V {load.vocab_size:7,d}: "
            f"{row.ms_per_token:7.3f} ms a token, {row.memory_mib:6.0f} MiB",
            flush=True,
        )
        rows.append(row)
    return rows


def draw(panels: dict[str, list[Row]], path: Path) -> None:
    """Time a token and peak memory against each size."""
    from paper_figs.style import BLUE, VERMILLION, finish, new_figure, panel_letter, styled

    xs = {"prompts": "num_prompts", "batch": "batch_size", "vocabulary": "vocab_size"}
    units = {"prompts": "prompts (count)", "batch": "batch (rows)", "vocabulary": "V (tokens)"}
    with styled():
        drawn, axes = new_figure(2, 3, 4.2)
        for column, (name, rows) in enumerate(panels.items()):
            x = [getattr(row.load, xs[name]) for row in rows]
            time_axis, memory_axis = axes[0][column], axes[1][column]
            time_axis.plot(x, [row.ms_per_token for row in rows], color=BLUE, marker="o")
            memory_axis.plot(x, [row.memory_mib for row in rows], color=VERMILLION, marker="s")
            lows, highs = zip(*(row.memory_range_mib for row in rows), strict=True)
            memory_axis.vlines(x, lows, highs, color=VERMILLION)
            for axis, most in (
                (time_axis, max(row.ms_per_token for row in rows)),
                (memory_axis, max(highs)),
            ):
                axis.set_xscale("log")
                axis.set_ylim(0, 1.15 * most)
            memory_axis.set_xlabel(units[name])
            panel_letter(time_axis, "abc"[column], f"against {name}")
        axes[0][0].set_ylabel("time a token (ms)")
        axes[1][0].set_ylabel("peak memory (MiB)")
        loads = {name: rows[0].load for name, rows in panels.items()}
        fixed = loads["prompts"]
        caption = (
            f"Full traces of a made-up pair; memory is above that of a warmed-up process. "
            f"Panel a: batch {fixed.batch_size}, V = "
            f"{fixed.vocab_size:,}, {fixed.max_new_tokens} tokens a prompt; b: V = "
            f"{loads['batch'].vocab_size:,}; c: batch {loads['vocabulary'].batch_size}. One "
            f"process a run, on one core; a shard is written after each batch. Medians of "
            f"{NUM_REPEATS} runs, bars from the least to the largest."
        )
        first, last = panels["prompts"][0], panels["prompts"][-1]
        more_prompts = last.load.num_prompts / first.load.num_prompts
        more_memory = last.memory_mib / first.memory_mib
        finding = (
            f"{more_prompts:.3g} times the prompts, {more_memory:.2f} times the memory: "
            f"{first.memory_mib:.0f} MiB at {first.load.num_prompts:,}, "
            f"{last.memory_mib:.0f} at {last.load.num_prompts:,}"
        )
        finish(drawn, finding, caption)
        with atomic_path(path) as temporary:
            drawn.savefig(temporary, format=path.suffix[1:] or "png", dpi=160)


def main() -> None:
    """Measure all three growths, print them, and draw them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure_here(Load(**json.loads(options.one)))))
        return
    panels = {
        "prompts": rows_of([Load(num, 64, 1_000, 8) for num in PROMPTS]),
        "batch": rows_of([Load(64, batch, 50_000, 8) for batch in BATCHES]),
        "vocabulary": rows_of([Load(32, 32, vocab, 8) for vocab in VOCABULARIES]),
    }
    if options.json is not None:
        content = {name: [asdict(row) for row in rows] for name, rows in panels.items()}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.figure is not None:
        draw(panels, options.figure)


if __name__ == "__main__":
    main()
