"""`hlm validate`: plan the reruns of a derived run, carry them out, write the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import provenance, read_json, write_json
from calibrate.run.prompts import Prompt, read_prompts, tokenize_prompts, validation_prompts
from calibrate.run.traces import shard_paths

if TYPE_CHECKING:
    from calibrate.pairs.registry import LoadedPair, PairSpec


@dataclass(frozen=True)
class ValidationPlan:
    """Reruns to make, checked before any model is loaded."""

    run: Path
    spec: PairSpec
    dtype: str
    points: tuple[dict[str, Any], ...]
    infeasible: tuple[dict[str, Any], ...]
    prompts: tuple[Prompt, ...]
    derived: dict[str, Any]
    calibration: dict[str, Any]
    seed: int
    batch_size: int | None
    needs_attention: bool
    command: tuple[str, ...]


def prepare_validation(
    run: Path,
    policies: tuple[str, ...] | None = None,
    rules: tuple[str, ...] | None = None,
    points: tuple[str, ...] | None = None,
    prompts_source: str | None = None,
    limit: int = 64,
    seed: int | None = None,
    batch_size: int | None = None,
    command: list[str] | None = None,
) -> ValidationPlan:
    """Choose operating points and prompts; loads no model.

    Raises
    ------
    UserError, UsageError
        If the run is not derived, nothing derived matches, or no fresh prompt is left. Points that
        are infeasible are a result: they are listed, not rerun.
    """
    derived = read_json(run, "operating_points.json")
    calibration = read_json(run, "calibration.json")
    info = read_json(run, "run.json")
    if not shard_paths(run):
        raise UserError(
            f"{run}: holds no trace shard, which predictions are made from; calibrate again"
        )
    settings = info["settings"]
    names = {f"{point['policy']}/{point['rule']}" for point in derived["operating_points"]}
    for name in points or ():
        if name not in names:
            raise UsageError(f"--point {name}: not derived; derived are {', '.join(sorted(names))}")
    chosen = [
        point
        for point in derived["operating_points"]
        if (policies is None or point["policy"] in policies)
        and (rules is None or point["rule"] in (*rules, "none"))
        and (points is None or f"{point['policy']}/{point['rule']}" in points)
    ]
    if not chosen:
        known = sorted({(p["policy"], p["rule"]) for p in derived["operating_points"]})
        raise UsageError(
            "no derived operating point matches --policy, --rule and --point; derived are "
            + ", ".join(f"{policy}/{rule}" for policy, rule in known)
        )
    for option, wanted, key in (("--policy", policies, "policy"), ("--rule", rules, "rule")):
        missing = set(wanted or ()) - {point[key] for point in derived["operating_points"]}
        if missing:
            raise UsageError(f"{option} {min(missing)}: not derived; run `hlm derive` with it")
    feasible = [point for point in chosen if point["feasible"]]
    source = prompts_source
    if source is None and settings["prompts"] != "shipped":
        source = settings["prompts"]
    prompts = validation_prompts(read_prompts(source), limit, set(info.get("prompt_keys", ())))
    return ValidationPlan(
        run=run,
        spec=spec_from_settings(settings),
        dtype=calibration["pair"]["dtype"],
        points=tuple(feasible),
        infeasible=tuple(point for point in chosen if not point["feasible"]),
        prompts=tuple(prompts),
        derived=derived,
        calibration=calibration,
        seed=settings["seed"] + 1 if seed is None else seed,
        batch_size=batch_size,
        needs_attention=any("importance" in point["settings"] for point in feasible),
        command=tuple(command or ()),
    )


def spec_from_settings(settings: dict[str, Any]) -> PairSpec:
    """The pair that run.json names, resolved again."""
    from calibrate.pairs.registry import REGISTRY, resolve_pair

    if settings["pair"] in REGISTRY:
        return REGISTRY[settings["pair"]]
    given = settings["given"]
    return resolve_pair(None, given["slm"], given["llm"], given["drop_layers"])


def run_validation(
    plan: ValidationPlan,
    pair: LoadedPair,
    on_step: Callable[[int, int], None] | None = None,
    on_total: Callable[[int], None] | None = None,
    on_point: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Rerun every planned point and write validation.json.

    Raises
    ------
    UserError
        If the pair is not the one that was calibrated.
    """
    from calibrate.decode.engine import DecodingSettings
    from calibrate.decode.memory import automatic_batch_size
    from calibrate.derive.operating_points import policy_from_settings
    from calibrate.fit.calibration import pair_identity
    from calibrate.validate.rerun import decode_policies, keep_rerun

    identity = pair_identity(pair)
    for side in ("slm", "llm"):
        before, now = plan.calibration["pair"][side], identity[side]
        if before["sha256"] != now["sha256"] or before["drop_layers"] != list(now["drop_layers"]):
            raise UserError(
                f"the {side} is not the calibrated one ({before['label']}, hash "
                f"{str(before['sha256'])[:12]}; now {str(now['sha256'])[:12]}); calibrate again"
            )
    calibrated = plan.calibration["settings"]
    max_new_tokens = calibrated["max_new_tokens"]
    prompts = tokenize_prompts(plan.prompts, pair.tokenizer, max_new_tokens, pair.max_context)
    settings = DecodingSettings(
        temperature=calibrated["temperature"],
        max_new_tokens=max_new_tokens,
        batch_size=plan.batch_size or automatic_batch_size(pair, prompts, max_new_tokens, 2),
        seed=plan.seed,
        trace="minimal",
    )
    derived = plan.derived
    policies = {
        f"{point['policy']} {point['rule']}": policy_from_settings(
            point["policy"], point["uncertainty_threshold"]["value"], point["settings"]
        )
        for point in plan.points
    }
    if on_total is not None:
        on_total(len(policies) * len(prompts) * settings.max_new_tokens)

    def on_batch(number: int, total: int, label: str) -> None:
        if on_point is not None:
            on_point(f"validating {number}/{total}: {label}")

    decoded = decode_policies(pair, prompts, policies, settings, on_step, on_batch)
    header: dict[str, Any] = {
        "pair": identity,
        "seed": plan.seed,
        **provenance(plan.command),
    }
    # Nothing is written before everything is decoded: the folder holds the reruns of one seed, and
    # what was made of the earlier ones goes first.
    stale = [plan.run / "validation.json", plan.run / "quality.json"]
    for path in (*stale, *(plan.run / "reruns").glob("*.parquet")):
        path.unlink(missing_ok=True)
    for point, batches in zip(plan.points, decoded.values(), strict=True):
        keep_rerun(rerun_path(plan.run, point), batches, header | {"operating_point": point})
    header["infeasible"] = [
        {key: point[key] for key in ("policy", "rule", "reason")} for point in plan.infeasible
    ]
    return compare_reruns(plan.run, plan.points, derived, header)


