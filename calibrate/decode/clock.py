"""Time inside a model's forward passes, read so that nobody waits for the reading."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator, so that a clock reads what was done and not what was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ForwardClock:
    """Seconds of what runs inside :meth:`running`.

    On CUDA events in the stream are read when somebody asks for the sum: a clock that waited at
    every step would keep the processor from preparing what comes after it.

    Parameters
    ----------
    device : torch.device
    seconds : float
        To begin with.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device, self._seconds = device, seconds
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is run inside."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Of all so far."""
        if self._events:
            synchronise(self._device)
            self._seconds += 1e-3 * sum(begin.elapsed_time(end) for begin, end in self._events)
            self._events.clear()
        return self._seconds
