"""The examples of README and docs: fenced blocks of commands, of Python and of files.

What a block is follows from its opening line:

- ```` ```sh ````: commands, one a line; a line goes on after a backslash, and `#` begins a remark;
- ```` ```console ````: lines after `$ ` are commands, the others what they print;
- ```` ```LANGUAGE title="NAME" ````: the content of a file of that name;
- ```` ```python ````: a snippet; those of a page share their names.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"^( *)```(\w*)(?: +title=\"([^\"]+)\")? *\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """One fenced block: language, name of the file that it is, if it is one, and content."""

    language: str
    title: str
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """Its command lines, whole."""
        if self.title or self.language not in ("sh", "console"):
            return ()
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return tuple(line[2:] for line in lines if line.startswith("$ "))
        return tuple(line for line in lines if line.strip() and not line.startswith("#"))


def pages() -> list[Path]:
    """Every page that people read, but for the two that are made of code."""
    others = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
    return [*others, *(path for path in sorted((ROOT / "docs").rglob("*.md"))
                       if "vendor" not in path.parts)]  # fmt: skip


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [block_of(found) for found in FENCE.finditer(page.read_text("utf-8"))]


def block_of(found: re.Match[str]) -> Block:
    """The block that `FENCE` found, moved to the left margin."""
    _, language, title, text = found.groups(default="")
    return Block(language, title, dedent(text))


def inline(page: Path) -> list[str]:
    """What a page sets as code within its sentences."""
    text = FENCE.sub("", page.read_text("utf-8"))
    return [" ".join(code.split()) for code in INLINE.findall(text)]


def words(command: str) -> list[str]:
    """A command line as the shell splits it, without remarks."""
    return shlex.split(command, comments=True)