def rerun_path(run: Path, point: dict[str, Any]) -> Path:
    """Where the rerun of an operating point is kept."""
    return run / "reruns" / f"{point['policy']}_{point['rule']}.parquet"


def compare_reruns(
    run: Path, points: Sequence[dict[str, Any]], derived: dict[str, Any], header: dict[str, Any]
) -> dict[str, Any]:
    """Hold the reruns on disk against the predictions and write validation.json; decodes nothing.

    Parameters
    ----------
    run : Path
    points : sequence of dict
        Entries of operating_points.json that have a rerun.
    derived : dict
        operating_points.json.
    header : dict
        Provenance, kept in front of the comparison.
    """
    from calibrate.derive.policy_tokens import Economics
    from calibrate.derive.presets import link_from_dict, profile_from_dict
    from calibrate.run.traces import read_trace
    from calibrate.validate.comparison import Comparison, common_strata, compare, coverage
    from calibrate.validate.context_shift import REFERENCE, context_shift
    from calibrate.validate.rerun import entries_per_sent_token

    economics = Economics(
        link_from_dict(derived["link"]),
        profile_from_dict(derived["profile"]),
        derived["pair"]["vocab_size"],
        derived["accounting"],
    )
    confidence = derived["confidence"]
    calibration = read_trace(shard_paths(run))
    compared: list[Comparison] = []
    categories: list[str] = []
    payload, shifts, num_tokens, num_prompts = [], [], 0, 0
    labels = {(point["policy"], point["rule"]): point for point in points}
    reference = None
    if REFERENCE in labels:
        reference = read_trace([rerun_path(run, labels[REFERENCE])])
    for point in points:
        trace = read_trace([rerun_path(run, point)])
        num_tokens += trace.num_tokens
        num_prompts = max(num_prompts, trace.num_prompts)
        categories = trace.categories
        compared += compare(point, calibration, trace, economics, confidence)
        if reference is not None:
            shift = context_shift(point, calibration, trace, reference, confidence)
            shifts += [] if shift is None else [asdict(shift)]
        entries = entries_per_sent_token(point, trace, confidence)
        payload.append(
            {
                "policy": point["policy"],
                "rule": point["rule"],
                "entries_per_sent_token": asdict(entries),
            }
        )
    result: dict[str, Any] = {
        **header,
        "confidence": confidence,
        "num_prompts": num_prompts,
        "num_calibration_prompts": derived["num_prompts"],
        "num_tokens": num_tokens,
        "strata": "category" if common_strata(calibration.categories, categories) else None,
        "payload": payload,
        "context_shift": shifts,
        "cells": [asdict(one.cell) for one in compared],
        "coverage": coverage(compared, confidence),
    }
    write_json(run / "validation.json", result)
    return result
