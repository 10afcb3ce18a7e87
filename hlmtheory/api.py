"""Everything that `hlm` does, from Python: calibrate, derive, validate, figures.

Each verb is the command of that name, its parameters are the command's options; it returns the
typed record that the command writes: with a short repr, and `to_pandas()` for a table. No other
module of `hlmtheory` looks at `calibrate` and `paper_figs`; this one does when a verb is called, so
that importing it brings in neither models nor plots.

`say` is told lines worth reading, `progress` a :class:`calibrate.run.watch.Progress` now and then;
nobody is told anything unless given. What a command refuses, a verb refuses with the same line, as
`UsageError` or `UserError` of `calibrate.run.errors`.

Examples
--------
Two folders with models that share a tokenizer, and a prompt a line:

```python
from hlmtheory.api import Models, calibrate, derive, figures, report, tokens, validate

models = Models(slm="device", llm="server")
calibration = calibrate("run", models, prompts="prompts.txt", limit=12, max_new_tokens=8)
calibration.to_pandas()  # slope, intercept, correlation, with their intervals
tokens("run").groupby("prompt_id")["rejection_prob"].mean()

derivation = derive("run", policies=["hlm", "u-hlm", "r-hlm"], risks=[0.05], link="lte")
table = derivation.to_pandas()
table[table.feasible].sort_values("uplink_bits_per_token")

validation = validate("run", models, rules=["risk-0.05"], limit=8)
validation.to_pandas().query("covered == False")

files = figures("run", say=print)
page = report("run")
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from calibrate.pairs.models import Models
    from calibrate.run.records import CalibrationRecord, DerivationRecord, ValidationRecord
    from calibrate.run.watch import Progress, Watch
    from calibrate.validate.validation import ValidationPlan
    from calibrate.work.crew import Staff
    from hlmtheory.sampled_law import Sampling

    Say = Callable[[str], None]
    OnProgress = Callable[[Progress], None]

__all__ = ["Models", "calibrate", "derive", "figures", "report", "tokens", "validate"]


def __getattr__(name: str) -> Any:
    """`Models`, which lies with the pairs, when it is asked for."""
    if name != "Models":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calibrate.pairs.models import Models

    return Models


def calibrate(
    run: str | Path,
    models: Models | None = None,
    *,
    prompts: str | None = None,
    order: Literal["random", "file"] = "random",
    limit: int = 64,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    sampling: Literal["options", "generation-config"] = "options",
    seed: int = 0,
    trace: Literal["full", "minimal"] = "full",
    pilot: int = 64,
    read_tokens: int = 250_000,
    num_workers: int = 1,
    engine: Literal["process", "ray"] = "process",
    address: str | None = None,
    resume: bool = False,
    say: Say | None = None,
    progress: OnProgress | None = None,
    command: Sequence[str] = (),
) -> CalibrationRecord:
    """Decode prompts speculatively; record uncertainty, importance and rejection of each token.

    Parameters
    ----------
    run : path
        Folder to make.
    models : Models, optional
        The demonstration pair if not given.
    prompts : str, optional
        A .jsonl or .txt file, or a hub dataset; the shipped prompts if not given.
    order : {"random", "file"}
        Draw the prompts from the seed, or take the first ones of the file.
    limit, max_new_tokens : int
        Prompts to use, and tokens a prompt, at most.
    batch_size : int, optional
        Prompts decoded together; as many as memory allows if not given.
    temperature, top_k, top_p, repetition_penalty : optional
        Sampling of both models' laws.
    sampling : {"options", "generation-config"}
        Those four, or the server model's own with what of them is given in its place.
    seed : int
    trace : {"full", "minimal"}
        Gated policies are derived from a full one only.
    pilot : int
        Prompts decoded again under a policy; 0 for none.
    read_tokens : int
        Tokens that fit and derivation look at, at most; of more, those of prompts drawn at random.
    num_workers : int
        Workers that decode batches; one of engine "process" is this process. A script that asks
        for more keeps its calls under ``if __name__ == "__main__":``, for it is imported by each.
    engine : {"process", "ray"}
        Processes of this machine, or actors of a Ray cluster.
    address : str, optional
        Of the cluster, or "auto"; one is started on this machine if not given.
    resume : bool
        Go on with an interrupted run.
    say, progress : callable, optional
    command : sequence of str
        For the record: the command line that asked.

    Returns
    -------
    CalibrationRecord
        As it lies in RUN/calibration.json.
    """
    from calibrate.pairs.models import Models, absolute
    from calibrate.run.errors import UsageError
    from calibrate.run.options import at_least, check_decoding, one_of
    from calibrate.run.prompts import MIN_PROMPTS, check_source, drawn_notes
    from calibrate.run.watch import TokenCount, Watch
    from calibrate.work.crew import Staff, Told

    run, watch = Path(run), Watch.of(say, progress)
    check_decoding(limit, max_new_tokens, batch_size, seed)
    staff = Staff(num_workers, engine, address)
    one_of("--sampling", sampling, "options", "generation-config")
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    chosen = _sampling(given)
    if 0 < pilot < MIN_PROMPTS:
        raise UsageError(f"--pilot {pilot}: allowed are 0, for none, and at least {MIN_PROMPTS}")
    at_least("--read-tokens", read_tokens, 1)
    one_of("--trace", trace, "full", "minimal")
    one_of("--order", order, "random", "file")
    models = models or Models()
    check_source(prompts)
    # What takes seconds to import, behind what can be wrong with the options.
    from calibrate.derive.caution import pair_cautions, sample_cautions
    from calibrate.fit.calibration import CalibrationRequest, finished, pair_identity, prepare
    from calibrate.fit.calibration import calibrate as run_calibration
    from calibrate.pairs.generation import not_applied
    from calibrate.run.lock import locked
    from calibrate.run.stopping import Interrupted, StoppedError
    from calibrate.run.traces import shard_paths
    from calibrate.run.wording import busy_text

    if sampling == "generation-config":
        chosen = _config_sampling(models, given, watch)
    request = CalibrationRequest(
        spec=models.spec,
        given=models.given,
        prompts_source=absolute(prompts),
        order=order,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        sampling=chosen,
        device=models.device,
        dtype=models.dtype,
        trace=trace,
        pilot=pilot,
        read_tokens=read_tokens,
        run=run,
        resume=resume,
        command=tuple(command),
    )
    drawn = prepare(request)
    if (done := finished(request)) is not None:
        watch.say(f"{run}: finished already, nothing to resume; go on with `hlm derive`")
        return done
    watch.lines(drawn_notes(drawn, limit))
    with locked(run, make=True):
        pair = models.load(trace == "full", watch)
        watch.lines(not_applied(models.spec, chosen))
        watch.warn(pair_cautions(pair_identity(pair)))
        count = TokenCount("calibrating", watch)
        told = Told(count.advance, count.set_total, note=watch.say)
        try:
            with staff.hire(models, pair, trace == "full") as crew:
                record = run_calibration(request, drawn, pair, told, crew)
        except Interrupted as error:
            raise StoppedError(
                f"interrupted: {len(shard_paths(run))} finished shards stay in {run}/traces; "
                "`hlm calibrate` with the same options and --resume goes on",
                error,
            ) from None
    if busy := busy_text(record.timings):
        watch.say(busy)
    watch.warn(sample_cautions(record))
    return record


def _sampling(given: Mapping[str, Any]) -> Sampling:
    """The sampling of the options that were given; whatever is wrong is named as an option."""
    from calibrate.run.errors import UsageError
    from hlmtheory.sampled_law import Sampling

    try:
        return Sampling(**given)
    except ValueError as error:
        name, _, rest = str(error).partition(" = ")
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from None


def _config_sampling(models: Models, given: Mapping[str, Any], watch: Watch) -> Sampling:
    """The server model's own sampling, with what was given in the place of its values."""
    from calibrate.pairs.generation import config_sampling

    models.fetch(watch)
    found = _sampling(asdict(config_sampling(models.spec)) | dict(given))
    watch.say(f"sampling of the server model's generation config, for both laws: {found}")
    return found


