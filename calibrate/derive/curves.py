"""Curves that figures draw, worked out once and kept beside the operating points they explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from calibrate.derive.answers import FAMILY, answer_curve
from calibrate.derive.operating_points import UNGATED, Study
from calibrate.derive.predict import (
    Averaged,
    Economics,
    PolicyTokens,
    drawn_tokens,
    rate_of,
    token_times,
    uplink_bits,
)
from calibrate.run.figure import AMOUNT, SHARE, curve
from calibrate.run.records import (
    AnswerCurve,
    Curve,
    ImportanceExample,
    LinkSweep,
    OperatingPoint,
    PayloadDistribution,
    SizeDistribution,
    ThresholdCurves,
    ThroughputCurves,
    TruncationCurves,
)
from hlmtheory.clusters import RatioEstimate, mean_over_tokens
from hlmtheory.policies import GatedPolicy, Policy
from hlmtheory.policies.base import TruncatingPolicy, recorded_bias
from hlmtheory.relation import linear_rejection
from hlmtheory.risk import skip_risk_sums
from hlmtheory.steps import no_skip
from hlmtheory.truncation import truncation_bias_bound, truncation_bound_soft

Runnable: TypeAlias = tuple[OperatingPoint, Policy]
"""A feasible point with its policy."""

NUM_THRESHOLDS = 161
USUAL_BUDGET = 0.01
"""Policies are compared at the risk budget nearest to it."""
NUM_LEVELS = 101
THROUGHPUTS = ("throughput_tok_s", "mean_throughput_tok_s")


def threshold_curves(study: Study) -> ThresholdCurves | None:
    """Skip rate and risk along the score, for the first gate that sees nothing else.

    From the least to the greatest threshold that makes a difference: the score's bounds, or where
    it has none its 0.5 and 99.5 % quantiles. docs/theory.md, (11).
    """
    plain = [
        one for one in study.policies if isinstance(one, GatedPolicy) and not one.needs_attention
    ]
    if not plain:
        return None
    atoms, _ = study.gate(plain[0])
    score = plain[0].score
    seen = atoms.quantiles(200)
    low = score.low if np.isfinite(score.low) else seen[0]
    high = score.high if np.isfinite(score.high) else seen[-1]
    sums = skip_risk_sums(atoms, np.linspace(low, high, NUM_THRESHOLDS))
    rates, risks = (
        curve(sums.thresholds, estimates, study.request.confidence, *SHARE)
        for estimates in sums.estimates()
    )
    return ThresholdCurves(score=score.name, skip_rate=rates, risk=risks)


def comparison_rule(points: Sequence[OperatingPoint]) -> str | None:
    """The rule to compare gated policies at: the risk budget of most of them, nearest 1 %.

    Without a budget, the commonest rule. Only feasible points that skip neither all nor nothing
    count; None if there is none.
    """
    usable = [
        point
        for point in points
        if point.feasible and point.score and 0 < (point.predicted["skip_rate"].value or 0) < 1
    ]
    budgets = [point for point in usable if point.family == "risk" and not point.variant]
    rules = [point.rule for point in budgets or usable]
    distance = {
        point.rule: abs(np.log((point.budget or USUAL_BUDGET) / USUAL_BUDGET)) for point in usable
    }
    by_use = {rule: (-rules.count(rule), distance[rule]) for rule in rules}
    return min(by_use, key=by_use.__getitem__, default=None)


def answer_curves(study: Study, runnable: Sequence[Runnable]) -> tuple[AnswerCurve, ...]:
    """Distance of answers by their length: gated policies at budgets, and the device alone."""
    chosen = [
        (point, policy)
        for point, policy in runnable
        if not point.variant and (point.family in ("risk", FAMILY) or policy.role == "device")
    ]
    found = [
        answer_curve(point, study.roads.prediction(policy).server, study.request.confidence)
        for point, policy in chosen
    ]
    return tuple(one for one in found if one is not None)


def throughput_curves(
    point: OperatingPoint,
    tokens: Averaged,
    economics: Economics,
    grid: Sequence[float],
    confidence: float,
) -> ThroughputCurves:
    """Both throughputs of a point's tokens, the link swept; docs/theory.md, (26), (28)."""
    links = [economics.link.at(amount) for amount in grid]

    def over_every_link(seen: PolicyTokens) -> dict[str, RatioEstimate]:
        bits = uplink_bits(seen, economics)
        return {
            f"{name}@{place}": one
            for place, link in enumerate(links)
            for name, one in token_times(seen, replace(economics, link=link), bits).items()
        }

    found = tokens.mean(over_every_link)
    for place in range(len(grid)):
        found[f"throughput_tok_s@{place}"] = rate_of(found[f"token_time_ms@{place}"])
    both = {
        name: curve(
            grid, [found[f"{name}@{place}"] for place in range(len(grid))], confidence, *AMOUNT
        )
        for name in THROUGHPUTS
    }
    return ThroughputCurves(policy=point.policy, rule=point.rule, **both)


def link_sweep(study: Study, runnable: Sequence[Runnable]) -> LinkSweep | None:
    """Throughput of one point a policy, see :func:`compared`, along what the link is swept by."""
    rule = comparison_rule([point for point, _ in runnable])
    if rule is None:
        return None
    link, grid = study.economics.link, study.economics.link.sweep()
    return LinkSweep(
        rule=rule,
        quantity=link.quantity.name,
        unit=link.quantity.unit,
        spacing=link.quantity.spacing,
        own=link.amount,
        grid=grid,
        series=tuple(
            throughput_curves(
                point,
                study.roads.prediction(policy),
                study.economics,
                grid,
                study.request.confidence,
            )
            for point, policy in compared(runnable)
        ),
    )


