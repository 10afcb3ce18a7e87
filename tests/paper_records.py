"""A run's records, built directly: small, and right by construction.

The pair is one whose laws can be written down. Uncertainty u is uniform on [0, 1] and beta = u**2,
so a gate at threshold t skips t of the tokens at risk t**3 / 3, and what sends f bits with a token
sends (1 - t) f. Intervals are a tenth of the value to either side. The figures' arithmetic can be
held against these formulas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calibrate.derive.presets import link_to_dict
from calibrate.run.folder import write_record
from calibrate.run.records import (
    AnswerCurve,
    AttentionSummary,
    AttenuationRecord,
    AttenuationRow,
    Backbone,
    Bin,
    CalibrationRecord,
    Cell,
    ContextShift,
    Coverage,
    CoverageSummary,
    Curve,
    DerivationRecord,
    DeriveRequest,
    EstimatorScore,
    Figure,
    GivenModels,
    GuaranteeRow,
    GuaranteesRecord,
    Histogram,
    ImportanceExample,
    ImportancePlane,
    LineFit,
    LinkSweep,
    ModelIdentity,
    OperatingPoint,
    PairIdentity,
    PayloadDistribution,
    PlaneCell,
    PolicyInfo,
    PolicyPath,
    PooledShift,
    Provenance,
    QualityRecord,
    QualityRow,
    Relation,
    Repeats,
    RerunInfo,
    RunRecord,
    RunSettings,
    SizeDistribution,
    StageRecord,
    ThresholdCurves,
    ThroughputCurves,
    Timings,
    TruncationCurves,
    ValidationRecord,
    WireLinkRuns,
    WireProbe,
    WireRecord,
    WireRun,
)
from hlmtheory.link import SNR, SNR_DB, RateLink
from paper_figs.loaded import LoadedRun

VOCAB = 32_000
NUM_PROMPTS, NUM_TOKENS = 12, 480
CONFIDENCE = 0.95
ANSWER_LENGTHS = (1, 2, 5, 10, 20, 40)
KS, GAMMAS = (1, 4, 16), (0.5, 1.0, 2.0)
METRICS = (
    "skip_rate", "rejection_risk", "uplink_bits_per_token", "token_time_ms", "throughput_tok_s",
    "mean_throughput_tok_s", "energy_j_per_token", "tv_bias",
    "answer_divergence", "tokens_in_agreement",
)  # fmt: skip
# Name, published system, gated, color, dashes, marker, bits of a sent token, added bias.
POLICIES: tuple[tuple[str, str | None, bool, str, tuple[float, ...], str, float, float], ...] = (
    ("slm", None, False, "#6b6b6b", (1, 3), "v", 0.0, 0.0),
    ("llm", None, False, "#000000", (10, 3), "^", 0.0, 0.0),
    ("hlm", None, False, "#000000", (), "s", 1e6, 0.0),
    ("u-hlm", "U-HLM", True, "#0072b2", (6, 2), "o", 1e6, 0.0),
    ("cu-hlm-online", "CU-HLM", True, "#d55e00", (3, 1.5), "<", 1.6e4, 0.02),
    ("ui-hlm", "UI-HLM", True, "#009e73", (8, 2, 1, 2, 1, 2), "P", 1e6, 0.0),
    ("r-hlm", None, True, "#b0588e", (1, 1.4), "*", 2.0, 0.0),
    ("coupled", None, True, "#3b3b98", (4, 1, 1, 1), "h", 0.0, 0.01),
)
LABELS = {"slm": "device alone", "llm": "server alone", "cu-hlm-online": "CU-HLM, online k",
          "r-hlm": "residual verification", "coupled": "coupled draws"}  # fmt: skip
BUDGETS = {"risk-0.01": 0.01, "risk-0.02": 0.02, "risk-0.05": 0.05}
SKIP_ALL = "risk-prone"
INFEASIBLE = "ltt-0.01"


STEPS = Curve(
    grid=(0.0, 16.0, 32.0), value=(0.01, 0.02, 0.03), low=(0.0, 0.01, 0.01), high=(0.02, 0.03, 0.05)
)


def fig(value: float, unit: str = "", width: float = 0.1) -> Figure:
    """A figure whose interval is a tenth of its value to either side."""
    half = width * abs(value)
    return Figure(value=value, low=value - half, high=value + half, unit=unit)


def curve(grid: Any, values: Any) -> Curve:
    """A curve with such intervals."""
    values = np.asarray(values, dtype=float)
    return Curve(
        grid=tuple(float(place) for place in grid),
        value=tuple(values.tolist()),
        low=tuple((0.9 * values).tolist()),
        high=tuple((1.1 * values).tolist()),
    )


def pair(name: str = "synthetic") -> PairIdentity:
    """Two models that never were."""
    model = ModelIdentity(
        label="made up", sha256="ab" * 32, drop_layers=(), num_parameters=1, num_layers=1
    )
    return PairIdentity(
        name=name, slm=model, llm=model, vocab_size=VOCAB, dtype="float32", device="cpu"
    )


def settings(prompts: str = "shipped") -> RunSettings:
    return RunSettings(
        pair="synthetic", given=GivenModels(), prompts=prompts, order="random", limit=NUM_PROMPTS,
        max_new_tokens=40, batch_size=None, temperature=1.0, seed=0, dtype="auto", device="auto",
        trace="full",
    )  # fmt: skip


PROVENANCE = Provenance(versions={"hlmtheory": "0"}, revision="cd" * 20, command=("hlm", "derive"))
TIMINGS = Timings(t_slm_ms=fig(20, "ms"), t_llm_ms=fig(60, "ms"), t_uncertainty_ms=fig(1, "ms"))


def run_record(prompts: str = "shipped") -> RunRecord:
    return RunRecord(
        complete=True, pair=pair(), settings=settings(prompts), prompt_ids=("a",),
        prompt_keys=("k",), provenance=PROVENANCE, timings=TIMINGS, num_threads=2,
        num_prompts=NUM_PROMPTS, num_tokens=NUM_TOKENS, wall_s=12.5, forward_s=10.0,
    )  # fmt: skip


def calibration_record(prompts: str = "shipped") -> CalibrationRecord:
    """beta = u**2: the least-squares line is u - 1/6, correlation sqrt(15)/4."""
    u = np.linspace(0.05, 0.95, 10)
    grid = np.linspace(0, 1, 21)
    budgets = ("0.01", "0.05")
    names = {"uncertainty": "uncertainty u, exact", "uncertainty_sampled": "uncertainty, 20 draws",
             "entropy": "entropy", "one_minus_max_prob": "1 − max probability",
             "one_minus_margin": "1 − margin of the top two", "max_logit": "largest logit",
             "learned": "learned, logistic", "learned_boosting": "learned, boosting"}  # fmt: skip
    rate = np.linspace(0, 1, 101)
    estimators = tuple(
        EstimatorScore(
            name=name, label=label, correlation=fig(0.9 - 0.05 * number),
            auroc=fig(0.95 - 0.05 * number, width=0.02),
            # A worse score has more risk at the same rate, up to the mean rejection, 1/3.
            risk=tuple((rate ** (3 - 0.2 * number) / 3).tolist()), skip_rate=tuple(rate.tolist()),
            skip_rate_at_risk={
                budget: fig((3 * float(budget)) ** (1 / (3 - 0.2 * number))) for budget in budgets
            },
        )
        for number, (name, label) in enumerate(names.items())
    )  # fmt: skip
    steps = np.arange(40)
    return CalibrationRecord(
        pair=pair(), settings=settings(prompts), num_prompts=NUM_PROMPTS, num_tokens=NUM_TOKENS,
        confidence=CONFIDENCE,
        fit=LineFit(
            slope=fig(1.0), intercept=fig(-1 / 6), correlation=fig(15**0.5 / 4, width=0.02),
            correlation_binned=fig(0.97, width=0.01), mean_rejection=fig(1 / 3), delta=fig(0.9),
            curvature=fig(1.0), covariance=((0.01, 0.0), (0.0, 0.01)), num_bins=10,
        ),
        rejection_excess=fig(0.0),
        relation=Relation(
            bins=tuple(
                Bin(uncertainty=x, rejection_prob=fig(x**2), num_tokens=48) for x in u.tolist()
            ),
            line=curve(grid, np.clip(grid - 1 / 6, 0, 1)),
            isotonic_uncertainty=tuple(grid.tolist()),
            isotonic_rejection=tuple((grid**2).tolist()),
            tokens=Histogram(
                uncertainty_edges=tuple(np.linspace(0, 1, 11).tolist()),
                rejection_edges=tuple(np.linspace(0, 1, 11).tolist()),
                counts=tuple(
                    tuple(48 * int(int(10 * x**2) == row) for row in range(10)) for x in u.tolist()
                ),
            ),
        ),
        estimators=estimators, learned=None,
        attention=AttentionSummary(
            entropy=fig(2.0), sink=fig(0.5), context=fig(0.1),
            normalised_entropy_by_step=curve(steps, 0.8 - 0.005 * steps),
            sink_by_step=curve(steps, 0.3 + 0.01 * steps),
        ),
        timings=TIMINGS,
    )  # fmt: skip


def predictions(policy: str, threshold: float | None) -> dict[str, Figure]:
    """What a policy does at a threshold; 0 sends all, 1 sends nothing."""
    entry = next(entry for entry in POLICIES if entry[0] == policy)
    skip = 1.0 if policy == "slm" else (threshold or 0.0)
    if policy == "ui-hlm":
        skip = min(1.0, 1.3 * skip)  # unimportant contexts are skipped whatever u is
    risk = skip**3 / 3
    time = 20.0 + (1 - skip) * (60.0 + entry[6] / 2e4)
    values = (skip, risk, (1 - skip) * entry[6], time, 1e3 / time, 1.1e3 / time, 3 - 2 * skip,
              risk + (1 - skip) * entry[7])  # fmt: skip
    found = {name: fig(value) for name, value in zip(METRICS[:-2], values, strict=True)}
    if policy == "cu-hlm-online":  # no recorded step says what it emits
        return found | {name: Figure(value=None) for name in METRICS[-2:]}
    kept = (1 - values[-1]) ** np.arange(1, 41)
    agreed = Figure(value=None) if policy == "coupled" else fig(float(kept.sum()), "token")
    return found | {"answer_divergence": fig(float(1 - kept[-1])), "tokens_in_agreement": agreed}


def answer_curves() -> tuple[AnswerCurve, ...]:
    """1 - (1 - bias)**t at every budget of the policies whose answers are known."""
    return tuple(
        AnswerCurve(
            policy=policy, rule=rule, at_most=policy == "coupled",
            divergence=curve(ANSWER_LENGTHS, [1 - (1 - bias) ** t for t in ANSWER_LENGTHS]),
        )
        for policy in ("u-hlm", "ui-hlm", "r-hlm", "coupled")
        for rule in BUDGETS
        for bias in [float(point(policy, rule).predicted["tv_bias"].value or 0.0)]
    )  # fmt: skip


def point(policy: str, rule: str) -> OperatingPoint:
    """A derived setting: risk budgets are t**3 / 3, `risk-prone` skips all, none has no gate."""
    gated = rule != "none"
    feasible = rule != INFEASIBLE
    budget = BUDGETS.get(rule)
    threshold = 1.2 if rule == SKIP_ALL else None if budget is None else (3 * budget) ** (1 / 3)
    importance = {"importance": {"variant": "topk", "k": 16, "gamma": 1.0}}
    return OperatingPoint(
        policy=policy, rule=rule, family=rule.rpartition("-0")[0] or rule, variant="",
        score="uncertainty" if gated else None,
        budget=0.01 if rule == INFEASIBLE else budget,
        weighting="tokens" if gated else None, confidence=None, bound=None,
        uncertainty_threshold=Figure(value=None) if threshold is None else fig(threshold),
        feasible=feasible,
        reason="" if feasible else "12 prompts cannot certify 1 %; calibrate more prompts",
        settings=importance if policy == "ui-hlm" else {},
        predicted=predictions(policy, None if threshold is None else min(threshold, 1.0))
        if feasible else {name: Figure(value=None) for name in METRICS},
        at_most=("answer_divergence",) if policy == "coupled" and feasible else (),
    )  # fmt: skip


def throughputs(policy: str, rule: str, factor: float = 1.0) -> ThroughputCurves:
    """Logistic in the SNR."""
    rate = factor * 20 / (1 + np.exp(-np.array(SNR_DB) / 5)) * (1 + len(policy) / 10)
    return ThroughputCurves(
        policy=policy, rule=rule, throughput_tok_s=curve(SNR_DB, rate),
        mean_throughput_tok_s=curve(SNR_DB, 1.2 * rate),
    )  # fmt: skip


def sizes(scale: float = 1.0) -> SizeDistribution:
    """Log-uniform from 1 to 1000 entries."""
    levels = np.linspace(0, 1, 101)
    return SizeDistribution(
        levels=tuple(levels.tolist()), quantiles=tuple((scale * 1000**levels).tolist()),
        mean=scale * 999 / np.log(1000), num_tokens=300,
    )  # fmt: skip


def payloads() -> tuple[PayloadDistribution, ...]:
    """Always the bits of a sent token, but for the online rule: log-uniform over three decades."""
    levels = np.linspace(0, 1, 101)
    found = []
    for entry in POLICIES:
        name, gated, bits = entry[0], entry[2], entry[6]
        if name in ("slm", "llm"):
            continue
        values = 16 * 1000**levels if name == "cu-hlm-online" else np.full(101, bits)
        found.append(
            PayloadDistribution(
                policy=name, rule="risk-0.02" if gated else "none",
                bits=SizeDistribution(
                    levels=tuple(levels.tolist()), quantiles=tuple(values.tolist()),
                    mean=float(values.mean()), num_tokens=300,
                ),
            )
        )  # fmt: skip
    return tuple(found)


def derivation_record(name: str = "default", **changes: Any) -> DerivationRecord:
    gated = [entry[0] for entry in POLICIES if entry[2]]
    points = [point(entry[0], "none") for entry in POLICIES if not entry[2]]
    points += [point(policy, rule) for policy in gated for rule in (*BUDGETS, SKIP_ALL, INFEASIBLE)]
    grid = np.linspace(0, 1, 101)
    plane_threshold = point("ui-hlm", "risk-0.02").uncertainty_threshold.value
    sizes_grid = (1, 4, 16, 64, 256, 1024)
    bias = 0.5 / np.sqrt(sizes_grid)
    steps = tuple(range(40))
    importance = tuple(0.2 / (1 + step % 7) for step in steps)
    content: dict[str, Any] = {
        "name": name,
        "request": DeriveRequest(policies=tuple(entry[0] for entry in POLICIES)),
        "provenance": PROVENANCE, "pair": pair(), "num_prompts": NUM_PROMPTS,
        "num_tokens": NUM_TOKENS, "confidence": CONFIDENCE,
        "link": {"name": "wifi", "model": "awgn", "bandwidth_hz": 2e7, "snr_db": 20.0,
                 "round_trip_ms": 5.0},
        "profile": {"name": "measured", "t_slm_ms": 20.0, "t_llm_ms": 60.0,
                    "t_uncertainty_ms": 1.0},
        "accounting": "paper",
        "num_prompt_tokens": 24.0,
        "policies": tuple(
            PolicyInfo(name=entry[0], label=LABELS.get(entry[0], entry[0].upper()),
                       source=None, paper=entry[1], gated=entry[2],
                       color=entry[3], dashes=entry[4], marker=entry[5])
            for entry in POLICIES
        ),
        "operating_points": tuple(points), "optima": (),
        "thresholds": ThresholdCurves(
            score="uncertainty", skip_rate=curve(grid, grid), risk=curve(grid, grid**3 / 3)
        ),
        "answers": answer_curves(),
        "paths": tuple(
            PolicyPath(
                policy=policy, thresholds=tuple(grid.tolist()),
                skip_rate=tuple(grid.tolist()),
                **{
                    metric: tuple(predictions(policy, float(t))[metric].value for t in grid)
                    for metric in ("uplink_bits_per_token", "tv_bias")
                },
            )
            for policy in gated
        ),
        "sweep": LinkSweep(
            rule="risk-0.02", quantity=SNR.name, unit=SNR.unit, spacing=SNR.spacing, own=20.0,
            grid=SNR_DB, series=tuple(
                throughputs(entry[0], "risk-0.02" if entry[2] else "none") for entry in POLICIES
            ),
        ),
        "payloads": payloads(),
        "truncation": TruncationCurves(
            theta=0.1, soft_bound=curve(sizes_grid, 4 * bias),
            sharp_bound=curve(sizes_grid, 1.2 * bias), exact=curve(sizes_grid, bias),
            num_tokens=NUM_TOKENS, num_exact=NUM_TOKENS // 4, chosen_size=200, online=sizes(),
            online_point="cu-hlm-online/risk-0.02",
        ),
        "importance_plane": ImportancePlane(
            policy="ui-hlm", threshold_rule="risk-0.02", uncertainty_threshold=plane_threshold,
            reason="", num_prompts=NUM_PROMPTS, num_tokens=NUM_TOKENS, ks=KS, gammas=GAMMAS,
            cells=tuple(
                PlaneCell(
                    k=k, gamma=gamma,
                    predicted={
                        "skip_rate": fig(min(1.0, 0.2 + 0.2 * gamma + 0.01 * k)),
                        "tv_bias": fig(0.01 * gamma), "throughput_tok_s": fig(10 + gamma),
                        "energy_j_per_token": fig(3 / gamma),
                    },
                )
                for k in KS for gamma in GAMMAS
            ),
        ),
        "importance_example": ImportanceExample(
            prompt_id="math-007", setting="topk-16-1", step=steps, importance=importance,
            threshold=(None, *(0.08 for _ in steps[1:])),
            important=(True, *(value >= 0.08 for value in importance[1:])),
        ),
    }  # fmt: skip
    return DerivationRecord(**(content | changes))


def validation_record(derivation: DerivationRecord, **changes: Any) -> ValidationRecord:
    """Every feasible point but `risk-prone`, measured 5 % off; the online rule 15 %: outside."""
    cells, reruns, shifts = [], [], []
    for own in derivation.operating_points:
        if not own.feasible or own.rule == SKIP_ALL:
            continue
        off = 1.15 if own.policy == "cu-hlm-online" else 1.05
        for metric, predicted in own.predicted.items():
            if predicted.value is None or metric in own.at_most:
                continue  # not predicted, or bounded only: nothing to judge
            value = float(predicted.value)
            fixed = value == 0 or not own.score
            cells.append(
                Cell(
                    policy=own.policy, rule=own.rule, metric=metric, source="counted",
                    predicted=predicted, measured=predicted if fixed else fig(off * value),
                    covered=fixed or off < 1.1, fixed=fixed,
                )
            )  # fmt: skip
        bits = next(entry[6] for entry in POLICIES if entry[0] == own.policy)
        compared = own.rule in ("none", "risk-0.02")
        online = own.policy == "cu-hlm-online"
        reruns.append(
            RerunInfo(
                policy=own.policy, rule=own.rule, folder=own.policy, num_tokens=300,
                entries_per_sent_token=fig(bits / 16),
                throughput=throughputs(own.policy, own.rule, 1.05) if compared else None,
                payload=next(
                    (one.bits for one in derivation.payloads
                     if (one.policy, one.rule) == (own.policy, own.rule)), None
                ),
                sizes=sizes(1.2) if online else None,
            )
        )  # fmt: skip
        if own.score:
            move = 0.05 if online else 0.01
            shift = Figure(value=move, low=move - 0.02, high=move + 0.02)
            shifts.append(
                ContextShift(
                    policy=own.policy, rule=own.rule, below_threshold=shift, predicted=shift,
                    risk=shift, score=shift, by_step=STEPS, num_references=2, num_prompts=6,
                )
            )  # fmt: skip
    tested = [cell for cell in cells if not cell.fixed]
    move = Figure(value=0.02, low=0.01, high=0.03)
    pooled = PooledShift(
        below_threshold=move, p_value=0.01, predicted=move, by_step=STEPS, num_reruns=len(shifts),
        num_prompts=6,
    )  # fmt: skip
    inside = sum(bool(cell.covered) for cell in tested)
    counts = Coverage(covered=inside, total=len(tested), share=fig(inside / len(tested)))
    content: dict[str, Any] = {
        "derivation": derivation.name, "provenance": PROVENANCE, "pair": pair(), "seed": 1,
        "order": "random", "prompt_ids": ("v1",), "confidence": CONFIDENCE, "num_prompts": 6,
        "num_calibration_prompts": NUM_PROMPTS, "num_tokens": 300 * len(reruns),
        "strata": "category", "reruns": tuple(reruns), "infeasible": (),
        "context_shift": tuple(shifts), "pooled_shift": pooled, "cells": tuple(cells),
        "coverage": CoverageSummary(
            **dict(counts),
            if_predictions_hold=Repeats(
                num_repeats=1000, share=Figure(value=0.95, low=0.6, high=1.0),
                probability_of_at_most=0.2, probability_of_at_least=0.85, widest_error=2.5,
                probability_of_as_wide=0.3,
            ),
            unstratified=counts,
        ),
    }  # fmt: skip
    return ValidationRecord(**(content | changes))


def guarantees_record() -> GuaranteesRecord:
    """Plug-in breaks its budget every other time, the certified one hardly ever."""
    rows = []
    for source in ("all-prompts", "halves"):
        for rule, weighting, share in (
            ("risk", "tokens", 0.5), ("conformal", "prompts", 0.3), ("ltt", "prompts", 0.02),
            ("ltt@cap", "prompts", 0.01), ("asymptotic (t)", "prompts", 0.1),
        ):  # fmt: skip
            for budget in (0.005, 0.01, 0.02, 0.05):
                infeasible = {("ltt", 0.005): 1.0, ("ltt", 0.01): 0.4}.get((rule, budget), 0.0)
                rate = (3 * budget) ** (1 / 3) * (1 - infeasible)
                rows.append(
                    GuaranteeRow(
                        rule=rule, family=rule.removesuffix("@cap"), budget=budget, source=source,
                        test="betting" if rule.startswith("ltt") else None,
                        cap=0.4 if rule.endswith("@cap") else None, weighting=weighting,
                        num_draws=500, num_calibration_prompts=12 if source != "halves" else 6,
                        violation_share=fig(share * (1 - infeasible)),
                        infeasible_share=fig(infeasible), skip_rate=fig(rate),
                        risk=fig(rate**3 / 3),
                    )
                )  # fmt: skip
    return GuaranteesRecord(
        score="uncertainty", num_draws=500, num_prompts=NUM_PROMPTS, num_tokens=NUM_TOKENS,
        confidence=CONFIDENCE, seed=0, provenance=PROVENANCE, certificates=(), rows=tuple(rows),
    )  # fmt: skip


def attenuation_record() -> AttenuationRecord:
    """r = 0.5, lambda = K / (K + 2), and a gap of 0.03 at the largest K; rows in no order."""
    rows = []
    for k, gap in ((100, 0.03), (5, -0.01), (20, 0.0)):
        reliability = k / (k + 2)
        predicted = 0.5 * reliability**0.5
        rows.append(
            AttenuationRow(
                num_temperatures=k, reliability=reliability, exact_correlation=0.5,
                predicted_correlation=predicted, predicted_slope=0.8 * reliability,
                measured_correlation=Figure(
                    value=predicted + gap, low=predicted - 0.1, high=predicted + 0.1
                ),
                measured_slope=fig(0.8 * reliability),
                correlation_gap=Figure(value=gap, low=gap - 0.02, high=gap + 0.02),
                slope_gap=Figure(value=0.0, low=-0.1, high=0.1), num_tokens=640, num_prompts=20,
            )
        )  # fmt: skip
    return AttenuationRecord(
        pair=pair(), confidence=CONFIDENCE, provenance=PROVENANCE, rows=tuple(rows)
    )


def quality_record(derivation: DerivationRecord, policies: tuple[str, ...]) -> QualityRecord:
    """Text scores of every rerun of some policies."""
    rows = tuple(
        QualityRow(
            policy=own.policy, rule=own.rule, reference="llm", coupled_with=None,
            bertscore=Figure(value=0.9, low=0.88, high=0.92),
            cosine=Figure(value=0.7, low=0.6, high=0.8),
            bertscore_difference=Figure(value=0.0, low=-0.01, high=0.01),
            cosine_difference=Figure(value=0.0, low=-0.1, high=0.1), identical=fig(0.2),
            shared_prefix=fig(5.0), num_prompts=6,
        )
        for own in derivation.operating_points
        if own.policy in policies and own.feasible
    )  # fmt: skip
    encoder = Backbone(name="made up", source="nowhere", sha256=None, max_tokens=512, num_cut=0)
    return QualityRecord(
        derivation=derivation.name, model=encoder, embedding=encoder, reference="llm",
        second_draw="hlm", confidence=CONFIDENCE, num_prompts=6, num_texts=60, num_empty=0,
        max_new_tokens=40, seed=1, mismatched={}, rows=rows, provenance=PROVENANCE,
    )  # fmt: skip


def records(name: str = "default") -> list[StageRecord]:
    """One of each kind, as a run that went through every stage has them."""
    derivation = derivation_record(name)
    return [
        run_record(), calibration_record(), derivation, validation_record(derivation),
        guarantees_record(), attenuation_record(), quality_record(derivation, ("u-hlm", "slm")),
        wire_record(derivation),
    ]  # fmt: skip


def write_run(run: Path) -> Path:
    """The same as a folder."""
    run.mkdir(parents=True)
    for record in records():
        write_record(run, record)
    return run


def rate_link(rate_bps: float) -> dict[str, Any]:
    """As a record holds it."""
    return link_to_dict(RateLink(rate_bps, None, 40.0))


def wire_record(derivation: DerivationRecord) -> WireRecord:
    """Two links; the clock is 2 % above the prediction, and 20 % above (27)."""

    def cell(policy: str, rule: str, value: float, off: float) -> Cell:
        return Cell(
            policy=policy, rule=rule, metric="token_time_ms", source="clock",
            predicted=fig(value, "ms"), measured=fig(off * value, "ms", 0.03), covered=off < 1.1,
            fixed=False,
        )  # fmt: skip

    def run(place: int, policy: str, rule: str) -> WireRun:
        value = 50.0 * (place + 1)
        return WireRun(
            policy=policy, rule=rule, num_prompts=6, num_tokens=240, first_token_ms=fig(300.0),
            probe=WireProbe(num_prompts=6, num_tokens=240, decide_ms=20.0, ask_ms=30.0,
                            server_ms=25.0),
            token_ms_quantiles=(20.0, 30.0, value, 90.0, 120.0), server_busy_share=0.4,
            predicted_ms_quantiles=(20.0, 20.0, value, 80.0, 80.0),
            uplink_bytes_per_token=fig(40.0), downlink_bytes_per_token=fig(25.0),
            framing_bytes_per_ask=26.0, framing_as_stated=True, same_tokens_share=1.0,
            before=(cell(policy, rule, value, 1.2),), cells=(cell(policy, rule, value, 1.02),),
            replayed=cell(policy, rule, value, 1.01),
        )  # fmt: skip

    points = [one for one in derivation.operating_points if one.rule in ("none", "risk-0.02")]
    runs = tuple(run(place, one.policy, one.rule) for place, one in enumerate(points))
    return WireRecord(
        derivation=derivation.name, provenance=PROVENANCE, pair=pair(), dtype="float32",
        num_threads=1, prob_bits=8, seed=1, max_new_tokens=40, prompt_ids=("v1", "v2"),
        confidence=CONFIDENCE,
        links=tuple(
            WireLinkRuns(link_name=name, link=rate_link(rate), runs=runs)
            for name, rate in (("10mbit", 1e7), ("1mbit", 1e6))
        ),
        mean_time_error=0.02, mean_time_error_replayed=0.01, mean_time_error_before=0.2,
        coverage=Coverage(covered=20, total=20, share=fig(1.0)),
    )  # fmt: skip


def full_run(run: Path = Path("RUN")) -> LoadedRun:
    """The same as figures take it, without files."""
    derivation = derivation_record()
    return LoadedRun(
        run=run, calibration=calibration_record(), info=run_record(), derivation=derivation,
        validation=validation_record(derivation), validation_name="default",
        quality=quality_record(derivation, ("u-hlm", "slm")), guarantees=guarantees_record(),
        attenuation=attenuation_record(), wire=wire_record(derivation),
    )  # fmt: skip
