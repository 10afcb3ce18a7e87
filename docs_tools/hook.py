"""Hooks of the documentation site (mkdocs.yml): made pages, mathematics, links between pages.

- README, CONTRIBUTING, CHANGELOG and data/README are pages too, the page of commands is made from
  the command line, and links between files of the repository become links between pages;
- a bar in the code of a table needs no backslash, which GitHub asks for;
- a formula between two `$$` stands alone in its paragraph, as the Markdown of the site wants it;
- `**(60)**` at the head of a paragraph of docs/theory.md is an anchor, and "docs/theory.md, (60)"
  anywhere, docstrings too, leads there. One that is not there fails the build, and so does a page
  that fetches anything.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from docs_tools.commands import commands_text
from docs_tools.pages import FENCE, ROOT

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "data.md",
}
"""Files outside docs/ that are pages, and where."""
THEORY = "theory.md"
LABEL = r"\((\d+[a-z]?)\)"
OPENING = re.compile(rf"^\*\*{LABEL}\*\*", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
BAR = re.compile(r"`[^`\n]*\\\|[^`\n]*`")
DISPLAYED = re.compile(r"\n*(\$\$.+?\$\$)[ ]*\n*", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere or are made."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "commands.md", content=commands_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between pages, anchors of the theory, and paragraphs of their own for formulas."""
    own = page.file.src_uri
    source = {site: path for path, site in PAGES.items()}.get(own, f"docs/{own}")
    if own == THEORY:
        markdown = OPENING.sub(r"**(\1)**{#eq-\1}", markdown)
    parts = _outside(FENCE, markdown, lambda text: _displayed(_linked(text, source, own)))
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Lead from each equation that is named to the equation."""
    if left := re.search(r"\.\. \w+::|:\w+:<code>", html):
        raise PluginError(f"{page.file.src_uri}: {left.group()!r} is shown as it stands")
    known = set(OPENING.findall((ROOT / "docs" / THEORY).read_text(encoding="utf-8")))
    own = page.file.src_uri
    here = own == THEORY
    prefix = "" if here else r"(docs/theory\.md,\s+(?:\(\w+\)\s+(?:to|and)\s+)?)"
    pattern = re.compile(rf"{prefix}{LABEL}")
    target = "" if here else posixpath.relpath("theory.html", posixpath.dirname(page.url) or ".")

    def link(found: re.Match[str]) -> str:
        label = found.group(found.lastindex or 1)
        if label not in known:
            if here:
                return found.group()
            raise PluginError(f"{own}: docs/theory.md has no equation ({label})")
        text = found.group().replace("docs/theory.md,", "Theory")
        return f'<a href="{target}#eq-{label}">{text}</a>'

    return "".join(_texts(html, lambda text: pattern.sub(link, text)))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would fetch something."""
    fetched = re.search(r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)="https?:[^"]*""", output)
    if fetched:
        raise PluginError(f"{page.file.src_uri} fetches: {fetched.group()}")
    return output


def _outside(pattern: re.Pattern[str], text: str, change: Any) -> list[str]:
    """Parts of a text, changed where the pattern does not match."""
    parts, place = [], 0
    for found in pattern.finditer(text):
        parts += [change(text[place : found.start()]), found.group()]
        place = found.end()
    return [*parts, change(text[place:])]


def _linked(markdown: str, source: str, own: str) -> str:
    """The links of a file of the repository as links of its page."""

    def link(found: re.Match[str]) -> str:
        begin, target, end = found.groups()
        if re.match(r"[a-z]+:", target):
            return found.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = PAGES.get(path, path.removeprefix("docs/"))
        return begin + posixpath.relpath(site, posixpath.dirname(own) or ".") + end

    return LINK.sub(link, BAR.sub(lambda found: found.group().replace("\\|", "|"), markdown))


def _displayed(markdown: str) -> str:
    return DISPLAYED.sub(r"\n\n\1\n\n", markdown)


def _texts(html: str, change: Any) -> list[str]:
    """Tags of a page, and its texts changed but for code, links, headings and formulas."""
    parts, inside = [], ""
    for part in re.split(r"(<[^>]+>)", html):
        if part.startswith("<"):
            tag = re.match(r"</?(\w+)", part)
            name = tag.group(1) if tag else ""
            if not inside and (
                name in ("a", "code", "pre", "script") or "arithmatex" in part or name[:1] == "h"
            ) and not part.startswith("</"):  # fmt: skip
                inside = name
            elif part == f"</{inside}>":
                inside = ""
            parts.append(part)
        else:
            parts.append(part if inside else change(part))
    return parts
