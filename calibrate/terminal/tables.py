"""Results as text: tables for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.figure import number_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calibrate.pairs.registry import PairDescription
    from calibrate.run.records import (
        AttenuationRecord,
        CalibrationRecord,
        DerivationRecord,
        Figure,
        GuaranteesRecord,
        ValidationRecord,
    )
    from calibrate.terminal.doctor import HealthReport
    from hlmtheory.audit import AuditRow
    from hlmtheory.reconcile import Reconciliation


PRICE_METRICS = (
    "uplink_bits_per_token",
    "token_time_ms",
    "throughput_tok_s",
    "mean_throughput_tok_s",
    "energy_j_per_token",
)
WRAPPED = ("quantity", "what it is", "why", "what mends it", "what it says")


def new_console() -> Any:
    """Where tables are printed: as wide as the terminal, wide in a pipe."""
    import shutil
    import sys

    from rich.console import Console

    # A pipe has no width; tables folded to 80 columns would be hard to read back.
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 160
    return Console(width=max(width, 100), highlight=False, soft_wrap=False)


def new_table(*columns: str, title: str | None = None) -> Any:
    """An empty table; columns whose name begins with ">" are numbers, set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in columns:
        justify: Any = "right" if name.startswith(">") else "left"
        table.add_column(name.lstrip(">"), justify=justify, no_wrap=name not in WRAPPED)
    return table


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.0f} MB"


def print_pairs(pairs: Sequence[PairDescription], as_json: bool) -> None:
    """`hlm pairs list`."""
    if as_json:
        print(json.dumps({"pairs": [asdict(pair) for pair in pairs]}, indent=1, default=str))
        return
    table = new_table("pair", "device model", "server model", ">download", "here", "what it is")
    for pair in pairs:
        sizes = {m.source: m.download_num_bytes for m in (pair.slm, pair.llm)}
        known = [size for size in sizes.values() if size is not None]
        table.add_row(
            pair.name,
            pair.slm.label,
            pair.llm.label,
            _size(sum(known)) if len(known) == len(sizes) else "-",
            "yes" if pair.cached else "no",
            pair.description,
        )
    new_console().print(table)


def print_pair(pair: PairDescription, as_json: bool) -> None:
    """`hlm pairs show`."""
    if as_json:
        print(json.dumps(asdict(pair), indent=1, default=str))
        return
    table = new_table(
        "", "device model (SLM)", "server model (LLM)", title=f"{pair.name}: {pair.description}"
    )
    rows: dict[str, Callable[[Any], str]] = {
        "name": lambda m: m.label,
        "source": lambda m: m.source,
        "sha256": lambda m: m.sha256 or "-",
        "layers left out": lambda m: ", ".join(map(str, m.drop_layers)) or "-",
        "download": lambda m: _size(m.download_num_bytes),
        "in cache": lambda m: _size(m.cached_num_bytes),
        "folder": lambda m: str(m.folder or "-"),
    }
    for name, read in rows.items():
        table.add_row(name, read(pair.slm), read(pair.llm))
    console = new_console()
    console.print(table)
    console.print(f"licence: {pair.license}\ncache: {pair.cache_path}")


def print_calibration(summary: CalibrationRecord, run: Path) -> None:
    """`hlm calibrate`: the line, the estimators, the timings."""
    fit, console = summary.fit, new_console()
    slope, intercept = fit.slope.value or 0.0, fit.intercept.value or 0.0
    sign = "-" if intercept < 0 else "+"
    console.print(
        f"\n{summary.pair.name}: {summary.num_prompts} prompts, {summary.num_tokens} tokens; "
        f"intervals {summary.confidence:.0%}, clustered by prompt\n"
        f"fitted line   beta = {slope:.3f} u {sign} {abs(intercept):.3f}"
    )
    table = new_table("quantity", ">value", "what it says")
    for key, meaning in (
        ("slope", "rejection probability gained per unit of uncertainty"),
        ("intercept", "predicted rejection probability at u = 0"),
        ("correlation", "token by token: how well u tells single rejections"),
        ("correlation_binned", "of binned means: how linear the average is"),
        ("curvature", "coefficient of u^2 added to the line; 0 if linear"),
        ("mean_rejection", "mean rejection probability = mean TV(x, y)"),
        ("delta", "share of drafts that can be rejected at all, P(y_d < x_d)"),
    ):
        table.add_row(key, number_text(getattr(fit, key)), meaning)
    console.print(table)
    risks = ("0.01", "0.05")
    table = new_table(
        "estimator", ">correlation", ">AUROC", ">skip rate at 1 % risk", ">at 5 % risk",
        title="what tells rejections best",
    )  # fmt: skip
    for one in summary.estimators:
        figures = (one.correlation, one.auroc, *(one.skip_rate_at_risk[risk] for risk in risks))
        table.add_row(one.name, *map(number_text, figures))
    console.print(table)
    console.print(
        "one token of one user on this machine: "
        + ", ".join(f"{key[2:-3]} {number_text(value)} ms" for key, value in summary.timings)
        + f"\nin {run}: traces, run.json, calibration.json; next: hlm derive {run}\n"
    )


