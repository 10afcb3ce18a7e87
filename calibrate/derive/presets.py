"""Link presets and device profiles, from data/ or from the user's own JSON files."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from calibrate.run.errors import UsageError
from calibrate.run.records import Timings
from calibrate.run.resources import data_path
from hlmtheory.audit import AuditRow, audit
from hlmtheory.cost import DeviceProfile
from hlmtheory.link import (
    AwgnLink,
    ErgodicRayleighLink,
    Link,
    RateLink,
    RayleighOutageLink,
    TraceLink,
)
from hlmtheory.published import PublishedNumber
from hlmtheory.reconcile import Reconciliation, reconciliations

LINK_MODELS: dict[str, Any] = {
    "awgn": AwgnLink,
    "ergodic-rayleigh": ErgodicRayleighLink,
    "rayleigh-outage": RayleighOutageLink,
    "rate": RateLink,
    "trace": TraceLink,
}
NOTES = ("source", "name")
# Assumed: nothing here measures watts. They go with times that were measured.
MEASURED_POWERS_W: dict[str, Any] = {
    "p_slm_w": 4.0,
    "p_tx_w": 1.0,
    "p_llm_w": 300.0,
    "p_idle_w": 0.5,
}


def load_link(name: str) -> Link:
    """A link by preset name, JSON file, or CSV file of measured rates (one bit/s a line)."""
    path = _preset_path(name, "links", "--link")
    if path.suffix != ".csv":
        return link_from_dict(_read_object(path, "--link"), f"--link {name}")
    try:
        return TraceLink(tuple(float(line) for line in path.read_text().split()))
    except ValueError as error:
        raise UsageError(f"--link {path}: {error}") from None


def link_from_dict(entry: dict[str, Any], where: str = "link") -> Link:
    """A link from its JSON object; `model` chooses which, `source` and `name` are notes."""
    values = dict(entry)
    model = values.pop("model", None)
    if not isinstance(model, str) or model not in LINK_MODELS:
        raise UsageError(f"{where}: model = {model!r}; allowed are {', '.join(LINK_MODELS)}")
    link: Link = _build(LINK_MODELS[model], values, where)
    return link


def link_to_dict(link: Link) -> dict[str, Any]:
    """The JSON object of a link, which :func:`link_from_dict` reads back."""
    model = next(name for name, kind in LINK_MODELS.items() if type(link) is kind)
    return {"model": model, **_json_object(link)}


def load_profile(name: str, timings: Timings | None) -> DeviceProfile:
    """A device profile by preset name or JSON file; `measured` takes the calibration's times."""
    if name == "measured" and timings is not None:
        times: dict[str, Any] = {key: number.value for key, number in timings.medians.items()}
        return DeviceProfile(**times, **MEASURED_POWERS_W, assumed=tuple(MEASURED_POWERS_W))
    path = _preset_path(name, "devices", "--profile")
    return profile_from_dict(_read_object(path, "--profile"), f"--profile {name}")


def profile_from_dict(entry: dict[str, Any], where: str = "profile") -> DeviceProfile:
    """A device profile from its JSON object; `source` and `name` are notes."""
    profile: DeviceProfile = _build(DeviceProfile, entry, where)
    return profile


def profile_to_dict(profile: DeviceProfile) -> dict[str, Any]:
    """The JSON object of a profile, which :func:`profile_from_dict` reads back."""
    return _json_object(profile)


def _json_object(record: Any) -> dict[str, Any]:
    values = asdict(record)
    return {key: list(one) if isinstance(one, tuple) else one for key, one in values.items()}


def _preset_path(name: str, folder: str, option: str) -> Path:
    for path in (data_path(folder, f"{name}.json"), Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in data_path(folder).glob("*.json")))
    extra = ", measured" if folder == "devices" else ""
    raise UsageError(f"{option} {name}: no such file or preset; presets are {known}{extra}")


def _read_object(path: Path, option: str) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise UsageError(f"{option} {path}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise UsageError(f"{option} {path}: give a JSON object")
    return entry


def _build(kind: Any, entry: dict[str, Any], where: str) -> Any:
    """A record of this kind, its lists as tuples."""
    names = [f.name for f in fields(kind)]
    values = {
        key: tuple(one) if isinstance(one, list) else one
        for key, one in entry.items()
        if key not in NOTES
    }
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(names)}")
    try:
        return kind(**values)
    except TypeError:
        raise UsageError(f"{where}: needs {', '.join(sorted(names))}") from None
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    except OverflowError:
        raise UsageError(f"{where}: a number is beyond what floating point holds") from None


def published_numbers() -> list[PublishedNumber]:
    """The shipped published numbers with their marks."""
    entries = _read_object(data_path("published.json"), "published.json")["numbers"]
    return [PublishedNumber(**entry) for entry in entries]


def published_audit() -> tuple[tuple[AuditRow, ...], tuple[Reconciliation, ...]]:
    """The shipped published numbers against the theory, and the times that reconcile them."""
    numbers = published_numbers()
    return audit(numbers), reconciliations(numbers)
