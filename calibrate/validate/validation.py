"""`hlm validate`: plan the reruns of a derivation, carry them out, write the comparison.

The prompts are fresh, the seed is fresh, and the tokens are decoded by the policy itself, not
replayed from the calibration trace. What is compared is the theory, for device, link and model
times are those of the predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import provenance, read_record, record_path, write_record
from calibrate.run.prompts import Prompt, draw_prompts, read_prompts, tokenize_prompts
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    Figure,
    Infeasible,
    OperatingPoint,
    RerunInfo,
    RunRecord,
    ValidationRecord,
)
from calibrate.run.traces import (
    Trace,
    finished_prompts,
    read_axes,
    read_trace,
    shard_paths,
    shards_in,
)
from calibrate.validate.rerun import (
    Rerun,
    decode_reruns,
    rerun_identity,
    rerun_path,
)
from calibrate.work.crew import Crew, OwnProcess, Told
from hlmtheory.policies import policy_class
from hlmtheory.uncertainty import Temperatures

if TYPE_CHECKING:
    from calibrate.derive.predict import Economics, PolicyTokens
    from calibrate.pairs.registry import LoadedPair
    from calibrate.work.job import PolicySource
    from hlmtheory.policies import Policy


@dataclass(frozen=True)
class ValidationPlan:
    """What one `hlm validate` is to compare, checked before any model is loaded.

    Attributes
    ----------
    run : Path
    name : str
        Of the derivation, and so of the validation.
    derivation, calibration : records
    points : tuple of OperatingPoint
        Feasible ones: those asked for and those validated before, as they are derived.
    infeasible : tuple of Infeasible
    prompts : tuple of Prompt
    thetas : tuple of float
        Temperatures of the calibration's uncertainty.
    order, seed, batch_size
        As asked for.
    command : tuple of str
    """

    run: Path
    name: str
    derivation: DerivationRecord
    calibration: CalibrationRecord
    points: tuple[OperatingPoint, ...]
    infeasible: tuple[Infeasible, ...]
    prompts: tuple[Prompt, ...]
    thetas: tuple[float, ...]
    order: Literal["random", "file"]
    seed: int
    batch_size: int | None
    command: tuple[str, ...]

    @cached_property
    def sources(self) -> dict[str, PolicySource]:
        """How the policy of every point is built, by its key."""
        from calibrate.derive.predict import point_source

        learned = self.calibration.learned
        try:
            return {one.key: point_source(self.derivation, one, learned) for one in self.points}
        except ValueError as error:
            raise UsageError(str(error)) from None

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """Of every point, by its key."""
        try:
            return {key: source.build() for key, source in self.sources.items()}
        except ValueError as error:
            raise UsageError(str(error)) from None

    def identity(self, point: OperatingPoint) -> dict[str, Any]:
        """What a rerun of the point is kept by."""
        settings = self.calibration.settings
        sources = {policy.name: policy.source for policy in self.derivation.policies}
        return rerun_identity(
            point, sources[point.policy], self.prompts, self.seed, settings.max_new_tokens,
            settings.sampling, self.thetas,
        )  # fmt: skip

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Where the rerun of each point lies or will lie; points that decide alike share one."""
        return {point.key: rerun_path(self.run, self.identity(point)) for point in self.points}

    @property
    def missing(self) -> dict[Path, OperatingPoint]:
        """A point for each rerun that is still to be decoded."""
        paths = {self.paths[point.key]: point for point in self.points}
        return {path: point for path, point in paths.items() if not self._is_whole(path)}

    def _is_whole(self, path: Path) -> bool:
        wanted = {prompt.prompt_id for prompt in self.prompts}
        return finished_prompts(shards_in(path)) >= wanted

    @property
    def num_kept(self) -> int:
        """Points whose rerun is there."""
        missing = self.missing
        return sum(path not in missing for path in self.paths.values())

    def trace(self, point: OperatingPoint) -> Trace:
        """The tokens of a point's rerun."""
        return read_trace(shards_in(self.paths[point.key]))

    @property
    def needs_attention(self) -> bool:
        """Whether a rerun to be decoded looks at attention."""
        return any(self.policies[point.key].needs_attention for point in self.missing.values())


