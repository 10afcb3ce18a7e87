"""The papers' pair by its name, end to end, on a hub of our own with two tiny random Llamas.

The hub gates the server model, as the real one does, and hands it out in shards. Everything but its
address is what `hlm calibrate --pair tinyllama-llama2` does anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from toy_pair import make_pair, write_prompts

import cli
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, ValidationRecord

pytestmark = pytest.mark.filterwarnings("default")
DEVICE, SERVER = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-2-7b-chat-hf"
TOKEN, COMMIT = "hf_of-our-own", "a" * 40
TEMPLATE = "<s> {% for message in messages %}{{ message['content'] }} {% endfor %}"


class Hub(BaseHTTPRequestHandler):
    """A hub of folders; the server model wants the token of somebody who accepted its licence."""

    folders: dict[str, Path]
    served: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if listing else parts[:2])
        if repo not in self.folders:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        files = sorted(path for path in self.folders[repo].iterdir() if path.is_file())
        if listing:
            return self._list(repo, parts[4:], files, body)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo == SERVER and not allowed:
            return self._answer(403, {"X-Error-Code": "GatedRepo"}, b"", body)
        path = self.folders[repo] / parts[-1]
        if not path.is_file():
            return self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        content = path.read_bytes()
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if body:
            self.served.append(f"{repo}/{path.name}")
        return self._answer(200, tag, content, body)

    def _list(self, repo: str, rest: list[str], files: list[Path], body: bool) -> None:
        """What a repository holds: its card, or its tree."""
        found: object = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}
            for path in files
        ]
        if rest[:1] != ["tree"]:
            siblings = [{"rfilename": path.name} for path in files]
            found = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [],
                     "gated": "manual" if repo == SERVER else False, "disabled": False,
                     "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
        kind = {"Content-Type": "application/json"}
        self._answer(200, kind, json.dumps(found).encode(), body)

    def _answer(self, code: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two repositories: a small device model, and a server model in shards with a template."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("repositories")
    device, server = make_pair(path)
    sharded = path / "sharded"
    AutoModelForCausalLM.from_pretrained(server).save_pretrained(sharded, max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(server / name, sharded)
    (sharded / "chat_template.jinja").write_text(TEMPLATE)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (sharded / "generation_config.json").write_text(json.dumps(sampling))
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    return {DEVICE: device, SERVER: sharded}


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> Iterator[ThreadingHTTPServer]:
    """The hub, an empty cache, and nobody logged in."""
    from huggingface_hub import constants

    Hub.folders, Hub.served = folders, []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def hlm(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """One command in this process, which has imported the models' libraries already."""
    monkeypatch.setattr(sys, "argv", ["hlm", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def calibrate(monkeypatch: pytest.MonkeyPatch, prompts: Path, run: Path) -> int:
    return hlm(
        monkeypatch, "calibrate", "--pair", "tinyllama-llama2", "--prompts", str(prompts),
        "--limit", "12", "--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu",
        "--output-path", str(run),
    )  # fmt: skip


def test_without_a_token_one_line_says_how_to_be_let_in(
    hub: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt")
    assert calibrate(monkeypatch, prompts, tmp_path / "run") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hlm: ")]
    for word in (f"{SERVER} is gated", "accept its licence at", "HF_TOKEN"):
        assert word in line
    assert not (tmp_path / "run").exists()
    assert not any(file.startswith(SERVER) for file in Hub.served)


def test_with_a_token_it_goes_all_the_way_and_then_without_a_network(
    hub: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fetched once; the second calibration and every rerun come from the cache alone."""
    from huggingface_hub import constants

    prompts, run, again = (tmp_path / name for name in ("prompts.txt", "run", "again"))
    write_prompts(prompts)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert calibrate(monkeypatch, prompts, run) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "has temperature = 0.6, top_p = 0.9: not applied" in said, "of the server's config"
    assert any(name.startswith(f"{SERVER}/model-0000") for name in Hub.served)
    assert len(Hub.served) == len(set(Hub.served)), "nothing is fetched twice"
    first = read_record(run, CalibrationRecord)
    assert (first.pair.name, first.pair.vocab_size) == ("tinyllama-llama2", 96)

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num_served = len(Hub.served)
    assert calibrate(monkeypatch, prompts, again) == 0, capsys.readouterr().err
    second = read_record(again, CalibrationRecord)
    assert (second.fit, second.relation) == (first.fit, first.relation)
    assert hlm(monkeypatch, "derive", str(run), "--risk", "0.05") == 0
    rules = ["--rule", "risk-0.05", "--policy", "hlm", "--policy", "u-hlm"]
    assert hlm(monkeypatch, "validate", str(run), *rules, "--limit", "8") == 0
    assert {one.policy for one in read_record(run, ValidationRecord).reruns} == {"hlm", "u-hlm"}
    assert hlm(monkeypatch, "figures", str(run)) == 0
    assert (run / "figures" / "relation.png").is_file()
    assert len(Hub.served) == num_served, "nothing was asked of the hub"


def test_offline_and_not_cached_says_both_ways_out(
    hub: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    prompts = write_prompts(tmp_path / "prompts.txt")
    assert calibrate(monkeypatch, prompts, tmp_path / "run") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hlm: ")]
    assert "HF_HUB_OFFLINE is set" in line
    assert "--slm/--llm" in line
    assert "HF_TOKEN" in line
    assert Hub.served == []
