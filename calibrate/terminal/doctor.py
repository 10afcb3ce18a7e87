"""`hlm doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from calibrate.run.machine import available_memory, num_cores

PACKAGES = (
    *("torch", "transformers", "accelerate", "gguf", "numpy", "scipy", "pyarrow", "pydantic"),
    *("statsmodels", "scikit-learn", "matplotlib", "typer"),
)
NEEDED_DISK_GB = 1.0


@dataclass(frozen=True)
class Check:
    """One thing looked at; `ok` is None of what may be missing."""

    name: str
    found: str
    ok: bool | None
    remedy: str = ""


@dataclass(frozen=True)
class HealthReport:
    """All checks; healthy if none failed, whatever may be missing."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing that is needed."""
        return all(check.ok is not False for check in self.checks)


def examine() -> HealthReport:
    """Look at versions, devices, cache and disk."""
    recent = sys.version_info >= (3, 11)
    python = _check("python", sys.version.split()[0], recent, "install Python 3.11 or newer")
    packages = [_package_check(name) for name in PACKAGES]
    return HealthReport((python, *packages, *_device_checks(), *_cache_checks()))


def _check(name: str, found: str, ok: bool, remedy: str) -> Check:
    return Check(name, found, ok, "" if ok else remedy)


def _package_check(name: str) -> Check:
    try:
        return Check(name, version(name), True)
    except PackageNotFoundError:
        return Check(name, "missing", False, f"pip install {name}")


def _device_checks() -> list[Check]:
    try:
        import torch

        from calibrate.pairs.loading import default_dtype, resolve_device
    except ImportError as error:
        return [Check("device", str(error), False, "pip install torch")]
    device = resolve_device("auto")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{num_cores()} cores"
    return [
        Check("device", f"{device} ({name}), {torch.get_num_threads()} threads", True),
        Check("dtype", default_dtype(device), True),
        Check("memory", f"{available_memory() / 1e9:.1f} GB free", True),
    ]


def _cache_checks() -> list[Check]:
    from calibrate.pairs.cache import cache_root
    from calibrate.pairs.registry import REGISTRY, cached

    cache = cache_root()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    writable, room = os.access(existing, os.W_OK), free_gb > NEEDED_DISK_GB
    checks = [
        _check("cache", str(cache), writable, "set HLM_CACHE to a folder you can write to"),
        _check(
            "disk", f"{free_gb:.1f} GB free", room, "free some space, or set HLM_CACHE elsewhere"
        ),
    ]
    for name, pair in REGISTRY.items():
        here = cached(pair)
        # A pair that is not here is fetched when it is first used: not a fault.
        remedy = "" if here else f"fetched when first used, or: hlm pairs pull {name}"
        found = "in cache" if here else "not fetched"
        checks.append(Check(f"pair {name}", found, True if here else None, remedy))
    return checks