def prepare_validation(
    run: Path,
    name: str = "default",
    policies: Sequence[str] | None = None,
    rules: Sequence[str] | None = None,
    points: Sequence[str] | None = None,
    prompts_source: str | None = None,
    order: Literal["random", "file"] = "random",
    limit: int = 64,
    seed: int | None = None,
    batch_size: int | None = None,
    replace: bool = False,
    command: Sequence[str] = (),
) -> ValidationPlan:
    """Choose operating points and prompts; loads no model.

    What was validated before under this name stays in: the plan holds those points too.

    Raises
    ------
    UserError, UsageError
        If the run is not derived, nothing derived matches, no fresh prompt is left, or the stored
        validation is of another seed, other prompts or settings derived anew since, and `replace`
        is not given. Points that are infeasible are a result: they are listed, not rerun.
    """
    derivation = read_record(run, DerivationRecord, name)
    calibration = read_record(run, CalibrationRecord)
    calibrated = read_record(run, RunRecord)
    if not shard_paths(run):
        raise UserError(
            f"{run}: holds no trace shard, which predictions are made from; calibrate again"
        )
    wanted = None if policies is None else [policy_class(one).name for one in policies]
    chosen = _chosen_points(derivation, wanted, rules, points)
    settings = calibration.settings
    source = prompts_source or (None if settings.prompts == "shipped" else settings.prompts)
    seed = settings.seed + 1 if seed is None else seed
    prompts = draw_prompts(
        read_prompts(source), "validation", limit, seed, order, set(calibrated.prompt_keys)
    )
    plan = ValidationPlan(
        run=run,
        name=name,
        derivation=derivation,
        calibration=calibration,
        points=tuple(point for point in chosen if point.feasible),
        infeasible=tuple(
            Infeasible(policy=point.policy, rule=point.rule, reason=point.reason)
            for point in chosen
            if not point.feasible
        ),
        prompts=tuple(prompts),
        thetas=read_axes(shard_paths(run)[0]).thetas,
        order=order,
        seed=seed,
        batch_size=batch_size,
        command=tuple(command),
    )
    if replace or not record_path(run, ValidationRecord, name).is_file():
        return plan
    return _with_earlier(plan, read_record(run, ValidationRecord, name))


def _chosen_points(
    derivation: DerivationRecord,
    policies: Sequence[str] | None,
    rules: Sequence[str] | None,
    points: Sequence[str] | None,
) -> list[OperatingPoint]:
    derived = derivation.operating_points
    known = ", ".join(sorted(point.key for point in derived))
    for option, wanted, there in (
        ("--policy", policies, {point.policy for point in derived}),
        ("--rule", rules, {point.rule for point in derived}),
        ("--point", points, {point.key for point in derived}),
    ):
        for lacking in sorted(set(wanted or ()) - there):
            raise UsageError(
                f"{option} {lacking}: not derived, `hlm derive` makes it; derived are {known}"
            )
    chosen = [
        point
        for point in derived
        if (policies is None or point.policy in policies)
        and (rules is None or point.rule in (*rules, "none"))
        and (points is None or point.key in points)
    ]
    if not chosen:
        raise UsageError(
            f"no derived operating point matches --policy, --rule and --point; derived are {known}"
        )
    return chosen


def _with_earlier(plan: ValidationPlan, earlier: ValidationRecord) -> ValidationPlan:
    """The plan with the points that were validated before, or a reason why they cannot stay."""
    file = record_path(plan.run, ValidationRecord, plan.name).name
    way_out = "--replace writes it anew, and keeps every rerun"
    ids = {prompt.prompt_id for prompt in plan.prompts}
    if earlier.seed != plan.seed:
        raise UsageError(f"--seed {plan.seed}: {file} is of seed {earlier.seed}; {way_out}")
    if set(earlier.prompt_ids) != ids:
        raise UsageError(
            f"--limit, --prompts, --order: {file} is of {len(earlier.prompt_ids)} prompts, these "
            f"are {len(ids)}, {len(ids & set(earlier.prompt_ids))} of them the same; {way_out}"
        )
    derived = {point.key: point for point in plan.derivation.operating_points}
    kept = {point.key: point for point in plan.points}
    for rerun in earlier.reruns:
        key = f"{rerun.policy}/{rerun.rule}"
        point = derived.get(key)
        if (
            point is None
            or not point.feasible
            or rerun_path(plan.run, plan.identity(point)).name != rerun.folder
        ):
            raise UsageError(
                f"{file} judged {key} at {rerun.folder}, which is not what is derived now; "
                f"{way_out}"
            )
        kept[key] = point
    infeasible = {(one.policy, one.rule): one for one in (*earlier.infeasible, *plan.infeasible)}
    return replace(
        plan,
        points=tuple(point for key, point in derived.items() if key in kept),
        infeasible=tuple(infeasible.values()),
    )


def check_pair(calibration: CalibrationRecord, pair: LoadedPair) -> None:
    """Refuse another pair than the one that was calibrated.

    Raises
    ------
    UserError
    """
    for side, now in (("slm", pair.slm_identity), ("llm", pair.llm_identity)):
        before = getattr(calibration.pair, side)
        if before.sha256 != now.sha256 or before.drop_layers != tuple(now.drop_layers):
            raise UserError(
                f"the {side} is not the calibrated one ({before.label}, hash "
                f"{str(before.sha256)[:12]}; now {str(now.sha256)[:12]}); calibrate again"
            )


