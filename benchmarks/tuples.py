"""Fit and derivation against the number of recorded tuples: seconds and peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.tuples [RUN] [--times 1,8,32,128]

The traces of a shipped run are written several times under other prompt ids, so that the files are
as long as those of so many prompts, and `hlm derive` reads them in a process of its own. The fit is
done as `hlm calibrate` does it after decoding.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from calibrate.fit.summary import summarise
from calibrate.run.folder import read_record, write_record
from calibrate.run.records import RunRecord
from calibrate.run.traces import Shard, prompts_to_read, read_trace, shard_paths, write_table

POLICIES = ("u-hlm", "cu-hlm-offline", "r-hlm", "coupled")


@dataclass(frozen=True)
class Row:
    """One size: tuples on disk and read, seconds, and the larger peak of both processes."""

    tokens: int
    gib: float
    tokens_read: int
    fit_s: float
    derive_s: float
    peak_gib: float


def repeated(run: Path, times: int, target: Path) -> RunRecord:
    """A run whose traces are those of `run`, so many times; returns its run.json."""
    (target / "traces").mkdir(parents=True)
    shutil.copytree(run / "pilot", target / "pilot")
    ids: list[str] = []
    number = num_tokens = 0
    for copy in range(times):
        for path in shard_paths(run):
            table = Shard(path).read()
            column = table["prompt_id"].combine_chunks()
            names = [f"{name}~{copy}" if copy else name for name in column.dictionary.to_pylist()]
            renamed = pa.DictionaryArray.from_arrays(column.indices, pa.array(names))
            place = table.schema.get_field_index("prompt_id")
            shard = target / "traces" / f"shard-{number:05d}.parquet"
            write_table(shard, table.set_column(place, "prompt_id", renamed))
            ids += names
            number, num_tokens = number + 1, num_tokens + len(table)
    told = {"prompt_ids": tuple(ids), "prompt_keys": tuple(ids), "num_prompts": len(ids)}
    info = read_record(run, RunRecord).model_copy(update={**told, "num_tokens": num_tokens})
    write_record(target, info)
    return info


def measure(run: Path, times: int) -> Row:
    """Fit and derive one size."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "run"
        info = repeated(run, times, target)
        gib = sum(path.stat().st_size for path in shard_paths(target)) / 2**30
        me = [sys.executable, "-m", "benchmarks.tuples", str(target)]
        hlm = "from cli import main; import sys; sys.exit(main())"
        policies = [word for name in POLICIES for word in ("--policy", name)]
        seconds = []
        for command in (
            [*me, "--fit"],
            [sys.executable, "-c", hlm, "derive", str(target), *policies],
        ):
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        unit = 2**30 if sys.platform == "darwin" else 2**20
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
        read = json.loads((target / "operating_points.json").read_text())["num_tokens"]
    return Row(info.num_tokens, gib, read, *seconds, peak)


def fit(run: Path) -> None:
    """What `hlm calibrate` does once all is decoded."""
    info = read_record(run, RunRecord)
    settings = info.settings
    prompts = prompts_to_read(info.prompt_ids, info.num_tokens, settings.read_tokens, settings.seed)
    write_record(run, summarise(read_trace(shard_paths(run), prompts=prompts), info))


def main() -> None:
    """Measure every size, the smallest first, for peaks only grow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("data/results/smollm2"))
    parser.add_argument("--times", default="1,8,32,128")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fit:
        fit(given.run)
        return
    for times in sorted(int(one) for one in given.times.split(",")):
        row = measure(given.run, times)
        if given.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        print(
            f"{row.tokens:11,d} tuples, {row.gib:6.2f} GiB; read {row.tokens_read:9,d}; fit "
            f"{row.fit_s:6.1f} s, derive {row.derive_s:6.1f} s, peak {row.peak_gib:5.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
