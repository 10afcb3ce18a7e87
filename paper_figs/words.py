"""Words that figures and report share: percentages, budgets, and what the terms mean."""

from __future__ import annotations

from calibrate.run.figure import NBSP, percent_text, share_text
from calibrate.run.records import Figure, OperatingPoint, WireLinkRuns


def percent(number: Figure, decimals: int | None = None, *, interval: bool = True) -> str:
    """A share with its interval, in per cent, with the sign where there is a number."""
    text = percent_text(number, decimals=decimals, interval=interval)
    return text if number.value is None else f"{text}{NBSP}%"


def link_text(link: WireLinkRuns) -> str:
    """A link by its numbers, or by its name where it is no plain rate."""
    rate, delay = link.link.get("rate_bps"), link.link.get("round_trip_ms")
    if rate is None:
        return link.link_name
    unit, scale = ("Gbit/s", 1e9) if rate >= 1e9 else ("Mbit/s", 1e6)
    return f"{rate / scale:g} {unit}, {delay:g} ms"


def budget_text(point: OperatingPoint) -> str:
    """What a threshold's rule keeps, in words that say whether it promises anything."""
    share = "" if point.budget is None else share_text(point.budget)
    certified = (
        "" if point.confidence is None else f", with {share_text(point.confidence)} confidence"
    )
    return {
        "none": "without a gate",
        "risk": f"at a risk of {share} a token, met on the calibration prompts, not certified",
        "answer": f"where answers stay within {share} of the server's law, on the calibration "
        "prompts, not certified",
        "conformal": f"at a risk of {share}, promised as a mean over calibrations",
        "ltt": f"at a certified risk of {share}{certified}",
        "risk-averse": "at the risk-averse threshold, where the line says that nothing is rejected",
        "risk-prone": "at the risk-prone threshold, where the line reaches the share of drafts "
        "that can be rejected",
    }.get(point.family, f"at {point.rule}")


GLOSSARY: dict[str, str] = {
    "draft": "The token that the device model proposes.",
    "uncertainty u": "Chance that the device model, drawing at other temperatures, gives another "
    "token than the draft; 0 to 1. The device knows it without the server.",
    "rejection probability β": "Chance that accept/resample on the server would replace the draft: "
    "1 − min(1, y/x) of the two models' probabilities of it.",
    "gate, threshold u_th": "The device keeps its draft and skips the server where its score is at "
    "most the threshold.",
    "skip rate": "Share of all tokens that are emitted without the server.",
    "risk": "Sum of β over the skipped tokens, divided by all tokens. Of the skipped tokens alone "
    "the share is larger.",
    "TV bias": "Total variation between the law that a policy's token has and the server "
    "model's, in the same context; 0 is lossless.",
    "TV of answers": "The same for whole answers: no score of an answer in [0, 1], such as "
    "accuracy, moves by more in expectation.",
    "risk-α": "The largest threshold whose risk on the calibration prompts is at most α. It "
    "promises nothing for other prompts.",
    "answer-α": "The same for the TV of answers.",
    "conformal-α": "A threshold whose risk, as a mean over calibrations, is at most α.",
    "ltt-α": "Learn-then-Test: a threshold whose risk is at most α with the stated confidence, "
    "for prompts like the calibration prompts.",
    "risk-averse, risk-prone": "U-HLM's own thresholds, where the fitted line is 0 and where it "
    "reaches the share of drafts that can be rejected.",
    "uplink, downlink payload": "Bits that the device sends and gets back, as means over all "
    "tokens, skipped ones included. 'paper' accounting bills the probabilities alone; 'full' also "
    "the draft, the tokens that the server has not seen, and its replies.",
    "throughput": "1 / mean token time is how fast a long answer comes; the mean of 1 / token time "
    "is what some papers report, and is never smaller.",
    "energy": "Of device and server together, from token times and the powers of the profile.",
    "load": "Devices whose tokens one server can carry that runs them one by one: a token's time "
    "over the server's part of it.",
    "agreement": "Tokens before an answer first differs from the server's, if both draw so as to "
    "agree at each token as often as they can.",
    "interval": "In brackets or as bars. Clustered by prompt: the tokens of one prompt are not "
    "independent, so prompts are the unit.",
    "rerun": "The pipeline decoded again at a derived setting, on prompts and random numbers that "
    "the derivation has not seen.",
    "a prediction holds": "The rerun's figure lies inside the interval predicted for it.",
    "pilot": "A part of the calibration decoded again under a policy, to tell where a policy's own "
    "outputs lead; predictions are moved by it.",
}
"""Terms of figures and report, each in a sentence or two; docs/glossary.md has the same words."""
