"""python pull.py SOURCE [GGUF]: one model brought into the cache, as commands do, and no more.

SOURCE is a .gguf file, a hub id, or `hub-file` or `packages`, which have the bytes of GGUF. Room is
not looked for before: it is there when it is asked for, and then somebody else fills the disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_pairs import WHEELS

from calibrate.pairs import convert, store
from calibrate.pairs.cache import file_sha256
from calibrate.pairs.registry import model_named
from calibrate.pairs.sources import HubFile, ModelSpec
from calibrate.run.errors import UserError


def main(source: str, *gguf: str) -> None:
    """Pull it; whatever is wrong is one line, as at the command line."""
    store.check_room = convert.check_room = lambda *_: None  # type: ignore[attr-defined]
    if gguf:
        path = Path(gguf[0])
        place = HubFile("owner/tiny-gguf", "tiny.gguf", path.stat().st_size)
        model = ModelSpec("tiny", place if source == "hub-file" else WHEELS, file_sha256(path))
    else:
        model = model_named(source, "--llm")
    try:
        store.ensure_folder(model)
    except UserError as error:
        sys.exit(f"hlm: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
