"""Sentences that terminal, figures and report share."""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.run.figure import number_text
from calibrate.run.records import DerivationRecord, Timings, ValidationRecord

UNKNOWN_ANSWERS = "recorded steps do not hold the law of what it emits"
"""Why nothing is said of a policy's whole answers."""
BUSY_SHARE = 0.1
UNSTEADY_RATIO = 1.5


def pilot_text(derivation: DerivationRecord) -> str:
    """Where the predictions of a derivation stand, in one sentence."""
    pilot = derivation.pilot
    if pilot is None:
        return "predictions are along the server's outputs: the calibration has no pilot"
    return (
        f"predictions are on each policy's own road, by a pilot of {len(pilot.prompt_ids)} prompts "
        f"({pilot.policy} at threshold {number_text(pilot.threshold)})"
    )


def coverage_text(validation: ValidationRecord) -> str:
    """What validation.json says of its coverage, in sentences."""
    summary, confidence = validation.coverage, validation.confidence
    hold = summary.if_predictions_hold
    text = (
        f"{summary.covered} of {summary.total} counted figures fall inside their "
        f"{confidence:.0%} prediction intervals"
    )
    if hold:
        low, high = (_percent(end) for end in (hold.share.low, hold.share.high))
        text += (
            f" = {100 * summary.covered / summary.total:.1f} %. They share prompts: "
            f"predictions that hold would cover {low} to {high} % of them in "
            f"{100 * confidence:g} of 100 repeats, "
            f"and as few with probability {number_text(hold.probability_of_at_most, 2)}; "
            f"the widest error, {number_text(hold.widest_error, 2)} standard errors, is matched "
            f"with probability {number_text(hold.probability_of_as_wide, 2)}"
        )
    if validation.strata:
        plain = summary.unstratified
        text += (
            ". Intervals take prompts by category, of which both sets have the same mix; "
            f"taken as independent draws, {plain.covered} of {plain.total} would be inside"
        )
    return f"{text}."


def busy_text(timings: Timings) -> str:
    """What is wrong with token times that were measured on a busy machine; empty if nothing is."""
    found = []
    if (timings.waited_share or 0.0) > BUSY_SHARE:
        found.append(f"threads waited {timings.waited_share:.0%} of the time for a processor")
    for name, time in timings.medians.items():
        if time.low and time.high and time.high > UNSTEADY_RATIO * time.low:
            found.append(f"{name} is {number_text(time)} ms")
    if not found:
        return ""
    return (
        f"token times were measured on a busy machine ({'; '.join(found)}): predictions with "
        "--profile measured are too slow; calibrate on a quiet one, or name another profile"
    )


def _percent(share: float | None) -> str:
    return number_text(None if share is None else 100 * share, decimals=0)


PROMISES = {
    "prompts": "prompts: the mean over prompts of a prompt's mean risk, in contexts that lossless "
    "decoding leads to; a policy's own outputs lead elsewhere",
    "tokens": "tokens: the risk over tokens, sum by sum, in contexts that lossless decoding leads "
    "to; a policy's own outputs lead elsewhere",
    "answers": "answers: the share of answers that differ at all from lossless decoding with the "
    "same random numbers, on the policy's own road; no score in [0, 1] of an answer moves by more",
}
COMMON_PROMISES = (
    "all: about the risk that the gate takes, which is the bias of full and, token by token, of "
    "residual verification; what truncation, shared or asked draws add to it is not certified",
    "all: each certificate alone. Whoever looks at n of them and takes one has n times the chance "
    "of a broken budget, but among caps asked for together, which share it. betting stands for "
    "prompts stratified by category too; wsr and conformal need draws of one population",
)


def promise_texts(certified: Sequence[str]) -> list[str]:
    """What a certified budget says, and what it does not."""
    return [*(PROMISES[one] for one in certified), *COMMON_PROMISES]
