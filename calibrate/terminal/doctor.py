"""`hlm doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "numpy",
    "scipy",
    "pyarrow",
    "statsmodels",
    "scikit-learn",
    "matplotlib",
    "typer",
)
NEEDED_DISK_GB = 1.0


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    found: str
    ok: bool
    remedy: str = ""


@dataclass(frozen=True)
class HealthReport:
    """All checks; healthy if none failed."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


def examine() -> HealthReport:
    """Look at versions, devices, cache and disk."""
    checks = [
        Check(
            "python",
            sys.version.split()[0],
            sys.version_info >= (3, 11),
            "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
        )
    ]
    for name in PACKAGES:
        try:
            checks.append(Check(name, version(name), True))
        except PackageNotFoundError:
            checks.append(Check(name, "missing", False, f"pip install {name}"))
    checks += [*_device_checks(), *_cache_checks()]
    return HealthReport(tuple(checks))


def _device_checks() -> list[Check]:
    try:
        import torch

        from calibrate.pairs.registry import default_dtype
    except ImportError as error:
        return [Check("device", str(error), False, "pip install torch")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    return [
        Check("device", f"{device} ({name}), {torch.get_num_threads()} threads", True),
        Check("dtype", str(default_dtype(device)).removeprefix("torch."), True),
    ]


def _cache_checks() -> list[Check]:
    from calibrate.pairs.registry import REGISTRY, cached, describe

    spec = REGISTRY["smollm2"]
    cache: Path = describe(spec).cache_path
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    writable = os.access(existing, os.W_OK)
    checks = [
        Check(
            "cache",
            str(cache),
            writable,
            "" if writable else "set HLM_CACHE to a folder you can write to",
        ),
        Check(
            "disk",
            f"{free_gb:.1f} GB free",
            free_gb > NEEDED_DISK_GB,
            "" if free_gb > NEEDED_DISK_GB else "free some space, or set HLM_CACHE elsewhere",
        ),
    ]
    for name, pair in REGISTRY.items():
        here = cached(pair)
        # A pair that is not here is fetched when it is first used: not a fault.
        remedy = "" if here else f"hlm pairs pull {name}"
        checks.append(Check(f"pair {name}", "in cache" if here else "not fetched", True, remedy))
    return checks
