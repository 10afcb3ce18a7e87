"""The pilot of a calibration: one policy on its own road, on prompts that were calibrated on.

Predictions read contexts that follow the server; a policy's own outputs lead it to others. With the
same random numbers on the same prompts, the difference between both roads is measured prompt by
prompt, and carried over to other policies: docs/theory.md, (60).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.run.prompts import MIN_PROMPTS, Prompt, draw_prompts
from calibrate.run.records import Pilot
from calibrate.run.traces import Trace
from calibrate.work.job import PolicySource
from hlmtheory.policies import pilot_policy
from hlmtheory.risk import SkipAtoms
from hlmtheory.scores import ExactUncertainty
from hlmtheory.thresholds import risk_budget_threshold

PILOT_RISK = 0.02
"""Large enough for answers to part within their length, small enough for first order to hold."""

DEFAULT_PROMPTS = 64
"""More narrow the intervals little: the sampling of prompts in the calibration is most of them."""


def plan_pilot(trace: Trace, prompts: Sequence[Prompt], num: int, seed: int) -> Pilot | None:
    """A pilot at PILOT_RISK; None with fewer than MIN_PROMPTS, or where nothing is within it.

    Parameters
    ----------
    trace : Trace
        The calibration's.
    prompts : sequence of Prompt
        Its prompts, of which `num` are drawn, by category where they have one.
    num : int
    seed : int
    """
    score, beta = trace["uncertainty"], trace["rejection_prob"]
    atoms = SkipAtoms.of_drafts(score, beta, trace.prompt_index, trace.num_prompts)
    threshold = risk_budget_threshold(atoms, PILOT_RISK, ExactUncertainty().high)
    if num < MIN_PROMPTS or not threshold.feasible:
        return None
    risk = float(np.mean(beta * (score <= threshold.value)))
    if risk == 0:
        return None  # the two models agree wherever it skips: no answer would part
    drawn = draw_prompts(list(prompts), "calibration", num, seed)
    return Pilot(
        policy=pilot_policy(threshold.value).name,
        threshold=threshold.value,
        risk=risk,
        prompt_ids=tuple(prompt.prompt_id for prompt in drawn),
        num_tokens=0,
        wall_s=0.0,
    )


def source_of(pilot: Pilot) -> PolicySource:
    """The policy that a pilot runs."""
    return PolicySource(pilot.policy, threshold=pilot.threshold)
