"""A small run of random laws, known to the last digit, made by the project's own stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibrate.derive.derivation import derive_run
from calibrate.derive.predict import point_policy, remembered
from calibrate.fit.summary import summarise
from calibrate.run.folder import DEFAULT_NAME, provenance, read_record, write_record
from calibrate.run.prompts import Prompt
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    DeriveRequest,
    Figure,
    GivenModels,
    ModelIdentity,
    PairIdentity,
    Pilot,
    RunRecord,
    RunSettings,
    Timings,
    ValidationRecord,
)
from calibrate.run.traces import Trace, next_shard, read_trace, shard_paths, write_shard
from calibrate.validate.validation import ValidationPlan, compare_reruns
from hlmtheory.policies import Policy, calibration_policy, policy_names
from hlmtheory.steps import COLUMNS, Axes, LawStep

VOCAB = 256
NUM_PROMPTS, NUM_STEPS = 12, 16
CATEGORIES = ("code", "prose")
RISKS = (0.02, 0.05)
STRIDE = 4
AXES = Axes(VOCAB)
OF_THE_ENGINE = {"prompt_id", "step", "skipped", "accepted"}


@dataclass(frozen=True)
class UniformNoise:
    """Random numbers of a step, from one generator."""

    generator: np.random.Generator
    num: int

    def __post_init__(self) -> None:
        draw = self.generator.random
        for name, shape in (("draft", (2,)), ("accept", ()), ("resample", (2,))):
            object.__setattr__(self, name, draw((self.num, *shape)))
        object.__setattr__(self, "perturbation", draw((self.num, len(AXES.thetas))))
        object.__setattr__(self, "_races", self.generator.exponential(size=(self.num, VOCAB)))

    def races(self) -> np.ndarray:
        return self._races  # type: ignore[attr-defined]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def synthetic_step(
    seed: int, policy: Policy | None = None, num_prompts: int = NUM_PROMPTS
) -> tuple[LawStep, np.ndarray, np.ndarray]:
    """Contexts with both laws, decoded under a policy: the step, prompt and step of each row.

    Contexts are drawn from one law whatever the outputs, so that predictions hold.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(NUM_STEPS // 2, NUM_STEPS + 1, size=num_prompts)
    lengths[0] = NUM_STEPS
    row = np.repeat(np.arange(num_prompts), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths])
    num = len(row)
    sharpness = np.exp(rng.normal(1.3, 0.8, num) + 0.2 * rng.normal(size=num_prompts)[row])
    z = sharpness[:, None] * rng.normal(size=(num, VOCAB))
    y = softmax(z + 0.5 * rng.normal(size=(num, VOCAB)))
    attended = 20 + steps
    entropy = np.log(attended - 1) * rng.uniform(0.6, 0.95, num)
    width = len(AXES.attention_sizes)
    attention = {
        "attention_sink": rng.uniform(0.2, 0.5, num),
        "attention_entropy": entropy,
        "context_attention": rng.uniform(0.2, 0.6, num),
        "num_attended": attended,
        "topk_attention": np.exp(-entropy)[:, None] * rng.uniform(0.95, 2.0, (num, width)),
    }
    step = LawStep(AXES, z, softmax(z), y, UniformNoise(rng, num), VOCAB, attention)
    policy = policy or calibration_policy()
    known = Trace({"step": steps, "prompt_index": row, **attention}, [], AXES)
    step = step.with_columns(dict(remembered(known, policy)))
    return step.drafted(policy.draft(step)), row, steps


def synthetic_columns(
    seed: int, policy: Policy | None = None, num_prompts: int = NUM_PROMPTS
) -> dict[str, np.ndarray]:
    """Columns of a full trace of these contexts, worked out as the engine does."""
    policy = policy or calibration_policy()
    step, row, steps = synthetic_step(seed, policy, num_prompts)
    answer = policy.answer(step)
    step = step.with_columns({"output_token": answer.output})
    expected, drawn = policy.outcome(step), policy.drawn(step)
    columns = {
        "row": row,
        "step": steps,
        "skipped": drawn.skip > 0.5,
        "accepted": answer.accepted,
        "policy_skip_prob": expected.skip,
        "policy_risk": expected.risk,
        "policy_bias": expected.bias,
        "policy_log_ratio": policy.log_ratio(step)[0],
        "policy_entries": drawn.entries,
    }
    for name, column in COLUMNS.items():
        if column.text and name not in columns and name not in OF_THE_ENGINE:
            columns[name] = np.array(step[name])
    for name in ("truncation_table", "head_agreement", "head_race"):
        columns[name][(steps + row) % STRIDE != 0] = np.nan
    return columns


