"""Coupled draws: device and server share their randomness, and nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from hlmtheory.coupling import (
    bracketed_columns,
    coupled_output_bias,
    coupled_output_probability,
    coupling_columns,
)
from hlmtheory.domain import Array
from hlmtheory.policies.base import OUTPUT, Answer, GatedPolicy
from hlmtheory.sampling import race_argmin
from hlmtheory.steps import LawStep, Noise, Skip, Step, candidates, is_output


@dataclass(frozen=True)
class Coupled(GatedPolicy):
    """A skipped draft stands; else the server's own draw under the same noise.

    docs/theory.md, (41). Both draw by a race of shared exponentials. Its bias is 0 if nothing
    skips, and for a gate that skips for sure or not at all never below rho.
    """

    name: ClassVar[str] = "coupled"
    label: ClassVar[str] = "coupled draws"
    color: ClassVar[str] = "#7a4b00"
    dashes: ClassVar[tuple[float, ...]] = (2, 1)
    marker: ClassVar[str] = "h"
    draft_sent: ClassVar[bool] = False
    in_quickstart: ClassVar[bool] = True

    def entries(self, step: Step, skip: Skip) -> Array:
        """Nothing."""
        return skip.zeros

    def sent_law(self, step: LawStep) -> Array:
        """Nothing."""
        return array_namespace(step.x).zeros_like(step.x)

    def bias(self, step: Step, skip: Skip) -> Array:
        """Exact where the head decides; from below, by rho, where it does not.

        NaN where the coupling was not recorded, also where nothing is skipped: a mean over what is
        known must not choose contexts by what they skip.
        """
        x, y, _ = (column[:, : skip.width] for column in candidates(step))
        xp = array_namespace(x)
        if isinstance(step, LawStep):
            agreement, race = self._columns(step, skip)
        elif self.skips_all:
            return skip.risk(step)
        else:
            agreement, race = (step[f"head_{name}"] for name in ("agreement", "race"))
        agreement, race = agreement[:, : skip.width], race[:, : skip.width]
        bias = coupled_output_bias(x, y, agreement, race, skip.candidates)
        total = xp.where(skip.whole | skip.undecided, skip.risk(step), xp.astype(bias, x.dtype))
        return total if step.has_laws else xp.where(xp.isnan(race[:, 0]), race[:, 0], total)

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """sigma (x - a) + y less what skips of other tokens take from it; docs/theory.md, (41c).

        Exact live. Recorded, the race beyond the head is known within bounds, and so is P.
        """
        x, y = (step[name] for name in OUTPUT)
        xp = array_namespace(x)
        low, high = (xp.asarray(xp.where(skip.whole, x, y), copy=True) for _ in range(2))
        rows = xp.nonzero(xp.any(skip.candidates > 0, axis=-1) & ~skip.whole)[0]
        if not len(rows):
            return low, high
        x, y, sigma = x[rows], y[rows], skip.candidates[rows]
        head_x, head_y = (column[rows] for column in candidates(step)[:2])
        if isinstance(step, LawStep):
            tokens = step["candidate_token"][rows, : skip.width]
            tokens = xp.concat([step["output_token"][rows][:, None], tokens], axis=-1)
            a, phi = coupling_columns(step.x[rows], step.y[rows], tokens)
            races = [(a[:, 0], phi[:, 0], phi[:, 1:])] * 2
        else:
            own = is_output(step, head_x.shape[-1])[rows]
            races = bracketed_columns(head_x, head_y, x, y, step["tv_distance"][rows], own)
        for out, (a, own_race, race) in zip((low, high), races, strict=True):
            token = x, y, a, own_race, skip.of_output(step)[rows]
            law = coupled_output_probability(
                token, head_x[:, : skip.width], race[:, : skip.width], sigma
            )
            out[rows] = xp.astype(law, out.dtype)
        return low, high

    def _columns(self, step: LawStep, skip: Skip) -> tuple[Array, Array]:
        """The coupling's columns of the contexts that skip something; others are not read."""
        xp = array_namespace(step.x)
        tokens = step["candidate_token"][:, : skip.width]
        out = [xp.full_like(skip.candidates, float("nan")) for _ in range(2)]
        rows = xp.nonzero(xp.any(skip.candidates > 0, axis=-1))[0]
        if len(rows):
            found = coupling_columns(step.x[rows], step.y[rows], tokens[rows])
            for column, values in zip(out, found, strict=True):
                column[rows] = xp.astype(values, column.dtype)
        return out[0], out[1]

    def draft(self, step: LawStep) -> Array:
        """The device's winner of the race."""
        return race_argmin(step.x, step.noise.races())

    def answer(self, step: LawStep) -> Answer:
        """Skipped drafts, and the server's winner elsewhere; accepted where both are one."""
        xp = array_namespace(step.x)
        found = self.reply(step.x, step["draft_token"], step.y, step.noise)
        skipped = self.skips(step)
        return Answer(xp.where(skipped, step["draft_token"], found.output), found.accepted)

    def reply(self, sent: Array, draft: Array, y: Array, noise: Noise) -> Answer:
        """The server's winner, whatever was sent."""
        own = race_argmin(y, noise.races())
        return Answer(own, own == draft)
