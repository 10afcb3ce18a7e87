"""Run the commands that a page shows, and put into the page what they print.

    python -m docs_tools.outputs docs/first-hour.md

The commands of its ```` ```console ```` blocks are run one after the other in a new folder, on a
terminal of 100 columns. The models must be in the cache.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from calibrate.run.folder import write_text
from docs_tools.pages import FENCE, ROOT, block_of

COLUMNS = 100
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def printed(command: str, folder: Path) -> str:
    """What a command prints on a terminal, without colours and blanks at the end of lines."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    program = re.sub(r"^hlm\b", f"{shlex.quote(sys.executable)} -m cli", command)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "TERM": "xterm"}
    chunks = []
    with subprocess.Popen(program, shell=True, cwd=folder, env=env, stdout=end) as process:
        os.close(end)
        while True:
            try:
                chunks.append(os.read(terminal, 2**16))
            except OSError:  # the other end is closed
                break
    os.close(terminal)
    if process.returncode:
        raise SystemExit(f"{command}: exit {process.returncode}")
    text = ESCAPES.sub("", b"".join(chunks).decode()).replace("\r", "")
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def refreshed(text: str, folder: Path) -> str:
    """The page with the output of its commands as it is now."""

    def run(found: re.Match[str]) -> str:
        block = block_of(found)
        if block.language != "console":
            return found.group()
        shown = []
        for line in re.findall(r"^\$ (?:.*\\\n)*.*$", block.text, re.MULTILINE):
            command = line[2:].replace("\\\n", " ")
            print(f"$ {command}", file=sys.stderr)
            shown.append("\n".join(part for part in (line, printed(command, folder)) if part))
        return "```console\n" + "\n".join(shown) + "\n```"

    return FENCE.sub(run, text)


def main() -> None:
    """Refresh the pages that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        with tempfile.TemporaryDirectory() as folder:
            write_text(path, refreshed(path.read_text(encoding="utf-8"), Path(folder)))


if __name__ == "__main__":
    main()
