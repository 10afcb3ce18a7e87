"""The pipeline from Python: the worked example of its docs, on the toy pair, and its promises."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from calibrate.derive.predict import SOURCES
from calibrate.fit.pilot import DEFAULT_PROMPTS
from calibrate.run.errors import UsageError
from calibrate.run.folder import read_record
from calibrate.run.records import (
    READ_TOKENS,
    CalibrationRecord,
    DerivationRecord,
    OperatingPoint,
    RunRecord,
    ValidationRecord,
)
from calibrate.run.watch import Progress
from hlmtheory import api

pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).resolve().parent.parent


def example() -> str:
    """The code in the docstring of `hlmtheory.api`, as a reader would copy it."""
    found = re.search(r"```python\n(.*?)```", api.__doc__ or "", re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> dict[str, Any]:
    """Every name of the example, run in a folder with the toy pair; and the folder."""
    folder = tmp_path_factory.mktemp("notebook")
    for name in ("device", "server", "prompts.txt"):
        (folder / name).symlink_to(toy / name)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(example(), names)
    return names | {"folder": folder, "run": folder / "run"}


def test_the_example_makes_what_the_commands_make(made: dict[str, Any]) -> None:
    run = made["run"]
    for name, kind in (
        ("calibration", CalibrationRecord), ("derivation", DerivationRecord),
        ("validation", ValidationRecord),
    ):  # fmt: skip
        assert isinstance(made[name], kind)
        assert made[name] == read_record(run, kind)
    assert {path.suffix for path in made["files"]} == {".png", ".pdf", ".md", ".csv"}
    assert all((made["folder"] / path).is_file() for path in made["files"])
    assert (made["folder"] / made["page"]).read_text().startswith("<!DOCTYPE html>")


def test_a_repr_fits_on_a_line(made: dict[str, Any]) -> None:
    texts = [repr(made[name]) for name in ("calibration", "derivation", "validation")]
    assert all(len(text) < 160 and "\n" not in text for text in texts)
    calibration, derivation, validation = texts
    assert "12 prompts" in calibration
    assert "beta = " in calibration
    assert derivation.startswith("<DerivationRecord: default, link lte, profile measured; ")
    held = made["validation"].coverage
    assert f"{held.covered} of {held.total} counted figures" in validation


def test_tables_say_what_the_records_say(made: dict[str, Any]) -> None:
    fit = made["calibration"].to_pandas().set_index("quantity")
    slope = made["calibration"].fit.slope
    assert tuple(fit.loc["slope"]) == (slope.value, slope.low, slope.high)
    points = made["derivation"].operating_points
    table = made["derivation"].to_pandas()
    assert list(table["policy"] + "/" + table["rule"]) == [point.key for point in points]
    assert list(table["tv_bias_high"].dropna()) == [
        point.predicted["tv_bias"].high for point in points
        if point.predicted["tv_bias"].high is not None
    ]  # fmt: skip
    cells = made["validation"].to_pandas()
    assert len(cells) == len(made["validation"].cells)
    assert int((cells["covered"] == False).sum()) == sum(  # noqa: E712
        cell.covered is False for cell in made["validation"].cells
    )
    frame = api.tokens(made["run"])
    assert "uncertainty" in frame
    assert "head_prob" not in frame
    assert len(frame) == made["calibration"].num_tokens
    assert frame["prompt_id"].nunique() == 12


def test_the_command_line_makes_the_same_records(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One path: all is the same but what a clock measured."""
    folder, run = made["folder"], tmp_path / "run"

    def hlm(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["hlm", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0

    hlm(
        "calibrate", "--slm", str(folder / "device"), "--llm", str(folder / "server"),
        "--prompts", str(folder / "prompts.txt"), "--limit", "12", "--max-new-tokens", "8",
        "--output-path", str(run),
    )  # fmt: skip
    policies = ["--policy", "hlm", "--policy", "u-hlm", "--policy", "r-hlm"]
    hlm("derive", str(run), *policies, "--risk", "0.05", "--link", "lte")
    hlm("validate", str(run), "--rule", "risk-0.05", "--limit", "8")
    theirs, ours = (read_record(one, CalibrationRecord) for one in (run, made["run"]))
    assert (theirs.fit, theirs.relation) == (ours.fit, ours.relation)
    assert theirs.estimators == ours.estimators
    theirs, ours = (read_record(one, DerivationRecord) for one in (run, made["run"]))
    assert theirs.request == ours.request
    assert theirs.certificates == ours.certificates
    assert [_counted(point) for point in theirs.operating_points] == [
        _counted(point) for point in ours.operating_points
    ]
    theirs, ours = (read_record(one, ValidationRecord) for one in (run, made["run"]))
    assert theirs.prompt_ids == ours.prompt_ids
    counted = [[cell for cell in one.cells if cell.source == "counted"] for one in (theirs, ours)]
    assert counted[0] == counted[1] != []


@pytest.mark.parametrize("name", ["calibrate", "derive", "validate"])
def test_what_is_not_given_is_the_same_on_the_command_line_and_in_python(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(one, name)).parameters for one in (api, cli))
    shared = [key for key in ours.keys() & theirs.keys() if key not in ("models", "run")]
    plain = [key for key in shared if isinstance(ours[key].default, int | float | str | bool)]
    assert plain
    assert {key: ours[key].default for key in plain} == {key: theirs[key].default for key in plain}


def test_defaults_that_a_run_stores_are_its_records() -> None:
    given = inspect.signature(api.calibrate).parameters
    assert given["read_tokens"].default == READ_TOKENS
    assert given["pilot"].default == DEFAULT_PROMPTS


def _counted(point: OperatingPoint) -> Any:
    """A point without what follows from times, which a clock measured."""
    kept = {key: value for key, value in point.predicted.items() if SOURCES[key] == "counted"}
    return point.model_copy(update={"predicted": kept})


def test_progress_and_lines_are_told(tmp_path: Path, toy: Path) -> None:
    said: list[str] = []
    seen: list[Progress] = []
    models = api.Models(
        slm=str(toy / "device"), llm=str(toy / "server"), dtype="float32", device="cpu"
    )
    api.calibrate(
        tmp_path / "run", models, prompts=str(toy / "prompts.txt"), limit=3, max_new_tokens=4,
        say=said.append, progress=seen.append,
    )  # fmt: skip
    assert said[0] == f"loading {models.spec.name}"
    assert {(one.stage, one.unit) for one in seen} == {("calibrating", "token")}
    record = read_record(tmp_path / "run", RunRecord)
    assert seen[-1].num_emitted == record.num_tokens
    assert seen[-1].done == seen[-1].total == 3 * 4
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    told = len(said)
    again = api.calibrate(
        tmp_path / "run", models, prompts=str(toy / "prompts.txt"), limit=3, max_new_tokens=4,
        resume=True, say=said.append,
    )  # fmt: skip
    assert again == read_record(tmp_path / "run", CalibrationRecord)
    assert len(said) == told + 1
    assert "finished already" in said[-1]


def test_models_are_loaded_once(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from calibrate.pairs import models as module

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(module, "load_pair", refuse)
    assert made["models"].load(attention=True) is made["models"].load(attention=False)
    with pytest.raises(AssertionError, match="loaded again"):
        api.Models(slm=str(made["folder"] / "device"), llm=str(made["folder"] / "server")).load(
            attention=False
        )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: api.calibrate(run, limit=0), "--limit 0: allowed is 1 or more"),
        (lambda run: api.calibrate(run, temperature=-1.0), "--temperature -1"),
        (lambda run: api.derive(run, risks=[1.5]), "--risk 1.5"),
        (lambda run: api.derive(run, policies=["x-hlm"]), "--policy x-hlm"),
        (lambda run: api.derive(run, mood="bright"), "mood = 'bright': unknown; known are"),
        (lambda run: api.validate(run, order="sorted"), "--order sorted"),
        (lambda run: api.figures(run, paper=3), "--paper 3"),
        (lambda run: api.Models(pair="nonsense"), "--pair nonsense"),
        (lambda run: api.Models(device="tpu"), "--device tpu"),
    ],
)
def test_mistakes_are_refused_as_on_the_command_line(tmp_path: Path, call: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        call(tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_plain_import_leads_to_everything_and_brings_in_nothing() -> None:
    code = (
        "import sys, hlmtheory\n"
        "hlmtheory.api.derive\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pandas', 'pydantic', 'calibrate',\n"
        "         'paper_figs'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from hlmtheory.api import Models\n"
        "assert Models().spec.name == 'smollm2'\n"
        "try:\n    hlmtheory.nonsense\n"
        "except AttributeError:\n    pass\n"
        "else:\n    raise AssertionError\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
