"""The server model alone: it streams its own draws, and nothing is sent up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from array_api_compat import array_namespace

from hlmtheory.domain import Array
from hlmtheory.policies.base import OUTPUT, Answer, Policy
from hlmtheory.sampling import sample_inverse_cdf
from hlmtheory.steps import LawStep, Noise, Skip, Step


@dataclass(frozen=True)
class ServerAlone(Policy):
    """The output has the server's law; the device's draft is drawn beside it and not used."""

    name: ClassVar[str] = "llm"
    label: ClassVar[str] = "server alone"
    color: ClassVar[str] = "#000000"
    dashes: ClassVar[tuple[float, ...]] = (10, 3)
    marker: ClassVar[str] = "^"
    role: ClassVar[Literal["both", "device", "server"]] = "server"
    follows_server: ClassVar[bool] = True
    draft_sent: ClassVar[bool] = False

    def entries(self, step: Step, skip: Skip) -> Array:
        """Nothing."""
        return skip.zeros

    def sent_law(self, step: LawStep) -> Array:
        """Nothing."""
        return array_namespace(step.x).zeros_like(step.x)

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """Y itself."""
        return step[OUTPUT[1]], step[OUTPUT[1]]

    def answer(self, step: LawStep) -> Answer:
        """A draw from y."""
        return self.reply(step.x, step["draft_token"], step.y, step.noise)

    def reply(self, sent: Array, draft: Array, y: Array, noise: Noise) -> Answer:
        """A draw from y; no draft is ever looked at."""
        output = sample_inverse_cdf(y, noise.resample)
        return Answer(output, output < 0)
