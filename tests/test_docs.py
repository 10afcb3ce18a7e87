"""Every command and snippet of README and docs: its options exist, and it does what it is for.

A page is a story: its files are written, its commands and snippets run one after the other, in a
folder with the toy pair as `small/` and `big/`, prompts of its vocabulary and a finished `run`.
Sizes are cut down; servers and relays run beside the page on free ports, to its end. What needs
weights is parsed only; pages on the embedded pair are stories of `make long`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import toy_pair

import cli
import hlmtheory
from calibrate.derive.predict import METRICS
from calibrate.derive.presets import LINK_MODELS
from docs_tools.commands import PRINTED, commands, commands_text, written_by
from docs_tools.outputs import refreshed
from docs_tools.pages import FENCE, ROOT, Block, block_of, blocks, inline, pages, words
from hlmtheory.cost import DeviceProfile
from hlmtheory.policies import policy_names
from hlmtheory.scores import SCORE_NAMES
from paper_figs.words import GLOSSARY

pytestmark = pytest.mark.filterwarnings("default")

COMMANDS = dict(commands())
ALL_OPTIONS = {option for one in COMMANDS.values() for parameter in one.params
               for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}  # fmt: skip
PROGRAMS = {"hlm", "make", "cp", "cat", ".", "pip", "pre-commit", "python", "openssl",
            "ray", "sbatch"}  # fmt: skip
NOT_RUN = {"pairs pull", "quality"}
"""Commands that fetch; they are parsed."""
BESIDE = {"serve", "relay"}
"""Commands that run until somebody stops them."""
TYPED = "w3 w4 w5\nw7 w8\n"
MOST = {"--limit": 16, "--max-new-tokens": 8, "--num-draws": 20}
CALIBRATE = ["--max-new-tokens", "8", "--dtype", "float32"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parts(line: str) -> list[list[str]]:
    """The programs of a command line, with their arguments."""
    found: list[list[str]] = [[]]
    for word in words(line):
        if word in ("|", "&&", ";"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The words of an `hlm` command, and what comes after them."""
    for num in (2, 1):
        if " ".join(arguments[:num]) in COMMANDS:
            return " ".join(arguments[:num]), arguments[num:]
    raise AssertionError(f"there is no command hlm {' '.join(arguments[:2])}")


