"""Silence for other libraries' bars and notices: only ours are shown."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what libraries would log, warn or draw; their errors still raise."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        bars_were_on = _set_bars(on=False)
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars_were_on:
                _set_bars(on=True)


def _set_bars(on: bool) -> bool:
    """Switch transformers' bars, if it is loaded; return whether they were on."""
    if "transformers" not in sys.modules:
        return False
    from transformers.utils import logging as bars

    were_on = bool(bars.is_progress_bar_enabled())
    (bars.enable_progress_bar if on else bars.disable_progress_bar)()
    return were_on
