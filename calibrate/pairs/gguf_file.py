"""The layout of a .gguf file, read without its weights, to refuse damaged files in one line."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from calibrate.run.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# struct codes of the fixed-width metadata types, by their number in the file
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufLayout:
    """What the header promises.

    Attributes
    ----------
    metadata : dict
        Scalar entries; arrays are left out.
    num_tensors, num_elements : int
        Tensors, and their elements together.
    num_bytes : int
        The least size a whole file can have.
    """

    metadata: dict[str, str | int | float | bool]
    num_tensors: int
    num_elements: int
    num_bytes: int


class _CutOffError(Exception):
    """The header asks for bytes behind the end of the file."""


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.position = 24

    def skip(self, num_bytes: int) -> int:
        """Move on and return where the skipped bytes begin."""
        begin = self.position
        if begin + num_bytes > self.size:
            raise _CutOffError
        self.position = begin + num_bytes
        return begin

    def number(self, code: str) -> int:
        begin = self.skip(struct.calcsize("<" + code))
        value: int = struct.unpack_from("<" + code, self.data, begin)[0]
        return value

    def text(self) -> str:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> str | int | float | bool | None:
        """A scalar, or None for an array, which is only walked over."""
        if kind in _FIXED:
            return self.number(_FIXED[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _FIXED:
            self.skip(count * struct.calcsize("<" + _FIXED[item]))
        else:
            for _ in range(count):
                if item == _STRING:
                    self.skip(self.number("Q"))
                else:
                    self.value(item)
        return None


def read_layout(path: Path) -> GgufLayout:
    """Read the header and the tensor table, and hold them against the size of the file.

    Raises
    ------
    UserError
        The file is not GGUF, or it is cut off: with the size it has and the size it needs.
    """
    try:
        with path.open("rb") as file:
            start = file.read(24)
            if start[:4] != _MAGIC:
                raise UserError(
                    f"{path} is not a GGUF file: it begins with {start[:4]!r}, not {_MAGIC!r}; "
                    "give a .gguf file, a model folder or a hub id"
                )
            size = path.stat().st_size
            if len(start) < 24:
                raise _CutOffError
            version, num_tensors, num_entries = struct.unpack_from("<IQQ", start, 4)
            if version not in _VERSIONS:
                raise UserError(
                    f"{path} is GGUF version {version}: versions 2 and 3 (little-endian) are read; "
                    "convert it again with a current converter"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                layout = _walk(_Cursor(data), num_tensors, num_entries)
    except _CutOffError:
        raise UserError(
            f"{path} is cut off: it ends inside its header, at byte {path.stat().st_size}; "
            "download it again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if size < layout.num_bytes:
        raise UserError(
            f"{path} is cut off: it has {size} bytes, its {layout.num_tensors} tensors need "
            f"{layout.num_bytes}; download it again"
        )
    return layout


def _walk(cursor: _Cursor, num_tensors: int, num_entries: int) -> GgufLayout:
    from gguf.constants import GGML_QUANT_SIZES

    block_sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    metadata: dict[str, str | int | float | bool] = {}
    for _ in range(num_entries):
        key = cursor.text()
        value = cursor.value(cursor.number("I"))
        if value is not None:
            metadata[key] = value
    end = num_elements = 0
    for _ in range(num_tensors):
        name = cursor.text()
        elements = 1
        for _ in range(cursor.number("I")):
            elements *= cursor.number("Q")
        kind = cursor.number("I")
        if kind not in block_sizes:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        block_elements, block_bytes = block_sizes[kind]
        end = max(end, cursor.number("Q") + elements // block_elements * block_bytes)
        num_elements += elements
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    if alignment < 1:
        raise ValueError(f"general.alignment = {alignment}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufLayout(metadata, num_tensors, num_elements, data_start + end)
