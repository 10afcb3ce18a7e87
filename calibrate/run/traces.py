"""Traces: one row a token, one parquet shard a batch, each written whole or not at all."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calibrate.run.checksums import BLANK, intact, sealed
from calibrate.run.errors import UserError
from calibrate.run.folder import atomic_path, read_record
from calibrate.run.prompts import MIN_PROMPTS
from calibrate.run.records import CalibrationRecord, RunRecord
from hlmtheory.steps import COLUMNS, Axes, Step

HEADER_KEY = b"hlmtheory"
SCHEMA_VERSION = 3
SHARD_NAME = re.compile(r"shard-\d+\.parquet")
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
    write_table(path, table)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with the checksum of the file in its footer.

    Hardly a float occurs twice, so dictionaries of them would only be carried along; bytes of equal
    weight together pack better.
    """
    floats: list[str] = []
    others: list[str] = []
    for one in table.schema:
        listed = pa.types.is_fixed_size_list(one.type)
        kind, leaf = (one.type.value_type, ".list.element") if listed else (one.type, "")
        (floats if pa.types.is_floating(kind) else others).append(one.name + leaf)
    packing = {"compression": "zstd", "use_dictionary": others, "use_byte_stream_split": floats}
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **packing) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"checksum": BLANK})
    with atomic_path(path) as temporary:
        temporary.write_bytes(sealed(sink.getvalue()))


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.dtype.kind == "f":
        values = values.astype(FLOAT_DTYPE)
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


