"""The command line `hlm`: parses, calls, prints. No formulas, no model code.

torch and transformers take seconds to import, so each command imports what it runs inside itself.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from calibrate.run.errors import UsageError, UserError
from calibrate.run.options import at_least, check_decoding, inside, one_of
from calibrate.run.stopping import Interrupted, listen
from hlmtheory import api

if TYPE_CHECKING:
    from collections.abc import Callable

    from calibrate.pairs.sources import ModelSpec
    from calibrate.run.records import StageRecord

app = typer.Typer(
    name="hlm",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "When should a phone ask the big model, and what should it send?\n\n"
        "calibrate -> derive -> validate -> figures: measure how the device model's uncertainty "
        "predicts rejection, derive thresholds and sizes from it, rerun the pipeline at them, "
        "and draw the result. `hlm quickstart` does all four on the embedded pair."
    ),
)
pairs_app = typer.Typer(no_args_is_help=True, help="List, fetch and inspect model pairs.")
app.add_typer(pairs_app, name="pairs")

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that calibrate made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every figure, with its interval.")
]
PairOption = Annotated[
    str | None, typer.Option(help="A pair of the registry; see `hlm pairs list`.")
]
SlmOption = Annotated[
    str | None, typer.Option(help="Own device model: folder, .gguf file or hub id.")
]
LlmOption = Annotated[
    str | None, typer.Option(help="Own server model: folder, .gguf file or hub id.")
]
DropOption = Annotated[
    str | None, typer.Option(help="Make the device model by leaving out layers, like 21,22.")
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts: .jsonl or .txt file, or hub dataset. Default: the run's own, or of a new "
        "run the shipped 320."
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Prompts decoded together.",
        show_default="as many as memory allows, to 64, or 256 on a GPU",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="Processor threads of the models; fewer than cores on a busy machine.",
        show_default="torch's own choice",
    ),
]
WorkersOption = Annotated[
    int, typer.Option(help="Workers that decode batches; one is this process itself.")
]
EngineOption = Annotated[
    str, typer.Option(help="Workers are: process, of this machine; ray, actors of a Ray cluster.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="With --engine ray: the cluster, HOST:PORT or auto.",
        show_default="one is started on this machine",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
OrderOption = Annotated[
    str, typer.Option(help="random: drawn from the seed; file: the first ones of the file.")
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy", help="Policy, or FILE.py:NAME of your own; repeat for more. Default: all."
    ),
]
RiskOption = Annotated[
    list[float] | None, typer.Option("--risk", help="Rejection-risk budget; repeatable.")
]
CertifyOption = Annotated[
    str,
    typer.Option(
        help="What certified budgets are about: the mean over prompts, the risk over tokens, or "
        "the share of answers that differ from the server's."
    ),
]
ScoreOption = Annotated[str, typer.Option(help="What gates compare with their threshold.")]
LimitOption = Annotated[int, typer.Option(help="Prompts to use.")]
LengthOption = Annotated[int, typer.Option(help="Tokens a prompt, at most.")]
SeedOption = Annotated[int, typer.Option(help="Seed of every random number.")]
OutputOption = Annotated[Path, typer.Option(help="Run folder to make.")]
NameOption = Annotated[str, typer.Option(help="Of the derivation, and of what judges it.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Let the result take the place of another of that name.")
]
COMMAND = ("hlm", *sys.argv[1:])

ReplaceStudyOption = Annotated[
    bool, typer.Option("--replace", help="Replace a study of other settings that the run holds.")
]


def _version(asked: bool) -> None:
    if asked:
        from hlmtheory import __version__

        print(f"hlmtheory {__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line; every failure is one line on stderr and exit 1 or 2.

    Interrupts exit as shells expect: 130 for Ctrl-C, 143 for SIGTERM.
    """
    listen()
    usage_error: Any = typer.BadParameter.__mro__[1]
    try:
        code = app(standalone_mode=False, prog_name="hlm")
    except usage_error as error:
        command = error.ctx.command_path if error.ctx is not None else "hlm"
        text = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
            sys.exit(2)
        _fail(f"{text.rstrip('.')}. See `{command} --help`.", 2)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Interrupted as error:
        _fail("interrupted; nothing half-written was left", error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> NoReturn:
    print(f"hlm: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _show(result: StageRecord, as_json: bool, print_table: Callable[..., None], *more: Any) -> None:
    if as_json:
        from calibrate.run.folder import record_text

        print(record_text(result))
    else:
        print_table(result, *more)


@pairs_app.command("list")
def pairs_list(as_json: JsonOption = False) -> None:
    """The pairs that need no more than their name."""
    from calibrate.pairs.registry import REGISTRY, describe
    from calibrate.terminal.tables import print_pairs

    print_pairs([describe(spec) for spec in REGISTRY.values()], as_json)


@pairs_app.command("show")
def pairs_show(
    name: Annotated[str, typer.Argument(help="Name of a pair.")], as_json: JsonOption = False
) -> None:
    """Sources, hashes, sizes and cache folder of one pair."""
    from calibrate.pairs.registry import describe, resolve_pair
    from calibrate.terminal.tables import print_pair

    print_pair(describe(resolve_pair(name, None, None, None)), as_json)


@pairs_app.command("pull")
def pairs_pull(name: Annotated[str, typer.Argument(help="Name of a pair.")]) -> None:
    """Fetch and convert a pair into the cache; verify what is there."""
    from calibrate.pairs.registry import describe, pull, resolve_pair
    from calibrate.run.watch import Watch
    from calibrate.terminal.progress import Bars

    spec = resolve_pair(name, None, None, None)
    with Bars() as bars:
        pull(spec, Watch(progress=bars).transfer)
    print(f"{name}: in {describe(spec).cache_path}")


@app.command()
def calibrate(
    output_path: OutputOption,
    pair: PairOption = None,
    slm: SlmOption = None,
    llm: LlmOption = None,
    drop_layers: DropOption = None,
    prompts: PromptsOption = None,
    order: OrderOption = "random",
    limit: LimitOption = 64,
    max_new_tokens: LengthOption = 64,
    batch_size: BatchOption = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of both models' laws; 0 takes the likeliest token.", show_default="1"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Keep the k likeliest tokens of both laws; 0: all.", show_default="0"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the tokens that make up this probability.", show_default="1"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Of tokens in the context, prompt included.", show_default="1"),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="options: the four above; generation-config: the server model's own, for both "
            "laws, with what of the four is given in its place."
        ),
    ] = "options",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    num_threads: ThreadsOption = None,
    trace: Annotated[
        str, typer.Option(help="full, or minimal: faster, but nothing can be derived from it.")
    ] = "full",
    pilot: Annotated[
        int,
        typer.Option(
            min=0,
            help="Prompts decoded again under a policy, so that predictions know where its own "
            "outputs lead; 0 for none.",
        ),
    ] = 64,
    read_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens that fit and derivation look at, at most; of more, those of prompts drawn "
            "at random.",
        ),
    ] = 250_000,
    num_workers: WorkersOption = 1,
    engine: EngineOption = "process",
    address: AddressOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decode prompts speculatively and record uncertainty, importance and rejection per token."""
    from calibrate.pairs.models import Models
    from calibrate.terminal.progress import Bars

    with Bars() as bars:
        summary = api.calibrate(
            output_path,
            Models(pair, slm, llm, drop_layers, device, dtype, num_threads),
            prompts=prompts,
            order=order,  # type: ignore[arg-type]
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            sampling=sampling,  # type: ignore[arg-type]
            seed=seed,
            trace=trace,  # type: ignore[arg-type]
            pilot=pilot,
            read_tokens=read_tokens,
            num_workers=num_workers,
            engine=engine,  # type: ignore[arg-type]
            address=address,
            resume=resume,
            say=bars.say,
            progress=bars,
            command=COMMAND,
        )
    from calibrate.terminal.tables import print_calibration

    _show(summary, as_json, print_calibration, output_path, verbose)


@app.command()
def derive(
    run: RunArgument,
    name: NameOption = "default",
    policy: PolicyOption = None,
    score: ScoreOption = "uncertainty",
    risk: RiskOption = None,
    answer_risk: Annotated[
        list[float] | None,
        typer.Option(
            help="Budget for whole answers: how far their law may lie from the server's, and any "
            "score in [0, 1] of them may move; repeatable."
        ),
    ] = None,
    certify: CertifyOption = "prompts",
    answer_cap: Annotated[
        list[str] | None,
        typer.Option(
            help="Also certify gates that skip at most this share of an answer, like 0.4, or auto; "
            "repeatable, and then caps share what 1 - confidence leaves."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of intervals and guarantees.")] = 0.95,
    link: Annotated[str, typer.Option(help="Link preset or JSON file.")] = "wifi",
    profile: Annotated[
        str, typer.Option(help="Device profile preset or JSON file; `measured` takes this machine.")
    ] = "measured",
    accounting: Annotated[
        str,
        typer.Option(
            help="full: every index that goes up or down; paper: the sent probabilities alone."
        ),
    ] = "full",
    theta: Annotated[
        list[float] | None,
        typer.Option(help="Tolerance of the truncation bound; repeatable. Default 0.1."),
    ] = None,
    importance: Annotated[
        list[str] | None,
        typer.Option(
            help="Of policies that look at attention: variant:k:gamma, like context:0:0.9; "
            "repeatable. Default topk:16:1."
        ),
    ] = None,
    draft_from_sent: Annotated[
        bool,
        typer.Option("--draft-from-sent", help="Also fixed sizes with drafts from what is sent."),
    ] = False,
    replace: ReplaceOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Thresholds, truncation sizes and predicted risk, payload, time and energy."""
    from calibrate.terminal.progress import say

    lists = {
        "risks": risk, "answer_risks": answer_risk, "thetas": theta, "importances": importance,
        "answer_caps": answer_cap,
    }  # fmt: skip
    derivation = api.derive(
        run,
        name=name,
        policies=policy or (),
        replace=replace,
        say=say,
        command=COMMAND,
        score=score,
        confidence=confidence,
        link=link,
        profile=profile,
        accounting=accounting,
        draft_from_sent=draft_from_sent,
        certify=certify,
        **{key: tuple(values) for key, values in lists.items() if values},
    )
    from calibrate.terminal.derived import print_operating_points

    _show(derivation, as_json, print_operating_points, verbose, run)


