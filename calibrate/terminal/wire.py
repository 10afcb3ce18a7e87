"""A device at a terminal: prompts typed or read, tokens shown as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from calibrate.run.prompts import Prompt, draw_prompts, read_prompts, tokenize_prompts

if TYPE_CHECKING:
    from calibrate.pairs.loading import LoadedModel
    from calibrate.wire.device import Device, WireAnswer, WireToken

SKIPPED, REPLACED = "green", "red"


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
