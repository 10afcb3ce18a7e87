"""What a device writes of its tokens: a table of clock times and bytes, and lines for the watch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from calibrate.run.traces import HEADER_KEY, write_table
from calibrate.wire.device import WIRE_UNITS, WireToken


def write_wire_trace(path: Path, tokens: Sequence[WireToken], header: Mapping[str, Any]) -> None:
    """One row a token, the columns of :class:`WireToken`; units and provenance in the metadata."""
    arrays = {
        one.name: pa.array([getattr(token, one.name) for token in tokens])
        for one in fields(WireToken)
    }
    meta = {HEADER_KEY: json.dumps({"units": WIRE_UNITS, **header})}
    write_table(path, pa.table(arrays).replace_schema_metadata(meta))


def audit_line(token: WireToken, audit_rate: float) -> str:
    """The token as `hlm monitor` reads it."""
    checked = token.audited
    return json.dumps(
        {
            "skipped": token.skipped,
            "rejection": token.rejection_prob if checked else None,
            "audit_rate": audit_rate or None,
            "answer": token.prompt_id,
        }
    )
