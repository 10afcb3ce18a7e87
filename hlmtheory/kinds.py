"""Names that options, records and tests share; importing them takes no time."""

from __future__ import annotations

from typing import Literal

Certified = Literal["prompts", "tokens", "answers"]
"""What a budget is about: the mean over prompts of each prompt's mean risk, the risk over tokens,
or whole answers: the share that differs from the server's, or the total variation of their law;
docs/theory.md, (33), (48), (52)."""

TestMethod = Literal["betting", "hoeffding-bentkus", "wsr", "t"]
"""Tests of a mean against a budget; the last is asymptotic and guarantees nothing."""
