"""Results as text: tables for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrate.pairs.registry import PairDescription
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


def _number(figure: dict[str, Any], digits: int = 3) -> str:
    value = figure["value"]
    if value is None:
        return "-"
    body = f"{value:.{digits}g}"
    if figure["low"] is not None and figure["high"] is not None:
        body += f" [{figure['low']:.{digits}g}, {figure['high']:.{digits}g}]"
    return body


def compact(figure: dict[str, Any]) -> str:
    """Value and interval in as few characters as they need, for wide tables."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "-"
    if low is None or high is None or low == high:
        return f"{value:.3g}"
    return f"{value:.3g} ({low:.2g} to {high:.2g})"


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
    rows = {
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


def print_calibration(summary: dict[str, Any], run: Path) -> None:
    """`hlm calibrate`: the line, the estimators, the timings."""
    fit = summary["fit"]
    confidence = f"{summary['confidence']:.0%}"
    console = new_console()
    sign = "-" if fit["intercept"]["value"] < 0 else "+"
    console.print(
        f"\n{summary['pair']['name']}: {summary['num_prompts']} prompts, "
        f"{summary['num_tokens']} tokens; intervals {confidence}, clustered by prompt\n"
        f"fitted line   beta = {fit['slope']['value']:.3f} u {sign} "
        f"{abs(fit['intercept']['value']):.3f}"
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
        table.add_row(key, _number(fit[key]), meaning)
    console.print(table)
    table = new_table(
        "estimator", ">correlation", ">AUROC", ">skip rate at 1 % risk", ">at 5 % risk",
        title="what tells rejections best",
    )  # fmt: skip
    for estimator in summary["estimators"]:
        skip = estimator["skip_rate_at_risk"]
        table.add_row(
            estimator["name"],
            _number(estimator["correlation"]),
            _number(estimator["auroc"]),
            _number(skip["0.01"]),
            _number(skip["0.05"]),
        )
    console.print(table)
    timings = summary["timings"]
    console.print(
        "one token of one user on this machine: "
        + ", ".join(f"{key[2:-3]} {_number(value)} ms" for key, value in timings.items())
        + f"\nin {run}: traces, run.json, calibration.json; next: hlm derive {run}\n"
    )


def print_operating_points(result: dict[str, Any]) -> None:
    """`hlm derive`: every point with its predictions."""
    from hlmtheory.importance import IMPORTANCE_ASSUMPTION

    console = new_console()
    console.print(
        f"derived settings ({result['num_prompts']} prompts, {result['num_tokens']} tokens; link "
        f"{result['link']['name']}, profile {result['profile']['name']}, accounting "
        f"{result['accounting']}; intervals {result['confidence']:.0%}, clustered by prompt)"
    )
    choice = new_table("policy", "rule", ">threshold u_th", ">skip rate", ">risk", ">TV bias")
    price = new_table(
        "policy", "rule", ">uplink bit/token", ">ms/token", ">token/s", ">mean token/s", ">J/token"
    )
    notes: dict[str, list[str]] = {}
    for point in result["operating_points"]:
        name = (point["policy"], point["rule"])
        if point["reason"]:
            kind = "" if point["feasible"] else "infeasible: "
            notes.setdefault(kind + point["reason"], []).append("/".join(name))
        if not point["feasible"]:
            continue
        predicted = point["predicted"]
        shown = ("skip_rate", "rejection_risk", "tv_bias")
        choice.add_row(
            *name,
            compact(point["uncertainty_threshold"]),
            *(compact(predicted[metric]) for metric in shown),
        )
        price.add_row(*name, *(f"{predicted[metric]['value']:.4g}" for metric in PRICE_METRICS))
    console.print(choice)
    console.print("at which the policies cost (means over tokens)")
    console.print(price)
    for optimum in result["optima"]:
        choice = optimum["choice"]
        if not choice["feasible"]:
            found = choice["reason"]
        else:
            size = f", k = {choice['num_entries']}" if choice["num_entries"] else ""
            found = (
                f"{choice['policy']} at u_th = {choice['uncertainty_threshold']:.3g}{size}: "
                f"{choice['throughput_tok_s']:.4g} token/s, {choice['energy_j_per_token']:.4g} "
                f"J/token, bias at most {choice['total_bias']:.2g}"
            )
        console.print(
            f"  best {optimum['objective']} within risk {optimum['risk']:g}: {found}",
            soft_wrap=True,
        )
    assumed = result["profile"].get("assumed", ())
    if assumed:
        console.print(f"  energy: {', '.join(assumed)} are assumed, not measured")
    if any("importance" in point["settings"] for point in result["operating_points"]):
        console.print(f"  ui-hlm: {IMPORTANCE_ASSUMPTION}", soft_wrap=True)
    for reason, names in notes.items():
        console.print(f"  {', '.join(names)}: {reason}", soft_wrap=True)
    console.print()


def print_validation(result: dict[str, Any]) -> None:
    """`hlm validate`: cell by cell, and the coverage."""
    from calibrate.run.figure import excludes_zero
    from calibrate.validate.comparison import coverage_text

    console = new_console()
    console.print(
        f"predicted against measured ({result['num_prompts']} fresh prompts, "
        f"{result['num_tokens']} tokens, seed {result['seed']}; "
        f"{result['confidence']:.0%} prediction intervals)"
    )
    table = new_table("policy", "rule", "metric", ">predicted", ">measured", "holds")
    last = ("", "")
    for cell in result["cells"]:
        key = (cell["policy"], cell["rule"])
        if key != last and last != ("", ""):
            table.add_section()
        shown = key if key != last else ("", "")
        last = key
        unit = cell["measured"]["unit"]
        table.add_row(
            *shown,
            cell["metric"] + (f" ({unit})" if unit else ""),
            _number(cell["predicted"], 4),
            f"{cell['measured']['value']:.4g}",
            {True: "yes", False: "NO", None: "-"}[cell["covered"]],
        )
    console.print(table)
    for point in result["infeasible"]:
        console.print(
            f"  not rerun: {point['policy']}/{point['rule']}: {point['reason']}", soft_wrap=True
        )
    console.print(f"covered: {coverage_text(result)}", soft_wrap=True)
    moved = [one for one in result["context_shift"] if excludes_zero(one["below_threshold"])]
    if result["context_shift"]:
        console.print(
            f"  contexts: beside the outputs of hlm on the same prompts, {len(moved)} of "
            f"{len(result['context_shift'])} reruns have another share of tokens below their "
            f"threshold ({1 - result['confidence']:.0%} would by chance)"
            + "".join(f"\n    {_shift(one)}" for one in moved),
            soft_wrap=True,
        )
    else:
        console.print("  contexts: their shift is measured beside a rerun of hlm; add --policy hlm")
    console.print()


def _shift(one: dict[str, Any]) -> str:
    rate = {key: 100 * one["below_threshold"][key] for key in ("value", "low", "high")}
    return (
        f"{one['policy']}/{one['rule']}: {rate['value']:+.1f} [{rate['low']:+.1f}, "
        f"{rate['high']:+.1f}] points"
    )


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
            f"{row.published:.4g}",
            f"{row.implied:.4g}",
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
            f"{entry.t_slm:.4g}",
            f"{entry.t_llm:.4g}",
            "none" if entry.t_up is None else f"{entry.t_up:.4g}",
            entry.unit,
            "-" if entry.ratio_of_means is None else f"{entry.ratio_of_means:.3g}x",
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
