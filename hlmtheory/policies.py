"""Policies: each system is one gate and one verification rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hlmtheory.domain import Array, check_positive
from hlmtheory.gates import (
    AlwaysSkip,
    AnyGate,
    NeverSkip,
    Statistic,
    UncertaintyGate,
    UncertaintyImportanceGate,
)
from hlmtheory.relation import linear_rejection
from hlmtheory.truncation import online_truncation_size
from hlmtheory.verification import (
    AnyRule,
    AskAndSample,
    DraftFromSent,
    FullDistribution,
    ResidualVerification,
    TruncatedDistribution,
)

POLICY_NAMES = (
    "slm",
    "llm",
    "hlm",
    "u-hlm",
    "cu-hlm-offline",
    "cu-hlm-online",
    "ui-hlm",
    "r-hlm",
    "ask-llm",
)
"""The policies of the command line, baselines first."""

GATED_POLICIES = ("u-hlm", "cu-hlm-offline", "cu-hlm-online", "ui-hlm", "r-hlm", "ask-llm")
"""Those with an uncertainty threshold to derive."""


@dataclass(frozen=True)
class FixedSize:
    """The same k for every token: docs/theory.md, (20)."""

    num_entries: int

    def __post_init__(self) -> None:
        if self.num_entries < 1:
            raise ValueError(f"num_entries = {self.num_entries}: allowed is >= 1")


@dataclass(frozen=True)
class OnlineSize:
    """k chosen for each token from its own bound: docs/theory.md, (19).

    Attributes
    ----------
    theta : float
        Tolerated bound, > 0.
    slope, intercept : float
        The fitted line that predicts the rejection probability.
    eta : float
        Sharpness of the soft maximum, > 0.
    """

    theta: float
    slope: float
    intercept: float
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.theta, "theta")
        check_positive(self.eta, "eta")


@dataclass(frozen=True)
class ImportanceSettings:
    """Which importance and its two strictness parameters; see hlmtheory.importance.

    Assumption: the formulas behind both variants are ours.
    """

    variant: Literal["topk", "context"] = "topk"
    k: float = 16.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in ("topk", "context"):
            raise ValueError(f"variant = {self.variant!r}: allowed are 'topk', 'context'")
        if not np.isfinite(self.k) or (self.variant == "topk" and self.k < 1):
            raise ValueError(f"k = {self.k}: allowed is >= 1 for topk, finite for context")
        if not 0 <= self.gamma <= (1 if self.variant == "context" else np.finfo(float).max):
            raise ValueError(
                f"gamma = {self.gamma}: allowed is [0, inf) for topk, [0, 1] for context"
            )

    @property
    def label(self) -> str:
        """Name of these settings, as rules carry it: variant-k-gamma."""
        return f"{self.variant}-{self.k:g}-{self.gamma:g}"


@dataclass(frozen=True)
class Policy:
    """A gate times a verification rule.

    Attributes
    ----------
    name : str
        One of POLICY_NAMES.
    gate : Gate
        Decides what the device emits unverified.
    rule : verification rule
        Decides what is sent and how the server answers.
    size : FixedSize, OnlineSize or None
        Entries sent by a truncating rule.
    importance : ImportanceSettings or None
        For gates that look at attention.
    """

    name: str
    gate: AnyGate
    rule: AnyRule
    size: FixedSize | OnlineSize | None = None
    importance: ImportanceSettings | None = None

    def __post_init__(self) -> None:
        if self.rule.truncates != (self.size is not None):
            raise ValueError(
                f"policy {self.name}: rule {self.rule.name!r} "
                + ("needs a size" if self.rule.truncates else "sends no truncated law: no size")
            )
        if self.rule.drafts_from_sent and not isinstance(self.size, FixedSize):
            raise ValueError(
                f"policy {self.name}: drafting from the truncated law needs a fixed size, for the "
                "online size depends on the draft"
            )
        if self.gate.needs_importance != (self.importance is not None):
            raise ValueError(f"policy {self.name}: gate and importance settings do not match")

    def fixed_size(self, vocab_size: int) -> int:
        """Entries sent where the size does not depend on the token."""
        if not isinstance(self.size, FixedSize):
            raise ValueError(f"policy {self.name}: its size depends on the token")
        return min(self.size.num_entries, vocab_size)

    def sizes(self, x: Array, draft_prob: Array, uncertainty: Array) -> Array | int | None:
        """Entries sent for each row: int, integer array (B,), or None if nothing is truncated."""
        if self.size is None:
            return None
        if isinstance(self.size, FixedSize):
            return self.fixed_size(x.shape[-1])
        predicted = linear_rejection(uncertainty, self.size.slope, self.size.intercept)
        return online_truncation_size(x, draft_prob, predicted, self.size.theta, self.size.eta)


def make_policy(
    name: str,
    threshold: float | None = None,
    *,
    statistic: Statistic = "exact",
    size: FixedSize | OnlineSize | None = None,
    importance: ImportanceSettings | None = None,
    draft_from_sent: bool = False,
) -> Policy:
    """Build a policy by its name.

    Parameters
    ----------
    name : str
        One of POLICY_NAMES.
    threshold : float, optional
        u_th, needed by gated policies; values above 1 are read as 1 (skip everything).
    statistic : {"exact", "sampled"}
        Which uncertainty u-hlm decides with.
    size : FixedSize or OnlineSize
        For the two cu-hlm policies.
    importance : ImportanceSettings
        For ui-hlm; the default is the `topk` variant.
    draft_from_sent : bool
        Let a cu-hlm policy draw its drafts from the truncated law.

    Raises
    ------
    ValueError
        For an unknown name, or a threshold that is missing or NaN.
    """
    if name not in POLICY_NAMES:
        raise ValueError(f"policy = {name!r}: known are {', '.join(POLICY_NAMES)}")
    if name == "slm":
        return Policy(name, AlwaysSkip(), FullDistribution())
    if name == "llm":
        return Policy(name, NeverSkip(), AskAndSample())
    if name == "hlm":
        return Policy(name, NeverSkip(), FullDistribution())
    if threshold is None or np.isnan(threshold):
        raise ValueError(f"threshold = {threshold}: policy {name} needs one in [0, 1]")
    threshold = min(float(threshold), 1.0)
    gate = UncertaintyGate(threshold, statistic)
    if name == "ui-hlm":
        return Policy(
            name,
            UncertaintyImportanceGate(threshold),
            FullDistribution(),
            importance=importance or ImportanceSettings(),
        )
    if name in ("cu-hlm-offline", "cu-hlm-online"):
        kind = FixedSize if name == "cu-hlm-offline" else OnlineSize
        if size is not None and not isinstance(size, kind):
            raise ValueError(f"policy {name}: its size is a {kind.__name__}, not {size!r}")
        rule = DraftFromSent() if draft_from_sent else TruncatedDistribution()
        return Policy(name, gate, rule, size=size)
    plain: dict[str, AnyRule] = {
        "u-hlm": FullDistribution(),
        "r-hlm": ResidualVerification(),
        "ask-llm": AskAndSample(),
    }
    return Policy(name, gate, plain[name])
