"""Traces: one row a token, one parquet shard a batch, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibrate.run.errors import UserError
from calibrate.run.folder import atomic_path
from hlmtheory.steps import COLUMNS, Axes, Step

HEADER_KEY = b"hlmtheory"
SCHEMA_VERSION = 2
FLOAT_DTYPE = np.float32


def write_shard(
    path: Path,
    columns: Mapping[str, np.ndarray],
    prompt_ids: Sequence[str],
    header: Mapping[str, Any],
    axes: Axes,
    categories: Sequence[str] = (),
) -> None:
    """Write one batch of token rows.

    Parameters
    ----------
    path : Path
        Final name; a temporary one is used until the file is whole.
    columns : mapping of str to array (N,) or (N, G)
        `row` indexes `prompt_ids` and becomes the column prompt_id.
    prompt_ids : sequence of str
    header : mapping
        JSON-serialisable provenance, stored in the file's metadata.
    axes : Axes
        What the columns mean, stored beside it: readers take them from there.
    categories : sequence of str
        Of each prompt; left out of the file unless every prompt has one.
    """
    rows = pa.array(columns["row"].astype(np.int32))
    arrays = {"prompt_id": pa.DictionaryArray.from_arrays(rows, pa.array(list(prompt_ids)))}
    if categories and all(categories):
        arrays["category"] = pa.DictionaryArray.from_arrays(rows, pa.array(list(categories)))
    for name, values in columns.items():
        if name != "row":
            arrays[name] = _to_arrow(values)
    table = pa.table(arrays).replace_schema_metadata(
        {
            HEADER_KEY: json.dumps(
                {"schema_version": SCHEMA_VERSION, "axes": axes.to_dict(), **header}
            )
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.dtype.kind == "f":
        values = values.astype(FLOAT_DTYPE)
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def read_header(path: Path) -> dict[str, Any]:
    """Provenance of a shard.

    Raises
    ------
    UserError
        If the file is not a whole shard of this schema version.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        header: dict[str, Any] = json.loads(metadata[HEADER_KEY])
    except (OSError, KeyError, pa.ArrowInvalid, json.JSONDecodeError):
        raise UserError(
            f"{path}: not a trace shard, or cut off; calibrate again into another folder"
        ) from None
    if header.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {header.get('schema_version')}, this is {SCHEMA_VERSION}; "
            "calibrate again"
        )
    return header


def read_axes(path: Path) -> Axes:
    """What the columns of a shard mean.

    Raises
    ------
    UserError
        If its header does not say, or a column is not as wide as its axis.
    """
    try:
        axes = Axes.from_dict(read_header(path).get("axes", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}; calibrate again") from None
    for one in pq.read_schema(path):
        axis = COLUMNS[one.name].axis if one.name in COLUMNS else ""
        width = getattr(one.type, "list_size", 1)
        if axis not in ("", "head") and width != len(getattr(axes, axis)):
            raise UserError(
                f"{path}: {one.name} has {width} columns and its axis {axis} "
                f"{len(getattr(axes, axis))}; calibrate again"
            )
    return axes


def shard_paths(run: Path) -> list[Path]:
    """Finished shards of a run, in order."""
    return sorted((run / "traces").glob("*.parquet"))


def finished_prompts(run: Path) -> set[str]:
    """Prompts whose tokens are already on disk."""
    done: set[str] = set()
    for path in shard_paths(run):
        read_header(path)
        done |= set(pq.read_table(path, columns=["prompt_id"])["prompt_id"].unique().to_pylist())
    return done


class Trace:
    """Token rows of a run as numpy columns, ordered by prompt and step.

    Attributes
    ----------
    columns : dict of str to array (N,) or (N, G)
    prompt_ids : list of str
        The prompts; `prompt_index` (N,) points into it.
    axes : Axes
        What the columns mean, as the files say.
    categories : list of str
        Of each prompt; empty where they have none.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        prompt_ids: list[str],
        axes: Axes,
        categories: Sequence[str] = (),
    ) -> None:
        self.columns = columns
        self.prompt_ids = prompt_ids
        self.axes = axes
        self.categories = list(categories)

    def step(self, rows: Any = slice(None)) -> Step:
        """Some rows, all by default, as a policy reads them."""
        return Step(self.axes, self.columns, rows)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise UserError(f"the trace has no column {name!r}; calibrate with --trace full")
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def prompt_index(self) -> np.ndarray:
        """Index of each token's prompt, (N,)."""
        return self.columns["prompt_index"]

    @property
    def num_tokens(self) -> int:
        """Number of token rows."""
        return len(self.columns["prompt_index"])

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.prompt_ids)


def read_trace(paths: list[Path], columns: list[str] | None = None) -> Trace:
    """Read shards into one trace.

    Floats of one number a token come back as float64, so that sums over a million tokens lose
    nothing more; wider columns stay as they are until a step reads them.

    Raises
    ------
    UserError
        If there is no shard, one is broken, or their axes differ.
    """
    if not paths:
        raise UserError("no finished trace shard; run `hlm calibrate` first")
    axes = read_axes(paths[0])
    for path in paths[1:]:
        if (found := read_axes(path)) != axes:
            raise UserError(
                f"{path}: its axes are not those of {paths[0].name}: {found} and {axes}"
            )
    categorised = all("category" in pq.read_schema(path).names for path in paths)
    of_prompts = ["prompt_id", "category"] if categorised else ["prompt_id"]
    wanted = None if columns is None else [*of_prompts, "step", *columns]
    tables = [pq.read_table(path, columns=wanted) for path in paths]
    out: dict[str, np.ndarray] = {}
    names = [name for name in tables[0].column_names if name not in ("prompt_id", "category")]
    for name in names:
        out[name] = np.concatenate([_to_numpy(table[name]) for table in tables])
    ids = [prompt_id for table in tables for prompt_id in table["prompt_id"].to_pylist()]
    prompt_ids = sorted(set(ids))
    place = {prompt_id: i for i, prompt_id in enumerate(prompt_ids)}
    index = np.array([place[prompt_id] for prompt_id in ids], dtype=np.int64)
    order = np.lexsort((out["step"], index))
    trace_columns = {name: values[order] for name, values in out.items()}
    trace_columns["prompt_index"] = index[order]
    categories: list[str] = []
    if categorised:
        of_rows = [value for table in tables for value in table["category"].to_pylist()]
        category = dict(zip(ids, of_rows, strict=True))
        categories = [category[prompt_id] for prompt_id in prompt_ids]
    return Trace(trace_columns, prompt_ids, axes, categories)


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        flat: np.ndarray = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, width)
    values: np.ndarray = array.to_numpy(zero_copy_only=False)
    return values.astype(np.float64) if values.dtype.kind == "f" else values
