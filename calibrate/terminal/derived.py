"""`hlm derive` on the terminal: what to take, one table of it, and all the rest on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from calibrate.derive.recommend import (
    Recommendation,
    fixed_size,
    recommendation_texts,
    recommendations,
    risk_texts,
    server_time_ms,
    threshold_text,
)
from calibrate.run.figure import NO_VALUE, number_text, percent_text, share_text
from calibrate.run.folder import DEFAULT_NAME
from calibrate.run.records import Certificate, DerivationRecord, Figure, OperatingPoint
from calibrate.run.wording import UNKNOWN_ANSWERS, WEAKER, pilot_text, promise_texts, rule_text
from calibrate.terminal.page import Page

SHORT = (">k", ">skips %", ">risk %", ">TV bias %", ">bit/token", ">token/s", ">J/token")
DOES = (">k", ">skips %", ">risk %", ">TV bias %")
PRICES = {
    "uplink_bits_per_token": ">bit/token up",
    "downlink_bits_per_token": ">bit/token down",
    "token_time_ms": ">ms/token",
    "throughput_tok_s": ">token/s",
    "mean_throughput_tok_s": ">mean of every token's 1/time",
    "energy_j_per_token": ">J/token",
    "devices_per_server": ">devices a server",
}
SERVER_TIME = ">server ms/token"
ANSWERS = ("answer_divergence", "tokens_in_agreement")
ADVICE = (
    "take", ">keep up to", ">skips %", ">TV bias %", ">bit/token", ">token/s", ">certified up to",
    ">users",
)  # fmt: skip
FEW = 2
"""Budgets whose recommendations are told in sentences; those of more are a table."""
TAKEN = "*"

Section: TypeAlias = tuple[str, list[OperatingPoint]]
"""A line that says what the points under it share, and the points."""


def print_operating_points(
    result: DerivationRecord, verbose: bool = False, run: Path | None = None
) -> None:
    """The recommendation of every budget, and the points that it was chosen from.

    Parameters
    ----------
    result : DerivationRecord
    verbose : bool
        Also every other rule, intervals, prices, whole answers, certificates and optima.
    run : Path, optional
        Of the derivation: the commands that go on from here name it.
    """
    page = Page()
    advice = recommendations(result)
    taken = {one.point.key for one in advice if one.point}
    chosen = {(one.kind, one.budget) for one in advice}
    feasible = [point for point in result.operating_points if point.feasible]
    if verbose or len(advice) <= FEW:
        for one in advice:
            for text in recommendation_texts(result, one):
                page.say(text)
        shown = [
            point for point in feasible
            if (point.score is None or (point.family, point.budget) in chosen)
            and (verbose or not point.variant or point.key in taken)
        ]  # fmt: skip
        _print_short(page, result, shown, taken, verbose or page.with_intervals)
    else:
        _print_advice(page, advice)
    for text in _notes(result, [one.point for one in advice if one.point]):
        page.say(text)
    if verbose:
        _print_all(page, result, feasible)
    else:
        page.say(
            f"{len(result.operating_points)} points in all; --verbose has the other rules and "
            "settings, intervals, whole answers and certificates"
        )
    if run is not None:
        name = "" if result.name == DEFAULT_NAME else f" --name {result.name}"
        gated = (one.point.key for one in advice if one.point and one.point.score)
        page.say(f"next: hlm validate {run}{name}")
        page.say(f"then: hlm export {run}{name} --point {next(gated, 'POINT')}")


def _print_advice(page: Page, advice: Sequence[Recommendation]) -> None:
    """The recommendations of many budgets, a line each."""

    def row(one: Recommendation) -> list[Any]:
        if one.point is None:
            return [f"none for {one.kind}-{one.budget:g}", *[NO_VALUE] * (len(ADVICE) - 1)]
        seen = one.point.predicted
        certified = None if one.certified is None else one.certified.uncertainty_threshold
        return [
            one.point.key,
            number_text(one.point.uncertainty_threshold, interval=False),
            percent_text(seen["skip_rate"], decimals=1, interval=False),
            percent_text(seen["tv_bias"], decimals=2, interval=False),
            number_text(seen["uplink_bits_per_token"], interval=False),
            number_text(seen["throughput_tok_s"], interval=False),
            number_text(certified, interval=False),
            NO_VALUE if one.num_users is None else f"{one.num_users:,}",
        ]

    page.table(ADVICE, map(row, advice))
    page.say("certified up to: the threshold that is certified for the budget, if one is")
    server = next((one.server for one in advice if one.server), None)
    if server is not None:
        page.say(
            f"users: of one server, from which on the point is faster than {server.policy} alone, "
            f"{number_text(server.predicted['throughput_tok_s'], interval=False)} token/s for one"
        )


def _print_short(
    page: Page,
    result: DerivationRecord,
    points: Sequence[OperatingPoint],
    taken: Iterable[str],
    with_intervals: bool,
) -> None:
    """One line a policy, under its threshold; alike policies share one."""

    def share(number: Figure, decimals: int, interval: bool) -> str:
        fixed = number.low == number.high  # by the policy, and then an interval says nothing
        return percent_text(number, decimals=decimals, interval=interval and not fixed)

    def cells(point: OperatingPoint) -> list[str]:
        seen = point.predicted
        return [
            _size(result, point),
            share(seen["skip_rate"], 1, with_intervals),
            share(seen["rejection_risk"], 2, False),
            share(seen["tv_bias"], 2, with_intervals),
            number_text(seen["uplink_bits_per_token"], interval=False),
            number_text(seen["throughput_tok_s"], interval=False),
            number_text(seen["energy_j_per_token"], interval=False),
        ]

    page.table(("~policy", *SHORT), _rows(_sections(points), cells, set(taken)))


def _notes(result: DerivationRecord, taken: Sequence[OperatingPoint]) -> list[str]:
    """What the table means, in a few lines."""
    mark = f"{TAKEN} recommended; " if len(taken) <= FEW else ""
    out = [
        f"{mark}{result.num_prompts:,} prompts, {result.num_tokens:,} tokens; link "
        f"{result.link['name']}, profile {result.profile['name']}, {result.accounting} accounting; "
        f"brackets: {share_text(result.confidence)}, by prompt"
    ]
    out += risk_texts(result, taken[:FEW])
    if assumed := result.profile.get("assumed"):
        out.append(f"assumed, not measured: {', '.join(assumed)}")
    return out


def _print_all(page: Page, result: DerivationRecord, points: Sequence[OperatingPoint]) -> None:
    sections = _sections(points)

    def does(point: OperatingPoint) -> list[str]:
        names = ("skip_rate", "rejection_risk", "tv_bias")
        return [_size(result, point), *(percent_text(point.predicted[name]) for name in names)]

    def costs(point: OperatingPoint) -> list[str]:
        prices = [number_text(point.predicted.get(key), 4, interval=False) for key in PRICES]
        return [*prices, number_text(server_time_ms(result, point), 4)]

    page.table(("~policy", *DOES), _rows(sections, does), f"every rule; {pilot_text(result)}")
    page.table(
        ("~policy", *PRICES.values(), SERVER_TIME),
        _rows(sections, costs),
        "prices, means over tokens",
    )
    _print_answers(page, result, points)
    print_certificates(page, result.certificates)
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
                f"{speed} token/s, {energy} J/token, TV bias {bias} along the server's outputs"
            )
        page.say(f"best {best.objective} within a TV bias of {share_text(best.budget)}: {found}")
    notes: dict[str, list[str]] = {}
    for point in result.operating_points:
        if point.reason:
            kind = "" if point.feasible else "infeasible: "
            notes.setdefault(kind + point.reason, []).append(point.key)
    for reason, names in notes.items():
        page.say(f"{', '.join(names)}: {reason}")


def _sections(points: Sequence[OperatingPoint]) -> list[Section]:
    """Points by what decides their gate: rules in the order of their first point."""
    rules: dict[str, dict[str, list[OperatingPoint]]] = {}
    for point in points:
        rule = point.rule.removesuffix(f"@{point.variant}") if point.variant else point.rule
        text = "no gate"
        if point.score is not None:
            text = f"{rule}: {threshold_text(point, interval=True)}; {rule_text(point)}"
        rules.setdefault(rule, {}).setdefault(text, []).append(point)
    return [section for sections in rules.values() for section in sections.items()]


def _rows(
    sections: Sequence[Section],
    cells: Callable[[OperatingPoint], list[str]],
    taken: frozenset[str] | set[str] = frozenset(),
) -> list[list[Any] | str]:
    """A line for each section, and one for all of its policies whose cells are the same."""
    out: list[list[Any] | str] = []
    for text, points in sections:
        rows: dict[tuple[str, ...], list[str]] = {}
        for point in points:
            name = point.policy + (f"@{point.variant}" if point.variant else "")
            mark = TAKEN if point.key in taken else ""
            rows.setdefault(tuple(cells(point)), []).append(name + mark)
        out += [[], text] if out else [text]
        out += [[", ".join(names), *line] for line, names in rows.items()]
    return out


def _size(result: DerivationRecord, point: OperatingPoint) -> str:
    size = fixed_size(result, point)
    return "" if size is None else f"{size:,}"


def _print_answers(page: Page, result: DerivationRecord, points: Sequence[OperatingPoint]) -> None:
    """Whole answers at the points where recorded steps say what becomes of them."""
    known = [
        point for point in points if point.score and point.predicted[ANSWERS[0]].value is not None
    ]
    if not known:
        return
    length = int(max(one.divergence.grid[-1] for one in result.answers)) if result.answers else None

    def cells(point: OperatingPoint) -> list[str]:
        return [
            ("at most " if key in point.at_most else "") + number_text(point.predicted[key])
            for key in ANSWERS
        ]

    page.table(
        ("~policy", ">TV of answers", ">tokens before they differ"),
        _rows(_sections(known), cells),
        "whole answers"
        + (f" of at most {length} tokens" if length else "")
        + ": no score of them in [0, 1] moves by more than TV in expectation",
    )
    names = {point.policy for point in known}
    lacking = {point.policy: None for point in points if point.score and point.policy not in names}
    if lacking:
        page.say(f"{', '.join(lacking)}: {UNKNOWN_ANSWERS}")


def print_certificates(page: Page, certificates: Sequence[Certificate]) -> None:
    """What each test certifies, and what that says."""
    if not certificates:
        return
    page.table(
        ("test", "about", ">budget", ">confidence", ">threshold", ">skip rate", ">bound"),
        (
            (one.rule + ("" if one.guaranteed else f": {WEAKER[one.test]}"), one.certified,
             one.budget, f"{one.confidence:.3g}", one.threshold, one.skip_rate, one.bound)
            for one in certificates
        ),
        "what the run's own prompts certify",
        num_names=3,
    )  # fmt: skip
    for text in promise_texts(sorted({one.certified for one in certificates})):
        page.say(text)
