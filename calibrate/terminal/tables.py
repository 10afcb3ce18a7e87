"""Results as text: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.figure import NBSP, NO_VALUE, number_text, percent_text, scaled, share_text
from calibrate.run.records import (
    AttenuationRecord,
    CalibrationRecord,
    Cell,
    Figure,
    GuaranteesRecord,
    MonitorRecord,
    PlanRecord,
    ValidationRecord,
)
from calibrate.run.wording import (
    SHOWN_RISKS,
    WEAKER,
    coverage_details,
    coverage_text,
    guarantees_text,
    plan_texts,
    verdict_text,
)
from calibrate.terminal.derived import print_certificates
from calibrate.terminal.page import Page

if TYPE_CHECKING:
    from calibrate.pairs.registry import ModelDescription, PairDescription
    from calibrate.terminal.doctor import HealthReport
    from hlmtheory.audit import AuditRow
    from hlmtheory.reconcile import Reconciliation

FIT = {
    "slope": "rejection probability gained per unit of uncertainty",
    "intercept": "predicted rejection probability at u = 0",
    "correlation": "token by token: how well u tells single rejections",
    "correlation_binned": "of binned means: how linear the average is",
    "curvature": "coefficient of u^2 added to the line; 0 if linear",
    "mean_rejection": "mean rejection probability = mean TV(x, y)",
    "delta": "share of drafts that can be rejected at all, P(y_d < x_d)",
}


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.0f} MB"


def print_pairs(pairs: Sequence[PairDescription], as_json: bool) -> None:
    """`hlm pairs list`."""
    if as_json:
        print(json.dumps({"pairs": [asdict(pair) for pair in pairs]}, indent=1, default=str))
        return

    def download(pair: PairDescription) -> str:
        sizes = {m.source: m.download_num_bytes for m in (pair.slm, pair.llm)}
        known = [size for size in sizes.values() if size is not None]
        return _size(sum(known)) if len(known) == len(sizes) else "-"

    Page().table(
        ("pair", "~device model", "~server model", ">download", "here", "~what it is"),
        (
            (pair.name, pair.slm.label, pair.llm.label, download(pair),
             "yes" if pair.cached else "no", pair.description)
            for pair in pairs
        ),
    )  # fmt: skip


def print_pair(pair: PairDescription, as_json: bool) -> None:
    """`hlm pairs show`."""
    if as_json:
        print(json.dumps(asdict(pair), indent=1, default=str))
        return

    def told(model: ModelDescription) -> dict[str, str]:
        return {
            "name": model.label,
            "source": model.source,
            "sha256": model.sha256 or "-",
            "layers left out": ", ".join(map(str, model.drop_layers)) or "-",
            "download": _size(model.download_num_bytes),
            "in cache": _size(model.cached_num_bytes),
            "folder": str(model.folder or "-"),
        }

    page, slm, llm = Page(), told(pair.slm), told(pair.llm)
    title = f"{pair.name}: {pair.description}"
    rows = [(name, slm[name], llm[name]) for name in slm]
    page.table(("", "~device model (SLM)", "~server model (LLM)"), rows, title)
    page.say(f"licence: {pair.license}\ncache: {pair.cache_path}")


def print_calibration(summary: CalibrationRecord, run: Path, verbose: bool = False) -> None:
    """`hlm calibrate`: the verdict, the line, the scores, the timings."""
    fit, page = summary.fit, Page()
    page.say(verdict_text(summary))
    page.say(
        f"line: rejection probability = a u + b, a ={NBSP}{number_text(fit.slope)}, "
        f"b ={NBSP}{number_text(fit.intercept)}; correlation {number_text(fit.correlation)} token "
        f"by token, {number_text(fit.correlation_binned)} of binned means"
    )
    page.table(
        ("score", ">AUROC", ">skip rate at 1 % risk", ">at 5 % risk"),
        (
            (one.name,
             *(number_text(number, interval=verbose or page.with_intervals)
               for number in (one.auroc, *(one.skip_rate_at_risk[risk] for risk in SHOWN_RISKS))))
            for one in summary.estimators
        ),
        "what tells rejections best",
    )  # fmt: skip
    if verbose:
        rows = [(key, getattr(fit, key), meaning) for key, meaning in FIT.items()]
        page.table(("quantity", ">value", "~what it says"), rows)
        page.table(
            ("score", ">correlation, token by token"),
            [(one.name, one.correlation) for one in summary.estimators],
        )
        excess = number_text(summary.rejection_excess)
        page.say(f"mean rejection less mean total variation: {excess}, 0 but for the draws")
    times = (
        f"{key[2:-3]} {number_text(value)} ms" for key, value in summary.timings.medians.items()
    )
    page.say(
        f"{summary.pair.name}: {summary.num_prompts:,} prompts, {summary.num_tokens:,} tokens; "
        f"{summary.settings.sampling}; brackets: {share_text(summary.confidence)}, by prompt\n"
        f"one token of one user on this machine: {', '.join(times)}\n"
        f"in {run}: traces, run.json, calibration.json; "
        + (
            "a minimal trace, which nothing can be derived from"
            if summary.settings.trace == "minimal"
            else f"next: hlm derive {run}"
        )
    )


SHORT_CELLS = {
    "skip_rate": (">skips %", 1),
    "rejection_risk": (">risk %", 2),
    "tv_bias": (">TV bias %", 2),
    "uplink_bits_per_token": (">bit/token", None),
}
"""What the short table of a validation holds: counted figures, shares as per cent; decimals."""
MISSED = "!"


def print_validation(result: ValidationRecord, verbose: bool = False) -> None:
    """`hlm validate`: whether the predictions held, then point by point, or figure by figure."""
    page = Page()
    page.say(coverage_text(result))
    by_rule: dict[str, dict[str, dict[str, Cell]]] = {}
    for cell in result.cells:
        of_rule = by_rule.setdefault(cell.rule, {})
        of_rule.setdefault(cell.policy, {})[cell.metric] = cell
    rows: list[Sequence[Any] | str] = []
    if verbose:
        for rule, policies in by_rule.items():
            for policy, cells in policies.items():
                rows += [[], f"{policy}/{rule}"] if rows else [f"{policy}/{rule}"]
                rows += map(_verbose_row, cells.values())
        page.table(("metric", ">predicted", ">measured", "holds"), rows)
    else:
        for rule, policies in by_rule.items():
            rows += [[], rule] if rows else [rule]
            rows += [
                [policy, *(_short_text(cells.get(key), SHORT_CELLS[key][1]) for key in SHORT_CELLS)]
                for policy, cells in policies.items()
            ]
        titles = [title for title, _ in SHORT_CELLS.values()]
        page.table(("policy", *titles), rows, "predicted \N{RIGHTWARDS ARROW} measured")
    missed = [cell for cell in result.cells if cell.covered is False]
    if missed:
        names = ", ".join(f"{cell.policy}/{cell.rule} {cell.metric}" for cell in missed)
        page.say(f"{'' if verbose else MISSED + ' '}outside their intervals: {names}")
    for point in result.infeasible:
        page.say(f"not rerun: {point.policy}/{point.rule}: {point.reason}")
    if verbose:
        for text in coverage_details(result):
            page.say(text)
    _say_shift(page, result, verbose)
    page.say(
        f"{result.num_prompts:,} fresh prompts, {result.num_tokens:,} tokens of all reruns, seed "
        f"{result.seed}"
        + ("" if verbose else "; --verbose has every figure and the interval it was to fall into")
    )


def _verbose_row(cell: Cell) -> list[Any]:
    unit = f" ({cell.measured.unit})" if cell.measured.unit else ""
    return [
        cell.metric + unit,
        number_text(cell.predicted, 4),
        number_text(cell.measured, 4, interval=False),
        "-" if cell.covered is None else cell.covered,
    ]


def _short_text(cell: Cell | None, decimals: int | None) -> str:
    """Predicted, measured, and a mark where the second is outside the first's interval."""
    if cell is None:
        return NO_VALUE
    text = number_text if cell.measured.unit else percent_text
    parts = (
        text(one, decimals=decimals, interval=False) for one in (cell.predicted, cell.measured)
    )
    return " \N{RIGHTWARDS ARROW} ".join(parts) + (MISSED if cell.covered is False else " ")


