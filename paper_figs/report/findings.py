"""What the shipped results say: README's table, docs/findings.md with its figures, and the table of
docs/choosing.md, made from them.

    python -m paper_figs.report.findings        # writes them again

A test fails when one of them and the results drift apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from calibrate.run.figure import NO_VALUE, number_text, scaled, signed_percent_text
from calibrate.run.folder import write_text
from calibrate.run.records import (
    Figure,
    GuaranteeRow,
    GuaranteesRecord,
    LineFit,
    OperatingPoint,
    ValidationRecord,
    WireLinkRuns,
    WireRecord,
    mean_off,
)
from calibrate.run.resources import data_path
from paper_figs.draw import figures, save
from paper_figs.figures.relation import MISFIT
from paper_figs.loaded import LoadedRun, load_run
from paper_figs.report.tables import markdown_table
from paper_figs.style import styled
from paper_figs.words import link_text, percent

BEGIN, END = "<!-- findings: from data/results, by paper_figs.report.findings -->", "<!-- end -->"
ROOT = Path(__file__).resolve().parents[2]
REAL = "qwen2.5-coder"
EQUAL_THRESHOLD_RULES = ("risk-0.01", "risk-0.02", "risk-0.05")
FIGURES = ("relation", "validation", "context_shift", "payload_bias", "guarantees", "wire")
BITS, BIAS = "uplink_bits_per_token", "tv_bias"


def findings(runs: Sequence[LoadedRun], real: LoadedRun) -> str:
    """Markdown of the findings: of the runs together, and of the real pair at temperature 1."""
    validated = [(run, run.validation) for run in runs if run.validation is not None]
    drawn = real.validation is not None
    parts = [
        _relation(real), _coverage(validated, drawn), _payload(real), _guarantees(real),
        _wires(runs),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def shipped_findings(results: Path) -> str:
    """Findings from the run folders of `results`."""
    folders = sorted(path.parent for path in results.glob("*/calibration.json"))
    runs = {folder.name: load_run(folder) for folder in folders}
    return findings(list(runs.values()), runs[REAL])


def summary(real: LoadedRun) -> str:
    """Markdown of README's table: what was found on the real pair, a line each, in plain words."""
    predicted = {point.key: point.predicted for point in real.feasible}
    whole, residual = (predicted.get(f"{name}/risk-0.01", {}) for name in ("u-hlm", "r-hlm"))
    rows = [[
        "tokens that the phone writes alone, at a risk of 1 % a token",
        percent(_skip_rates(real)["uncertainty"]),
    ]]  # fmt: skip
    if BITS in whole and BITS in residual:
        rows.append([
            "sent up a token at that risk: all probabilities (`u-hlm`), or only what the gate "
            "would have skipped (`r-hlm`)",
            f"{number_text(whole[BITS])} bit, or {number_text(residual[BITS])} bit",
        ])  # fmt: skip
    if real.wire is not None:
        links = real.wire.links
        rows.append([
            "time of a token by the clock, of the fastest policy with a gate, on links of "
            + "; ".join(link_text(one) for one in links),
            _fastest(links),
        ])  # fmt: skip
    if real.guarantees is not None:
        found = _of_all_prompts(real.guarantees)
        rows.append([
            "how often a budget of 5 % that calibration met is broken afterwards: as it is, or "
            "certified",
            " or ".join(percent(found[rule, 0.05].violation_share) for rule in ("risk", "ltt")),
        ])  # fmt: skip
    rows.append(_last_row(real))
    return _table(["what was measured", "result"], rows)


def costs(real: LoadedRun) -> str:
    """Markdown of the table of docs/choosing.md: every policy at 1 % risk or without a gate."""
    told = {
        "skip_rate": "skipped",
        BITS: "bit/token",
        BIAS: "TV bias",
        "answer_divergence": "of answers",
    }
    points = [point for point in real.feasible if point.rule in ("none", "risk-0.01")]
    points.sort(key=lambda point: (point.rule, point.predicted[BITS].value or 0.0))

    def cell(point: OperatingPoint, name: str) -> str:
        number = point.predicted[name]
        text = number_text(number) if name == BITS else percent(number)
        return f"at most {text}" if name in point.at_most else text

    rows = [[f"`{point.policy}`", *(cell(point, name) for name in told)] for point in points]
    return _table(["policy", *told.values()], rows)


