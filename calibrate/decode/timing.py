"""How long one token of one user takes on this machine: medians over single-context steps."""

from __future__ import annotations

import time

import numpy as np
import torch

from calibrate.decode.models import LanguageModel, synchronise
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
    return Timings(
        **{
            f"t_{name}_ms": _median(np.array(taken[3:]) * 1e3, confidence)
            for name, taken in samples.items()
        }
    )


def _median(values_ms: np.ndarray, confidence: float) -> Figure:
    from scipy import stats

    ordered = np.sort(values_ms)
    num = len(ordered)
    rank = int(stats.binom.ppf((1 - confidence) / 2, num, 0.5))
    low, high = ordered[max(rank - 1, 0)], ordered[min(num - rank, num - 1)]
    return Figure(value=float(np.median(ordered)), low=float(low), high=float(high), unit="ms")