def identity(name: str) -> PairIdentity:
    model = ModelIdentity(
        label="M", sha256="ab" * 32, drop_layers=(), num_parameters=1000, num_layers=2
    )
    return PairIdentity(
        name=name, slm=model, llm=model, vocab_size=VOCAB, dtype="float32", device="cpu"
    )


def run_record(pair: str, prompts: str, prompt_ids: tuple[str, ...], num_tokens: int) -> RunRecord:
    """run.json of a finished calibration."""
    times = {"t_slm_ms": 20.0, "t_llm_ms": 30.0, "t_uncertainty_ms": 1.0}
    return RunRecord(
        complete=True,
        pair=identity(pair),
        settings=RunSettings(
            pair=pair, given=GivenModels(), prompts=prompts, order="random",
            limit=len(prompt_ids), max_new_tokens=NUM_STEPS, batch_size=4, temperature=1.0, seed=0,
            dtype="float32", device="cpu", trace="full",
        ),
        prompt_ids=prompt_ids,
        prompt_keys=(),
        provenance=provenance(["hlm", "calibrate", "--prompts", prompts]),
        timings=Timings(**{key: Figure(value=one, unit="ms") for key, one in times.items()}),
        num_threads=1,
        num_prompts=len(prompt_ids),
        num_tokens=num_tokens,
        wall_s=1.0,
        forward_s=0.5,
    )  # fmt: skip


def make_calibration(
    run: Path, pair: str = "synthetic", prompts: str = "p.jsonl", prompt_name: str = "prompt"
) -> None:
    """A calibrated run in two shards."""
    columns = synthetic_columns(0)
    names = tuple(f"{prompt_name}-{i:02d}" for i in range(NUM_PROMPTS))
    half = NUM_PROMPTS // 2
    for number, first in enumerate((0, half)):
        rows = (columns["row"] >= first) & (columns["row"] < first + half)
        part = {name: values[rows] for name, values in columns.items()}
        part["row"] = part["row"] - first
        path = run / "traces" / f"shard-{number:05d}.parquet"
        categories = CATEGORIES * (half // 2)
        write_shard(path, part, names[first : first + half], {}, AXES, categories)
    info = run_record(pair, prompts, names, len(columns["row"]))
    write_record(run, info)
    write_record(run, summarise(read_trace(shard_paths(run)), info))


def add_pilot(run: Path) -> Pilot:
    """A pilot on every prompt of a calibration, along other contexts."""
    info = read_record(run, RunRecord)
    columns = synthetic_columns(3)
    categories = CATEGORIES * (NUM_PROMPTS // 2)
    path = next_shard(run / "pilot")
    write_shard(path, columns, list(info.prompt_ids), {}, AXES, categories)
    pilot = Pilot(
        policy="u-hlm", threshold=0.5, risk=0.02, prompt_ids=info.prompt_ids,
        num_tokens=len(columns["row"]), wall_s=1.0,
    )  # fmt: skip
    write_record(run, info.model_copy(update={"pilot": pilot}))
    return pilot


def make_run(run: Path, prompts_file: str = "p.jsonl", prompt_name: str = "prompt") -> None:
    """A calibrated and derived run, by the project's own stages from synthetic shards on."""
    make_calibration(run, prompts=prompts_file, prompt_name=prompt_name)
    derive_run(run, DeriveRequest(policies=policy_names(), risks=RISKS))


def add_validation(run: Path, name: str = DEFAULT_NAME) -> ValidationRecord:
    """Reruns of every feasible point on other contexts, compared as the project does."""
    derivation = read_record(run, DerivationRecord, name)
    calibration = read_record(run, CalibrationRecord)
    ids = [f"fresh-{i:02d}" for i in range(NUM_PROMPTS)]
    categories = CATEGORIES * (NUM_PROMPTS // 2)
    plan = ValidationPlan(
        run=run,
        name=name,
        derivation=derivation,
        calibration=calibration,
        points=tuple(point for point in derivation.operating_points if point.feasible),
        infeasible=(),
        prompts=tuple(
            Prompt(prompt_id=one, text=one, category=category, split=None)
            for one, category in zip(ids, categories, strict=True)
        ),
        thetas=AXES.thetas,
        order="random",
        seed=1,
        batch_size=None,
        command=("hlm", "validate"),
    )
    for point in plan.points:
        path = plan.paths[point.key]
        if not path.is_dir():
            policy = point_policy(derivation, point, calibration.learned)
            write_shard(next_shard(path), synthetic_columns(1, policy), ids, {}, AXES, categories)
    return compare_reruns(plan, dict.fromkeys(ids, 20))
