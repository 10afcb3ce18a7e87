"""`hlm calibrate`: decode the calibration prompts losslessly, write traces, fit, run a pilot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibrate.fit.pilot import DEFAULT_PROMPTS, plan_pilot, source_of
from calibrate.fit.summary import summarise
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import (
    LOCK_NAME,
    open_run,
    provenance,
    read_record,
    record_path,
    write_record,
)
from calibrate.run.lock import locked
from calibrate.run.prompts import (
    MIN_PROMPTS,
    Prompt,
    draw_prompts,
    read_prompts,
    text_key,
    tokenize_prompts,
)
from calibrate.run.records import (
    READ_BYTES,
    READ_TOKENS,
    CalibrationRecord,
    GivenModels,
    ModelIdentity,
    PairIdentity,
    RunRecord,
    RunSettings,
)
from calibrate.run.stopping import finishing
from calibrate.run.traces import (
    Stored,
    finished_prompts,
    next_shards,
    pilot_paths,
    prompts_to_read,
    read_trace,
    shard_paths,
    shards_in,
    stored_in,
)
from calibrate.work.crew import Crew, OwnProcess, Told
from calibrate.work.job import Job, Output, PolicySource
from hlmtheory.policies import calibration_policy

if TYPE_CHECKING:
    from calibrate.pairs.registry import LoadedPair, PairSpec
    from calibrate.run.prompts import TokenizedPrompt
    from hlmtheory.sampled_law import Sampling
    from hlmtheory.steps import Axes


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked for, checked before any model is loaded.

    Attributes
    ----------
    spec : PairSpec
    prompts_source : str or None
        File or hub id; None for the shipped prompts.
    order : {"random", "file"}
        Draw prompts from the seed, or take the file's first.
    limit, max_new_tokens, seed : int
    batch_size : int or None
        None: as many as memory and lengths allow.
    sampling : Sampling
    device, dtype : str
    trace : {"full", "minimal"}
    pilot : int
        Prompts to decode again under a policy, so that predictions know what its own road is like;
        0 for none.
    read_tokens : int
        Tokens that are looked at once they are recorded; of more, those of drawn prompts.
    run : Path
    given : GivenModels
    resume : bool
    command : tuple of str
    """

    spec: PairSpec
    prompts_source: str | None
    order: Literal["random", "file"]
    limit: int
    max_new_tokens: int
    batch_size: int | None
    seed: int
    sampling: Sampling
    device: str
    dtype: str
    trace: Literal["full", "minimal"]
    run: Path
    given: GivenModels
    pilot: int = DEFAULT_PROMPTS
    read_tokens: int = READ_TOKENS
    resume: bool = False
    command: tuple[str, ...] = ()

    def num_pilot(self, prompts: Sequence[Prompt]) -> int:
        """Prompts of the pilot; none if too few, or of a minimal trace: nothing is predicted."""
        num = min(self.pilot, len(prompts)) if self.trace == "full" else 0
        return num if num >= MIN_PROMPTS else 0

    def settings(self) -> RunSettings:
        """What decides the tokens of the trace, as it is stored in run.json."""
        return RunSettings(
            pair=self.spec.name,
            prompts=self.prompts_source or "shipped",
            **asdict(self.sampling),
            **{
                name: getattr(self, name)
                for name in RunSettings.model_fields.keys() & vars(self).keys()
            },
        )


def prepare(request: CalibrationRequest) -> list[Prompt]:
    """Check the run folder and draw the prompts; loads no model.

    Raises
    ------
    UserError, UsageError
        One line that says what is wrong.
    """
    prompts = draw_prompts(
        read_prompts(request.prompts_source),
        "calibration",
        request.limit,
        request.seed,
        request.order,
    )
    if (request.run / LOCK_NAME).exists():  # of another process, or left by one that was killed
        with locked(request.run):
            pass
    open_run(request.run, request.settings(), request.resume)
    return prompts


