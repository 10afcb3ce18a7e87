"""Predictions on a policy's own road: the server's contexts, moved as a pilot was; (60)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from calibrate.derive.predict import (
    OF_SERVER_ANSWERS,
    UNITS,
    Means,
    PolicyTokens,
    predicted_tokens,
)
from calibrate.fit.pilot import source_of
from calibrate.run.errors import UserError
from calibrate.run.folder import read_record
from calibrate.run.records import CalibrationRecord, Pilot, RunRecord
from calibrate.run.traces import Trace, pilot_paths, read_calibration_trace, read_trace
from hlmtheory.clusters import RatioEstimate, estimate_of, mean_over_tokens
from hlmtheory.context_shift import on_own_road, parted_before
from hlmtheory.policies import Policy


@dataclass(frozen=True)
class Prediction:
    """What a policy is expected to do on its own road; docs/theory.md, (60).

    Attributes
    ----------
    server : PolicyTokens
        At the contexts of the calibration, which follow the server.
    pilot : PolicyTokens or None
        The same policy at the contexts that a pilot led itself to.
    parted, pilot_parted : RatioEstimate or None
        Share of tokens after the parting, of the policy and of the pilot.
    place : int array (N,)
        Of each pilot prompt among the calibration's.
    """

    server: PolicyTokens
    pilot: PolicyTokens | None = None
    parted: RatioEstimate | None = None
    pilot_parted: RatioEstimate | None = None
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def mean(self, means: Means) -> dict[str, RatioEstimate]:
        """Means at the server's contexts, moved as the pilot was."""
        found = means(self.server)
        if self.pilot is None or self.parted is None or self.pilot_parted is None:
            return found
        own, paired = means(self.pilot), means(self.server.of_prompts(self.place))
        parted = (self.parted, self.pilot_parted, self.place)
        moved = {
            name: _in_range(name, one, on_own_road(one, own[name], paired[name], *parted))
            for name, one in found.items()
            if name not in OF_SERVER_ANSWERS
        }
        return found | moved


def _in_range(name: str, server: RatioEstimate, moved: RatioEstimate) -> RatioEstimate:
    """The moved mean; where it left the range of a mean, the server's with the error of both.

    Heavy-tailed payloads do that to a small pilot, which then says nothing of where they go.
    """
    most = 1.0 if UNITS.get(name) == "" else np.inf
    return moved if 0.0 <= moved.value <= most else replace(moved, value=server.value)


@dataclass(frozen=True)
class Roads:
    """The contexts that predictions are made at.

    Attributes
    ----------
    server : Trace
        The calibration's.
    pilot : Trace or None
        A policy's own, on some of its prompts; others are left out.
    info : Pilot or None
        What it ran.
    """

    server: Trace
    pilot: Trace | None = None
    info: Pilot | None = None

    def __post_init__(self) -> None:
        if self.pilot is None:
            return
        common = sorted(set(self.pilot.prompt_ids) & set(self.server.prompt_ids))
        object.__setattr__(self, "pilot", self.pilot.of_prompts(common) if common else None)

    def first(self, num_tokens: int) -> Roads:
        """The first tokens of each answer, as many or fewer: skip rates fall along an answer."""
        pilot = None if self.pilot is None else self.pilot.first(num_tokens)
        return replace(self, server=self.server.first(num_tokens), pilot=pilot)

    @cached_property
    def _place(self) -> np.ndarray:
        assert self.pilot is not None
        return np.searchsorted(self.server.prompt_ids, self.pilot.prompt_ids)

    @cached_property
    def _paired(self) -> Trace:
        """The server's road on the pilot's prompts."""
        assert self.pilot is not None
        return self.server.of_prompts(self.pilot.prompt_ids)

    @cached_property
    def _pilot_parted(self) -> RatioEstimate:
        assert self.info is not None
        tokens = predicted_tokens(self.server, source_of(self.info).build()).of_prompts(self._place)
        return parted_share(tokens)

    def prediction(self, policy: Policy) -> Prediction:
        """What the policy is expected to do.

        What skips everything is not moved: nothing that a pilot learned of answers that parted once
        says where those go that part ever again.
        """
        server = predicted_tokens(self.server, policy)
        if self.pilot is None or policy.follows_server or policy.skips_all:
            return Prediction(server)
        pilot = predicted_tokens(self.pilot, policy)
        return Prediction(server, pilot, parted_share(server), self._pilot_parted, self._place)

    def shift(self, policy: Policy, mean: Callable[[Trace], RatioEstimate]) -> RatioEstimate | None:
        """What its own road changes of a mean over a trace; None without a pilot."""
        if self.pilot is None:
            return None
        server, paired = mean(self.server), mean(self._paired)
        parted = parted_share(predicted_tokens(self.server, policy))
        moved = on_own_road(
            server, mean(self.pilot), paired, parted, self._pilot_parted, self._place
        )
        return estimate_of(moved.value - server.value, moved.influence - server.influence)


def parted_share(tokens: PolicyTokens) -> RatioEstimate:
    """Share of tokens that come after the answer has left the server's, at its contexts."""
    gap = tokens.bias - tokens.rho
    known = np.isfinite(gap)
    rest = float(gap[known].mean()) if known.any() else 0.0
    bias = np.where(known, tokens.bias, tokens.rho + rest)
    return mean_over_tokens(
        parted_before(bias, tokens.prompt_index), tokens.prompt_index, tokens.num_prompts
    )


def read_roads(run: Path, calibration: CalibrationRecord) -> Roads:
    """The contexts that a run recorded.

    Raises
    ------
    UserError
        If a trace is missing, broken, or not of this calibration.
    """
    server = read_calibration_trace(run, calibration)
    info = read_record(run, RunRecord).pilot
    if info is None:
        return Roads(server)
    pilot = read_trace(pilot_paths(run))
    if pilot.num_tokens != info.num_tokens:
        raise UserError(
            f"{run}/pilot holds {pilot.num_tokens} tokens, run.json is of {info.num_tokens}: a "
            "shard was lost or added; restore it, or calibrate again"
        )
    return Roads(server, pilot, info)