def derive(
    run: str | Path,
    *,
    name: str = "default",
    policies: Sequence[str] = (),
    replace: bool = False,
    say: Say | None = None,
    command: Sequence[str] = (),
    **request: Any,
) -> DerivationRecord:
    """Thresholds, truncation sizes and predicted risk, payload, time and energy.

    Parameters
    ----------
    run : path
        A folder that :func:`calibrate` made.
    name : str
        Of the derivation, and of what judges it.
    policies : sequence of str
        Names, or FILE.py:NAME of your own; all that are shipped if empty.
    replace : bool
        Let the result take the place of another that was validated.
    say : callable, optional
    command : sequence of str
    **request
        Any other field of :class:`calibrate.run.records.DeriveRequest`, whose defaults are the
        command's: score, risks, answer_risks, certify, answer_caps, confidence, link, profile,
        accounting, thetas, importances, draft_from_sent.

    Returns
    -------
    DerivationRecord
        As it lies in RUN/operating_points.json.
    """
    from calibrate.derive.caution import link_cautions, request_cautions, sample_cautions
    from calibrate.derive.certify import check_caps
    from calibrate.derive.derivation import derive_run, parse_importance, replaced_note
    from calibrate.derive.predict import economics_of
    from calibrate.run.errors import UsageError
    from calibrate.run.folder import check_name, read_record
    from calibrate.run.lock import locked
    from calibrate.run.options import inside, one_of
    from calibrate.run.records import CalibrationRecord, DeriveRequest
    from calibrate.run.watch import Watch
    from calibrate.run.wording import busy_text
    from hlmtheory.scores import SCORE_NAMES

    run, watch = Path(run), Watch.of(say, None)
    chosen = _policies(policies)
    unknown = sorted(set(request) - set(DeriveRequest.model_fields))
    if unknown:
        known = ", ".join(DeriveRequest.model_fields)
        raise UsageError(f"{unknown[0]} = {request[unknown[0]]!r}: unknown; known are {known}")
    fields = {
        key: one.default for key, one in DeriveRequest.model_fields.items() if key != "policies"
    } | request
    one_of("--score", fields["score"], *SCORE_NAMES)
    inside("--risk", fields["risks"], 0, 1)
    inside("--answer-risk", fields["answer_risks"], 0, 1)
    inside("--confidence", [fields["confidence"]], 0, 1)
    inside("--theta", fields["thetas"], 0, float("inf"))
    one_of("--accounting", fields["accounting"], "paper", "full")
    one_of("--certify", fields["certify"], "prompts", "tokens", "answers")
    for text in fields["importances"]:
        parse_importance(text)
    check_caps(fields["answer_caps"], fields["certify"])
    asked = DeriveRequest(policies=chosen, **fields)
    check_name(name)
    with locked(run):
        if note := replaced_note(run, asked, name, replace):
            watch.say(note)
        record = derive_run(run, asked, name, replace, command)
        calibration = read_record(run, CalibrationRecord)
    if asked.profile == "measured" and (busy := busy_text(calibration.timings)):
        watch.say(busy)
    priced = economics_of(record)
    watch.warn(sample_cautions(calibration))
    watch.warn(request_cautions(asked))
    watch.warn(link_cautions(asked.link, priced.link, priced.vocab_size))
    return record


