"""Files that ship with the project: prompts, presets, published numbers, results."""

from __future__ import annotations

import sys
from pathlib import Path


def data_path(*parts: str) -> Path:
    """Path of a shipped file, in a checkout or in an installation."""
    checkout = Path(__file__).resolve().parent.parent.parent / "data"
    installed = Path(sys.prefix) / "share" / "hlmtheory"
    root = checkout if (checkout / "prompts.jsonl").is_file() else installed
    return root.joinpath(*parts)