def finished(request: CalibrationRequest) -> CalibrationRecord | None:
    """What a prepared request to resume would make, where it is there already, token for token."""
    state = open_run(request.run, request.settings(), request.resume)
    if state != "finished":
        return None
    info = read_record(request.run, RunRecord)
    pilot = info.pilot.prompt_ids if info.pilot else ()
    for part, wanted in ((shard_paths, info.prompt_ids), (pilot_paths, pilot)):
        if finished_prompts(part(request.run)) != set(wanted):
            return None
    try:
        fitted = read_record(request.run, CalibrationRecord)
    except UserError:  # fitted anew, which takes seconds
        return None
    ids, num_tokens = info.prompt_ids, info.num_tokens
    read = prompts_to_read(ids, num_tokens, request.read_tokens, request.seed)
    if len(read) == fitted.num_prompts:
        return fitted
    if derived := sorted(request.run.glob("operating_points*.json")):
        raise UsageError(
            f"--read-tokens {request.read_tokens}: {derived[0]} rests on {fitted.num_prompts:,} "
            f"prompts, this would read {len(read):,}; move it away, or copy the run without it"
        )
    return None


def calibrate(
    request: CalibrationRequest,
    prompts: Sequence[Prompt],
    pair: LoadedPair,
    told: Told | None = None,
    crew: Crew | None = None,
) -> CalibrationRecord:
    """Run the calibration of a prepared request and write run.json and calibration.json.

    Parameters
    ----------
    request : CalibrationRequest
    prompts : sequence of Prompt
        From :func:`prepare`.
    pair : LoadedPair
    told : Told, optional
        Whom to tell of steps and remarks.
    crew : Crew, optional
        Who decodes; this process if not given.

    Raises
    ------
    UserError
        If the shards of a run to be resumed are of other prompts, models or axes.
    """
    with locked(request.run, make=True):
        open_run(request.run, request.settings(), request.resume)
        return _calibrate(request, prompts, pair, told or Told(), crew or OwnProcess(pair))


def _calibrate(
    request: CalibrationRequest,
    prompts: Sequence[Prompt],
    pair: LoadedPair,
    told: Told,
    crew: Crew,
) -> CalibrationRecord:
    import torch

    from calibrate.decode.engine import DecodingSettings, batches_by_length
    from calibrate.decode.models import transformer_models
    from calibrate.decode.timing import measure_timings

    tokenized = tokenize_prompts(prompts, pair.tokenizer, request.max_new_tokens, pair.max_context)
    begun = record_path(request.run, RunRecord).is_file()
    earlier = read_record(request.run, RunRecord) if begun else None
    settings = DecodingSettings(
        sampling=request.sampling,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size or _batch_size(request, pair, tokenized, earlier, crew),
        seed=request.seed,
        trace=request.trace,
    )
    axes = settings.axes(pair.vocab_size)
    slm, llm = transformer_models(pair)
    info = RunRecord(
        complete=False,
        pair=pair_identity(pair),
        settings=request.settings(),
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        prompt_keys=tuple(text_key(prompt.text) for prompt in prompts),
        provenance=provenance(request.command),
        timings=measure_timings(slm, llm, tokenized[0].tokens, settings.thetas),
        num_threads=torch.get_num_threads(),
        num_together=settings.batch_size,
        num_prompts=0,
        num_tokens=0,
        wall_s=0.0,
        forward_s=0.0,
    )
    if earlier is not None:
        _check_same_inputs(request.run, earlier, info)
        info = info.model_copy(update={"pilot": earlier.pilot})
    held = {
        folder: stored_in(shards_in(folder))
        for folder in (request.run / "traces", request.run / "pilot")
    }
    _check_same_axes(held.values(), axes)
    write_record(request.run, info)
    header = info.model_dump(mode="json", include={"pair", "settings", "provenance"})

    def decode_to_shards(folder: Path, policy: PolicySource, wanted: Collection[str]) -> Stored:
        """Decode what a folder lacks and write one shard a batch, with the time that it took."""
        done = held[folder]
        left = [
            p for p in tokenized if p.prompt_id in wanted and p.prompt_id not in done.prompt_ids
        ]
        batches = batches_by_length(left, settings.batch_size)
        paths = next_shards(folder, len(batches))
        jobs = [
            Job(tuple(batch), (Output(path.absolute(), policy, header),), settings)
            for path, batch in zip(paths, batches, strict=True)
        ]
        with finishing("the shard in work" if crew.num_workers == 1 else "every shard in work"):
            for _ in crew.run(jobs, told):
                pass
        return done | stored_in([path for path in paths if path.is_file()])

    num = sum(len(one.prompt_ids) for one in held.values())
    told.total((len(tokenized) + request.num_pilot(prompts) - num) * request.max_new_tokens)
    stored = decode_to_shards(
        request.run / "traces", PolicySource(calibration_policy().name), info.prompt_ids
    )
    if stored.prompt_ids != set(info.prompt_ids):
        raise UserError(
            f"{request.run}: its shards do not hold the {len(tokenized)} prompts of this run; "
            "name another folder"
        )
    info = info.model_copy(
        update={
            "num_prompts": len(stored.prompt_ids),
            "num_tokens": stored.num_tokens,
            "wall_s": stored.wall_s,
            "forward_s": stored.forward_s,
        }
    )
    most = request.read_tokens
    read = prompts_to_read(info.prompt_ids, info.num_tokens, most, request.seed)
    chosen = set(read)
    prompts = [prompt for prompt in prompts if prompt.prompt_id in chosen]
    if len(read) < info.num_prompts:
        told.note(
            f"fitted on {len(read):,} of {info.num_prompts:,} prompts, drawn at random; "
            f"--resume --read-tokens {info.num_tokens} reads all, with "
            f"{1e-9 * READ_BYTES * info.num_tokens:.2g} GB of memory to derive"
        )
    trace = read_trace(
        shard_paths(request.run), prompts=read if len(read) < info.num_prompts else None
    )
    if set(trace.prompt_ids) != chosen:
        raise UserError(
            f"{request.run}/traces holds {trace.num_prompts} of the {len(chosen)} prompts that "
            "were just there: a shard went; bring it back, or decode its prompts with --resume"
        )
    # What is planned stays, also where a resumed run reads more or fewer tokens.
    pilot = info.pilot or plan_pilot(trace, prompts, request.num_pilot(prompts), request.seed)
    if pilot is not None:
        write_record(request.run, info.model_copy(update={"pilot": pilot}))
        spent = decode_to_shards(request.run / "pilot", source_of(pilot), pilot.prompt_ids)
        pilot = pilot.model_copy(update={"num_tokens": spent.num_tokens, "wall_s": spent.wall_s})
    info = info.model_copy(update={"complete": True, "pilot": pilot})
    summary = summarise(trace, info)
    write_record(request.run, summary)
    write_record(request.run, info)
    return summary