def _policies(chosen: Sequence[str]) -> tuple[str, ...]:
    """Names and FILE.py:NAME as they were given, the files by their full path; all by default."""
    from calibrate.run.errors import UsageError
    from hlmtheory.policies import policy_class, policy_names

    out = []
    for one in chosen:
        try:
            policy_class(one)
        except ValueError as error:
            raise UsageError(
                f"--policy {one}: {str(error).removeprefix(f'policy {one}: ')}"
            ) from None
        path, colon, attribute = one.rpartition(":")
        out.append(f"{Path(path).resolve()}:{attribute}" if colon else one)
    return tuple(dict.fromkeys(out)) or policy_names()


def validate(
    run: str | Path,
    models: Models | None = None,
    *,
    name: str = "default",
    policies: Sequence[str] = (),
    rules: Sequence[str] = (),
    points: Sequence[str] = (),
    prompts: str | None = None,
    order: Literal["random", "file"] = "random",
    limit: int = 64,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    num_threads: int | None = None,
    num_workers: int = 1,
    engine: Literal["process", "ray"] = "process",
    address: str | None = None,
    replace: bool = False,
    say: Say | None = None,
    progress: OnProgress | None = None,
    command: Sequence[str] = (),
) -> ValidationRecord:
    """Rerun the pipeline at derived settings on fresh prompts; predicted against measured.

    Parameters
    ----------
    run : path
        A folder that was calibrated and derived.
    models : Models, optional
        The calibrated ones, if they are in memory; else they are loaded as the run names them, on
        `device` with `num_threads`.
    name : str
        Of the derivation.
    policies, rules, points : sequence of str
        Only points of these; all if empty. A point is POLICY/RULE.
    prompts, order, limit, batch_size
        As in :func:`calibrate`; no text that was calibrated on is used.
    seed : int, optional
        Another than the calibration's if not given.
    num_workers, engine, address
        As in :func:`calibrate`.
    replace : bool
        Let the result take the place of a validation on other prompts.
    say, progress : callable, optional
    command : sequence of str

    Returns
    -------
    ValidationRecord
        As it lies in RUN/validation.json.
    """
    from calibrate.run.folder import check_name
    from calibrate.run.lock import locked
    from calibrate.run.options import check_decoding, one_of
    from calibrate.run.prompts import drawn_notes
    from calibrate.run.watch import Watch
    from calibrate.validate.validation import prepare_validation
    from calibrate.work.crew import Staff

    run, watch = Path(run), Watch.of(say, progress)
    check_decoding(limit, 1, batch_size, seed, device, num_threads=num_threads)
    staff = Staff(num_workers, engine, address)
    one_of("--order", order, "random", "file")
    chosen = _policies(policies) if policies else None
    check_name(name)
    with locked(run):
        plan = prepare_validation(
            run,
            name,
            policies=chosen,
            rules=rules or None,
            points=points or None,
            prompts_source=prompts,
            order=order,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            replace=replace,
            command=command,
        )
        watch.lines(drawn_notes(plan.prompts, limit))
        return _rerun(plan, models, device, num_threads, staff, watch)


