"""docs/formats.md, made from the records and the table of columns: `python -m ...run.formats`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

from calibrate.run import records, traces
from calibrate.run.checksums import BLANK, KEY
from calibrate.run.folder import write_text
from hlmtheory import steps

PATH = Path(__file__).resolve().parents[2] / "docs" / "formats.md"

VERSION = records.StageRecord.schema_version
INTRODUCTION = f"""# Formats: every file of a run

Made by `python -m calibrate.run.formats` from `calibrate/run/records.py` and the table of columns
in `hlmtheory/steps.py`; a test fails when it is out of date.

Every JSON file is one object and begins with its schema version, {VERSION}, and its checksum
`{KEY}`: the SHA-256 of the object without that entry, as JSON in ASCII with sorted keys and no
blanks. A file of another version, whose checksum does not match, or with a key that is not listed
here, is refused. `tuple[X, ...]` is a list of X, `dict[str, X]` an object, `None` is null; NaN and
infinity never occur. A derivation,
its validation and its text scores are kept under a name: `operating_points.json` is the one named
`default`, `operating_points.NAME.json` any other.
"""

BLANK_TEXT = BLANK.decode().rstrip("0")
AXES = ", ".join(f"`{name}`" for name in steps.Axes(1).to_dict())
COLUMNS_TEXT = f"""## traces/*.parquet, pilot/*.parquet and reruns/POLICY-HASH/*.parquet

The calibration prompts, those that were decoded again on a policy's own road, and the reruns of
`hlm validate`: one row a token, one shard a batch, numbers in single precision. The metadata key
`hlmtheory` of each shard holds its header as JSON: schema version {traces.SCHEMA_VERSION},
provenance, the time that its batch took (`wall_s`, `forward_s`; of all policies that were decoded
together), and the axes that give the columns their meaning ({AXES}). The key `checksum`
is `{BLANK_TEXT}` and the SHA-256 of the whole file, taken with zeros in the place of
its 64 digits; it is checked before anything is decoded. A column with
several numbers a token is a list of fixed length along one of them, or along the head: the
{steps.HEAD_SIZE} likeliest candidates of the step.

"""


def formats_text() -> str:
    """The whole of docs/formats.md."""
    classes = {
        node.name: node
        for node in ast.parse(inspect.getsource(records)).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    stages = {kind.__name__: kind for kind in records.STAGES}
    parts = [INTRODUCTION]
    for name, kind in stages.items():
        parts.append(f"## {kind.file_name}\n\nWritten by `{kind.made_by}`. {_table(classes[name])}")
    rows = [
        (f"`{name}`", f"`{column.axis}`" if column.axis else "", column.text)
        for name, column in steps.COLUMNS.items()
        if column.text
    ]
    rows.insert(
        1, ("`category`", "", "that of the prompt; absent unless all of the shard have one")
    )
    parts.append(COLUMNS_TEXT + _rows(("column", "list along", "meaning"), rows))
    parts.append("## Shapes inside the JSON files\n")
    for name, node in classes.items():
        if name not in stages and name not in ("Record", "StageRecord"):
            parts.append(f"### {name}\n\n{_table(node)}")
    return "\n".join(parts)


def _table(node: ast.ClassDef) -> str:
    """Docstring of a record and one line a field: key, type as it is written, meaning."""
    fields = [
        (f"`{entry.target.id}`", f"`{ast.unparse(entry.annotation)}`", _text_behind(node, place))
        for place, entry in enumerate(node.body)
        if isinstance(entry, ast.AnnAssign)
        and isinstance(entry.target, ast.Name)
        and not ast.unparse(entry.annotation).startswith("ClassVar")
    ]
    about = (ast.get_docstring(node) or "").partition(": ")
    text = about[2] if about[0].endswith(".json") else "".join(about)
    return f"{text[:1].upper()}{text[1:]}\n\n" + _rows(("key", "type", "meaning"), fields)


def _text_behind(node: ast.ClassDef, place: int) -> str:
    """The string that follows a field, in one line."""
    following = node.body[place + 1 : place + 2]
    if following and isinstance(following[0], ast.Expr):
        return " ".join(str(ast.literal_eval(following[0].value)).split())
    return ""


def _rows(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


if __name__ == "__main__":
    write_text(PATH, formats_text())