def print_operating_points(result: DerivationRecord) -> None:
    """`hlm derive`: every point with its predictions."""
    console = new_console()
    console.print(
        f"derived settings ({result.num_prompts} prompts, {result.num_tokens} tokens; link "
        f"{result.link['name']}, profile {result.profile['name']}, accounting "
        f"{result.accounting}; score {result.request.score}; intervals "
        f"{result.confidence:.0%}, clustered by prompt)"
    )
    choice = new_table("policy", "rule", ">threshold", ">skip rate", ">risk", ">TV bias")
    price = new_table(
        "policy", "rule", ">uplink bit/token", ">ms/token", ">token/s", ">mean token/s", ">J/token"
    )
    notes: dict[str, list[str]] = {}
    for point in result.operating_points:
        if point.reason:
            kind = "" if point.feasible else "infeasible: "
            notes.setdefault(kind + point.reason, []).append(point.key)
        if not point.feasible:
            continue
        name, predicted = (point.policy, point.rule), point.predicted
        shown = [predicted[metric] for metric in ("skip_rate", "rejection_risk", "tv_bias")]
        choice.add_row(*name, *map(number_text, (point.uncertainty_threshold, *shown)))
        price.add_row(
            *name, *(number_text(predicted[metric], 4, interval=False) for metric in PRICE_METRICS)
        )
    console.print(choice)
    console.print("at which the policies cost (means over tokens)")
    console.print(price)
    for best in result.optima:
        if best.feasible:
            size = f", k = {best.num_entries}" if best.num_entries else ""
            speed, energy, bias = (
                number_text(best.predicted[key])
                for key in ("throughput_tok_s", "energy_j_per_token", "total_bias")
            )
            found = (
                f"{best.policy} at u_th = {number_text(best.uncertainty_threshold)}{size}: "
                f"{speed} token/s, {energy} J/token, bias at most {bias}"
            )
        else:
            found = best.reason
        console.print(
            f"  best {best.objective} within risk {best.budget:g}: {found}", soft_wrap=True
        )
    assumed = result.profile.get("assumed", ())
    if assumed:
        console.print(f"  energy: {', '.join(assumed)} are assumed, not measured")
    for reason, names in notes.items():
        console.print(f"  {', '.join(names)}: {reason}", soft_wrap=True)
    console.print()


