"""What is allowed and hardly meant: one line each, told and not refused."""

from __future__ import annotations

import numpy as np

from calibrate.run.prompts import MIN_PROMPTS
from calibrate.run.records import CalibrationRecord, DeriveRequest, PairIdentity
from hlmtheory.cost import index_bits
from hlmtheory.link import Link

MIN_TOKENS = 200
"""Fewer fit no line, and no threshold of 1 %, that a second calibration would find again."""
LOW_CONFIDENCE = 0.5
MOST_INDEX_MS = 100.0
"""Time of one token's index beyond which a link's numbers are in another unit, not slow."""


def pair_cautions(pair: PairIdentity) -> list[str]:
    """Two models that are one, or the wrong way round."""
    slm, llm = pair.slm, pair.llm
    if slm.sha256 is not None and (slm.sha256, slm.drop_layers) == (llm.sha256, llm.drop_layers):
        return [f"device and server model are the same, {slm.label}: nothing will be rejected"]
    if slm.num_parameters > llm.num_parameters:
        return [
            f"the device model has more parameters than the server's ({slm.num_parameters:,} of "
            f"{slm.label}, {llm.num_parameters:,} of {llm.label}): are --slm and --llm swapped?"
        ]
    return []


def sample_cautions(calibration: CalibrationRecord) -> list[str]:
    """Too little to have intervals that mean something."""
    prompts, tokens = calibration.num_prompts, calibration.num_tokens
    if prompts >= MIN_PROMPTS and tokens >= MIN_TOKENS:
        return []
    return [
        f"{prompts} prompts with {tokens} tokens are too few to go by: intervals, whose unit are "
        f"prompts, mean little below {MIN_PROMPTS} of them and {MIN_TOKENS} tokens"
    ]


def request_cautions(request: DeriveRequest) -> list[str]:
    """Tolerances that bound nothing, and a confidence that promises nothing."""
    out = [
        f"--theta {theta:g}: a total variation is at most 1, and this bounds nothing"
        for theta in request.thetas
        if theta >= 1
    ]
    if request.confidence < LOW_CONFIDENCE:
        out.append(
            f"--confidence {request.confidence:g}: intervals and certificates fail in "
            f"{100 * (1 - request.confidence):g} of 100 calibrations; 0.95 is usual"
        )
    return out


def link_cautions(name: str, link: Link, vocab_size: int) -> list[str]:
    """A link that cannot carry the indices of ten tokens a second."""
    bits = index_bits(vocab_size)
    time_ms = float(link.uplink_time_ms(np.asarray(float(bits))))
    if time_ms <= MOST_INDEX_MS:
        return []
    return [
        f"--link {name}: one token's index, {bits} bit, takes {time_ms / 1e3:,.2g} s; bandwidth_hz "
        "is in Hz, rate_bps and rates_bps in bit/s"
    ]