def _batch_size(
    request: CalibrationRequest,
    pair: LoadedPair,
    prompts: Sequence[TokenizedPrompt],
    earlier: RunRecord | None,
    crew: Crew,
) -> int:
    """What the memory holds, but no more than before: other batches would round otherwise."""
    from calibrate.decode.memory import automatic_batch_size

    fits = automatic_batch_size(
        pair, prompts, request.max_new_tokens, 1, crew.num_beside, crew.worker_bytes
    )
    return (
        fits if earlier is None or earlier.num_together is None else min(fits, earlier.num_together)
    )


def _check_same_inputs(run: Path, earlier: RunRecord, now: RunRecord) -> None:
    """Refuse to resume on other prompts or models."""
    texts, texts_now = (
        dict(zip(one.prompt_ids, one.prompt_keys, strict=True)) for one in (earlier, now)
    )
    for what, before, after in (
        ("text of prompt ", texts, texts_now), ("", _flat(earlier.pair), _flat(now.pair))
    ):  # fmt: skip
        for key in before | after:
            if before.get(key) != after.get(key):
                raise UserError(
                    f"--resume: {what}{key} was {before.get(key)!r} in {run}, now "
                    f"{after.get(key)!r}; name another folder"
                )


def _check_same_axes(held: Iterable[Stored], axes: Axes) -> None:
    """Refuse to resume on shards whose columns mean something else."""
    for before, path in (pair for stored in held for pair in stored.axes.items()):
        then, now = before.to_dict(), axes.to_dict()
        for name, value in now.items():
            if then[name] != value:
                raise UserError(
                    f"--resume: {path.name} has the axis {name} = {then[name]}, this version "
                    f"writes {value}; name another folder"
                )


def _flat(pair: PairIdentity) -> dict[str, Any]:
    """What a pair must have kept, by name: all but the device, which may change."""
    content = pair.model_dump(exclude={"device"})
    models = {
        f"{side} {key}": value
        for side in ("slm", "llm")
        for key, value in content.pop(side).items()
    }
    return content | models


def pair_identity(pair: LoadedPair) -> PairIdentity:
    """Names and hashes of both models, as stored beside every result."""
    slm, llm = (ModelIdentity(**asdict(model)) for model in (pair.slm_identity, pair.llm_identity))
    return PairIdentity(
        name=pair.name,
        slm=slm,
        llm=llm,
        vocab_size=pair.vocab_size,
        dtype=pair.dtype,
        device=pair.device,
    )
