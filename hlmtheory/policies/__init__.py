"""Policies: one file each, and this registry; somebody's own is a file too, FILE.py:NAME."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hlmtheory.policies.base import (
    Answer,
    DeriveOptions,
    Fitted,
    GatedPolicy,
    Memory,
    Outcome,
    Policy,
)
from hlmtheory.scores import ExactUncertainty, Score

REGISTRY = [
    "slm",
    "llm",
    "hlm",
    "u_hlm",
    "cu_hlm_offline",
    "cu_hlm_online",
    "ui_hlm",
    "r_hlm",
    "coupled",
    "ask_llm",
]
"""The files of this folder that hold a policy, in the order of tables: baselines first."""


def _policy_in(module: Any) -> type[Policy]:
    """The one policy that a module defines."""
    (found,) = [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, Policy) and one.__module__ == module.__name__
    ]
    return found


@cache
def _registered() -> dict[str, type[Policy]]:
    classes = (_policy_in(importlib.import_module(f"{__name__}.{file}")) for file in REGISTRY)
    return {one.name: one for one in classes}


def policy_names() -> tuple[str, ...]:
    """Names of the registered policies."""
    return tuple(_registered())


def policy_class(name: str) -> type[Policy]:
    """A policy's class by its name, or by FILE.py:NAME of somebody's own.

    Raises
    ------
    ValueError
        In one line: for an unknown name, or a file that holds no such policy.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        if name not in _registered():
            raise ValueError(
                f"policy {name}: unknown; known are {', '.join(policy_names())}, and FILE.py:NAME "
                "of your own"
            )
        return _registered()[name]
    if not Path(path).is_file():
        raise ValueError(f"policy {name}: no such file")
    return _own_policy(str(Path(path).resolve()), attribute)


@cache
def _own_policy(path: str, attribute: str) -> type[Policy]:
    where = f"policy {path}:{attribute}"
    name = f"own_policy_{zlib.crc32(path.encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{where}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{where}: {type(error).__name__} on import: {error}") from None
    found = getattr(module, attribute, None)
    if not (inspect.isclass(found) and issubclass(found, Policy)):
        raise ValueError(f"{where}: the file holds no subclass of Policy of that name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(found.name)) or (
        found.name in _registered()
    ):
        raise ValueError(
            f"{where}: name = {found.name!r}; give it one of its own, of letters, digits, - and _"
        )
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", str(found.color)):
        raise ValueError(f"{where}: color = {found.color!r}; give it as '#rrggbb'")
    if not all(isinstance(one, str) for one in (found.label, found.marker)):
        raise ValueError(f"{where}: label and marker are strings")
    return found


def policy_from_settings(
    name: str,
    settings: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    score: Score | None = None,
) -> Policy:
    """A policy by name or FILE.py:NAME, with the settings that an operating point stores.

    Raises
    ------
    ValueError
        For an unknown policy or setting, or a gated policy without a threshold.
    """
    kind = policy_class(name)
    gate: dict[str, Any] = {}
    if kind.gated:
        gate = {"threshold": threshold, "score": score or ExactUncertainty()}
    return kind.build(settings or {}, **gate)


def calibration_policy() -> Policy:
    """The lossless policy that calibrations decode under: all drafts verified."""
    return next(one for one in server_policies() if one.role == "both")()


def pilot_policy(threshold: float) -> Policy:
    """The policy that pilots run: the first gate of a paper, with full verification."""
    kind = next(one for one in _registered().values() if one.gated and one.paper)
    return policy_from_settings(kind.name, {}, threshold)


def server_policies() -> tuple[type[Policy], ...]:
    """Policies whose outputs have the server's law in every context."""
    return tuple(one for one in _registered().values() if one.follows_server)


__all__ = [
    "REGISTRY",
    "Answer",
    "DeriveOptions",
    "Fitted",
    "GatedPolicy",
    "Memory",
    "Outcome",
    "Policy",
    "calibration_policy",
    "pilot_policy",
    "policy_class",
    "policy_from_settings",
    "policy_names",
    "server_policies",
]