class Shard:
    """One shard, its checksum checked before its bytes are decoded.

    Attributes
    ----------
    path : Path
    header : dict
        Provenance.
    axes : Axes
        What its columns mean.
    names : list of str
        Of its columns.

    Raises
    ------
    UserError
        If the file is not what was written, is of another schema version, or its header does not
        say what its columns are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        if not intact(data):
            raise UserError(
                f"{path}: not a trace shard, cut off or changed: its checksum does not match; "
                "restore it, or remove it and make it again: `hlm validate` for a rerun's, else "
                "`hlm calibrate --resume`"
            )
        self._file = pq.ParquetFile(pa.BufferReader(data))
        schema = self._file.schema_arrow
        self.names: list[str] = list(schema.names)
        self.header: dict[str, Any] = json.loads((schema.metadata or {}).get(HEADER_KEY, b"{}"))
        if self.header.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {self.header.get('schema_version')}, this is "
                f"{SCHEMA_VERSION}; calibrate again"
            )
        try:
            self.axes = Axes.from_dict(self.header.get("axes", {}))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {error}; calibrate again") from None
        for one in schema:
            axis = COLUMNS[one.name].axis if one.name in COLUMNS else ""
            width = getattr(one.type, "list_size", 1)
            if axis not in ("", "head") and width != len(getattr(self.axes, axis)):
                raise UserError(
                    f"{path}: {one.name} has {width} columns and its axis {axis} "
                    f"{len(getattr(self.axes, axis))}; calibrate again"
                )

    @property
    def plain(self) -> list[str]:
        """Columns of one number a token, apart from labels and the step."""
        schema, labels = self._file.schema_arrow, ("prompt_id", "category", "step")
        wide = {one.name for one in schema if pa.types.is_fixed_size_list(one.type)}
        return [name for name in self.names if name not in labels and name not in wide]

    @property
    def num_tokens(self) -> int:
        """Rows."""
        num: int = self._file.metadata.num_rows
        return num

    def read(
        self, columns: Sequence[str] | None = None, prompts: pa.Array | None = None
    ) -> pa.Table:
        """These columns, of the prompts with these ids; all by default.

        Of a shard that holds none of the prompts no other column is unpacked.
        """
        names = self.names if columns is None else list(columns)
        if prompts is None:
            return self._file.read(names)
        ids = self._file.read(["prompt_id"])["prompt_id"]
        kept = pc.is_in(ids.cast(pa.string()), prompts)
        if not pc.any(kept).as_py():
            return self._file.schema_arrow.empty_table().select(names)
        return self._file.read(names).filter(kept)


def read_axes(path: Path) -> Axes:
    """What the columns of a shard mean."""
    return Shard(path).axes


def shard_paths(run: Path) -> list[Path]:
    """Finished shards of a run, in order."""
    return shards_in(run / "traces")


def pilot_paths(run: Path) -> list[Path]:
    """Finished shards of its pilot, in order."""
    return shards_in(run / "pilot")


def shards_in(folder: Path) -> list[Path]:
    """Finished shards of a folder, in order.

    Raises
    ------
    UserError
        If a file has another name, as copies get: its tokens would count twice.
    """
    found = sorted(folder.glob("*.parquet"))
    for path in found:
        if SHARD_NAME.fullmatch(path.name) is None:
            raise UserError(f"{path}: no name of a shard (shard-00000.parquet); move it away")
    return found


def next_shard(folder: Path) -> Path:
    """Where the next shard of a folder goes: behind those that are there."""
    return next_shards(folder, 1)[0]


def next_shards(folder: Path, num: int) -> list[Path]:
    """Where the next shards of a folder go, in order."""
    numbers = [int(path.stem.rpartition("-")[2]) for path in shards_in(folder)]
    begin = max(numbers, default=-1) + 1
    return [folder / f"shard-{number:05d}.parquet" for number in range(begin, begin + num)]


@dataclass(frozen=True)
class Stored:
    """What shards hold, seen without their columns.

    Attributes
    ----------
    prompt_ids : frozenset of str
    num_tokens : int
    wall_s, forward_s : float
        That decoding them took, as their headers say.
    axes : mapping of Axes to Path
        What their columns mean, each with the first shard that says so: one, if all is well.
    """

    prompt_ids: frozenset[str]
    num_tokens: int
    wall_s: float
    forward_s: float
    axes: Mapping[Axes, Path]

    def __or__(self, more: Stored) -> Stored:
        """What both hold together, of different prompts."""
        return Stored(
            self.prompt_ids | more.prompt_ids,
            self.num_tokens + more.num_tokens,
            self.wall_s + more.wall_s,
            self.forward_s + more.forward_s,
            {**more.axes, **self.axes},
        )


def stored_in(shards: Sequence[Path]) -> Stored:
    """What finished shards hold, one after the other in memory.

    Raises
    ------
    UserError
        As :class:`Shard`.
    """
    prompt_ids: set[str] = set()
    num_tokens, spent = 0, {"wall_s": 0.0, "forward_s": 0.0}
    axes: dict[Axes, Path] = {}
    for path in shards:
        shard = Shard(path)
        axes.setdefault(shard.axes, path)
        prompt_ids.update(shard.read(["prompt_id"])["prompt_id"].unique().to_pylist())
        num_tokens += shard.num_tokens
        for name in spent:
            spent[name] += shard.header.get(name, 0.0)
    return Stored(frozenset(prompt_ids), num_tokens, **spent, axes=axes)


def finished_prompts(shards: Sequence[Path]) -> frozenset[str]:
    """Prompts whose tokens are already on disk."""
    return stored_in(shards).prompt_ids


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

    def of_prompts(self, prompt_ids: Sequence[str]) -> Trace:
        """The tokens of some of its prompts, given by id in rising order."""
        place = np.searchsorted(self.prompt_ids, prompt_ids)
        kept = np.isin(self.prompt_index, place)
        columns = {name: values[kept] for name, values in self.columns.items()}
        columns["prompt_index"] = np.searchsorted(place, columns["prompt_index"])
        categories = [self.categories[i] for i in place] if self.categories else []
        return Trace(columns, list(prompt_ids), self.axes, categories)

    def first(self, num_tokens: int) -> Trace:
        """The first tokens of each answer, as many or fewer."""
        kept = self["step"] < num_tokens
        columns = {name: values[kept] for name, values in self.columns.items()}
        return Trace(columns, self.prompt_ids, self.axes, self.categories)

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


def read_trace(
    paths: list[Path], columns: list[str] | None = None, prompts: Sequence[str] | None = None
) -> Trace:
    """Read shards into one trace, or the tokens of some prompts: what others hold is let go of.

    Floats of one number a token come back as float64, so that sums over a million tokens lose
    nothing more; wider columns stay as they are until a step reads them.

    Raises
    ------
    UserError
        If there is no shard, one is not what was written, their axes differ, or a token occurs
        twice.
    """
    axes: Axes | None = None
    tables: list[pa.Table] = []
    kept = None if prompts is None else pa.array(prompts, pa.string())
    for path in paths:
        shard = Shard(path)
        axes = axes or shard.axes
        if shard.axes != axes:
            raise UserError(
                f"{path}: its axes are not those of {paths[0].name}: {shard.axes} and {axes}"
            )
        labels = [name for name in ("prompt_id", "category") if name in shard.names]
        wanted = None if columns is None else [*labels, "step", *columns]
        tables.append(shard.read(wanted, kept))
    if axes is None:
        raise UserError("no finished trace shard; run `hlm calibrate` first")
    categorised = all("category" in table.column_names for table in tables)
    out: dict[str, np.ndarray] = {}
    names = [name for name in tables[0].column_names if name not in ("prompt_id", "category")]
    for name in names:
        out[name] = np.concatenate([_to_numpy(table[name]) for table in tables])
    ids = [prompt_id for table in tables for prompt_id in table["prompt_id"].to_pylist()]
    prompt_ids = sorted(set(ids))
    place = {prompt_id: i for i, prompt_id in enumerate(prompt_ids)}
    index = np.array([place[prompt_id] for prompt_id in ids], dtype=np.int64)
    order = np.lexsort((out["step"], index))
    twice = ~(np.diff(index[order]) | np.diff(out["step"][order])).astype(bool)
    if twice.any():
        at = order[np.flatnonzero(twice)[0]]
        raise UserError(
            f"{paths[0].parent}: step {out['step'][at]} of prompt {ids[at]!r} occurs twice; remove "
            "the shard that does not belong there"
        )
    trace_columns = {name: values[order] for name, values in out.items()}
    trace_columns["prompt_index"] = index[order]
    categories: list[str] = []
    if categorised:
        of_rows = [value for table in tables for value in table["category"].to_pylist()]
        category = dict(zip(ids, of_rows, strict=True))
        categories = [category[prompt_id] for prompt_id in prompt_ids]
    return Trace(trace_columns, prompt_ids, axes, categories)


def prompts_to_read(
    prompt_ids: Sequence[str], num_tokens: int, most: int, seed: int
) -> Sequence[str]:
    """The prompts of a trace that are looked at: all, or as many as make up to `most` tokens.

    Intervals narrow with the root of the prompts and memory grows with the tokens, 13 KB each while
    operating points are derived. The number follows from the mean length of an answer; which, from
    the seed and the ids alone.

    Parameters
    ----------
    prompt_ids : sequence of str
    num_tokens : int
        Of all of them.
    most : int
    seed : int
        Of the run.
    """
    num = max(MIN_PROMPTS, most * len(prompt_ids) // max(num_tokens, 1))
    return sampled_prompts(prompt_ids, num, seed)


def sampled_prompts(prompt_ids: Sequence[str], num: int, seed: int) -> Sequence[str]:
    """So many prompts drawn without replacement, or all if there are no more.

    In whatever order the ids come; of one seed more prompts hold all of fewer.
    """
    if num >= len(prompt_ids):
        return prompt_ids
    drawn = np.random.default_rng([seed, len(prompt_ids)]).permutation(len(prompt_ids))[:num]
    ordered = sorted(prompt_ids)
    return [ordered[i] for i in drawn]


def read_calibration_trace(run: Path, calibration: CalibrationRecord) -> Trace:
    """The very tokens that a calibration was fitted on.

    Raises
    ------
    UserError
        As :func:`read_trace`, and if any of them were lost or added since.
    """
    info = read_record(run, RunRecord)
    num = calibration.num_prompts
    seed, all_read = info.settings.seed, num >= len(info.prompt_ids)
    prompts = None if all_read else sampled_prompts(info.prompt_ids, num, seed)
    trace = read_trace(shard_paths(run), prompts=prompts)
    found, told = ((one.num_prompts, one.num_tokens) for one in (trace, calibration))
    if found != told:
        raise UserError(
            f"{run}/traces holds {found[1]} tokens of {found[0]} prompts, calibration.json is of "
            f"{told[1]} of {told[0]}: a shard was lost or added; restore it, or calibrate again"
        )
    return trace


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
