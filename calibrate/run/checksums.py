"""Checksums that files carry in themselves, checked before anything is made of a file.

A JSON object carries the SHA-256 of its other entries in canonical form: new indentation changes
nothing, a new number does. A binary file carries that of all its bytes, read with zeros where the
checksum itself stands, so nothing that is damaged reaches a decoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

KEY = "sha256"
"""The entry of a JSON object."""

_MARK = b"hlmtheory-sha256:"
_NUM_DIGITS = 64
BLANK = _MARK + b"0" * _NUM_DIGITS
"""What a binary file holds before it is sealed; its last one counts."""


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its own checksum: keys sorted, no blanks, ASCII."""
    rest = {key: value for key, value in content.items() if key != KEY}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(data: bytes) -> bytes:
    """A file's bytes with the checksum in the place of BLANK."""
    place = data.rfind(_MARK)
    if not data.startswith(BLANK, max(place, 0)):
        raise ValueError("data has no BLANK to put the checksum in")
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:place] + _MARK + digest + data[place + len(BLANK) :]


def intact(data: bytes) -> bool:
    """Whether a file's bytes are the ones that were sealed."""
    begin = data.rfind(_MARK) + len(_MARK)
    end = begin + _NUM_DIGITS
    if begin < len(_MARK) or end > len(data):
        return False
    view = memoryview(data)
    digest = hashlib.sha256(view[:begin])
    digest.update(b"0" * _NUM_DIGITS)
    digest.update(view[end:])
    return digest.hexdigest().encode() == data[begin:end]