def _rerun(
    plan: ValidationPlan,
    models: Models | None,
    device: str,
    num_threads: int | None,
    staff: Staff,
    watch: Watch,
) -> ValidationRecord:
    """Decode what was not rerun before, and compare all."""
    from calibrate.pairs.loading import pair_tokenizer
    from calibrate.pairs.models import Models
    from calibrate.run.prompts import prompt_sizes
    from calibrate.run.stopping import Interrupted, StoppedError, finishing
    from calibrate.run.watch import TokenCount
    from calibrate.validate.validation import compare_reruns, decode_missing
    from calibrate.work.crew import Told

    if plan.num_kept:
        watch.say(f"{plan.num_kept} of {len(plan.points)} points were rerun before: reused")
    try:
        if plan.missing:
            attention = plan.needs_attention
            models = models or Models.of_run(plan.calibration, device, num_threads)
            pair = models.load(attention, watch)
            count = TokenCount("validating", watch)
            told = Told(count.advance, count.set_total, count.at_batch, watch.say)
            in_work = "the batch in work" if staff.num_workers == 1 else "every batch in work"
            with staff.hire(models, pair, attention) as crew, finishing(in_work):
                decode_missing(plan, pair, told, crew)
        tokenizer = pair_tokenizer((models or Models.of_run(plan.calibration)).spec)
        return compare_reruns(plan, prompt_sizes(plan.prompts, tokenizer))
    except Interrupted as error:
        raise StoppedError(
            f"interrupted: the finished batches stay in {plan.run}/reruns; the same command "
            "goes on with the others",
            error,
        ) from None


def figures(
    run: str | Path,
    *,
    name: str = "default",
    output: str | Path | None = None,
    paper: Literal[1, 2] | None = None,
    say: Say | None = None,
) -> list[Path]:
    """Draw every figure that the run's results allow, and its tables.

    Parameters
    ----------
    run : path
    name : str
        Of the derivation.
    output : path, optional
        RUN/figures if not given, with the name of another derivation; RUN/paper with `paper`.
    paper : {1, 2}, optional
        Columns of a paper that figures are wide; their words in text files beside them.
    say : callable, optional
        Told which figures were drawn, and what others lack.

    Returns
    -------
    list of Path
        The files written.
    """
    from calibrate.run.folder import check_writable
    from calibrate.run.options import one_of
    from calibrate.run.watch import Watch
    from paper_figs.draw import draw_run

    if paper is not None:
        one_of("--paper", str(paper), "1", "2")
    run, kind = Path(run), "figures" if paper is None else "paper"
    folder = run / (kind if name == "default" else f"{kind}.{name}")
    folder = folder if output is None else Path(output)
    if run.is_dir():
        check_writable(folder)
    return draw_run(run, folder, Watch.of(say, None).say, name, paper)


def report(run: str | Path, *, name: str = "default") -> Path:
    """Write one self-contained HTML page of the run, and return its path."""
    from calibrate.run.folder import check_writable
    from paper_figs.report.report import write_report

    run = Path(run)
    if run.is_dir():
        check_writable(run)
    return write_report(run, name)


def tokens(run: str | Path) -> pd.DataFrame:
    """All recorded tokens of a calibration, a row each: every column that holds one number.

    docs/formats.md says what the columns mean.
    """
    import pandas as pd

    from calibrate.run.traces import Shard, read_trace, shard_paths

    shards = shard_paths(Path(run))
    trace = read_trace(shards, Shard(shards[0]).plain if shards else None)
    names = [trace.prompt_ids[row] for row in trace.prompt_index]
    return pd.DataFrame({"prompt_id": names, **trace.columns})
