"""Redo the shipped evidence: calibrate, derive, rerun and score three settings on two pairs.

    python -m benchmarks.evidence [--only NAME] [--results data/results] [--from-traces]

Every step but the last two, the guarantees' splits and the attenuation table, is a command of `hlm`
that anybody can run alone. A step whose result is there already is left out, and an interrupted
calibration goes on where it stopped. On two processor cores the whole takes about an hour and a
half.

`--from-traces` decodes nothing: it makes calibration.json, operating_points.json and
validation.json anew from the traces and reruns that are there, without a model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import load_workload
from calibrate.fit.calibration import pair_identity, summarise
from calibrate.run.errors import UserError
from calibrate.run.folder import read_json, write_json
from calibrate.run.traces import read_header, read_trace, shard_paths
from calibrate.validate.attenuation import (
    attenuation_table,
    decode_attenuation_trace,
    write_attenuation,
)
from calibrate.validate.guarantees import write_splits
from calibrate.validate.validation import compare_reruns, rerun_path

COMMAND = ("python", "-m", "benchmarks.evidence", *sys.argv[1:])

RISKS = ("0.01", "0.005", "0.02", "0.05", "0.1", "0.2")
THETAS = ("0.1", "0.02", "0.5")

BASELINES = ("slm/none", "llm/none", "hlm/none")
CORE = (
    *BASELINES,
    "u-hlm/risk-averse",
    "u-hlm/risk-prone",
    "u-hlm/risk-0.01",
    "u-hlm/risk-0.02",
    "u-hlm/risk-0.05",
    "u-hlm/conformal-0.05",
    "u-hlm/ltt-0.05",
    "cu-hlm-offline/risk-0.02",
    "cu-hlm-offline/risk-0.05",
    "cu-hlm-offline/risk-0.05@draft-from-sent",
    "cu-hlm-online/risk-0.02",
    "cu-hlm-online/risk-0.05",
    "r-hlm/risk-0.02",
    "r-hlm/risk-0.05",
    "ask-llm/risk-0.05",
)


@dataclass(frozen=True)
class Setting:
    """One pair at one temperature."""

    name: str
    pair: str
    temperature: str
    num_validation: int
    importances: tuple[str, ...]
    points: tuple[str, ...]


SETTINGS = (
    Setting(
        "qwen2.5-coder",
        "qwen2.5-coder",
        "1.0",
        64,
        ("topk:16:1", "topk:16:1.4", "topk:8:2.1", "topk:4:2.1"),
        (
            *CORE,
            "u-hlm/risk-0.005",
            "cu-hlm-offline/risk-0.02@theta-0.02",
            "cu-hlm-online/risk-0.02@theta-0.02",
            "ui-hlm/risk-0.1@topk-16-1.4",
            "ui-hlm/risk-0.2@topk-8-2.1",
            "ui-hlm/risk-0.1@topk-4-2.1",
            "r-hlm/risk-0.01",
        ),
    ),
    Setting(
        "smollm2",
        "smollm2",
        "1.0",
        64,
        ("topk:16:1", "topk:16:1.2", "topk:8:1.6"),
        (*CORE, "ui-hlm/risk-0.2@topk-16-1.2", "ui-hlm/risk-0.2@topk-8-1.6"),
    ),
    Setting(
        "qwen2.5-coder-t0.7",
        "qwen2.5-coder",
        "0.7",
        48,
        ("topk:16:1", "topk:16:1.4"),
        (*CORE, "ui-hlm/risk-0.1@topk-16-1.4"),
    ),
)


def hlm(*words: str) -> None:
    """Run one command of the command line, as anybody would."""
    print("+ hlm", " ".join(words), flush=True)
    subprocess.run([sys.executable, "cli.py", *words], check=True)


def repeated(option: str, values: tuple[str, ...]) -> list[str]:
    """The same option once for each value."""
    return [word for value in values for word in (option, value)]


def measure(setting: Setting, run: Path, limit: int, max_new_tokens: int) -> None:
    """Every step of one setting that has no result yet."""
    folder = str(run)
    if not (run / "calibration.json").is_file():
        words = ["--pair", setting.pair, "--temperature", setting.temperature]
        words += ["--limit", str(limit), "--max-new-tokens", str(max_new_tokens)]
        if (run / "run.json").is_file():
            words.append("--resume")
        hlm("calibrate", *words, "--output-path", folder)
    if not (run / "operating_points.json").is_file():
        derive_points(setting, run)
    if not (run / "validation.json").is_file():
        words = ["--limit", str(min(setting.num_validation, limit))]
        hlm("validate", folder, *words, *repeated("--point", setting.points))
    if not (run / "quality.json").is_file():
        hlm("quality", folder)
    if not (run / "splits.json").is_file():
        write_splits(run, command=COMMAND)
    if not (run / "attenuation.json").is_file():
        attenuation(setting, run, min(limit, 48), min(max_new_tokens, 32))


def summarise_again(setting: Setting, run: Path) -> None:
    """Fit, derived settings and comparison, from the traces and reruns of a finished run."""
    info = read_json(run, "run.json")
    write_json(run / "calibration.json", summarise(read_trace(shard_paths(run)), info))
    derive_points(setting, run)
    derived = read_json(run, "operating_points.json")
    decoded = [p for p in derived["operating_points"] if rerun_path(run, p).is_file()]
    for point in decoded:
        before = read_header(rerun_path(run, point))["operating_point"]
        now, then = (
            (one["uncertainty_threshold"]["value"], one["settings"]) for one in (point, before)
        )
        if now != then:
            name = f"{point['policy']}/{point['rule']}"
            raise UserError(f"{name}: decoded at another setting than is derived now; rerun it")
    validation = read_json(run, "validation.json")
    made = ("pair", "seed", "versions", "revision", "command", "infeasible")
    compare_reruns(run, decoded, derived, {key: validation[key] for key in made})


def derive_points(setting: Setting, run: Path) -> None:
    """All operating points of a setting."""
    words = ["--draft-from-sent", *repeated("--risk", RISKS), *repeated("--theta", THETAS)]
    hlm("derive", str(run), *words, *repeated("--importance", setting.importances))


def attenuation(setting: Setting, run: Path, limit: int, max_new_tokens: int) -> None:
    """What K draws instead of the exact uncertainty do to the line, on the pair's own tokens."""
    work = load_workload(setting.pair, limit, max_new_tokens)
    settings = work.settings("minimal", float(setting.temperature), seed=6)
    table = attenuation_table(decode_attenuation_trace(work.pair, work.prompts, settings))
    write_attenuation(run, table, pair_identity(work.pair), COMMAND)


def main() -> None:
    """Run every step that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[setting.name for setting in SETTINGS])
    parser.add_argument("--results", type=Path, default=Path("data/results"))
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--from-traces", action="store_true", help="decode nothing")
    options = parser.parse_args()
    for setting in SETTINGS:
        if options.only in (None, setting.name):
            run = options.results / setting.name
            if not options.from_traces:
                measure(setting, run, options.limit, options.max_new_tokens)
            elif run.is_dir():
                summarise_again(setting, run)


if __name__ == "__main__":
    main()