def _known_score(name: str) -> None:
    from hlmtheory.scores import SCORE_NAMES

    one_of("--score", name, *SCORE_NAMES)


@app.command()
def export(
    run: RunArgument,
    point: Annotated[str, typer.Option(help="The operating point, like POLICY/risk-0.01.")],
    name: NameOption = "default",
    output_path: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="standard output")
    ] = None,
) -> None:
    """One operating point as a small JSON file for an application."""
    from calibrate.derive.export import export_point
    from calibrate.run.folder import check_name, check_writable, record_text, write_record_file

    check_name(name)
    if output_path is not None:
        check_writable(output_path.parent)
    record = export_point(run, point, name, COMMAND)
    if output_path is None:
        print(record_text(record))
        return
    write_record_file(output_path, record)
    print(f"{output_path}: {record.point}, valid while")
    for condition in record.valid_while:
        print(f"  {condition}")


@app.command()
def validate(
    run: RunArgument,
    name: NameOption = "default",
    policy: PolicyOption = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Only points of this rule, like risk-averse or risk-0.01; repeatable."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="Only this operating point, like POLICY/risk-0.01; repeatable."),
    ] = None,
    prompts: PromptsOption = None,
    order: OrderOption = "random",
    limit: LimitOption = 64,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the reruns. Default: another than calibration's.")
    ] = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
    num_workers: WorkersOption = 1,
    engine: EngineOption = "process",
    address: AddressOption = None,
    replace: ReplaceOption = False,
    wire: Annotated[
        bool,
        typer.Option(
            "--wire",
            help="Run server, link and device as processes, and hold the clock against the "
            "prediction; needs --point.",
        ),
    ] = False,
    link: Annotated[
        list[str] | None,
        typer.Option(help="With --wire: preset, .json or .csv of rates; repeatable. Default: fast"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="With --wire: tokens a prompt, at most. Default: the calibration's."),
    ] = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rerun the pipeline at the derived settings on fresh prompts; predicted against measured.

    With --wire, prompts are decoded one at a time over a link: a fast machine needs minutes for
    each point and link, so give a small --limit.
    """
    from calibrate.terminal.progress import Bars

    if wire:
        many = num_workers != 1 or engine != "process" or address
        if not point or policy or rule or prompts or batch_size or order != "random" or many:
            raise UsageError(
                "--wire: needs --point, repeatable, and takes --link, --limit, --seed, "
                "--max-new-tokens, --device, --num-threads and --replace beside it"
            )
        check_decoding(limit, seed=seed, device=device, num_threads=num_threads)
        if max_new_tokens is not None:
            at_least("--max-new-tokens", max_new_tokens, 2)
        _validate_wire(
            run, name, point, link or ["fast"], limit, seed, max_new_tokens, device, num_threads,
            replace, as_json,
        )  # fmt: skip
        return
    if link or max_new_tokens is not None:
        raise UsageError("--link, --max-new-tokens: only with --wire")
    with Bars() as bars:
        result = api.validate(
            run,
            name=name,
            policies=policy or (),
            rules=rule or (),
            points=point or (),
            prompts=prompts,
            order=order,  # type: ignore[arg-type]
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            device=device,
            num_threads=num_threads,
            num_workers=num_workers,
            engine=engine,  # type: ignore[arg-type]
            address=address,
            replace=replace,
            say=bars.say,
            progress=bars,
            command=COMMAND,
        )
    from calibrate.terminal.tables import print_validation

    _show(result, as_json, print_validation, verbose)


def _validate_wire(
    run: Path,
    name: str,
    points: list[str],
    links: list[str],
    limit: int,
    seed: int | None,
    max_new_tokens: int | None,
    device: str,
    num_threads: int | None,
    replace: bool,
    as_json: bool,
) -> None:
    from calibrate.pairs.loading import load_model
    from calibrate.pairs.models import use_threads
    from calibrate.run.folder import check_name
    from calibrate.run.lock import locked
    from calibrate.run.prompts import drawn_notes
    from calibrate.terminal.progress import say, token_progress
    from calibrate.terminal.wire import print_wire
    from calibrate.validate.wire import prepare_wire, run_wire

    check_name(name)
    with locked(run):
        plan = prepare_wire(
            run, name, points, links, limit, seed, max_new_tokens, num_threads, replace, COMMAND
        )
        for line in drawn_notes(plan.prompts, limit):
            say(line)
        use_threads(num_threads)
        spec, dtype = plan.spec.slm, plan.derived.calibration.pair.dtype
        say(f"loading {spec.label}")
        attention = any(one.needs_attention for one in plan.policies.values())
        model = load_model(spec, dtype=dtype, device=device, attention=attention)
        with token_progress("over the wire") as bar:
            bar.set_total(plan.num_tokens)
            result = run_wire(plan, model, lambda token: bar.advance(1, 0), bar.at_part)
    _show(result, as_json, print_wire)


@app.command()
def guarantees(
    run: RunArgument,
    risk: RiskOption = None,
    num_draws: Annotated[int, typer.Option(help="Calibrations to draw again.")] = 500,
    score: ScoreOption = "uncertainty",
    seed: SeedOption = 0,
    replace: ReplaceStudyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do the threshold rules keep their promise? Calibrations drawn again from the run's own."""
    inside("--risk", risk, 0, 1)
    at_least("--num-draws", num_draws, 1)
    at_least("--seed", seed, 0)
    _known_score(score)
    from calibrate.run.folder import read_record
    from calibrate.run.lock import locked
    from calibrate.run.records import RunRecord
    from calibrate.terminal.progress import token_progress
    from calibrate.terminal.tables import print_guarantees
    from calibrate.validate.guarantees import RISKS, write_guarantees

    with locked(run), token_progress("drawing", "calibrations") as bar:
        read_record(run, RunRecord)
        bar.set_total(2 * num_draws)
        result = write_guarantees(
            run, score, risk or RISKS, num_draws, seed=seed, command=COMMAND, replace=replace,
            on_draw=lambda num: bar.advance(num, 0),
        )  # fmt: skip
    _show(result, as_json, print_guarantees)


