"""Which operating points a derivation holds, and which of them a validation takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import VOCAB, make_run

from calibrate.decode.recording import THRESHOLD_GRID
from calibrate.derive.derivation import derive_run
from calibrate.derive.policy_tokens import at_threshold, sent_skip_set_size
from calibrate.run.errors import UsageError
from calibrate.run.folder import Figure, read_json
from calibrate.run.traces import read_trace, shard_paths
from calibrate.validate.comparison import Cell, Comparison, coverage
from calibrate.validate.validation import prepare_validation

THETAS, IMPORTANCES = (0.1, 0.02, 0.5), ("topk:16:1", "topk:4:1.5", "context:0:0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("derive") / "run"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def derived(run: Path) -> dict[str, Any]:
    policies = ("hlm", "u-hlm", "cu-hlm-offline", "cu-hlm-online", "ui-hlm")
    return derive_run(
        run,
        policies,
        risks=(0.05,),
        thetas=THETAS,
        importances=IMPORTANCES,
        draft_from_sent=True,
    )


def points_of(derived: dict[str, Any], policy: str) -> dict[str, dict[str, Any]]:
    return {p["rule"]: p for p in derived["operating_points"] if p["policy"] == policy}


def test_every_setting_has_a_name_of_its_own(derived: dict[str, Any]) -> None:
    names = [(p["policy"], p["rule"]) for p in derived["operating_points"]]
    assert len(set(names)) == len(names)
    plain = set(points_of(derived, "u-hlm"))
    labels = {
        "cu-hlm-offline": ("", "@theta-0.02", "@theta-0.5", "@draft-from-sent"),
        "cu-hlm-online": ("", "@theta-0.02", "@theta-0.5"),
        "ui-hlm": ("", "@topk-4-1.5", "@context-0-0.9"),
    }
    for policy, wanted in labels.items():
        rules = set(points_of(derived, policy))
        assert rules == {rule + label for rule in plain for label in wanted}


def test_settings_are_those_of_the_name(derived: dict[str, Any]) -> None:
    offline, online = (points_of(derived, f"cu-hlm-{kind}") for kind in ("offline", "online"))
    assert online["risk-0.05"]["settings"]["theta"] == 0.1
    assert online["risk-0.05@theta-0.5"]["settings"]["theta"] == 0.5
    # A smaller tolerance never sends less.
    entries = [offline[f"risk-0.05{t}"]["settings"]["num_entries"] for t in ("@theta-0.5", "")]
    entries.append(offline["risk-0.05@theta-0.02"]["settings"]["num_entries"])
    assert entries == sorted(entries)
    assert entries[0] < entries[-1]
    sent = offline["risk-0.05@draft-from-sent"]
    assert sent["settings"]["num_entries"] == offline["risk-0.05"]["settings"]["num_entries"]
    # Drafts from the sent law are verified without bias: only the gate's is left.
    bias = {rule: offline[rule]["predicted"]["tv_bias"]["value"] for rule in offline}
    gate = points_of(derived, "u-hlm")["risk-0.05"]["predicted"]["tv_bias"]["value"]
    assert bias["risk-0.05@draft-from-sent"] == pytest.approx(gate)
    assert bias["risk-0.05"] > gate
    importance = points_of(derived, "ui-hlm")["risk-0.05@context-0-0.9"]["settings"]["importance"]
    assert importance == {"variant": "context", "k": 0.0, "gamma": 0.9}


def test_thresholds_do_not_depend_on_what_is_sent(derived: dict[str, Any]) -> None:
    plain = points_of(derived, "u-hlm")
    for policy in ("cu-hlm-offline", "cu-hlm-online"):
        for rule, point in points_of(derived, policy).items():
            assert (
                point["uncertainty_threshold"]
                == plain[rule.partition("@")[0]]["uncertainty_threshold"]
            )


def test_validation_takes_the_points_named(run: Path, derived: dict[str, Any]) -> None:
    settings = read_json(run, "run.json")
    settings["settings"] |= {"pair": "smollm2", "prompts": "shipped"}
    (run / "run.json").write_text(json.dumps(settings))
    plan = prepare_validation(
        run, points=("hlm/none", "cu-hlm-online/risk-0.05@theta-0.5"), limit=2
    )
    assert [(p["policy"], p["rule"]) for p in plan.points] == [
        ("hlm", "none"),
        ("cu-hlm-online", "risk-0.05@theta-0.5"),
    ]
    with pytest.raises(UsageError, match="--point u-hlm/risk-7: not derived; derived are cu-hlm"):
        prepare_validation(run, points=("hlm/none", "u-hlm/risk-7"))


def test_a_predicted_event_that_never_happened_is_a_miss_not_a_fixed_figure() -> None:
    predicted, silent = Figure(0.02, 0.012, 0.028), Figure(0.0, 0.0, 0.0)
    missed = Cell("u-hlm", "risk-0.02", "rejection_risk", predicted, silent, False)
    exact = Cell("slm", "none", "skip_rate", Figure(1.0, 1 - 1e-5, 1 + 1e-5), Figure(1.0), True)
    assert not missed.fixed
    assert exact.fixed
    alone, both = (
        [Comparison(cell, None, cell.covered) for cell in cells]
        for cells in ([missed], [missed, exact])
    )
    assert coverage(both, 0.95)["tested"] == coverage(alone, 0.95)["tested"]
    assert coverage(both, 0.95)["tested"]["total"] == 1
    assert coverage(both, 0.95)["total"] == 2


@pytest.mark.parametrize("threshold", [0.99, 0.998])
def test_beyond_the_stored_thresholds_bias_follows_risk(run: Path, threshold: float) -> None:
    trace = read_trace(shard_paths(run))
    u, beta = trace["uncertainty"], trace["rejection_prob"]
    last = THRESHOLD_GRID[-1]
    share = beta[(u > last) & (u <= threshold)].sum() / beta[(u > last) & (u <= 1)].sum()
    assert share < 1
    distance = trace["tv_distance"]
    found = at_threshold(trace, "skip_set_bias", threshold, distance)
    expected = (1 - share) * trace["skip_set_bias"][:, -1] + share * distance
    np.testing.assert_allclose(found, expected)
    sizes = sent_skip_set_size(trace, threshold, VOCAB)
    assert sizes.max() <= 1 / (1 - threshold)  # not a share of the vocabulary
    assert (sizes >= trace["skip_set_size"][:, -1]).all()
