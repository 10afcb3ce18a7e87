"""Analytic theory of hybrid language models (HLM), as pure array functions.

One room a topic. Functions of tokens take numpy arrays and torch tensors alike, those of channels
and published numbers floats and numpy arrays. Nothing here imports torch, transformers or
matplotlib, opens a file, or prints; but for `hlmtheory.api`, which runs the pipeline.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`hlmtheory.api` after a plain `import hlmtheory`."""
    if name == "api":
        return import_module("hlmtheory.api")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
