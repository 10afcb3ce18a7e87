"""Sentences that terminal, figures and report share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibrate.run.figure import number_text, percent_text, share_text
from calibrate.run.records import (
    READ_BYTES,
    READ_TOKENS,
    CalibrationRecord,
    DerivationRecord,
    GuaranteesRecord,
    OperatingPoint,
    PlanRecord,
    Timings,
    ValidationRecord,
)

UNKNOWN_ANSWERS = "recorded steps do not hold the law of what it emits"
"""Why nothing is said of a policy's whole answers."""
SHOWN_RISKS = ("0.01", "0.05")
"""Of those that scores are compared at."""
NO_REJECTION = 1e-6
"""Mean rejection probability up to which two laws are one, computed in single precision."""
UNLIKELY = 0.05
"""Chance of so few covered figures, or of so wide an error, that speaks against predictions."""
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


def rule_text(point: OperatingPoint) -> str:
    """What the threshold of a gated point is, and what it promises."""
    nothing = "certifies nothing"
    if point.family == "ltt":
        return (
            f"certified over {point.weighting} with {share_text(point.confidence or 0)} confidence"
        )
    return {
        "risk": nothing,
        "answer": nothing,
        "conformal": "met on average over calibrations, certifies no single one",
        "risk-averse": f"where the papers' line is 0, {nothing}",
        "risk-prone": f"where the papers' line is at its most, {nothing}",
    }[point.family]


def verdict_text(calibration: CalibrationRecord) -> str:
    """Whether uncertainty tells rejections on this pair, and what that is worth, in a sentence."""
    fit = calibration.fit
    gate = next((one for one in calibration.estimators if one.name == "uncertainty"), None)
    if fit.degenerate:
        return f"uncertainty tells nothing about rejections here: {fit.degenerate}"
    if (fit.mean_rejection.value or 0.0) <= NO_REJECTION:
        return "the server model rejects nothing here: both models have the same law"
    if fit.slope.low is None:
        return "whether uncertainty tells rejections cannot be said: too few prompts"
    if fit.slope.low <= 0:
        return (
            "uncertainty does not tell rejections here: the line's slope is "
            f"{number_text(fit.slope)}, which may be 0"
        )
    text = "uncertainty tells rejections here: the more uncertain a draft, the more are rejected"
    if gate is not None:
        parts = [
            f"{percent_text(rate)} % of the tokens at a risk of {share_text(float(risk))}"
            for risk, rate in gate.skip_rate_at_risk.items()
            if risk in SHOWN_RISKS
        ]
        text += f"; a gate on it could skip {' and '.join(parts)}"
    return text


def coverage_text(validation: ValidationRecord) -> str:
    """Whether the predictions held, in one sentence."""
    summary = validation.coverage
    counted = (
        f"{summary.covered} of {summary.total} counted figures fall inside their "
        f"{share_text(validation.confidence)} prediction intervals"
    )
    hold = summary.if_predictions_hold
    if hold is None or hold.share.low is None or hold.share.high is None:
        return f"Too few prompts to say whether the predictions hold: {counted}."
    low, high = (round(end * summary.total) for end in (hold.share.low, hold.share.high))
    few, wide = hold.probability_of_at_most < UNLIKELY, hold.probability_of_as_wide < UNLIKELY
    verdict = "do not hold" if few or wide else "hold"
    expected = f"{low} to {high} were to be expected"
    if wide and not few:
        expected += f", but one is {number_text(hold.widest_error, 2)} standard errors off"
    return f"The predictions {verdict}: {counted}, where {expected}."


def coverage_details(validation: ValidationRecord) -> list[str]:
    """What the sentence of :func:`coverage_text` rests on."""
    summary, out = validation.coverage, []
    if hold := summary.if_predictions_hold:
        out.append(
            f"figures share prompts: predictions that hold would cover as few with probability "
            f"{number_text(hold.probability_of_at_most, 2)}; the widest error is "
            f"{number_text(hold.widest_error, 2)} standard errors, matched with probability "
            f"{number_text(hold.probability_of_as_wide, 2)}"
        )
    if validation.strata:
        plain = summary.unstratified
        out.append(
            "intervals take prompts by category, of which both sets have the same mix; taken as "
            f"independent draws, {plain.covered} of {plain.total} would be inside"
        )
    return out


def plan_texts(plan: PlanRecord) -> list[str]:
    """How many prompts a certificate of each budget takes, a sentence each."""
    out = []
    most = max((one.num_prompts for one in plan.intervals), default=0)
    for budget in dict.fromkeys(row.budget for row in plan.rows):
        rows = [row for row in plan.rows if row.budget == budget and row.guaranteed]
        known = [row for row in rows if row.num_prompts is not None]
        if not known:
            out.append(f"for risk {share_text(budget)}: more than {plan.most:,} prompts")
            continue
        best = min(known, key=lambda row: row.num_prompts or 0)
        most = max(most, best.num_prompts or 0)
        minutes = "" if best.wall_s is None else f", {number_text(best.wall_s / 60, 2)} min here"
        out.append(
            f"for risk {share_text(budget)}: {best.num_prompts:,} prompts{minutes}, certify a "
            f"threshold that skips {100 * best.goal_skip_rate:.3g} % of the tokens in "
            f"{100 * plan.power:g} of 100 calibrations ({best.rule}); this run has "
            f"{plan.num_prompts:,}"
        )
    tokens = round(most * plan.num_tokens / plan.num_prompts)
    if tokens > READ_TOKENS:
        memory = f"{1e-9 * READ_BYTES * tokens:.2g} GB of memory"
        out.append(
            f"{most:,} prompts are about {tokens:,} tokens: `hlm calibrate --read-tokens "
            f"{math.ceil(1.1 * tokens)}` looks at all, with {memory} to "
            f"derive; unless told otherwise, at {READ_TOKENS:,}"
        )
    return out


def guarantees_text(study: GuaranteesRecord) -> str:
    """Whether rules kept their promise over redrawn calibrations, in one sentence."""
    certified = [row.violation_share for row in study.rows if row.family == "ltt"]
    plain = [row.violation_share.value or 0.0 for row in study.rows if row.family == "risk"]
    allowed, out = 1 - study.confidence, []
    if certified:
        worst = max(certified, key=lambda share: share.value or 0.0)
        kept = (worst.low or 0.0) <= allowed
        out.append(
            f"certified thresholds {'keep' if kept else 'do not keep'} their promise: over "
            f"{study.num_draws:,} redrawn calibrations their budget is broken in at most "
            f"{percent_text(worst)} % of them, and {share_text(round(allowed, 10))} are allowed"
        )
    if plain:
        ends = f"{100 * min(plain):.2g} to {100 * max(plain):.2g}"
        out.append(f"a budget that is met on the calibration alone is broken in {ends} %")
    return "; ".join(out)


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


PROMISES = {
    "prompts": "prompts: the mean over prompts of a prompt's mean risk, in contexts that lossless "
    "decoding leads to; a policy's own outputs lead elsewhere",
    "tokens": "tokens: the risk over tokens, sum by sum, in contexts that lossless decoding leads "
    "to; a policy's own outputs lead elsewhere",
    "answers": "answers: the share of answers that differ at all from lossless decoding with the "
    "same random numbers, on the policy's own road; no score in [0, 1] of an answer moves by more",
}
WEAKER = {
    "t": "asymptotic, no guarantee",
    "wsr": "no guarantee for prompts by category",
    None: "a promise on average",
}
"""Why a test that is compared promises less than its confidence."""
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
