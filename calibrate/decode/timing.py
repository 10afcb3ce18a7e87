"""How long one token of one user takes on this machine: medians over single-context steps."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from calibrate.decode.clock import synchronise
from calibrate.decode.models import LanguageModel
from calibrate.run.records import Figure, Timings
from hlmtheory import domain
from hlmtheory.uncertainty import Temperatures, exact_uncertainty


def measure_timings(
    slm: LanguageModel,
    llm: LanguageModel,
    context: tuple[int, ...],
    thetas: Temperatures,
    num_steps: int = 24,
    confidence: float = 0.95,
) -> Timings:
    """Time one context's steps in both models, and the exact uncertainty, interleaved.

    Parameters
    ----------
    slm, llm : LanguageModel
    context : tuple of int
        At least two tokens.
    thetas : Temperatures
    num_steps : int
        Timed steps; three more warm up.
    confidence : float
        Of the order-statistic interval of the median.
    """
    waited_s, began = _waited_s(), time.perf_counter()
    samples: dict[str, list[float]] = {"slm": [], "llm": [], "uncertainty": []}
    with torch.inference_mode(), domain.unchecked():
        slm_session = slm.start([context[:-1]], False, fill=False)
        llm_session = llm.start([context[:-1]], False, fill=False)
        token = torch.tensor([context[-1]], device=slm.device)
        for _ in range(num_steps + 3):
            begin = time.perf_counter()
            z = slm_session.step(token).logits
            synchronise(slm.device)
            after_slm = time.perf_counter()
            llm_session.step(token)
            synchronise(slm.device)
            after_llm = time.perf_counter()
            draft = z.argmax(-1, keepdim=True)
            exact_uncertainty(z, draft, thetas)
            synchronise(slm.device)
            end = time.perf_counter()
            samples["slm"].append(after_slm - begin)
            samples["llm"].append(after_llm - after_slm)
            samples["uncertainty"].append(end - after_llm)
            token = draft[:, 0]
    medians = {
        f"t_{name}_ms": _median(np.array(taken[3:]) * 1e3, confidence)
        for name, taken in samples.items()
    }
    waited = None
    if waited_s is not None:
        waited = ((_waited_s() or 0.0) - waited_s) / (time.perf_counter() - began)
    return Timings(**medians, waited_share=waited)


def _waited_s() -> float | None:
    """Seconds in which threads of this process were ready and had no processor, all added up.

    Linux alone counts them.
    """
    waited_ns = 0
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                waited_ns += int((thread / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return waited_ns * 1e-9


def _median(values_ms: np.ndarray, confidence: float) -> Figure:
    from scipy import stats

    ordered = np.sort(values_ms)
    num = len(ordered)
    rank = int(stats.binom.ppf((1 - confidence) / 2, num, 0.5))
    low, high = ordered[max(rank - 1, 0)], ordered[min(num - rank, num - 1)]
    return Figure(value=float(np.median(ordered)), low=float(low), high=float(high), unit="ms")
