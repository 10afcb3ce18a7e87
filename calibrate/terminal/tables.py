"""Results as text: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.figure import number_text, scaled
from calibrate.run.records import (
    AttenuationRecord,
    CalibrationRecord,
    Certificate,
    DerivationRecord,
    Figure,
    GuaranteesRecord,
    MonitorRecord,
    OperatingPoint,
    PlanRecord,
    ValidationRecord,
)
from calibrate.run.wording import UNKNOWN_ANSWERS, coverage_text, pilot_text, promise_texts

if TYPE_CHECKING:
    from calibrate.pairs.registry import ModelDescription, PairDescription
    from calibrate.terminal.doctor import HealthReport
    from hlmtheory.audit import AuditRow
    from hlmtheory.reconcile import Reconciliation

PRICES = {
    "uplink_bits_per_token": ">uplink bit/token",
    "token_time_ms": ">ms/token",
    "throughput_tok_s": ">token/s",
    "mean_throughput_tok_s": ">mean token/s",
    "energy_j_per_token": ">J/token",
}
FIT = {
    "slope": "rejection probability gained per unit of uncertainty",
    "intercept": "predicted rejection probability at u = 0",
    "correlation": "token by token: how well u tells single rejections",
    "correlation_binned": "of binned means: how linear the average is",
    "curvature": "coefficient of u^2 added to the line; 0 if linear",
    "mean_rejection": "mean rejection probability = mean TV(x, y)",
    "delta": "share of drafts that can be rejected at all, P(y_d < x_d)",
}
ANSWERS = ("answer_divergence", "tokens_in_agreement")
WEAKER = {"t": "asymptotic, no guarantee", "conformal": "a promise on average"}
WRAPPED = ("quantity", "what it is", "why", "what mends it", "what it says")


class Page:
    """Where results are printed: as wide as the terminal, wide in a pipe."""

    def __init__(self) -> None:
        import shutil
        import sys

        from rich.console import Console

        # A pipe has no width; tables folded to 80 columns would be hard to read back.
        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 160
        self._console = Console(width=max(width, 100), highlight=False, soft_wrap=False)

    def say(self, text: str = "") -> None:
        """A line, folded by the terminal alone."""
        self._console.print(text, soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None
    ) -> None:
        """A table of texts, figures, numbers and truths.

        Columns whose name begins with ">" are set to the right; an empty row draws a line.
        """
        from rich import box
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for name in columns:
            justify: Any = "right" if name.startswith(">") else "left"
            table.add_column(name.lstrip(">"), justify=justify, no_wrap=name not in WRAPPED)
        for row in rows:
            if row:
                table.add_row(*map(_cell, row))
            else:
                table.add_section()
        self._console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return number_text(value)


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
        ("pair", "device model", "server model", ">download", "here", "what it is"),
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
    page.table(("", "device model (SLM)", "server model (LLM)"), rows, title)
    page.say(f"licence: {pair.license}\ncache: {pair.cache_path}")


def print_calibration(summary: CalibrationRecord, run: Path) -> None:
    """`hlm calibrate`: the line, the estimators, the timings."""
    fit, page = summary.fit, Page()
    slope, intercept = fit.slope.value or 0.0, fit.intercept.value or 0.0
    no_line = f"; no line: {fit.degenerate}" if fit.degenerate else ""
    page.say(
        f"\n{summary.pair.name}: {summary.num_prompts} prompts, {summary.num_tokens} tokens; "
        f"{summary.settings.sampling}; intervals {summary.confidence:.0%}, clustered by prompt\n"
        f"fitted line   beta = {slope:.3f} u {'-' if intercept < 0 else '+'} {abs(intercept):.3f}"
        f"{no_line}"
    )
    rows: list[Sequence[Any]] = [(key, getattr(fit, key), meaning) for key, meaning in FIT.items()]
    page.table(("quantity", ">value", "what it says"), rows)
    rows = [
        (one.name, one.correlation, one.auroc,
         *(one.skip_rate_at_risk[risk] for risk in ("0.01", "0.05")))
        for one in summary.estimators
    ]  # fmt: skip
    page.table(
        ("estimator", ">correlation", ">AUROC", ">skip rate at 1 % risk", ">at 5 % risk"),
        rows,
        "what tells rejections best",
    )
    times = (
        f"{key[2:-3]} {number_text(value)} ms" for key, value in summary.timings.medians.items()
    )
    excess = number_text(summary.rejection_excess)
    page.say(f"mean rejection less mean total variation: {excess}, 0 but for the draws")
    page.say(
        f"one token of one user on this machine: {', '.join(times)}\n"
        f"in {run}: traces, run.json, calibration.json; next: hlm derive {run}\n"
    )


def print_operating_points(result: DerivationRecord) -> None:
    """`hlm derive`: every point with its predictions."""
    page = Page()
    page.say(
        f"derived settings ({result.num_prompts} prompts, {result.num_tokens} tokens; link "
        f"{result.link['name']}, profile {result.profile['name']}, accounting "
        f"{result.accounting}; score {result.request.score}; intervals "
        f"{result.confidence:.0%}, clustered by prompt)"
    )
    page.say(f"  {pilot_text(result)}")
    points = [point for point in result.operating_points if point.feasible]
    page.table(
        ("policy", "rule", ">threshold", ">skip rate", ">risk", ">TV bias"),
        (
            (point.policy, point.rule, point.uncertainty_threshold,
             *(point.predicted[key] for key in ("skip_rate", "rejection_risk", "tv_bias")))
            for point in points
        ),
    )  # fmt: skip
    _print_answers(page, result, points)
    page.say("at which the policies cost (means over tokens)")
    page.table(
        ("policy", "rule", *PRICES.values()),
        (
            (point.policy, point.rule,
             *(number_text(point.predicted[key], 4, interval=False) for key in PRICES))
            for point in points
        ),
    )  # fmt: skip
    _certificates(page, result.certificates)
    for best in result.optima:
        found = best.reason
        if best.feasible:
            size = f", k = {best.num_entries}" if best.num_entries else ""
            speed, energy, bias = (
                number_text(best.predicted[key])
                for key in ("throughput_tok_s", "energy_j_per_token", "total_bias")
            )
            found = (
                f"{best.policy} at threshold {number_text(best.uncertainty_threshold)}{size}: "
                f"{speed} token/s, {energy} J/token, bias at most {bias}"
            )
        page.say(f"  best {best.objective} within risk {best.budget:g}: {found}")
    if assumed := result.profile.get("assumed"):
        page.say(f"  energy: {', '.join(assumed)} are assumed, not measured")
    notes: dict[str, list[str]] = {}
    for point in result.operating_points:
        if point.reason:
            kind = "" if point.feasible else "infeasible: "
            notes.setdefault(kind + point.reason, []).append(point.key)
    for reason, names in notes.items():
        page.say(f"  {', '.join(names)}: {reason}")
    page.say()


def _print_answers(page: Page, result: DerivationRecord, points: Sequence[OperatingPoint]) -> None:
    """Whole answers at the points where recorded steps say what becomes of them."""
    known = [
        point for point in points if point.score and point.predicted[ANSWERS[0]].value is not None
    ]
    if not known:
        return
    length = int(max(one.divergence.grid[-1] for one in result.answers)) if result.answers else None
    page.say(
        "whole answers"
        + (f" of at most {length} tokens" if length else "")
        + ": no score of them in [0, 1] moves by more than TV in expectation"
    )
    page.table(
        ("policy", "rule", ">TV of answers", ">tokens before they differ"),
        (
            (point.policy, point.rule, *(
                ("at most " if key in point.at_most else "") + number_text(point.predicted[key])
                for key in ANSWERS
            ))
            for point in known
        ),
    )  # fmt: skip
    names = {point.policy for point in known}
    lacking = {point.policy: None for point in points if point.score and point.policy not in names}
    if lacking:
        page.say(f"  {', '.join(lacking)}: {UNKNOWN_ANSWERS}")


def print_validation(result: ValidationRecord) -> None:
    """`hlm validate`: cell by cell, and the coverage."""
    page = Page()
    page.say(
        f"predicted against measured ({result.num_prompts} fresh prompts, "
        f"{result.num_tokens} tokens, seed {result.seed}; "
        f"{result.confidence:.0%} prediction intervals)"
    )
    rows: list[Sequence[Any]] = []
    last = ("", "")
    for cell in result.cells:
        key = (cell.policy, cell.rule)
        if last not in (key, ("", "")):
            rows.append(())
        unit = f" ({cell.measured.unit})" if cell.measured.unit else ""
        rows.append(
            (*(key if key != last else ("", "")), cell.metric + unit,
             number_text(cell.predicted, 4), number_text(cell.measured, 4, interval=False),
             "-" if cell.covered is None else cell.covered)
        )  # fmt: skip
        last = key
    page.table(("policy", "rule", "metric", ">predicted", ">measured", "holds"), rows)
    for point in result.infeasible:
        page.say(f"  not rerun: {point.policy}/{point.rule}: {point.reason}")
    page.say(f"covered: {coverage_text(result)}")
    _say_shift(page, result)
    page.say()


def _say_shift(page: Page, result: ValidationRecord) -> None:
    pooled = result.pooled_shift
    if pooled is None:
        page.say("  contexts: their shift is measured beside a rerun of a lossless policy")
        return
    said = "" if pooled.predicted.value is None else f", {_points(pooled.predicted)} as predicted"
    chance = "" if pooled.p_value is None else f"; no shift: p = {pooled.p_value:.2g}"
    page.say(
        f"  contexts: on their own road the {pooled.num_reruns} gated reruns have "
        f"{_points(pooled.below_threshold)} points more tokens below their threshold than along "
        f"the server's outputs{said}{chance}"
    )
    parts = [_points(part) for part in pooled.by_step.figures()]
    places = [f"token {start:.0f}" for start in pooled.by_step.grid]
    page.table(("from", ">points"), list(zip(places, parts, strict=True)))


def _points(number: Figure) -> str:
    return number_text(scaled(number, 100), decimals=1)


def print_guarantees(result: GuaranteesRecord) -> None:
    """`hlm guarantees`: how often each rule broke its promise."""
    page = Page()
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
    )  # fmt: skip
    _certificates(page, result.certificates)


def _certificates(page: Page, certificates: Sequence[Certificate]) -> None:
    """What each test certifies, and what that says."""
    if not certificates:
        return
    page.say("what the run's own prompts certify")
    page.table(
        ("test", "about", ">budget", ">confidence", ">threshold", ">skip rate", ">bound"),
        (
            (one.rule + ("" if one.guaranteed else ": asymptotic, no guarantee"), one.certified,
             one.budget, f"{one.confidence:.3g}", one.threshold, one.skip_rate, one.bound)
            for one in certificates
        ),
    )  # fmt: skip
    for text in promise_texts(sorted({one.certified for one in certificates})):
        page.say(f"  {text}")


def print_plan(result: PlanRecord) -> None:
    """`hlm plan`: prompts for a certificate, for an interval, and their time."""
    page = Page()
    page.say(
        f"prompts that certify a budget with confidence {result.confidence:g} in "
        f"{result.power:.0%} of calibrations (about {result.certified}; score {result.score}), if "
        f"prompts are like the run's {result.num_prompts}; {result.ms_per_prompt / 1e3:.2g} s each"
    )
    page.table(
        (">budget", "rule", ">answer cap", ">skip rate", ">without any loss", ">prompts",
         ">minutes"),
        (
            (one.budget, one.rule + ("" if one.guaranteed else ": " + WEAKER[one.rule]), one.cap,
             one.goal_skip_rate, str(one.without_loss),
             f"over {result.most:,}" if one.num_prompts is None else f"{one.num_prompts:,}",
             None if one.wall_s is None else one.wall_s / 60)
            for one in result.rows
        ),
    )  # fmt: skip
    page.table(
        (">budget", "interval of", ">width", ">prompts", ">minutes"),
        (
            (one.budget, one.metric, one.width, f"{one.num_prompts:,}", one.wall_s / 60)
            for one in result.intervals
        ),
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
        page.say("  that is more than chance allows: the audit rate is not what it is said to be")
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
        ("system", "quantity", ">published", ">implied", "consistent", "why"),
        (
            (row.system, row.quantity, number_text(row.published, 4), number_text(row.implied, 4),
             row.consistent, row.explanation)
            for row in rows
        ),
    )  # fmt: skip
    page.say("times that make each throughput figure come out (t_llm given, t_up solved for)")
    page.table(
        ("system", "averaging", ">t_slm", ">t_llm", ">t_up", "unit", ">speed-up in mean time",
         "why"),
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
    Page().table(("check", "found", "ok", "what mends it"), rows)
