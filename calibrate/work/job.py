"""What a worker is given and what it hands back: small records that can be sent anywhere.

Traces never travel. A job says what to decode and into which files; what comes back is a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.policies import Policy, policy_from_settings
from hlmtheory.scores import Score

if TYPE_CHECKING:
    from calibrate.decode.engine import DecodingSettings
    from calibrate.pairs.sources import PairSpec


LIBRARY_BYTES = 2**29
"""Of a process that has imported torch and transformers: about 0.4 GB were seen."""


@dataclass(frozen=True)
class PolicySource:
    """How a policy is built, here and in any other process.

    Attributes
    ----------
    name : str
        Of a registered policy, or FILE.py:NAME of somebody's own: a class in a file cannot be sent.
    settings : mapping
        As an operating point stores them.
    threshold : float or None
    score : Score or None
        What a gate compares with the threshold; the uncertainty if None.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    score: Score | None = None

    def build(self) -> Policy:
        """The policy; raises ValueError as :func:`hlmtheory.policies.policy_from_settings`."""
        return policy_from_settings(self.name, self.settings, self.threshold, self.score)


@dataclass(frozen=True)
class PairSource:
    """How another process loads the pair that this one has loaded.

    Attributes
    ----------
    spec : PairSpec
    dtype, device : str
        Resolved: nobody chooses again.
    attention : bool
        Whether the device model must be able to give its attention weights.
    hashes : tuple of str
        Of the device's and the server's weights, which must be the same everywhere.
    prepacked_bytes : int
        Memory that its prepacked layers take; 0 to leave the layers as they come.
    """

    spec: PairSpec
    dtype: str
    device: str
    attention: bool
    hashes: tuple[str, str]
    prepacked_bytes: int = 0

    @property
    def worker_bytes(self) -> int:
        """Memory that a process takes with it: libraries, and weights that it cannot share."""
        return LIBRARY_BYTES + self.prepacked_bytes

    def for_workers(self, num_on_a_machine: int) -> PairSource:
        """The same for workers that share a machine: prepacked layers each has for itself.

        Decided once for all, before they take memory from each other: layers of either kind round
        otherwise. Assumption: machines are alike.
        """
        from calibrate.pairs.prepack import room_for

        fits = room_for(self.prepacked_bytes, num_on_a_machine)
        return self if fits else replace(self, prepacked_bytes=0)


@dataclass(frozen=True)
class Output:
    """One shard of a job: the file, the policy whose tokens it holds, and its header."""

    path: Path
    policy: PolicySource
    header: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One batch of prompts, decoded under the policies of all its outputs at once.

    Attributes
    ----------
    prompts : tuple of TokenizedPrompt
        No more than `settings.batch_size`.
    outputs : tuple of Output
    settings : DecodingSettings
    """

    prompts: tuple[TokenizedPrompt, ...]
    outputs: tuple[Output, ...]
    settings: DecodingSettings

    @property
    def most_tokens(self) -> int:
        """Tokens if no answer ends before the length limit."""
        return len(self.prompts) * len(self.outputs) * self.settings.max_new_tokens


@dataclass(frozen=True)
class Written:
    """Manifest of a job that is done: its files are whole and in their places.

    Attributes
    ----------
    paths : tuple of Path
    num_tokens : int
        Of all of them.
    wall_s, forward_s : float
        As :class:`calibrate.decode.engine.DecodedBatch`.
    """

    paths: tuple[Path, ...]
    num_tokens: int
    wall_s: float
    forward_s: float
