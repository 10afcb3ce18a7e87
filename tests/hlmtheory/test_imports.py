"""The theory stands alone: importing all of it brings in no model, plot or calibration code."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import hlmtheory

FORBIDDEN = ("torch", "transformers", "matplotlib", "calibrate", "paper_figs", "cli")

PROGRAM = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_importing_every_room_leaves_the_heavy_packages_alone():
    rooms = [f"hlmtheory.{room.name}" for room in pkgutil.walk_packages(hlmtheory.__path__)]
    assert "hlmtheory.acceptance" in rooms
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(rooms)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = json.loads(done.stdout)  # a room that printed anything would break this
    assert "hlmtheory" in loaded
    assert done.stderr == ""
    assert [name for name in FORBIDDEN if name in loaded] == []