def _last_row(real: LoadedRun) -> list[str]:
    """Whether predictions held; without reruns, how well the score tells rejections."""
    if real.validation is not None:
        covered = real.validation.coverage
        what = "figures of reruns on fresh prompts that lie in their prediction intervals"
        return [what, f"{covered.covered} of {covered.total}"]
    fit = real.calibration.fit
    what = "correlation of the phone's uncertainty with rejection: in the mean, and token by token"
    return [what, f"{number_text(fit.correlation_binned)} and {number_text(fit.correlation)}"]


def _skip_rates(loaded: LoadedRun) -> dict[str, Figure]:
    """Share of tokens that each score skips at 1 % risk."""
    return {one.name: one.skip_rate_at_risk["0.01"] for one in loaded.calibration.estimators}


def _of_all_prompts(record: GuaranteesRecord) -> dict[tuple[str, float], GuaranteeRow]:
    """Rows of the study with calibrations as large as the run's own, by rule and budget."""
    return {(row.rule, row.budget): row for row in record.rows if row.source == "all-prompts"}


def _figure(name: str, alt: str) -> str:
    return f"![{alt}](figures/{name}.png)"


def _table(titles: Sequence[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(titles, rows))


def _relation(loaded: LoadedRun) -> str:
    calibration, fit = loaded.calibration, loaded.calibration.fit
    rates = _skip_rates(loaded)
    less = next(
        (one.less_uncertainty["0.01"] for one in calibration.estimators
         if one.name == "uncertainty_sampled" and one.less_uncertainty),
        Figure(value=None),
    )  # fmt: skip
    return (
        "## 1. A line describes averages, not tokens, and not exactly\n\n"
        f"{calibration.num_prompts} prompts, {calibration.num_tokens:,} tokens: "
        f"slope {number_text(fit.slope)}, intercept {number_text(fit.intercept)}; correlation of "
        f"binned means {number_text(fit.correlation_binned)}, token by token "
        f"{number_text(fit.correlation)}; curvature {number_text(fit.curvature)}. {_wald(fit)}"
        "At 1 % risk the exact "
        f"uncertainty skips {percent(rates['uncertainty'])} of the tokens, that of twenty draws "
        f"{percent(rates['uncertainty_sampled'])}, a difference of "
        f"{number_text(scaled(less, 100), 2)} points on the same prompts: it takes 21 values only, "
        "and its last step within the budget may fall far short of it.\n\n"
        + _figure("relation", "rejection probability against uncertainty")
    )


def _wald(fit: LineFit) -> str:
    test = fit.lack_of_fit
    if test is None:
        return ""
    leave = "leave the line all the same" if test.p_value < MISFIT else "do not leave the line"
    return (
        f"The bins {leave}: a level of its own for each bin, {test.statistic:.0f} on "
        f"{test.degrees} degrees of freedom (Wald, clustered by prompt), "
        f"p = {test.p_value:.1g} (lower panel). "
    )


def _coverage(runs: list[tuple[LoadedRun, ValidationRecord]], drawn: bool) -> str:
    """What reruns said; with figures where the run that is drawn has some."""
    if not runs:
        return "## 2. Predictions against reruns\n\nNone of the shipped runs was rerun yet."
    rows = []
    for loaded, validation in runs:
        tested, hold = validation.coverage, validation.coverage.if_predictions_hold
        row = [loaded.run.name, str(validation.num_prompts), f"{validation.num_tokens:,}",
               f"{tested.covered} of {tested.total}"]  # fmt: skip
        if hold is None or hold.share.low is None or hold.share.high is None:
            row += [NO_VALUE] * 3
        else:
            row += [
                f"{hold.share.low * tested.total:.0f} to {hold.share.high * tested.total:.0f}",
                f"{hold.probability_of_at_most:.2g}",
                f"{hold.widest_error:.1f}, {hold.probability_of_as_wide:.2g}",
            ]
        rows.append([*row, str(validation.coverage.unstratified.covered)])
    level = " or ".join(f"{100 * each:g}" for each in sorted({v.confidence for _, v in runs}))
    titles = ["run", "prompts", "tokens", "inside", "to expect", "as few",
              "widest error in standard errors, as wide", "inside if independent"]  # fmt: skip
    text = (
        "## 2. Predictions against reruns\n\nEvery policy at derived settings, decoded again on "
        "prompts and random numbers that the derivation has not seen; a cell is one figure of one "
        f"rerun, held to its {level} % interval. Cells that a policy fixes by itself, "
        "or that others imply, are left out. Intervals take prompts by category, of which "
        "calibration and reruns have the same mix; taken as independent draws they are wider "
        "(last column). The cells of a run "
        'share their prompts and many say nearly the same, so a count is a weak witness: "to '
        f'expect" is where {level} % of the counts would lie if the predictions held, "as few" how '
        "often one would be as small. The runs share their validation prompts, so they are not "
        "independent either."
    )
    parts = [text, _table(titles, rows), *_context_shift(runs)]
    if drawn:
        parts.insert(2, _figure("validation", "predicted against measured, cell by cell"))
        parts.append(
            _figure("context_shift", "change of contexts in every rerun, paired by prompt")
        )
    return "\n\n".join(parts)


def _context_shift(runs: list[tuple[LoadedRun, ValidationRecord]]) -> tuple[str, str]:
    """What did not hold, and how far policies leave the contexts that predictions start from."""
    rows = []
    for loaded, validation in runs:
        counts = Counter(cell.policy for cell in validation.cells if cell.covered is False)
        pooled = validation.pooled_shift
        told = [NO_VALUE] * 4
        if pooled is not None:
            last = pooled.by_step.value[-1]
            told = [
                number_text(scaled(pooled.below_threshold, 100), 2),
                NO_VALUE if pooled.p_value is None else f"{pooled.p_value:.2g}",
                number_text(scaled(pooled.predicted, 100), 2),
                NO_VALUE if last is None else f"{100 * last:+.1f}",
            ]
        outside = ", ".join(f"`{name}` {count}" for name, count in counts.items()) or "none"
        rows.append([loaded.run.name, outside, *told])
    titles = ["run", "outside", "shift", "no shift: p", "shift, as predicted", "in the last part"]
    text = (
        "A policy leads itself into other contexts than the server's outputs would. The table has "
        "the cells outside by policy; the mean change, over all gated reruns, of the share of "
        "tokens below the threshold, in percentage points, against the mean of the reruns that "
        "follow the server's law on the same prompts; the one test of it; what the calibration's "
        "pilot said it would be, which "
        "is in every prediction above; and the change in the last quarter of the answers."
    )
    return text, _table(titles, rows)


def _payload(loaded: LoadedRun) -> str:
    """Every gated policy at three thresholds, by what it sends, as predicted."""
    found: dict[str, dict[str, dict[str, Figure]]] = {}
    for point in loaded.feasible:
        if point.rule in EQUAL_THRESHOLD_RULES:
            found.setdefault(point.policy, {})[point.rule] = point.predicted
    complete = {name: by for name, by in found.items() if len(by) == len(EQUAL_THRESHOLD_RULES)}
    if not complete:
        return ""

    def bits(name: str) -> float:
        return sum(figures[BITS].value or 0.0 for figures in complete[name].values())

    rows = []
    for name in sorted(complete, key=bits):
        cells = [complete[name][rule] for rule in EQUAL_THRESHOLD_RULES]
        rows.append([
            f"`{name}`", *(number_text(figures[BITS]) for figures in cells),
            *(percent(figures[BIAS]) for figures in cells),
        ])  # fmt: skip
    rules = [f"at {100 * float(rule.rpartition('-')[2]):g} %" for rule in EQUAL_THRESHOLD_RULES]
    titles = ["policy", *(f"bit/token {rule}" for rule in rules),
              *(f"TV bias {rule}" for rule in rules)]  # fmt: skip
    accounting = "" if loaded.derivation is None else loaded.derivation.accounting
    low = [rows[0][place].split()[0] for place in (1, 2, 3)]
    least = [row[0] for row in rows if [row[i].split()[0] for i in (1, 2, 3)] == low]
    verb = "sends" if len(least) == 1 else "send"
    twins = [b[0] for a, b in pairwise(rows) if a[1:7] == b[1:7]]
    same = f"({', '.join(twins)}: all figures of the row before, for it skips the same.) "
    same = same if twins else ""
    return (
        f"## 3. What sending less costs in bias: {' and '.join(least)} {verb} least\n\n"
        "Every gated policy at the thresholds of three risk budgets, by rising payload in "
        f"'{accounting}' accounting, which bills the draft, the tokens that the server has not "
        "seen and, once an answer, the prompt as well. "
        f"{same}In one context all of them skip the same drafts where the score alone decides, at "
        "the same risk, and no policy's bias is below its own risk: what is above it is the price. "
        "On their own roads, where these figures are predicted, skip rates and risks "
        f"differ a little (docs/theory.md, (60)).\n\n{_table(titles, rows)}\n\n"
        + _figure("payload_bias", "uplink payload against TV bias for all policies")
    )


def _at_one_percent(rows: dict[tuple[str, float], GuaranteeRow]) -> str:
    row = rows.get(("ltt", 0.01))
    if row is None or row.infeasible_share.value is None:
        return ""
    share = 100 * (1 - row.infeasible_share.value)
    return f"At 1 % it certifies a threshold in {share:.3g} % of them. "


def _capped(rows: dict[tuple[str, float], GuaranteeRow]) -> str:
    """What an answer cap makes of small budgets."""
    found = [
        f"{percent(row.skip_rate)} at {100 * alpha:g} % (at most {row.cap:.0%} of an answer)"
        for alpha in (0.01, 0.02)
        if (row := rows.get(("ltt@cap", alpha))) is not None and row.cap is not None
    ]
    return f"Under an answer cap it certifies {' and '.join(found)}. " if found else ""


def _guarantees(loaded: LoadedRun) -> str:
    if loaded.guarantees is None:
        return ""
    rows = _of_all_prompts(loaded.guarantees)
    plug_in, certified = rows["risk", 0.05], rows["ltt", 0.05]
    return (
        "## 4. A budget met on the calibration prompts is broken about every other time; a "
        f"certified one keeps its promise\n\n{plug_in.num_draws} calibrations of "
        f"{plug_in.num_calibration_prompts} prompts drawn from the real ones with "
        "replacement, at 5 % risk: the plug-in threshold breaks its budget (a mean over "
        f"{plug_in.weighting}) in {percent(plug_in.violation_share)} of them, Learn-then-Test "
        f"({loaded.guarantees.confidence:.0%}, a mean over {certified.weighting}) in "
        f"{percent(certified.violation_share)}, skipping "
        f"{percent(certified.skip_rate)} of the tokens instead of "
        f"{percent(plug_in.skip_rate)}. {_at_one_percent(rows)}{_capped(rows)}Intervals here are "
        "over the redrawn calibrations.\n\n"
        + _figure("guarantees", "how often each rule breaks its budget")
    )


def _fastest(links: Sequence[WireLinkRuns]) -> str:
    """The fastest gated policy on each link, by the clock, and those that do as well."""
    told, beside = [], []
    for one in links:
        first, *others = [run for run in one.by_time if run.gated]
        most = first.token_time.measured.high
        beside.append([
            f"`{run.policy}`" for run in others
            if most is not None and (run.token_time.measured.value or 0.0) <= most
        ])  # fmt: skip
        told.append(f"`{first.policy}` {number_text(first.token_time.measured)} ms")
    if len({tuple(sorted(names)) for names in beside}) == 1:
        near = f" (inside its interval on each: {', '.join(sorted(beside[0]))})"
        return "; ".join(told) + (near if beside[0] else "")
    return "; ".join(
        text + (f" (inside: {', '.join(names)})" if names else "")
        for text, names in zip(told, beside, strict=True)
    )


def _misses(record: WireRecord) -> str:
    """Token times outside their intervals, and what of it the machines and the link did."""
    found = [
        f"`{run.policy}` over {link_text(one)} by {signed_percent_text(run.token_time.off)} "
        f"(which tokens came left out: {signed_percent_text(run.replayed.off)})"
        for one in record.links for run in one.runs if run.token_time.covered is False
    ]  # fmt: skip
    return f" Of the token times these miss: {'; '.join(found)}." if found else ""


def _wires(runs: Sequence[LoadedRun]) -> str:
    """Token times by the clock, every pair and link."""
    timed = [(run, run.wire) for run in runs if run.wire is not None]
    if not timed:
        return ""
    parts = [
        "## 5. By the clock: which policy is fastest on which link\n\nServer and device as two "
        "processes, a relay between them that has the link's rate and round trip; prompts one at a "
        "time. In brackets the interval, clustered by prompt, and behind it what docs/theory.md, "
        "(63), had predicted from the calibration and from times without a link."
    ]
    for loaded, record in timed:
        names = list(dict.fromkeys(run.policy for one in record.links for run in one.runs))
        rows = []
        for name in names:
            cells = [
                next((run.token_time for run in one.runs if run.policy == name), None)
                for one in record.links
            ]
            rows.append([
                f"`{name}`",
                *(NO_VALUE if cell is None else
                  f"{number_text(cell.measured)}, {number_text(cell.predicted, interval=False)}"
                  for cell in cells),
            ])  # fmt: skip
        rules = ", ".join(dict.fromkeys(
            run.rule for one in record.links for run in one.runs if run.gated
        ))  # fmt: skip
        held = record.coverage
        parts.append(
            f"{loaded.run.name}, {len(record.prompt_ids)} prompts of at most "
            f"{record.max_new_tokens} tokens, gated policies at {rules}; ms a token:"
        )
        parts.append(_table(["policy", *(link_text(one) for one in record.links)], rows))
        parts.append(
            f"Predicted token times are {record.mean_time_error:.1%} off in the mean "
            f"({record.mean_time_error_before:.1%} without what a wire adds, "
            f"{record.mean_time_error_replayed:.1%} once it is known which tokens were skipped); "
            f"{held.covered} of {held.total} figures of the clock lie in their intervals. Fastest "
            f"of the gated policies, link by link: {_fastest(record.links)}.{_misses(record)}"
        )
    every = [run for _, record in timed for one in record.links for run in one.runs]
    error = mean_off(run.token_time for run in every)
    covered = sum(record.coverage.covered for _, record in timed)
    total = sum(record.coverage.total for _, record in timed)
    parts.append(
        f"Over all {len(every)} points and links, token times are {error:.1%} off in the mean, and "
        f"{covered} of {total} figures of the clock lie in their intervals. The links of a pair "
        "share prompts and probes, so a count is a weak witness here too; data/README.md says what "
        "else the machine did."
    )
    parts.append(_figure("wire", "token times by the clock beside their predictions, link by link"))
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    """The page with what stands between its two marks exchanged."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"nothing stands between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def pages(results: Path) -> dict[Path, str]:
    """Every page that says what the results say, as it should be."""
    real = load_run(results / REAL)
    told = {
        ROOT / "README.md": summary(real),
        ROOT / "docs" / "findings.md": shipped_findings(results),
        ROOT / "docs" / "choosing.md": costs(real),
    }
    return {path: replaced(path.read_text(encoding="utf-8"), text) for path, text in told.items()}


def draw_figures(results: Path, output: Path) -> None:
    """Draw the figures that the findings show, those that the results allow."""
    with styled():
        real = dict(figures(load_run(results / REAL)))
        for name in FIGURES:
            drawn = real[name]
            if not isinstance(drawn, str):
                save(drawn, output / f"{name}.png")


def main() -> None:
    """Write README's table, the findings and their figures."""
    results = data_path("results")
    for path, text in pages(results).items():
        write_text(path, text)
    draw_figures(results, ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()
