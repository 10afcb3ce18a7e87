"""A device at a terminal: prompts typed or read, tokens as they come; and what a wire showed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from calibrate.run.figure import number_text, signed_percent_text
from calibrate.run.prompts import Prompt, draw_prompts, read_prompts, tokenize_prompts
from calibrate.run.records import WireRecord, WireRun
from calibrate.terminal.page import Page

if TYPE_CHECKING:
    from calibrate.pairs.loading import LoadedModel
    from calibrate.wire.device import Device, WireAnswer, WireToken

SKIPPED, REPLACED = "green", "red"


def print_wire(result: WireRecord) -> None:
    """`hlm validate --wire`: token times by the clock and as predicted, link by link."""
    from calibrate.validate.wire import QUANTILES

    page = Page()
    held = result.coverage
    page.say(
        f"over the wire: token times are off their prediction by {result.mean_time_error:.1%} in "
        f"the mean, {result.mean_time_error_replayed:.1%} once it is known which tokens were "
        f"skipped, {result.mean_time_error_before:.1%} by (27) alone; {held.covered} of "
        f"{held.total} figures of the clock lie inside their {result.confidence:.0%} intervals "
        f"({len(result.prompt_ids)} prompts, one at a time)"
    )
    for one in result.links:
        page.table(
            ("point", ">ms/token by the clock", ">predicted", ">off", ">replayed, off",
             ">(27) off", ">first token ms", ">byte up", ">byte down", ">server busy",
             ">same tokens"),
            [
                (f"{run.policy}/{run.rule}", number_text(run.token_time.measured, 4),
                 number_text(run.token_time.predicted, 4), signed_percent_text(run.token_time.off),
                 signed_percent_text(run.replayed.off),
                 signed_percent_text(run.token_time_before.off),
                 number_text(run.first_token_ms, 3, interval=False),
                 number_text(run.uplink_bytes_per_token, 4, interval=False),
                 number_text(run.downlink_bytes_per_token, 3, interval=False),
                 f"{run.server_busy_share:.0%}",
                 f"{run.same_tokens_share:.1%}")
                for run in one.by_time
            ], title=f"link {one.link_name}",
        )  # fmt: skip
        page.table(
            ("point", *(f">{100 * level:g} %" for level in QUANTILES)),
            [
                (f"{run.policy}/{run.rule}",
                 *(f"{clock:,.0f}, {predicted:,.0f}" for clock, predicted in
                   zip(run.token_ms_quantiles, run.predicted_ms_quantiles, strict=True)))
                for run in one.by_time
            ],
            title=f"link {one.link_name}: ms that so many tokens take at most: clock, predicted",
        )  # fmt: skip
        for run in one.by_time:
            if run.token_time.covered is False:
                page.say(f"  {_miss(run)}")
    if not all(run.framing_as_stated for one in result.links for run in one.runs):
        page.say("  some frames have another length than docs/protocol.md states")


def _miss(run: WireRun) -> str:
    """Why a token time lies outside its interval: which tokens came, or what they took."""
    skips = next(cell for cell in run.cells if cell.metric == "skip_rate")
    return (
        f"{run.policy}/{run.rule} misses by {signed_percent_text(run.token_time.off)}: machines "
        f"and link {signed_percent_text(run.replayed.off)}, the "
        f"rest is which tokens came (skipped {number_text(skips.measured)}, predicted "
        f"{number_text(skips.predicted)})"
    )


def typed_prompts(source: str | None, limit: int) -> Iterator[Prompt]:
    """Prompts of a file, for validation; or of standard input, a line each until it ends."""
    if source is not None:
        yield from draw_prompts(read_prompts(source), "validation", limit, 0, "file")
        return
    number = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            number += 1
            yield Prompt(f"typed-{number}", line.strip(), "", None)


def show_answer(
    device: Device, model: LoadedModel, prompts: Iterable[Prompt]
) -> Iterator[WireAnswer]:
    """Decode each prompt and print its answer, token by token where this is a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    length = device.settings.max_new_tokens
    for prompt in prompts:
        (ready,) = tokenize_prompts([prompt], model.tokenizer, length, model.max_context)
        shown: list[int] = []
        done = ""

        def show(token: WireToken, shown: list[int] = shown) -> None:
            nonlocal done
            shown.append(token.output_token)
            text = model.tokenizer.decode(shown, skip_special_tokens=True)
            new = text[len(done) :]
            if new.endswith("\N{REPLACEMENT CHARACTER}"):
                return  # half a character: the next token brings the rest
            done = text
            changed = not token.skipped and token.output_token != token.draft_token
            style = SKIPPED if token.skipped else REPLACED if changed else ""
            console.print(Text(new, style=style), end="", soft_wrap=True)

        answer = device.decode(ready, show)
        tokens = answer.tokens
        seconds = 1e-3 * (answer.first_ms + sum(one.token_ms for one in tokens[1:]))
        skipped = sum(one.skipped for one in tokens)
        sent = sum(one.sent_bytes for one in tokens)
        console.print()
        Console(stderr=True, highlight=False).print(
            f"{len(tokens)} tokens, {skipped} of them alone; {sent:,} bytes up; "
            f"{len(tokens) / seconds:.1f} token/s, the first after {1e-3 * answer.first_ms:.2f} s"
        )
        yield answer
