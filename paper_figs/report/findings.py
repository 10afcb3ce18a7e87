"""The README's findings, every number of them read from shipped results.

    python -m paper_figs.report.findings        # writes them into README.md again

A test fails when README and results drift apart.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from calibrate.run.figure import excludes_zero
from calibrate.run.folder import Figure, atomic_path, read_json
from calibrate.run.resources import data_path

BEGIN, END = "<!-- findings: from data/results, by paper_figs.report.findings -->", "<!-- end -->"
REAL = "qwen2.5-coder"
EQUAL_THRESHOLD_RULE = "risk-0.02"


def findings(results: Path) -> str:
    """Markdown of the findings, from the run folders of `results`."""
    real = results / REAL
    parts = [_relation(real), _coverage(results), _payload(real), _guarantees(real)]
    return "\n\n".join(parts)


def _interval(number: dict[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    figure = Figure(**number)
    assert figure.value is not None
    text = f"{figure.value * scale:.{digits}g}"
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low * scale:.{digits}g}, {figure.high * scale:.{digits}g}]"
    return text


def _percent(number: dict[str, Any], digits: int = 3) -> str:
    return f"{_interval(number, 100.0, digits)} %"


def _figure(name: str, alt: str) -> str:
    return f"![{alt}](docs/figures/{name}.png)"


def _relation(run: Path) -> str:
    calibration = read_json(run, "calibration.json")
    fit = calibration["fit"]
    scores = {score["name"]: score for score in calibration["estimators"]}
    exact, sampled = (
        scores[name]["skip_rate_at_risk"]["0.01"] for name in ("uncertainty", "uncertainty_sampled")
    )
    return (
        "**1. A line describes averages, not tokens, and not exactly.** "
        f"{calibration['num_prompts']} prompts, {calibration['num_tokens']:,} tokens: "
        f"slope {_interval(fit['slope'])}, "
        f"intercept {_interval(fit['intercept'])}; correlation of binned means "
        f"{_interval(fit['correlation_binned'])}, token by token "
        f"{_interval(fit['correlation'])}; curvature {_interval(fit['curvature'])}, "
        "yet single bins leave the line by more than their intervals (lower panel). At 1 % "
        f"risk the exact uncertainty skips {_percent(exact)} of the tokens, twenty drawn ones "
        f"{_percent(sampled)}.\n\n"
        + _figure("relation", "rejection probability against uncertainty")
    )


def _coverage(results: Path) -> str:
    rows, confidence = [], set()
    for run in _validated(results):
        validation = read_json(run, "validation.json")
        tested, plain = (validation["coverage"][key] for key in ("tested", "unstratified"))
        hold = tested["if_predictions_hold"]
        low, high = (hold["share"][end] * tested["total"] for end in ("low", "high"))
        confidence.add(validation["confidence"])
        rows.append(
            f"| {run.name} | {validation['num_prompts']} | {validation['num_tokens']:,} | "
            f"{tested['covered']} of {tested['total']} | {low:.0f} to {high:.0f} | "
            f"{hold['probability_of_at_most']:.2g} | {hold['widest_error']:.1f}, "
            f"{hold['probability_of_as_wide']:.2g} | {plain['covered']} |"
        )
    (level,) = confidence
    return (
        "**2. Predictions against reruns.** Every policy at derived settings, decoded again on "
        "prompts and random numbers that the derivation has not seen; a cell is one figure of one "
        f"rerun, held to its {100 * level:g} % interval. Cells that a policy fixes by itself are "
        "left out. Intervals take prompts by category, of which calibration and reruns have the "
        "same mix; taken as independent draws they are wider (last column). The cells of a run "
        'share their prompts and many say nearly the same, so a count is a weak witness: "to '
        f'expect" is where {100 * level:g} % of the counts would lie if the predictions held, "as '
        'few" how often one would be as small. The runs share their validation prompts, so they '
        "are not independent either.\n\n"
        "| run | prompts | tokens | inside | to expect | as few | widest error in standard errors, "
        "as wide | inside, prompts independent |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + _figure("validation", "predicted against measured, cell by cell")
        + "\n\n"
        + _context_shift(results)
    )


def _validated(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/validation.json"))


def _context_shift(results: Path) -> str:
    """What did not hold: the reruns with cells outside, and what their skip rates are off by."""
    rows = []
    for run in _validated(results):
        validation = read_json(run, "validation.json")
        outside = [cell for cell in validation["cells"] if cell["covered"] is False]
        reruns = Counter(cell["policy"] for cell in outside)
        missed = {(c["policy"], c["rule"]) for c in outside if c["metric"] == "skip_rate"}
        shifts = validation["context_shift"]
        # ui-hlm has a second condition, so its skip rate is not its share below the threshold.
        split = [
            one
            for one in shifts
            if (one["policy"], one["rule"]) in missed and one["policy"] != "ui-hlm"
        ]
        parts = [
            sum(one[key]["value"] for one in split) / len(split)
            for key in ("below_threshold", "prompts_below_threshold")
            if split
        ]
        whole = "`ui-hlm` only, not split" if missed else "none missed"
        moving = [one for one in shifts if _half_width(one["below_threshold"]) > 0]
        away = [one for one in moving if excludes_zero(one["below_threshold"])]
        clearest = max(moving, key=lambda one: _clearness(one["below_threshold"]))
        rows.append(
            f"| {run.name} | {', '.join(f'`{name}` {n}' for name, n in reruns.items()) or 'none'} "
            f"| {' and '.join(f'{100 * part:+.1f}' for part in parts) or whole} | "
            f"{len(away)} of {len(moving)} | `{clearest['policy']}/{clearest['rule']}`: "
            f"{_interval(clearest['below_threshold'], 100.0, 2)} |"
        )
    return (
        "What did not hold. Predictions are made along the server's outputs, and a policy leads "
        "itself elsewhere; so measured less predicted is the sum of that shift, against the rerun "
        "of `hlm` on the same prompts, and of what these prompts differ in from the calibration's. "
        "The table has the cells outside by policy; the mean of both parts in the skip rates that "
        "missed, where uncertainty alone decides; the reruns whose share of tokens below their "
        "threshold shifted by more than its interval (one in twenty does by chance, and all are "
        "held against one rerun of `hlm`); and the clearest of these shifts. In percentage "
        "points.\n\n"
        "| run | outside | shift and prompts, where missed | shifted | clearest shift |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + _figure("context_shift", "change of contexts in every rerun, paired by prompt")
    )


def _half_width(number: dict[str, Any]) -> float:
    return 0.0 if number["low"] is None else (number["high"] - number["low"]) / 2


def _clearness(number: dict[str, Any]) -> float:
    return abs(number["value"]) / _half_width(number)


def _payload(run: Path) -> str:
    validation = read_json(run, "validation.json")
    entries = {
        row["policy"]: row["entries_per_sent_token"]
        for row in validation["payload"]
        if row["rule"] == EQUAL_THRESHOLD_RULE
    }
    bias = {
        cell["policy"]: cell["measured"]
        for cell in validation["cells"]
        if cell["rule"] == EQUAL_THRESHOLD_RULE and cell["metric"] == "tv_bias"
    }
    return (
        "**3. Residual verification sends almost nothing, and costs no accuracy.** At the same "
        f"threshold, in reruns: `r-hlm` sends {_interval(entries['r-hlm'])} probabilities with a "
        f"token that is sent and its TV bias is {_interval(bias['r-hlm'])}; `cu-hlm-offline` sends "
        f"{_interval(entries['cu-hlm-offline'])} with bias {_interval(bias['cu-hlm-offline'])}, "
        f"`cu-hlm-online` {_interval(entries['cu-hlm-online'])} with bias "
        f"{_interval(bias['cu-hlm-online'])}; `u-hlm` sends all "
        f"{Figure(**entries['u-hlm']).value:,.0f} with bias {_interval(bias['u-hlm'])}.\n\n"
        + _figure("payload_bias", "uplink payload against TV bias for all policies")
    )


def _guarantees(run: Path) -> str:
    splits = read_json(run, "splits.json")
    rows = {
        (row["rule"], row["budget"]): row
        for row in splits["rows"]
        if row["source"] == "all-prompts"
    }
    plug_in, certified = rows[("risk", 0.05)], rows[("ltt", 0.05)]
    return (
        "**4. A budget met on the calibration prompts is broken about every other time; a "
        f"certified one keeps its promise.** {plug_in['num_draws']} calibrations of "
        f"{plug_in['num_calibration_prompts']} prompts drawn from the real ones with "
        "replacement, at 5 % risk: the plug-in threshold breaks its budget (a mean over tokens) in "
        f"{_percent(plug_in['violation_share'])} of them, Learn-then-Test (95 %, a mean over "
        f"prompts) in {_percent(certified['violation_share'])}, skipping "
        f"{_percent(certified['skip_rate'])} of the tokens instead of "
        f"{_percent(plug_in['skip_rate'])}. Intervals here are over the redrawn calibrations.\n\n"
        + _figure("guarantees", "how often each rule breaks its budget")
    )


def replaced(readme: str, text: str) -> str:
    """The README with its findings between the two marks exchanged."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"README has no findings between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """Write the findings into README.md."""
    path = Path(__file__).resolve().parent.parent.parent / "README.md"
    text = replaced(path.read_text(encoding="utf-8"), findings(data_path("results")))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
