"""Predictions moved as a pilot was moved stay what such a mean can be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from calibrate.derive.roads import Prediction, Roads
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.policies import policy_from_settings


@pytest.mark.parametrize(
    ("name", "pilot", "expected"),
    [
        # 10 + 2 (1.5 - 10) is no payload: where it goes the pilot cannot tell, and it stays.
        ("uplink_bits_per_token", (2.0, 1.0), 10.0),
        ("uplink_bits_per_token", (12.0, 13.0), 15.0),
        ("skip_rate", (10.3, 10.3), 10.0),
        ("token_time_ms@-15", (0.0, 0.0), 10.0),
    ],
)
def test_a_few_prompts_of_a_pilot_lead_to_no_impossible_mean(name, pilot, expected):
    def mean(*values: float):
        return mean_over_tokens(np.array(values), np.arange(len(values)), len(values))

    def means(of):
        return {name: mean(*of.values)}

    server = SimpleNamespace(values=(10.0, 10.0, 10.0, 10.0))
    server.of_prompts = lambda place: SimpleNamespace(values=server.values[: len(place)])
    share = mean(0.4, 0.4, 0.4, 0.4), mean(0.2, 0.2)
    own = SimpleNamespace(values=pilot)
    found = Prediction(server, own, *share, np.array([0, 1])).mean(means)[name]  # type: ignore[arg-type]
    assert found.value == pytest.approx(expected)
    assert np.isfinite(found.standard_error)


@pytest.mark.parametrize(("threshold", "moved"), [(1.0, False), (0.5, True)])
def test_what_skips_everything_is_not_moved(monkeypatch, threshold, moved):
    """A gate that skips all is the device alone, and its prediction the same."""
    monkeypatch.setattr("calibrate.derive.roads.predicted_tokens", lambda trace, policy: trace)
    monkeypatch.setattr("calibrate.derive.roads.parted_share", lambda tokens: None)
    trace = SimpleNamespace(prompt_ids=["a"])
    trace.of_prompts = lambda ids: trace
    roads = Roads(trace, trace)  # type: ignore[arg-type]
    vars(roads).update(_pilot_parted=None, _place=np.array([0]))
    found = roads.prediction(policy_from_settings("u-hlm", {}, threshold))
    assert (found.pilot is not None) == moved
    assert roads.prediction(policy_from_settings("slm")).pilot is None