def _say_shift(page: Page, result: ValidationRecord, verbose: bool) -> None:
    pooled = result.pooled_shift
    if pooled is None:
        page.say("contexts: their shift is measured beside a rerun of a lossless policy")
        return
    said = "" if pooled.predicted.value is None else f", {_points(pooled.predicted)} as predicted"
    chance = "" if pooled.p_value is None else f"; no shift: p = {pooled.p_value:.2g}"
    page.say(
        f"contexts: on their own road the {pooled.num_reruns} gated reruns have "
        f"{_points(pooled.below_threshold)} points more tokens below their threshold than along "
        f"the server's outputs{said}{chance}"
    )
    if not verbose:
        return
    parts = [_points(part) for part in pooled.by_step.figures()]
    places = [f"token {start:.0f}" for start in pooled.by_step.grid]
    page.table(("from", ">points"), list(zip(places, parts, strict=True)))


def _points(number: Figure) -> str:
    return number_text(scaled(number, 100), decimals=1)


def print_guarantees(result: GuaranteesRecord) -> None:
    """`hlm guarantees`: how often each rule broke its promise."""
    page = Page()
    page.say(guarantees_text(result))
    page.say(
        f"rules over {result.num_draws} redrawn calibrations of the run's own "
        f"{result.num_prompts} prompts ({result.num_tokens} tokens; score {result.score}; "
        f"{result.confidence:.0%} intervals)"
    )
    page.table(
        ("rule", ">budget", "calibrated on", "about", ">above budget", ">infeasible",
         ">skip rate", ">risk"),
        (
            (row.rule + (f" {row.cap:g}" if row.cap else ""), row.budget, row.source,
             row.weighting, row.violation_share, row.infeasible_share, row.skip_rate, row.risk)
            for row in result.rows
        ),
        num_names=4,
    )  # fmt: skip
    print_certificates(page, result.certificates)


