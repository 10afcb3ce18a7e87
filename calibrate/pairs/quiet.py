"""Silence for other libraries' bars and notices: only ours are shown."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("transformers", "huggingface_hub", "accelerate", "gguf", "torch", "httpx", "httpx2")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the libraries imported so far would print; their errors still raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bars_were_on = _set_bars(on=False)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars_were_on:
                _set_bars(on=True)


def _set_bars(on: bool) -> bool:
    """Switch transformers' bars, if it is loaded; return whether they were on."""
    if "transformers" not in sys.modules:
        return False
    from transformers.utils import logging as transformers_logging

    were_on = bool(transformers_logging.is_progress_bar_enabled())
    if on:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    return were_on
