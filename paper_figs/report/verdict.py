"""What a run says, in a few sentences: the first thing on its report."""

from __future__ import annotations

from calibrate.run.figure import number_text, share_text
from paper_figs.figures import costs, payload_bias, relation
from paper_figs.loaded import LoadedRun
from paper_figs.words import budget_text, percent


def headline(loaded: LoadedRun) -> str:
    """The answer in one sentence."""
    if loaded.derivation is None:
        return f"Nothing was derived yet: `hlm derive {loaded.run}` says what may be skipped."
    if not loaded.gates:
        return "No derived budget leaves a threshold at which some tokens are skipped and not all."
    point = loaded.gates[0]
    kept = budget_text(point)
    source = "measured in a rerun" if loaded.measured(point) else "predicted"
    return (
        f"{kept[:1].upper()}{kept[1:]}, the device answers "
        f"{percent(loaded.figure_of(point, 'skip_rate'))} of the tokens alone ({source}). It asks "
        f"the server where its score ({loaded.score_label(point.score or '')}) is above "
        f"{number_text(point.uncertainty_threshold, interval=False)}."
    )


def verdict(loaded: LoadedRun) -> list[str]:
    """What carries the headline, and what limits it."""
    lines = [f"{relation.QUESTION} {relation.answer(loaded)}"]
    if loaded.derivation is None:
        return lines
    if loaded.gates:
        lines += [payload_bias.answer(loaded), costs.answer(loaded)]
    lines += [_certified(loaded), _reruns(loaded)]
    lacking = len(loaded.points) - len(loaded.feasible)
    if lacking:
        lines.append(
            f"{lacking} of {len(loaded.points)} derived settings are infeasible on this "
            "calibration; why stands below the thresholds."
        )
    return [line for line in lines if line]


def _certified(loaded: LoadedRun) -> str:
    """The least budget that is certified without a cap."""
    derivation = loaded.derivation
    certificates = [
        one for one in (() if derivation is None else derivation.certificates) if one.guaranteed
    ]
    passed = [one for one in certificates if one.feasible]
    if not certificates:
        return "Nothing was asked to be certified: budgets hold on the calibration prompts."
    if not passed:
        return (
            "None of the budgets asked for is certified with "
            f"{loaded.calibration.num_prompts:,} prompts; `hlm plan {loaded.run}` says how many "
            "it takes."
        )
    best = min(passed, key=lambda one: (one.budget, one.cap or 0.0))
    cap = "" if best.cap is None else f", skipping at most {best.cap:.0%} of an answer"
    what = (
        f"that at most {share_text(best.budget)} of the answers differ at all from the server's"
        if best.certified == "answers"
        else f"a risk of {share_text(best.budget)}, as a mean over {best.certified}"
    )
    return (
        f"Certified with {share_text(best.confidence)} confidence: {what}{cap}, with a threshold "
        f"of {number_text(best.threshold)}. It skips {percent(best.skip_rate)} of the tokens."
    )


def _reruns(loaded: LoadedRun) -> str:
    if loaded.validation is None:
        return f"Nothing was rerun yet, so these are predictions: `hlm validate {loaded.run}`."
    return loaded.coverage_note