@app.command()
def plan(
    run: RunArgument,
    risk: RiskOption = None,
    certify: CertifyOption = "prompts",
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    power: Annotated[float, typer.Option(help="Chance of getting the certificate.")] = 0.8,
    skip_rate: Annotated[
        float | None,
        typer.Option(
            help="That the certified threshold is to have.",
            show_default="that at which the run's prompts spend half the budget",
        ),
    ] = None,
    width: Annotated[float, typer.Option(help="Of the skip rate's interval, end to end.")] = 0.05,
    score: ScoreOption = "uncertainty",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """How many prompts a budget or an interval needs, and how long they take here."""
    inside("--risk", risk, 0, 1)
    inside("--confidence", [confidence], 0, 1)
    inside("--power", [power], 0, 1)
    inside("--skip-rate", [skip_rate] if skip_rate is not None else None, 0, 1)
    inside("--width", [width], 0, 1)
    one_of("--certify", certify, "prompts", "tokens", "answers")
    at_least("--seed", seed, 0)
    _known_score(score)
    from calibrate.derive.plan import plan_run
    from calibrate.terminal.tables import print_plan

    result = plan_run(
        run, risk or [0.01], confidence, power, certify,  # type: ignore[arg-type]
        skip_rate, width, score, seed,
    )  # fmt: skip
    _show(result, as_json, print_plan)


@app.command()
def attenuation(
    run: RunArgument,
    limit: LimitOption = 48,
    max_new_tokens: LengthOption = 32,
    device: DeviceOption = "auto",
    num_threads: ThreadsOption = None,
    replace: ReplaceStudyOption = False,
    as_json: JsonOption = False,
) -> None:
    """What drawing K tokens instead of summing exactly does to the fitted line, measured."""
    check_decoding(limit, max_new_tokens, device=device, num_threads=num_threads)
    from calibrate.pairs.models import Models
    from calibrate.run.lock import locked
    from calibrate.run.watch import TokenCount, Watch
    from calibrate.terminal.progress import Bars
    from calibrate.terminal.tables import print_attenuation
    from calibrate.validate.attenuation import prepare_attenuation, write_attenuation

    with Bars() as bars, locked(run):
        plan = prepare_attenuation(run, limit, max_new_tokens, COMMAND, replace)
        watch = Watch(bars.say, bars)
        pair = Models.of_run(plan.calibration, device, num_threads).load(False, watch)
        count = TokenCount("decoding", watch)
        result = write_attenuation(plan, pair, count.advance, count.set_total)
    _show(result, as_json, print_attenuation)


@app.command()
def monitor(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines, an object a token; - for stdin.")
    ],
    risk: Annotated[float | None, typer.Option(help="Budget of the rejection risk.")] = None,
    audit_rate: Annotated[
        float,
        typer.Option(help="Chance that a skipped draft is checked; lines may name larger ones."),
    ] = 1.0,
    confidence: Annotated[
        float | None,
        typer.Option(help="No false alarm, ever, with this probability.", show_default="0.95"),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="tokens: their mean risk so far; answers: the mean over answers of each one's "
            "mean.",
            show_default="tokens, or answers where the point's budget is over prompts",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Begin anew after so many tokens or answers.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Take the budget from a derivation of this run.")
    ] = None,
    name: NameOption = "default",
    point: Annotated[
        str | None, typer.Option(help="Its operating point, like POLICY/risk-0.01.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File to go on from, and to keep the watch in.")
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit 3 once the alarm was raised, instead of 0.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Raise the alarm when audited tokens show that the risk is above its budget, at any time."""
    inside("--risk", None if risk is None else [risk], 0, 1)
    inside("--confidence", None if confidence is None else [confidence], 0, 1)
    if not 0 < audit_rate <= 1:
        raise UsageError(f"--audit-rate {audit_rate:g}: allowed is above 0 and at most 1")
    if window is not None:
        at_least("--window", window, 1)
    if unit is not None:
        one_of("--unit", unit, "tokens", "answers")
    if (run is None) != (point is None) or (run is None) == (risk is None):
        raise UsageError("--risk, or --run and --point: one of them says the budget")
    from calibrate.run.records import MonitorSettings
    from calibrate.terminal.progress import say, token_progress
    from calibrate.terminal.tables import print_monitor
    from calibrate.validate.monitor import UNITS, run_monitor, watched_point

    if run is not None and point is not None:
        watched = watched_point(run, name, point)
        risk = watched.budget
        confidence = confidence or watched.confidence
        unit = unit or UNITS[watched.weighting]
    settings = MonitorSettings(
        risk=risk,  # type: ignore[arg-type]
        confidence=confidence or 0.95,
        audit_rate=audit_rate,
        unit=unit or "tokens",  # type: ignore[arg-type]
        window=window,
    )
    with token_progress("watching", "lines", silent_in_pipe=True) as bar:
        result = run_monitor(
            None if str(file) == "-" else file,
            settings,
            state,
            bar.set_total,
            lambda lines, size: bar.advance(lines, size - lines),
            lambda alarm: say(f"alarm at line {alarm.line}"),
        )
    _show(result, as_json, print_monitor)
    if exit_code and result.alarm is not None:
        raise typer.Exit(3)


@app.command()
def serve(
    run: Annotated[
        Path | None, typer.Option(help="Serve the server model of this run.", show_default="none")
    ] = None,
    pair: PairOption = None,
    llm: LlmOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that devices must show.")
    ] = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Answers held at once.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers advanced together.")] = 32,
    max_context: Annotated[int, typer.Option(min=2, help="Tokens of one answer's context.")] = 8192,
    idle_s: Annotated[
        float, typer.Option(help="Seconds after which a silent session is freed.")
    ] = 300.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Serve a pair's server model to devices: sessions, verification, /health and /metrics.

    Off loopback it needs --tls-cert, --tls-key and --token-file.
    """
    at_least("--idle-s", idle_s, 1)
    check_decoding(device=device, dtype=dtype, num_threads=num_threads)
    from calibrate.wire.options import ServerOptions

    options = ServerOptions(
        host, port, tls_cert, tls_key, token_file, max_sessions, max_batch, max_context,
        idle_s=idle_s,
    )  # fmt: skip
    options.check_secrets()
    spec = _server_model(run, pair, llm)
    from calibrate.pairs.loading import load_model
    from calibrate.pairs.models import use_threads
    from calibrate.terminal.progress import say
    from calibrate.wire.run import serve as serve_model

    use_threads(num_threads)
    say(f"loading {spec.label}")
    model = load_model(spec, dtype=dtype, device=device)
    scheme = "ws" if tls_cert is None else "wss"
    serve_model(model, options, lambda own: say(f"serving {spec.label} at {scheme}://{host}:{own}"))
    say("stopped: every answer that was asked for has been sent")


def _server_model(run: Path | None, pair: str | None, llm: str | None) -> ModelSpec:
    """The server model that the options name, resolved; nothing is loaded."""
    from calibrate.pairs.registry import model_named, resolve_pair, spec_from_settings

    if sum(one is not None for one in (run, pair, llm)) > 1:
        raise UsageError("--run, --pair, --llm: give one of them")
    if llm is not None:
        return model_named(llm, "--llm")
    if run is not None:
        from calibrate.run.folder import read_record
        from calibrate.run.records import CalibrationRecord

        return spec_from_settings(read_record(run, CalibrationRecord).settings).llm
    return resolve_pair(pair or "smollm2", None, None, None).llm


@app.command()
def device(
    run: RunArgument,
    point: Annotated[str, typer.Option(help="Operating point, like u-hlm/risk-0.02.")],
    server: Annotated[str, typer.Option(help="Address of `hlm serve`.")] = "ws://127.0.0.1:8765",
    name: NameOption = "default",
    prompts: Annotated[
        str | None,
        typer.Option(help="File of prompts, .jsonl or .txt. Default: typed, one a line."),
    ] = None,
    limit: LimitOption = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens a prompt, at most. Default: the calibration's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of every random number. Default: validation's.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust in the place of the system's, PEM.")
    ] = None,
    audit_rate: Annotated[
        float, typer.Option(help="Share of skipped drafts that are sent for checking.")
    ] = 0.0,
    patience_s: Annotated[
        float, typer.Option(help="Seconds to try without an answer from the server.")
    ] = 60.0,
    output_path: Annotated[
        Path | None, typer.Option(help="Table of every token's times and bytes, .parquet.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="JSON lines of audited tokens, for `hlm monitor`.")
    ] = None,
    dtype: DtypeOption = "auto",
    num_threads: ThreadsOption = None,
) -> None:
    """Decode prompts on this device at a derived point, asking a server where the point says so.

    Skipped tokens are shown in green, those that the server replaced in red.
    """
    check_decoding(limit, max_new_tokens or 1, seed=seed, dtype=dtype, num_threads=num_threads)
    at_least("--patience-s", patience_s, 0)
    if max_new_tokens is not None:
        at_least("--max-new-tokens", max_new_tokens, 1)
    if not 0 <= audit_rate <= 1:
        raise UsageError(f"--audit-rate {audit_rate:g}: allowed is 0 to 1")
    from calibrate.run.folder import check_writable

    for path in (output_path, log):
        if path is not None:
            check_writable(path.parent)
    from calibrate.pairs.loading import load_model
    from calibrate.pairs.models import use_threads
    from calibrate.pairs.registry import spec_from_settings
    from calibrate.run.folder import provenance
    from calibrate.terminal.progress import say
    from calibrate.terminal.wire import show_answer, typed_prompts
    from calibrate.wire.client import ServerLink
    from calibrate.wire.options import read_token
    from calibrate.wire.run import read_derived
    from calibrate.wire.trace import audit_line, write_wire_trace

    derived = read_derived(run, name)
    policy = derived.policy(point)
    token = None if token_file is None else read_token(token_file)
    spec = spec_from_settings(derived.calibration.settings).slm
    changes = {"max_new_tokens": max_new_tokens, "seed": seed}
    use_threads(num_threads)
    say(f"loading {spec.label}")
    model = load_model(spec, dtype=dtype, attention=policy.needs_attention)
    tokens: list[Any] = []
    with ServerLink(server, token, tls_ca, patience_s) as link, ExitStack() as files:
        lines = None if log is None else files.enter_context(log.open("a", encoding="utf-8"))
        runs = derived.device(
            policy, model, link, audit_rate,
            **{key: value for key, value in changes.items() if value is not None},
        )  # fmt: skip
        for answer in show_answer(runs, model, typed_prompts(prompts, limit)):
            tokens += answer.tokens
            if lines is not None:
                lines.writelines(audit_line(one, audit_rate) + "\n" for one in answer.tokens)
                lines.flush()
    if output_path is not None:
        made = provenance(COMMAND).model_dump(mode="json")
        write_wire_trace(output_path, tokens, {"point": point, "provenance": made})


@app.command()
def relay(
    link: Annotated[str, typer.Option(help="Link to imitate: preset, .json or .csv of rates.")],
    to: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8765",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8766,
) -> None:
    """Carry connections to a server at the rate and with the delay of a link."""
    import asyncio

    from calibrate.derive.presets import load_link
    from calibrate.terminal.progress import say
    from calibrate.wire.link import wire_link
    from calibrate.wire.relay import relay as carry

    host, colon, number = to.rpartition(":")
    if not colon or not number.isdecimal() or not 0 < int(number) < 65536:
        raise UsageError(f"--to {to}: allowed is HOST:PORT")
    carried = wire_link(load_link(link))

    def ready(own: int) -> None:
        say(f"127.0.0.1:{own} -> {to}, as {link}")

    asyncio.run(carry(carried, (host, int(number)), port=port, ready=ready))


@app.command()
def quality(
    run: RunArgument,
    name: NameOption = "default",
    model: Annotated[
        str | None,
        typer.Option(
            help="Backbone of BERTScore: hub id or folder. Default: all-MiniLM-L6-v2 from a "
            "package index, which is not the papers'."
        ),
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Its layer to compare. Default: bert-score's own for it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts encoded together.")] = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score the texts of every rerun against the server model's own: RUN/quality.json."""
    if num_layers is not None:
        at_least("--num-layers", num_layers, 1)
    check_decoding(batch_size=batch_size, device=device)
    from calibrate.quality.encoder import ENCODER, encoder_is_cached, ensure_encoder
    from calibrate.quality.scores import prepare_quality, run_quality
    from calibrate.run.folder import check_name
    from calibrate.run.lock import locked
    from calibrate.run.watch import Watch
    from calibrate.terminal.progress import Bars
    from calibrate.terminal.quality_table import print_quality

    check_name(name)
    with Bars() as bars, locked(run):
        plan = prepare_quality(run, name, model, num_layers, batch_size, COMMAND)
        if not encoder_is_cached():
            bars.say(f"fetching {ENCODER.label} (once)")
            ensure_encoder(Watch(progress=bars).transfer)
        result = run_quality(plan, ensure_encoder(), device, bars.say)
    _show(result, as_json, print_quality)


@app.command()
def figures(
    run: RunArgument,
    name: NameOption = "default",
    output_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder for PNG and PDF. Default: RUN/figures, or RUN/figures.NAME; RUN/paper "
            "with --paper."
        ),
    ] = None,
    paper: Annotated[
        int | None,
        typer.Option(
            metavar="COLUMNS",
            help="For a paper: 1 column wide (3.5 inches) or 2 (7 inches), title and caption in "
            "NAME.txt beside each figure.",
        ),
    ] = None,
) -> None:
    """Draw every figure that the run's results allow."""
    from calibrate.terminal.progress import say

    for path in api.figures(run, name=name, output=output_path, paper=paper, say=say):  # type: ignore[arg-type]
        print(path)


@app.command()
def report(run: RunArgument, name: NameOption = "default") -> None:
    """One self-contained HTML page of the run: RUN/report.html."""
    print(api.report(run, name=name))


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """The papers' published numbers against what the theory says they imply."""
    from calibrate.derive.presets import published_audit
    from calibrate.terminal.tables import print_audit

    print_audit(*published_audit(), as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Versions, devices, cache, disk, and the command that mends what is missing."""
    from calibrate.terminal.doctor import examine
    from calibrate.terminal.tables import print_doctor

    report = examine()
    print_doctor(report, as_json)
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def quickstart(
    output_path: OutputOption = Path("hlm-quickstart"),
    limit: LimitOption = 32,
    max_new_tokens: LengthOption = 48,
    seed: SeedOption = 0,
) -> None:
    """Calibrate, derive, validate and draw on the embedded pair, in a few minutes."""
    from calibrate.pairs.models import Models
    from calibrate.terminal.derived import print_operating_points
    from calibrate.terminal.progress import Bars
    from calibrate.terminal.tables import print_calibration, print_validation
    from hlmtheory.policies import policy_class, policy_names

    begin, models = time.perf_counter(), Models("smollm2")
    with Bars() as bars:
        told: Any = {"say": bars.say, "progress": bars, "command": COMMAND}
        summary = api.calibrate(
            output_path, models, limit=limit, max_new_tokens=max_new_tokens, seed=seed, **told
        )
        print_calibration(summary, output_path)
        print_operating_points(api.derive(output_path, say=bars.say, command=COMMAND))
        chosen = [one for one in policy_names() if policy_class(one).in_quickstart]
        result = api.validate(
            output_path, models, policies=chosen, rules=("risk-averse", "risk-0.01"), limit=limit,
            **told,
        )  # fmt: skip
        print_validation(result)
        for path in api.figures(output_path, say=bars.say):
            print(path)
    print(f"\ndone in {time.perf_counter() - begin:.0f} s; everything is in {output_path}")


if __name__ == "__main__":
    main()