def print_validation(result: ValidationRecord) -> None:
    """`hlm validate`: cell by cell, and the coverage."""
    from calibrate.run.figure import excludes_zero, scaled
    from calibrate.run.wording import coverage_text

    console = new_console()
    console.print(
        f"predicted against measured ({result.num_prompts} fresh prompts, "
        f"{result.num_tokens} tokens, seed {result.seed}; "
        f"{result.confidence:.0%} prediction intervals)"
    )
    table = new_table("policy", "rule", "metric", ">predicted", ">measured", "holds")
    last = ("", "")
    for cell in result.cells:
        key = (cell.policy, cell.rule)
        if last not in (key, ("", "")):
            table.add_section()
        unit = cell.measured.unit
        table.add_row(
            *(key if key != last else ("", "")),
            cell.metric + (f" ({unit})" if unit else ""),
            number_text(cell.predicted, 4),
            number_text(cell.measured, 4, interval=False),
            {True: "yes", False: "NO", None: "-"}[cell.covered],
        )
        last = key
    console.print(table)
    for point in result.infeasible:
        console.print(f"  not rerun: {point.policy}/{point.rule}: {point.reason}", soft_wrap=True)
    console.print(f"covered: {coverage_text(result)}", soft_wrap=True)
    moved = [one for one in result.context_shift if excludes_zero(one.below_threshold)]
    if result.context_shift:
        console.print(
            "  contexts: beside the outputs of lossless decoding on the same prompts, "
            f"{len(moved)} of {len(result.context_shift)} reruns have another share of tokens "
            f"below their threshold ({1 - result.confidence:.0%} would by chance)"
            + "".join(
                f"\n    {one.policy}/{one.rule}: "
                f"{number_text(scaled(one.below_threshold, 100), decimals=1)} points"
                for one in moved
            ),
            soft_wrap=True,
        )
    else:
        console.print("  contexts: their shift is measured beside a rerun of a lossless policy")
    console.print()


def print_guarantees(result: GuaranteesRecord) -> None:
    """`hlm guarantees`: how often each rule broke its promise."""
    console = new_console()
    console.print(
        f"rules over {result.num_draws} redrawn calibrations of the run's own "
        f"{result.num_prompts} prompts ({result.num_tokens} tokens; score {result.score}; "
        f"{result.confidence:.0%} intervals)"
    )
    table = new_table(
        "rule", ">budget", "calibrated on", "mean over", ">above budget", ">infeasible",
        ">skip rate", ">risk",
    )  # fmt: skip
    for row in result.rows:
        figures = (row.violation_share, row.infeasible_share, row.skip_rate, row.risk)
        table.add_row(
            row.family, number_text(row.budget), row.source, row.weighting,
            *map(number_text, figures),
        )  # fmt: skip
    console.print(table)


def print_attenuation(result: AttenuationRecord) -> None:
    """`hlm attenuation`: what drawing K tokens does to the line, predicted and measured."""
    console = new_console()
    table = new_table(
        ">K", ">reliability", ">r predicted", ">r measured", ">slope predicted", ">slope measured"
    )
    for row in result.rows:
        shown: tuple[Figure | float, ...] = (
            row.reliability, row.predicted_correlation, row.measured_correlation,
            row.predicted_slope, row.measured_slope,
        )  # fmt: skip
        table.add_row(str(row.num_temperatures), *map(number_text, shown))
    console.print(f"{result.pair.name}: the line on K draws ({result.confidence:.0%} intervals)")
    console.print(table)


def print_audit(rows: Sequence[AuditRow], times: Sequence[Reconciliation], as_json: bool) -> None:
    """`hlm audit`: the published numbers against the theory, and what would reconcile them."""
    if as_json:
        content = {
            "rows": [asdict(row) for row in rows],
            "reconciliations": [asdict(entry) for entry in times],
        }
        print(json.dumps(content, indent=1))
        return
    console = new_console()
    table = new_table("system", "quantity", ">published", ">implied", "consistent", "why")
    for row in rows:
        table.add_row(
            row.system,
            row.quantity,
            number_text(row.published, 4),
            number_text(row.implied, 4),
            "yes" if row.consistent else "NO",
            row.explanation,
        )
    console.print(table)
    console.print("times that make each throughput figure come out (t_llm given, t_up solved for)")
    table = new_table(
        "system", "averaging", ">t_slm", ">t_llm", ">t_up", "unit", ">speed-up in mean time", "why"
    )
    for entry in times:
        table.add_row(
            entry.system,
            entry.averaging,
            *(number_text(time, 4) for time in (entry.t_slm, entry.t_llm, entry.t_up)),
            entry.unit,
            number_text(entry.ratio_of_means),
            entry.reason,
        )
    console.print(table)


def print_doctor(report: HealthReport, as_json: bool) -> None:
    """`hlm doctor`."""
    if as_json:
        print(json.dumps({"healthy": report.healthy, "checks": [asdict(c) for c in report.checks]}))
        return
    table = new_table("check", "found", "ok", "what mends it")
    for check in report.checks:
        table.add_row(check.name, check.found, "yes" if check.ok else "NO", check.remedy)
    new_console().print(table)
