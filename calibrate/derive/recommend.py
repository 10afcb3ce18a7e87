"""Which operating point to take for a budget, whether it is certified, and whether it pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.run.figure import number_text, percent_text, share_text
from calibrate.run.records import DerivationRecord, OperatingPoint
from hlmtheory.policies import policy_class, policy_from_settings, policy_names
from hlmtheory.serving import server_ms_per_token, users_from_which_asking_is_faster

KINDS = ("risk", "answer")
"""Rules whose thresholds are the largest within a budget: what a recommendation is made from."""
NEAR = 0.01
"""Share of a token's time by which the fastest has to win: below it the smaller payload decides."""
NO_MORE = 1e-6
"""Relative room within which a bias counts as no more than the risk: rounding."""


@dataclass(frozen=True)
class Recommendation:
    """What to run for one budget.

    Attributes
    ----------
    kind : {"risk", "answer"}
        What the budget is of: the rejection risk of a token, or the law of whole answers.
    budget : float
    point : OperatingPoint or None
        The fastest whose bias is no more than the risk that its gate takes, and of those as fast
        the one that sends least; the least biased where all have more; the device alone where that
        keeps the budget. None where nothing can be skipped.
    reason : str
        Why there is none; empty otherwise.
    hidden_bias : bool
        Whether the point's bias is above its risk, which is what the budget is of: verification
        adds to it.
    certified : OperatingPoint or None
        Of the same policy, certified for the budget and skipping most.
    not_certified : str
        Why there is none.
    server : OperatingPoint or None
        The server alone, to compare with.
    num_users : int or None
        Users of one server from which the point is surely faster than the server alone; None where
        that is never so.
    """

    kind: str
    budget: float
    point: OperatingPoint | None
    reason: str
    hidden_bias: bool
    certified: OperatingPoint | None
    not_certified: str
    server: OperatingPoint | None
    num_users: int | None


def recommendations(derivation: DerivationRecord) -> tuple[Recommendation, ...]:
    """One for every budget that was asked for, risks first."""
    asked = derivation.request
    budgets = [("risk", one) for one in asked.risks] + [
        ("answer", one) for one in asked.answer_risks
    ]
    return tuple(_recommend(derivation, kind, budget) for kind, budget in budgets)


def _recommend(derivation: DerivationRecord, kind: str, budget: float) -> Recommendation:
    points = [point for point in derivation.operating_points if point.feasible]
    server = next((one for one in points if _role(derivation, one) == "server"), None)
    device = next((one for one in points if _role(derivation, one) == "device"), None)
    gated = [
        one for one in derivation.operating_points if (one.family, one.budget) == (kind, budget)
    ]
    able = [one for one in gated if one.feasible and (_value(one, "skip_rate") or 0) > 0]
    loss = "tv_bias" if kind == "risk" else "answer_divergence"
    plain = [one for one in able if kind == "answer" or not _adds(one)]
    found, reason = None, ""
    if device is not None and _value(device, loss, 1.0) <= budget:
        found = device
    elif plain:
        fastest = min(_value(one, "token_time_ms") for one in plain)
        near = [one for one in plain if _value(one, "token_time_ms") <= fastest * (1 + NEAR)]
        found = min(near, key=lambda one: _value(one, "uplink_bits_per_token"))
    elif able:
        found = min(able, key=lambda one: _value(one, "tv_bias"))
    else:
        reason = next((one.reason for one in gated if one.reason), "no policy has a gate")
    certified, why = _certified(derivation, found, kind, budget)
    return Recommendation(
        kind, budget, found, reason,
        kind == "risk" and found is not None and found.score is not None and _adds(found),
        certified, why, server, None if found is None else _num_users(derivation, found, server),
    )  # fmt: skip


def _role(derivation: DerivationRecord, point: OperatingPoint) -> str:
    info = next(one for one in derivation.policies if one.name == point.policy)
    try:
        return policy_class(info.source or info.name).role
    except ValueError:  # somebody's own, whose file is no longer there
        return "both"


def _value(point: OperatingPoint, metric: str, unknown: float = float("inf")) -> float:
    value = point.predicted[metric].value
    return unknown if value is None else value


def _adds(point: OperatingPoint) -> bool:
    """Whether verification adds bias to the risk that the gate takes."""
    risk = _value(point, "rejection_risk", 0.0)
    return _value(point, "tv_bias") > risk * (1 + NO_MORE) + NO_MORE**2


def _certified(
    derivation: DerivationRecord, point: OperatingPoint | None, kind: str, budget: float
) -> tuple[OperatingPoint | None, str]:
    if point is None or point.score is None or kind != "risk":
        return None, ""
    tried = [
        one for one in derivation.operating_points
        if (one.policy, one.family, one.budget) == (point.policy, "ltt", budget)
    ]  # fmt: skip
    able = [one for one in tried if one.feasible]
    if able:
        return max(able, key=lambda one: _value(one, "skip_rate")), ""
    return None, tried[0].reason if tried else "no certified rule was derived"


def _num_users(
    derivation: DerivationRecord, point: OperatingPoint, server: OperatingPoint | None
) -> int | None:
    if server is None or point.score is None:
        return None
    return users_from_which_asking_is_faster(
        _value(point, "token_time_ms"), _value(point, "skip_rate"),
        derivation.profile["t_llm_ms"], _value(server, "token_time_ms"),
    )  # fmt: skip


def fixed_size(derivation: DerivationRecord, point: OperatingPoint) -> int | None:
    """k of a point that sends as many probabilities with every sent token, and had a choice."""
    info = next(one for one in derivation.policies if one.name == point.policy)
    try:
        return policy_from_settings(info.source or info.name, point.settings, 0.5).fixed_size
    except ValueError:  # somebody's own, whose file is no longer there
        return None


