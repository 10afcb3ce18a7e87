"""Docstrings as the site's Markdown: their mathematics and roles are those of numpydoc."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension

DIRECTIVE = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +.*| *(?=\n\1 +)))*)", re.MULTILINE)
SECTION = re.compile(r"^(?=[A-Z]\w+\n-{3,}$)", re.MULTILINE)
PROSE = ("Notes", "Examples")
ROLE = re.compile(r":(\w+):`~?([^`]+)`")


def as_markdown(docstring: str) -> str:
    """The docstring with `.. math::` as $$, `:math:` as $ and other roles as code."""

    def displayed(found: re.Match[str]) -> str:
        indent, body = found.groups()
        first, _, rest = body.partition("\n")
        formula = "\n".join(line for line in (first, dedent(rest)) if line.strip()).strip()
        if "\\\\" in formula and "\\begin" not in formula:
            formula = f"\\begin{{aligned}} {formula} \\end{{aligned}}"
        lines = f"\n$$\n{formula}\n$$\n".split("\n")
        return "\n".join(indent + line if line else "" for line in lines)

    def role(found: re.Match[str]) -> str:
        name, text = found.groups()
        return f"${' '.join(text.split())}$" if name == "math" else f"`{text}`"

    return ROLE.sub(role, DIRECTIVE.sub(displayed, _with_notes(docstring)))


def _with_notes(docstring: str) -> str:
    """The docstring with what stands behind its sections, sources and assumptions, as notes."""
    head, *sections = SECTION.split(docstring)
    for place, section in enumerate(sections):
        title, content = section.split("\n-", 1)
        rule, _, body = content.partition("\n")
        entries, blank, rest = body.partition("\n\n")
        if title not in PROSE and rest.strip():
            body = f"{entries}{blank}Notes\n-----\n{rest}"
        sections[place] = f"{title}\n-{rule}\n{body}"
    return "".join([head, *sections])


class Markdown(Extension):
    """Change every docstring as it is collected, before its sections are parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
