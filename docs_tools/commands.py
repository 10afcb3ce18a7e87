"""The page of every command, with options, defaults and output, made from the command line itself.

The page is made at each build (`docs_tools/hook.py`) and stands in no file that could go stale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from typer.main import get_command

import cli
from calibrate.pairs.registry import ModelDescription, PairDescription
from calibrate.run.records import STAGES, RunRecord, StageRecord
from calibrate.terminal.doctor import Check
from hlmtheory.audit import AuditRow
from hlmtheory.reconcile import Reconciliation

INTRODUCTION = """# Commands

Made from the command line itself when this page was built, so it cannot differ from
`hlm COMMAND --help`. Results go to standard output and everything else (progress, remarks, errors)
to standard error; in a pipe there is no progress bar. A failure is one line on standard error:

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | it could not be done: a file, a model, the system; the line says what mends it |
| 2 | it was asked wrongly: an option or its value |
| 3 | `hlm monitor --exit-code`: the alarm was raised |
| 130, 143 | interrupted by Ctrl-C, by SIGTERM; the line says what stays |

With `--json` standard output is one JSON object and nothing else. Where a command also writes that
object into the run folder, its keys stand in [File formats](formats.md).
"""

PRINTED: dict[str, dict[str, type]] = {
    "pairs list": {"pairs": PairDescription},
    "pairs show": {"": PairDescription},
    "audit": {"rows": AuditRow, "reconciliations": Reconciliation},
    "doctor": {"healthy": bool, "checks": Check},
}
"""What commands print with --json that is in no file: by key, where a shape stands for a list of
it; the shape itself under no key."""

INNER: tuple[type, ...] = (ModelDescription,)
"""Shapes inside the ones above."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words, like `pairs list`, in the order of the help."""

    def below(words: tuple[str, ...], group: Any) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below((*words, name), command)
            else:
                yield " ".join((*words, name)), command

    yield from below((), get_command(cli.app))


def written_by(words: str) -> list[type[StageRecord]]:
    """Records that a command writes into the run folder."""
    return [one for one in STAGES if f"{one.made_by} ".startswith(f"hlm {words} ")]


def commands_text() -> str:
    """Markdown of the whole page."""
    return INTRODUCTION + "".join(_section(words, command) for words, command in commands())


def _section(words: str, command: Any) -> str:
    with command.make_context(f"hlm {words}", [], resilient_parsing=True) as context:
        usage = command.get_usage(context).removeprefix("Usage: ")
        rows = [_row(parameter, context) for parameter in command.params]
    table = _table(("argument or option", "default", "meaning"), rows)
    parts = [f"\n## hlm {words}\n", f"{command.help}\n", f"```text\n{usage.strip()}\n```\n", table]
    return "\n".join([*parts, *_output(words, command)])


def _row(parameter: Any, context: Any) -> tuple[str, str, str]:
    record = parameter.get_help_record(context)
    left, text = record if record is not None else (parameter.metavar or parameter.name, "")
    found = re.search(r"\s*\[(?:default: (?P<default>.*?)|required)\]$", text)
    text = text[: found.start()] if found else text
    default = (found["default"] or "required") if found else ""
    if default and default != "required" and not default.startswith("("):
        default = f"`{default}`"
    return f"`{left}`", default.removeprefix("(").removesuffix(")"), text


def _output(words: str, command: Any) -> list[str]:
    """What the command prints and writes."""
    has_json = any("--json" in parameter.opts for parameter in command.params)
    lines = []
    for kind in written_by(words):
        name = kind.file_name
        told = "; `--json` prints the same object" if has_json and kind is not RunRecord else ""
        lines.append(f"Writes [{name}](formats.md#{name.replace('.', '')}){told}.\n")
    if words == "plan":
        lines.append("`--json` prints a [PlanRecord](formats.md#planrecord).\n")
    if words in PRINTED:
        kinds = PRINTED[words]
        lines.append("`--json` prints:\n")
        shapes = [kind for kind in kinds.values() if is_dataclass(kind)]
        for key, kind in kinds.items():
            if kind in shapes:
                lines.append(f"`{key}`: a list of\n" if key else "")
                lines.append(_fields_table(kind))
            else:
                lines.append(f"`{key}`: `{kind.__name__}`\n")
        said = " ".join(str(field.type) for kind in shapes for field in fields(kind))
        inner = [one for one in INNER if one.__name__ in said]
        lines += [f"`{one.__name__}`:\n\n{_fields_table(one)}" for one in inner]
    return lines


def _fields_table(kind: Any) -> str:
    rows = [(f"`{field.name}`", f"`{field.type}`") for field in fields(kind)]
    about = " ".join((kind.__doc__ or "").partition("\n\n")[2].split())
    return _table(("key", "type"), rows) + f"\n{about}\n"


def _table(titles: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [tuple(titles), tuple("---" for _ in titles), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