def decode_missing(
    plan: ValidationPlan,
    pair: LoadedPair,
    told: Told | None = None,
    crew: Crew | None = None,
) -> None:
    """Decode what is not there yet of the plan's reruns; each batch is kept as soon as it is done.

    Parameters
    ----------
    plan : ValidationPlan
    pair : LoadedPair
    told : Told, optional
        Whom to tell of steps, batches and remarks.
    crew : Crew, optional
        Who decodes; this process if not given.

    Raises
    ------
    UserError
        If the pair is not the one that was calibrated.
    """
    from calibrate.decode.engine import DecodingSettings
    from calibrate.decode.memory import automatic_batch_size

    check_pair(plan.calibration, pair)
    crew = crew or OwnProcess(pair)
    max_new_tokens, missing = plan.calibration.settings.max_new_tokens, plan.missing
    prompts = tokenize_prompts(plan.prompts, pair.tokenizer, max_new_tokens, pair.max_context)
    settings = DecodingSettings(
        sampling=plan.calibration.settings.sampling,
        max_new_tokens=max_new_tokens,
        batch_size=plan.batch_size
        or automatic_batch_size(
            pair, prompts, max_new_tokens, len(missing), crew.num_beside, crew.worker_bytes
        ),
        seed=plan.seed,
        thetas=Temperatures(plan.thetas),
        trace="minimal",
    )
    made = provenance(plan.command).model_dump(mode="json")
    reruns = {
        path: Rerun(plan.sources[point.key], {**plan.identity(point), "provenance": made})
        for path, point in missing.items()
    }
    decode_reruns(crew, prompts, reruns, settings, told or Told())


def compare_reruns(plan: ValidationPlan, num_prompt_tokens: Mapping[str, int]) -> ValidationRecord:
    """Hold the plan's reruns on disk against the predictions; write the validation.

    Decodes nothing.

    Parameters
    ----------
    plan : ValidationPlan
    num_prompt_tokens : mapping of str to int
        Tokens of each prompt, by its id: whoever asks the server sends it the prompt once.
    """
    from calibrate.derive.predict import economics_of, measured_tokens
    from calibrate.derive.roads import read_roads
    from calibrate.validate.comparison import common_strata, compare, coverage
    from calibrate.validate.context_shift import context_shift, pooled_shift

    derivation, confidence = plan.derivation, plan.derivation.confidence
    economics = economics_of(derivation)
    roads = read_roads(plan.run, plan.calibration)
    calibration = roads.server
    cells, counted, reruns, shifts = [], [], [], []
    judged: set[Path] = set()  # a rerun that two points share counts once
    references = [
        plan.trace(point) for point in plan.points if plan.policies[point.key].follows_server
    ]
    for point in plan.points:
        policy = plan.policies[point.key]
        trace = plan.trace(point)
        lengths = np.array([num_prompt_tokens[one] for one in trace.prompt_ids], dtype=float)
        compared = compare(point, policy, roads, trace, lengths, economics, confidence)
        cells += [one.cell for one in compared]
        shift = context_shift(point, policy, roads, trace, references, confidence)
        if plan.paths[point.key] not in judged:
            judged.add(plan.paths[point.key])
            counted += compared
            shifts += [] if shift is None else [shift]
        tokens = measured_tokens(trace, policy, lengths)
        reruns.append(_rerun_info(point, plan.paths[point.key].name, tokens, economics, derivation))
    strata = common_strata(calibration.categories, [prompt.category for prompt in plan.prompts])
    result = ValidationRecord(
        derivation=plan.name,
        provenance=provenance(plan.command),
        pair=derivation.pair,
        seed=plan.seed,
        order=plan.order,
        prompt_ids=tuple(prompt.prompt_id for prompt in plan.prompts),
        confidence=confidence,
        num_prompts=len(plan.prompts),
        num_calibration_prompts=derivation.num_prompts,
        num_tokens=sum(rerun.num_tokens for rerun in reruns),
        strata="category" if strata else None,
        reruns=tuple(reruns),
        infeasible=plan.infeasible,
        context_shift=tuple(shift.record for shift in shifts),
        pooled_shift=pooled_shift(shifts, roads, references[0], confidence) if shifts else None,
        cells=tuple(cells),
        coverage=coverage(counted, confidence),
    )
    write_record(plan.run, result, plan.name)
    return result


def _rerun_info(
    point: OperatingPoint,
    folder: str,
    tokens: PolicyTokens,
    economics: Economics,
    derivation: DerivationRecord,
) -> RerunInfo:
    """What figures show of a rerun beside its cells."""
    from calibrate.derive.curves import sent_bits, size_distribution, throughput_curves
    from calibrate.run.figure import AMOUNT, as_figure
    from hlmtheory.clusters import mean_over_tokens

    sent = tokens.skip < 0.5
    entries = Figure(value=None)
    if tokens.policy.role == "both" and sent.any():
        estimate = mean_over_tokens(
            np.where(sent, tokens.entries, np.nan), tokens.prompt_index, tokens.num_prompts
        )
        entries = as_figure(estimate, "", derivation.confidence, *AMOUNT)
    confidence, sweep = derivation.confidence, derivation.sweep
    compared = any((one.policy, one.rule) == (point.policy, point.rule)
                   for one in derivation.payloads)  # fmt: skip
    return RerunInfo(
        policy=point.policy,
        rule=point.rule,
        folder=folder,
        num_tokens=len(tokens.skip),
        entries_per_sent_token=entries,
        throughput=None
        if sweep is None
        else throughput_curves(point, tokens, economics, sweep.grid, confidence),
        payload=sent_bits(tokens, economics) if compared else None,
        sizes=size_distribution(tokens.entries[sent])
        if tokens.policy.entries_vary and sent.any()
        else None,
    )
