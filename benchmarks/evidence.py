"""Redo the shipped evidence: calibrate, derive, rerun and score the settings of data/evidence.json.

    python -m benchmarks.evidence [--only NAME] [--results data/results] [--again]

Every step is a command of `hlm` that anybody can run alone. A step whose result is there already is
left out, and an interrupted calibration goes on where it stopped. On two processor cores the whole
takes about two and a half hours, of which the clock of the wires needs an hour alone.

`--again` decodes nothing that is there: it derives anew from the traces and holds the reruns, which
are kept by what they ran, against the new predictions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from calibrate.run.resources import data_path


def hlm(*words: str) -> None:
    """Run one command of the command line, as anybody would."""
    print("+ hlm", " ".join(words), flush=True)
    subprocess.run([sys.executable, "cli.py", *words], check=True)


def repeated(option: str, values: list[str]) -> list[str]:
    """The same option once for each value."""
    return [word for value in values for word in (option, value)]


def measure(plan: dict[str, Any], setting: dict[str, Any], run: Path, again: bool) -> None:
    """Every step of one setting that has no result yet."""
    folder, limit, length = str(run), plan["limit"], plan["max_new_tokens"]
    replace = ["--replace"] if again else []

    def lacks(name: str) -> bool:
        return not (run / name).is_file()

    if lacks("calibration.json"):
        words = ["--pair", setting["pair"], *setting["sampling"]]
        words += ["--limit", str(limit), "--max-new-tokens", str(length)]
        if not lacks("run.json"):
            words.append("--resume")
        hlm("calibrate", *words, "--output-path", folder)
    if again or lacks("operating_points.json"):
        words = ["--draft-from-sent", *repeated("--risk", plan["risks"])]
        words += repeated("--theta", plan["thetas"]) + repeated(
            "--answer-risk", plan["answer_risks"]
        )
        hlm("derive", folder, *words, *repeated("--importance", setting["importances"]), *replace)
    for name, words in setting["named"].items():
        if again or lacks(f"operating_points.{name}.json"):
            hlm("derive", folder, "--name", name, *words, *replace)
    if again or lacks("validation.json"):
        points = repeated("--point", plan["core"] + setting["points"])
        num = str(min(setting["num_validation"], limit))
        hlm("validate", folder, "--limit", num, *points, *replace)
    if setting["wire"] and lacks("wire.json"):
        hlm("validate", folder, "--wire", *setting["wire"])
    if again or lacks("quality.json"):
        hlm("quality", folder)
    if again or lacks("guarantees.json"):
        hlm("guarantees", folder)
    if lacks("attenuation.json"):
        words = ["--limit", str(min(limit, 48)), "--max-new-tokens", str(min(length, 32))]
        hlm("attenuation", folder, *words)


def main() -> None:
    """Run every step that has no result yet."""
    plan = json.loads(data_path("evidence.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[setting["name"] for setting in plan["settings"]])
    parser.add_argument("--results", type=Path, default=Path("data/results"))
    parser.add_argument("--limit", type=int, default=plan["limit"])
    parser.add_argument("--max-new-tokens", type=int, default=plan["max_new_tokens"])
    parser.add_argument("--again", action="store_true", help="derive and compare anew")
    options = parser.parse_args()
    plan |= {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
    for setting in plan["settings"]:
        if options.only in (None, setting["name"]):
            measure(plan, setting, options.results / setting["name"], options.again)


if __name__ == "__main__":
    main()
