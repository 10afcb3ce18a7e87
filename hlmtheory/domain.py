"""Domain checks: every bad argument ends in one line that names it, its value and the way out.

The checks cost a pass over the array. A hot loop that has checked its inputs once switches the
others off with :func:`unchecked`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from array_api_compat import array_namespace

Array: TypeAlias = Any
"""A numpy array or a torch tensor."""

_enabled: ContextVar[bool] = ContextVar("hlmtheory_checks", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch the domain checks off inside a loop whose inputs are already known to be valid."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def check_finite(value: Array, name: str) -> None:
    """Raise ValueError if `value` holds a NaN or an infinity."""
    if not _enabled.get():
        return
    xp = array_namespace(value)
    if not bool(xp.all(xp.isfinite(value))):
        raise ValueError(f"{name} holds NaN or infinity; every entry must be finite")


def check_unit_interval(value: Array | float, name: str) -> None:
    """Raise ValueError unless every entry of `value` lies in [0, 1]."""
    _check_range(value, name, "[0, 1]", "give a probability, not a percentage or a logit", most=1.0)


def check_nonnegative(value: Array | float, name: str) -> None:
    """Raise ValueError unless every entry of `value` is finite and at least 0."""
    _check_range(value, name, "[0, inf)", "give a finite value of at least 0")


def check_positive(value: Array | float, name: str) -> None:
    """Raise ValueError unless every entry of `value` is finite and above 0."""
    _check_range(value, name, "(0, inf)", "give a finite value above 0", open_at_zero=True)


def _check_range(
    value: Array | float,
    name: str,
    allowed: str,
    way_out: str,
    most: float = math.inf,
    open_at_zero: bool = False,
) -> None:
    if not _enabled.get():
        return
    if isinstance(value, int | float):
        smallest, largest, finite = float(value), float(value), math.isfinite(value)
    else:
        xp = array_namespace(value)
        if not bool(xp.all(xp.isfinite(value))):
            raise ValueError(f"{name} holds NaN or infinity: allowed is {allowed}; {way_out}")
        if value.shape and 0 in value.shape:
            return
        smallest, largest, finite = float(xp.min(value)), float(xp.max(value)), True
    low_enough = largest <= most
    if not (finite and low_enough and (smallest > 0 if open_at_zero else smallest >= 0)):
        worst = largest if smallest >= 0 and not low_enough else smallest
        raise ValueError(f"{name} = {worst:.6g}: allowed is {allowed}; {way_out}")


def check_distribution(x: Array, name: str) -> None:
    """Raise ValueError unless the last axis of `x` holds probability distributions.

    Logits passed where probabilities are meant are the commonest mistake of this field: they fail
    here by their sign or by their sum, which may be off by 1e-9 in float64 and by 1e-3 in anything
    narrower: room for sequential rounding over 2^18 tokens, not for counts or percentages.
    """
    if not _enabled.get():
        return
    xp = array_namespace(x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: give probabilities of shape (..., V)")
    if not bool(xp.all(xp.isfinite(x))):
        raise ValueError(f"{name} holds NaN or infinity; give probabilities that sum to 1")
    smallest = float(xp.min(x))
    if smallest < 0:
        raise ValueError(
            f"{name} has an entry {smallest:.6g}: allowed is [0, 1]; give probabilities, not logits"
        )
    worst = float(xp.max(xp.abs(xp.sum(x, axis=-1) - 1)))
    tolerance = 1e-9 if "float64" in str(x.dtype) else 1e-3
    if worst > tolerance:
        raise ValueError(
            f"{name} sums to 1 only within {worst:.3g}: allowed is {tolerance:.0e}; "
            "normalise it, or apply softmax if these are logits"
        )


def check_same_shape(x: Array, y: Array, x_name: str, y_name: str) -> None:
    """Raise ValueError unless both arrays have the same vocabulary (last axis) and broadcast."""
    if not _enabled.get():
        return
    if x.shape[-1:] != y.shape[-1:]:
        raise ValueError(
            f"{y_name} has {tuple(y.shape)} and {x_name} has {tuple(x.shape)}: the last axis "
            "(vocabulary) must agree; cut padded vocabularies to the common size"
        )