def compared(runnable: Sequence[Runnable]) -> list[Runnable]:
    """Points to compare policies at: the gated ones at the common rule, and those without a gate.

    None if there is no such rule.
    """
    rule = comparison_rule([point for point, _ in runnable])
    return [one for one in runnable if rule is not None and one[0].rule in (rule, UNGATED)]


def payload_distributions(
    study: Study, runnable: Sequence[Runnable]
) -> tuple[PayloadDistribution, ...]:
    """Distribution of the uplink bits of sent tokens, of the policies that send any."""
    found = []
    for point, policy in compared(runnable):
        bits = sent_bits(drawn_tokens(study.trace, policy), study.economics)
        if bits is not None:
            found.append(PayloadDistribution(policy=point.policy, rule=point.rule, bits=bits))
    return tuple(found)


def sent_bits(tokens: PolicyTokens, economics: Economics) -> SizeDistribution | None:
    """Uplink bits of those tokens that are sent; None where none is, or no device sends them."""
    bits = uplink_bits(tokens, economics)[tokens.skip < 0.5]
    known = np.isfinite(bits).any()
    return size_distribution(bits) if tokens.policy.role == "both" and known else None


def size_distribution(entries: np.ndarray) -> SizeDistribution:
    """Quantiles of the sizes (N,) of sent tokens; what is not recorded, NaN, is left out."""
    known = entries[np.isfinite(entries)]
    levels = np.linspace(0.0, 1.0, NUM_LEVELS)
    return SizeDistribution(
        levels=tuple(levels.tolist()),
        quantiles=tuple(np.quantile(known, levels).tolist()),
        mean=float(known.mean()),
        num_tokens=len(known),
    )


def truncation_curves(study: Study, runnable: Sequence[Runnable]) -> TruncationCurves | None:
    """Bounds (19) and (22) and the exact bias (21) along k, and which k the rules choose.

    None for a trace without them.
    """
    trace, fit = study.trace, study.calibration.fit
    step = trace.step()
    if not TruncatingPolicy.recorded(step):
        return None
    deviation, sampled = step["tail_deviation"], step.recorded("truncation_table")
    recorded = np.isfinite(deviation).all(axis=1)
    if not (recorded.any() and sampled.any()):
        return None
    kept = step.rows(np.flatnonzero(sampled))
    exact = np.full(deviation.shape, np.nan)
    for column, size in enumerate(trace.axes.truncation_sizes):
        sizes = np.full(int(sampled.sum()), size)
        exact[sampled, column] = recorded_bias(kept, no_skip(kept), sizes)
    beta = linear_rejection(step["uncertainty"], fit.slope.value or 0.0, fit.intercept.value or 0.0)
    soft = truncation_bound_soft(
        deviation, step["draft_prob"][:, None], beta[:, None], study.request.eta
    )
    fixed = [one.fixed_size for one in study.policies]
    online = _online_point(runnable)
    return TruncationCurves(
        theta=study.request.thetas[0],
        soft_bound=_column_means(study, trace.axes.truncation_sizes, soft),
        sharp_bound=_column_means(
            study, trace.axes.truncation_sizes, truncation_bias_bound(deviation)
        ),
        exact=_column_means(study, trace.axes.truncation_sizes, exact),
        num_tokens=int(recorded.sum()),
        num_exact=int(sampled.sum()),
        chosen_size=next((size for size in fixed if size is not None), None),
        online=None if online is None else _sent_sizes(study, online[1]),
        online_point=None if online is None else online[0].key,
    )


def _column_means(study: Study, sizes: Sequence[int], values: np.ndarray) -> Curve:
    index, num_prompts = study.trace.prompt_index, study.trace.num_prompts
    means = [mean_over_tokens(column, index, num_prompts) for column in values.T]
    return curve(sizes, means, study.request.confidence, *AMOUNT)


def _online_point(runnable: Sequence[Runnable]) -> Runnable | None:
    """A policy that truncates token by token, at the common rule; else where it sends most."""
    rule = comparison_rule([point for point, _ in runnable])
    rates = {point.key: point.predicted["skip_rate"].value or 0.0 for point, _ in runnable}
    found = [
        (point, policy)
        for point, policy in runnable
        if isinstance(policy, TruncatingPolicy) and policy.entries_vary
        if not point.variant and rates[point.key] < 1
    ]
    return min(found, key=lambda one: (one[0].rule != rule, rates[one[0].key]), default=None)


def _sent_sizes(study: Study, policy: Policy) -> SizeDistribution | None:
    tokens = drawn_tokens(study.trace, policy)
    sizes = tokens.entries[(tokens.skip < 0.5) & np.isfinite(tokens.entries)]
    return size_distribution(sizes) if len(sizes) else None


def importance_example(study: Study) -> ImportanceExample | None:
    """Importance and its threshold along the longest answer, the first by id among equals.

    docs/theory.md, (31) and (32); of the first policy that looks at importance.
    """
    chosen = [one for one in study.policies if one.importance_settings is not None]
    if not chosen:
        return None
    trace = study.trace
    lengths = np.bincount(trace.prompt_index, minlength=trace.num_prompts)
    prompt = int(np.argmax(lengths))
    memory = chosen[0].memory()
    seen = [
        memory.update(trace.step(np.array([row])))
        for row in np.flatnonzero(trace.prompt_index == prompt)
    ]
    importance, least = (
        np.array([float(one[name][0]) for one in seen])
        for name in ("importance", "importance_threshold")
    )
    return ImportanceExample(
        prompt_id=trace.prompt_ids[prompt],
        setting=chosen[0].importance_settings.label,
        step=tuple(range(len(seen))),
        importance=tuple(importance.tolist()),
        threshold=tuple(value if np.isfinite(value) else None for value in least.tolist()),
        important=tuple(bool(one["important"][0]) for one in seen),
    )
