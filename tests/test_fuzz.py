"""Readers meet anything: an answer or one line that names the file, never a traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibrate.derive.presets import load_link, load_profile
from calibrate.pairs.convert import read_header
from calibrate.run.checksums import KEY, checksum
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record_file
from calibrate.run.prompts import read_prompts
from calibrate.run.records import STAGES
from calibrate.run.resources import data_path
from calibrate.run.traces import read_trace

pytestmark = pytest.mark.filterwarnings("default")
NUM_CASES = [60, pytest.param(10_000, marks=pytest.mark.long)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ODD = (
    b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"NaN", b"1e999",
    b'"\\ud800"', b"\x00" * 64, b'{"prompt": "a", "prompt": 1}', b"-", b"{}", b"[]", b"null",
)  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with some bytes changed, cut out or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, min(len(data) - place, draw(st.sampled_from((1, 8, 10**6))))))
        data[place : place + length] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def edited(draw: st.DrawFn, content: dict[str, Any]) -> bytes:
    """A valid object with some entry, deep inside, replaced or removed, and sealed again."""
    content = json.loads(json.dumps(content))
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys)) if keys else draw(st.text())
        if keys and isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        if keys and draw(st.booleans()):
            del place[key]
        elif keys or isinstance(place, dict):
            place[key] = draw(JSON)
        break
    if KEY in content:
        content[KEY] = checksum(content)
    return json.dumps(content).encode()


def meets(read: Callable[[Path], Any], path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        read(path)
    except UserError as error:
        said = str(error)
    else:
        return
    assert "\n" not in said
    assert path.name in said


def check(read: Callable[[Path], Any], path: Path, num: int, *kinds: st.SearchStrategy) -> None:
    """So many cases of each kind, and the odd ones."""
    for data in ODD:
        meets(read, path, data)

    @settings(
        max_examples=num, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(st.binary(max_size=200), *kinds))
    def run(data: bytes) -> None:
        meets(read, path, data)

    run()


@pytest.mark.parametrize("num", NUM_CASES)
def test_prompts(num: int, tmp_path: Path) -> None:
    line = {"prompt": "Why?", "id": "a", "category": "b", "split": "calibration"}
    lines = "\n".join(json.dumps(line | {"id": str(i)}) for i in range(3)).encode()
    check(
        lambda path: read_prompts(str(path)), tmp_path / "prompts.jsonl", num,
        changed(lines), edited(line), JSON.map(lambda value: json.dumps(value).encode()),
    )  # fmt: skip


@pytest.mark.parametrize("num", NUM_CASES)
@pytest.mark.parametrize(("folder", "name"), [("links", "wifi"), ("devices", "phone")])
def test_links_and_profiles(folder: str, name: str, num: int, tmp_path: Path) -> None:
    whole = data_path(folder, f"{name}.json").read_bytes()

    def read(path: Path) -> None:
        found = load_link(str(path)) if folder == "links" else load_profile(str(path), None)
        numbers = [value for value in vars(found).values() if isinstance(value, int | float)]
        assert all(math.isfinite(value) for value in numbers)

    check(read, tmp_path / f"{folder}.json", num, changed(whole), edited(json.loads(whole)))


@pytest.mark.parametrize("num", NUM_CASES)
@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_records_of_every_stage(kind: Any, num: int, judged_run: Path, tmp_path: Path) -> None:
    """Edited ones are sealed anew, so that the typed record itself has to tell."""
    made = judged_run / kind.file_name
    shipped = data_path("results", "qwen2.5-coder", kind.file_name)
    source = next((path for path in (made, shipped) if path.is_file()), None)
    kinds = []
    if source is not None and len(source.read_bytes()) < 500_000:
        kinds = [changed(source.read_bytes()), edited(json.loads(source.read_bytes()))]
    check(
        lambda path: read_record_file(path, kind, kind.made_by), tmp_path / kind.file_name, num,
        *kinds,
    )  # fmt: skip


@pytest.mark.parametrize("num", NUM_CASES)
def test_shards(num: int, judged_run: Path, tmp_path: Path) -> None:
    whole = (judged_run / "traces" / "shard-00000.parquet").read_bytes()
    check(lambda path: read_trace([path]), tmp_path / "shard.parquet", num, changed(whole))


@pytest.mark.parametrize("num", NUM_CASES)
def test_gguf_headers(num: int, tmp_path: Path) -> None:
    import numpy as np

    writer = GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("weights", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert read_header(tmp_path / "whole.gguf").num_elements == 8
    check(read_header, tmp_path / "model.gguf", num, changed(whole))