def threshold_text(point: OperatingPoint, interval: bool = False) -> str:
    """When the device keeps its draft."""
    return f"{point.score} <= {number_text(point.uncertainty_threshold, interval=interval)}"


def _gate_text(point: OperatingPoint) -> str:
    """What else decides, where it is not the score alone."""
    known = point.policy in policy_names()  # somebody's own says what it says
    beside = getattr(policy_class(point.policy), "also_skips", "") if known else ""
    cap = point.settings.get("cap")
    most = "" if cap is None else f", up to {share_text(cap)} of an answer,"
    return (f" or {beside}" if beside else "") + most


def recommendation_texts(derivation: DerivationRecord, one: Recommendation) -> list[str]:
    """The recommendation in a sentence, and what has to be said with it."""
    link = derivation.link["name"]
    budget = share_text(one.budget)
    what = f"for risk {budget}" if one.kind == "risk" else f"for answers within {budget}"
    point = one.point
    if point is None:
        return [f"{what} on {link}: nothing can be skipped: {one.reason}"]
    seen = point.predicted
    price = (
        f"{number_text(seen['throughput_tok_s'], interval=False)} token/s, "
        f"{number_text(seen['energy_j_per_token'], interval=False)} J/token"
    )
    if point.score is None:
        return [
            f"{what} on {link}: {point.policy}, the device alone: its law is "
            f"{percent_text(seen['tv_bias'])} % from the server's, so no server is needed; {price}"
        ]
    where = threshold_text(point) + _gate_text(point)
    out = [
        f"{what} on {link}: {point.key} keeps a draft where {where} and so "
        f"skips {percent_text(seen['skip_rate'])} % of the tokens: {price}, "
        f"{number_text(seen['uplink_bits_per_token'], interval=False)} bit/token up, TV bias "
        f"{percent_text(seen['tv_bias'])} %"
    ]
    if one.hidden_bias:
        out.append(
            "  its bias is above its risk, for its verification adds to it; no policy that was "
            "asked for does without"
        )
    risk, most = seen["rejection_risk"], (1 + NO_MORE) * one.budget
    if one.kind == "risk" and derivation.pilot and risk.value is not None and risk.value > most:
        out.append(
            "  the budget is kept at the contexts of the server's answers; at its own, as the "
            f"pilot found them, a risk of {percent_text(risk)} % is predicted"
        )
    out += [f"  {text}" for text in (_certified_text(one), _worth_text(derivation, one)) if text]
    return out


def _certified_text(one: Recommendation) -> str:
    if one.kind != "risk":
        return "certified? no: met on the calibration prompts alone"
    point = one.certified
    if point is None:
        return f"certified? no: {one.not_certified}; see `hlm plan`"
    return (
        f"certified? {point.key} is, with {share_text(point.confidence or 0.0)} confidence over "
        f"{point.weighting}: {threshold_text(point)} skips "
        f"{percent_text(point.predicted['skip_rate'])} %"
    )


def _worth_text(derivation: DerivationRecord, one: Recommendation) -> str:
    """Whether the gate pays, against the server alone."""
    point, server = one.point, one.server
    if point is None or server is None:
        return ""
    faster = _value(point, "token_time_ms") < _value(server, "token_time_ms")
    thrifty = _value(point, "energy_j_per_token") < _value(server, "energy_j_per_token")
    speed = number_text(server.predicted["throughput_tok_s"], interval=False)
    energy = number_text(server.predicted["energy_j_per_token"], interval=False)
    asked, alone = (
        number_text(server_time_ms(derivation, each)) for each in (point, server)
    )  # fmt: skip
    text = (
        f"worth it? for one user {server.policy} alone is {'slower' if faster else 'faster'} "
        f"({speed} token/s), takes {'more' if thrifty else 'no more'} energy ({energy} J/token) "
        f"and {alone} ms of the server a token instead of {asked}"
    )
    if not faster and one.num_users is not None:
        text += f"; from {one.num_users:,} users who share the server, {point.policy} is faster"
    elif not faster:
        text += f"; {point.policy} is slower however many share the server"
    return text


def risk_texts(derivation: DerivationRecord, points: Sequence[OperatingPoint]) -> list[str]:
    """What risk is divided by, and what it makes of whole answers, told by these points."""
    gated = {one.rule: one for one in points if one.score is not None}
    if not gated:
        return []
    of_skipped = (
        f"{100 * _value(one, 'rejection_risk') / _value(one, 'skip_rate'):.2g} % at {rule}"
        for rule, one in gated.items()
    )
    out = [
        "risk is a share of all tokens: the server would have rejected, of the skipped ones alone, "
        + ", ".join(of_skipped)
    ]
    known = {
        rule: one for rule, one in gated.items()
        if one.predicted["answer_divergence"].value is not None
    }  # fmt: skip
    if known:
        of_answers = (
            f"{'at most ' if 'answer_divergence' in one.at_most else ''}"
            f"{percent_text(one.predicted['answer_divergence'], interval=False)} % at {rule}"
            for rule, one in known.items()
        )
        out.append(
            "and of a token: the law of whole answers is from the server's, in total variation, "
            + ", ".join(of_answers)
        )
    return out


def server_time_ms(derivation: DerivationRecord, point: OperatingPoint) -> float:
    """Time of the server that a token takes, ms."""
    return server_ms_per_token(min(_value(point, "skip_rate"), 1.0), derivation.profile["t_llm_ms"])