def print_plan(result: PlanRecord) -> None:
    """`hlm plan`: prompts for a certificate, for an interval, and their time."""
    page = Page()
    for text in plan_texts(result):
        page.say(text)
    page.say(
        f"prompts that certify a budget with confidence {result.confidence:g} in "
        f"{result.power:.0%} of calibrations (about {result.certified}; score {result.score}), if "
        f"prompts are like the run's {result.num_prompts}; {result.ms_per_prompt / 1e3:.2g} s each"
    )
    page.table(
        (">budget", "~rule", ">answer cap", ">skip rate", ">without any loss", ">prompts",
         ">minutes"),
        (
            (one.budget, one.rule + ("" if one.guaranteed else f": {WEAKER[one.test]}"), one.cap,
             one.goal_skip_rate, str(one.without_loss),
             f"over {result.most:,}" if one.num_prompts is None else f"{one.num_prompts:,}",
             None if one.wall_s is None else one.wall_s / 60)
            for one in result.rows
        ),
        num_names=2,
    )  # fmt: skip
    page.table(
        (">budget", "interval of", ">width", ">prompts", ">minutes"),
        (
            (one.budget, one.metric, one.width, f"{one.num_prompts:,}", one.wall_s / 60)
            for one in result.intervals
        ),
        num_names=2,
    )


def print_attenuation(result: AttenuationRecord) -> None:
    """`hlm attenuation`: what drawing K tokens does to the line, predicted and measured."""
    page = Page()
    page.say(f"{result.pair.name}: the line on K draws ({result.confidence:.0%} intervals)")
    page.table(
        (">K", ">reliability", ">r predicted", ">r measured", ">slope predicted",
         ">slope measured"),
        (
            (str(row.num_temperatures), row.reliability, row.predicted_correlation,
             row.measured_correlation, row.predicted_slope, row.measured_slope)
            for row in result.rows
        ),
    )  # fmt: skip


def print_monitor(result: MonitorRecord) -> None:
    """`hlm monitor`: the verdict, and what it rests on."""
    page, asked, alarm = Page(), result.settings, result.alarm
    unit, delta = asked.unit.removesuffix("s"), 1 - asked.confidence
    if alarm is None:
        page.say(f"quiet: no alarm in {result.num_units:,} {asked.unit}")
    else:
        page.say(
            f"ALARM at {unit} {alarm.num_units:,} of {result.num_units:,}, line {alarm.line:,}"
        )
    present = "" if asked.window is None else f" of window {result.window:,}"
    page.say(
        f"  an alarm while the mean risk of the {asked.unit} so far{present} is at most "
        f"{asked.risk:g} has probability {delta:.3g} at most, over all times together\n"
        f"  e-value{present} {_exponential(result.log_e_value)}, alarm from "
        f"{_exponential(result.log_alarm_level)}\n"
        f"  mean risk{present} {number_text(result.mean_risk)}, "
        f"confidence sequence at {100 * asked.confidence:g} %\n"
        f"  {result.num_checked:,} of {result.num_skipped:,} skipped drafts checked, "
        f"{result.expected_checked:,.0f} expected at the audit rate"
    )
    if not result.as_audited:
        page.say(
            "  further from it than chance allows: the audit rate is not what it is said to be"
        )
    if asked.unit == "answers" and result.open_answer:
        page.say("  the last answer counts once another has begun")


def _exponential(log: float) -> str:
    """e to a power that may be too large for a float, as a power of ten beyond a million."""
    return number_text(math.exp(log)) if log < 14 else f"10^{log / math.log(10):.0f}"


def print_audit(rows: Sequence[AuditRow], times: Sequence[Reconciliation], as_json: bool) -> None:
    """`hlm audit`: the published numbers against the theory, and what would reconcile them."""
    if as_json:
        content = {
            "rows": [asdict(row) for row in rows],
            "reconciliations": [asdict(entry) for entry in times],
        }
        print(json.dumps(content, indent=1))
        return
    page = Page()
    page.table(
        ("system", "~quantity", ">published", ">implied", "consistent", "~why"),
        (
            (row.system, row.quantity, number_text(row.published, 4), number_text(row.implied, 4),
             row.consistent, row.explanation)
            for row in rows
        ),
    )  # fmt: skip
    page.say("times that make each throughput figure come out (t_llm given, t_up solved for)")
    page.table(
        ("system", "averaging", ">t_slm", ">t_llm", ">t_up", "unit", ">speed-up in mean time",
         "~why"),
        (
            (one.system, one.averaging, one.t_slm, one.t_llm, one.t_up, one.unit,
             one.ratio_of_means, one.reason)
            for one in times
        ),
    )  # fmt: skip


def print_doctor(report: HealthReport, as_json: bool) -> None:
    """`hlm doctor`."""
    if as_json:
        print(json.dumps({"healthy": report.healthy, "checks": [asdict(c) for c in report.checks]}))
        return
    rows = ((check.name, check.found, check.ok, check.remedy) for check in report.checks)
    Page().table(("check", "found", "ok", "~what mends it"), rows)