def parse(arguments: list[str]) -> dict[str, Any]:
    """The parameters that an `hlm` command line gives; fails where the command line would."""
    command, rest = split(arguments)
    context = COMMANDS[command].make_context(command, list(rest))
    return dict(context.params)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_of_a_page_parse(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in (line for block in blocks(page) for line in block.commands):
        for program, *arguments in parts(line):
            assert program in PROGRAMS, line
            if program == "hlm":
                parse(arguments)
            if program == "make":
                assert {word for word in arguments if "=" not in word} <= set(targets), line
            if program == "python":
                assert arguments[0] == "-m", line
                assert importlib.util.find_spec(arguments[1]) is not None, line
            for path in (word for word in arguments if word.startswith("data/")):
                assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", pages(), ids=name)
def test_options_that_a_page_speaks_of_exist(page: Path) -> None:
    for code in inline(page):
        named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        if code.startswith("hlm ") and not code.split()[1].isupper():
            command, _ = split(code.split()[1:])
            known = {option for one in COMMANDS[command].params for option in one.opts} | {"--help"}
            assert set(named) <= known, code
        elif code.startswith("--"):
            assert set(named) <= ALL_OPTIONS, code


def test_a_wrong_option_and_a_wrong_command_are_found() -> None:
    """Negative control."""
    with pytest.raises(Exception, match="no-such-option"):
        parse(["derive", "run", "--no-such-option"])
    with pytest.raises(AssertionError, match="no command"):
        parse(["derived", "run"])


def test_blocks_are_what_their_first_line_says() -> None:
    text = "- a\n\n  ```sh\n  # no\n  hlm derive a \\\n    --risk 1\n  ```\n\n"
    text += '```json title="x.json"\n{}\n```\n'
    found = [block_of(match) for match in FENCE.finditer(text)]
    assert [block.title for block in found] == ["", "x.json"]
    assert [words(line) for line in found[0].commands] == [["hlm", "derive", "a", "--risk", "1"]]
    assert Block("console", "", "$ hlm doctor\nfine\n$ hlm audit\n").commands == (
        "hlm doctor",
        "hlm audit",
    )


def of_pair(arguments: list[str]) -> str:
    """The pair of the registry whose weights a command needs; empty where it needs none.

    What needs a cluster is "other" too: it is parsed.
    """
    command, _ = split(arguments)
    given = parse(arguments)
    if given.get("engine") == "ray":
        return "other"
    if command == "quickstart":
        return "smollm2"
    if command == "calibrate" and not (given["slm"] or given["llm"]):
        return str(given["pair"] or "smollm2")
    return "other" if command in NOT_RUN else ""


def lines_of(page: Path) -> list[list[str]]:
    """Arguments of every `hlm` of a page."""
    return [arguments for block in blocks(page) for line in block.commands
            for program, *arguments in parts(line) if program == "hlm"]  # fmt: skip


def on_embedded_pair(page: Path) -> bool:
    return any(of_pair(arguments) == "smollm2" for arguments in lines_of(page))


def stories() -> list[Any]:
    """Pages with something to run, those on the embedded pair for `make long`."""
    found = []
    for page in pages():
        if lines_of(page) or any(block.language == "python" for block in blocks(page)):
            real = on_embedded_pair(page)
            marks = [pytest.mark.model, pytest.mark.long] if real else []
            found.append(pytest.param(page, id=name(page), marks=marks))
    return found


@pytest.fixture(scope="module")
def prepared(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the pages can be run."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(toy / "device", folder / "small")
    shutil.copytree(toy / "server", folder / "big")
    asked = '{"do_sample": true, "temperature": 0.8, "top_p": 0.9}'
    (folder / "big" / "generation_config.json").write_text(asked)
    texts = toy_pair.write_prompts(folder / "prompts.txt", 64).read_text().split("\n")[:-1]
    lines = [f'{{"prompt": "{text}", "id": "p{i}"}}' for i, text in enumerate(texts)]
    (folder / "my-prompts.jsonl").write_text("\n".join(lines) + "\n")
    run(folder, "calibrate", "--slm", "small", "--llm", "big", "--limit", "16", *CALIBRATE,
        "--output-path", "run")  # fmt: skip
    run(folder, "derive", "run", "--risk", "0.01", "--risk", "0.05")
    shutil.copytree(folder / "run", folder / "data" / "results" / "qwen2.5-coder")
    return folder


def run(folder: Path, *arguments: str) -> None:
    """One command in this process, which has imported the models' libraries already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["hlm", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(TYPED))
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0, f"hlm {' '.join(arguments)}"


def smaller(arguments: list[str]) -> list[str]:
    """The same command on less."""
    out = list(arguments)
    for place, word in enumerate(arguments[:-1]):
        if word in MOST:
            out[place + 1] = str(min(int(arguments[place + 1]), MOST[word]))
    return [*out, *CALIBRATE] if split(arguments)[0] == "calibrate" else out


class Beside:
    """Servers and relays of a page, each on a free port in the place of the page's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, str] = {}
        self.running = ExitStack()

    def place(self, arguments: list[str]) -> list[str]:
        """The same command with the ports that were taken, and this machine's name."""
        if split(arguments)[0] == "device" and "--server" not in arguments:
            arguments = [*arguments, "--server", parse(arguments)["server"]]
        for theirs, mine in self.places.items():
            arguments = [word.replace(theirs, mine) for word in arguments]
        return arguments

    def start(self, arguments: list[str]) -> None:
        """Run a server or a relay until the page ends; returns when it listens."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = str(one.getsockname()[1])
        given = parse(arguments)
        own = self.place([one for one in arguments if one not in ("--port", str(given["port"]))])
        name = "server.example" if given.get("tls_cert") else "127.0.0.1"
        self.places[f"{name}:{given['port']}"] = f"localhost:{port}"
        program = Path(sys.executable).with_name("hlm")
        process = subprocess.Popen([program, *own, "--port", port], cwd=self.folder)
        self.running.callback(process.wait, 30)
        self.running.callback(process.terminate)
        for _ in range(600):
            assert process.poll() is None, arguments
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
                return
            time.sleep(0.1)
        raise AssertionError(f"hlm {' '.join(arguments)} does not listen")


def play(page: Path, folder: Path, change: Callable[[list[str]], list[str]] = smaller) -> None:
    """Write the files of a page, and run its commands and snippets in order."""
    beside = Beside(folder)
    with beside.running:
        _play(page, folder, change, beside)


def _play(
    page: Path, folder: Path, change: Callable[[list[str]], list[str]], beside: Beside
) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.title:
            if not (folder / block.title).exists():
                (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                exec(compile(block.text, str(page), "exec"), names)
        for line in block.commands:
            for program, *arguments in parts(line):
                if program == "hlm" and split(arguments)[0] in BESIDE:
                    beside.start(arguments)
                elif program == "hlm" and of_pair(arguments) in ("", "smollm2"):
                    run(folder, *beside.place(change(arguments)))
                elif program in ("cp", "cat", "openssl"):
                    local = [word.replace("server.example", "localhost") for word in arguments]
                    subprocess.run([program, *local], cwd=folder, check=True)


@pytest.mark.parametrize("page", stories())
def test_a_page_can_be_followed(page: Path, request: Any, tmp_path: Path) -> None:
    if on_embedded_pair(page):
        play(page, tmp_path, list)
        return
    folder = tmp_path / "here"
    shutil.copytree(request.getfixturevalue("prepared"), folder)
    if any(str(parse(arguments).get("output_path")) == "run" for arguments in lines_of(page)):
        shutil.rmtree(folder / "run")
    play(page, folder)


def test_the_page_of_commands_has_every_option_of_every_command() -> None:
    text = commands_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n## hlm ")[1:]}
    assert set(sections) == set(COMMANDS)
    for command, section in sections.items():
        for parameter in COMMANDS[command].params:
            assert any(f"`{option}" in section for option in parameter.opts) or (
                f"`{parameter.metavar}" in section
            ), f"{command}: {parameter.opts}"


def test_every_json_that_a_command_prints_is_described() -> None:
    for command, one in COMMANDS.items():
        if any("--json" in parameter.opts for parameter in one.params):
            assert written_by(command) or command in PRINTED or command == "plan", command


@pytest.mark.parametrize("command", PRINTED)
def test_what_is_printed_is_what_the_page_says(command: str, capsys: Any) -> None:
    more = ["smollm2"] if command == "pairs show" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hlm", *command.split(), *more, "--json"])
        with pytest.raises(SystemExit):
            cli.main()
    made = json.loads(capsys.readouterr().out)
    for key, kind in PRINTED[command].items():
        found = made[key] if key else [made]
        if is_dataclass(kind):
            keys = {field.name for field in fields(kind)}
            assert found
            assert all(set(entry) == keys for entry in found)
        else:
            assert isinstance(found, kind)
    assert "" in PRINTED[command] or set(made) == set(PRINTED[command])


def first_cells(page: str, title: str) -> set[str]:
    """Code in the first cells of the table under a title row."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = text.split(title)[1].split("\n\n")[0].splitlines()[2:]
    return {code for row in rows for code in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_pages_name_every_link_profile_metric_and_score() -> None:
    links = first_cells("how-to/own-link.md", "| `model` | what it is | keys beside `model` |")
    assert links == set(LINK_MODELS)
    profile = first_cells("how-to/own-link.md", "| key | unit | meaning |")
    assert profile == {field.name for field in fields(DeviceProfile)}
    metrics = first_cells("glossary.md", "| name, in operating points and reruns | meaning |")
    assert metrics == set(METRICS)
    assert first_cells("how-to/own-policy.md", "| score | of | what it is |") == set(SCORE_NAMES)
    policies = first_cells("choosing.md", "| policy | the device skips the server when |")
    assert policies - {"-online"} == set(policy_names()) - {"cu-hlm-online"}


def test_the_glossary_has_the_sentences_of_the_reports() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for term, meaning in GLOSSARY.items():
        (said,) = (said for word, said in rows if word.partition(":")[0] == term)
        assert meaning in said


def test_presets_are_named() -> None:
    text = (ROOT / "docs" / "how-to" / "own-link.md").read_text(encoding="utf-8")
    for folder in ("links", "devices"):
        for path in (ROOT / "data" / folder).glob("*.json"):
            assert f"`{path.stem}`" in text, path


def test_keys_of_links_are_those_of_their_classes() -> None:
    text = (ROOT / "docs" / "how-to" / "own-link.md").read_text(encoding="utf-8")
    for model, kind in LINK_MODELS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{model}`"))
        named = re.findall(r"`(\w+)`", row.split("|")[3])
        assert set(named) == {field.name for field in fields(kind)}, model


def test_every_module_of_the_theory_is_on_one_page() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: (hlmtheory\S*)$", text, re.MULTILINE)
    there = {module.name for module in pkgutil.walk_packages(hlmtheory.__path__, "hlmtheory.")}
    assert sorted(named) == sorted(there)


def test_outputs_are_put_in_the_place_of_the_old_ones(tmp_path: Path) -> None:
    page = "Say:\n\n```console\n$ echo a \\\n  b\nold\n$ tput cols\n```\n\n```sh\necho c\n```\n"
    made = page.replace("b\nold", "b\na b").replace("tput cols\n", "tput cols\n100\n")
    assert refreshed(page, tmp_path) == made
    with pytest.raises(SystemExit, match="exit 3"):
        refreshed("```console\n$ exit 3\n```\n", tmp_path)


def test_docstrings_become_markdown() -> None:
    docstrings = pytest.importorskip("docs_tools.docstrings", reason="needs the extra docs")
    made = docstrings.as_markdown(
        "Of :math:`u_K`; see :func:`f`.\n\n.. math:: a = b, \\\\\n    c = d\n\nRest.\n\n"
        "Raises\n------\nValueError\n    If so.\n\nSource: somebody.\n"
    )
    assert "Of $u_K$; see `f`." in made
    assert "$$\n\\begin{aligned} a = b, \\\\\nc = d \\end{aligned}\n$$" in made
    assert made.endswith("If so.\n\nNotes\n-----\nSource: somebody.\n")


def test_hooks_move_links_bars_and_formulas() -> None:
    hook = pytest.importorskip("docs_tools.hook", reason="needs the extra docs")
    assert hook._linked("[a](docs/x.md#b) ![c](docs/figures/d.png)", "README.md", "index.md") == (
        "[a](x.md#b) ![c](figures/d.png)"
    )
    told = hook._linked("[a](../../CONTRIBUTING.md) `A \\| B`", "docs/how-to/x.md", "how-to/x.md")
    assert told == "[a](../contributing.md) `A | B`"
    assert hook._displayed("so\n$$a$$\nand") == "so\n\n$$a$$\n\nand"
    html = "<p>a <code>b</code> <a>c</a></p><h2>d</h2><span class='arithmatex'>e</span>f"
    assert "".join(hook._texts(html, str.upper)) == html.replace("a <", "A <").replace(">f", ">F")
