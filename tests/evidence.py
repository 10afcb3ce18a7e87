"""The optional files of a run, for tests of figures: small, and right by construction."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.derive.importance_plane import importance_plane
from calibrate.derive.policy_tokens import Economics
from calibrate.derive.presets import link_from_dict, profile_from_dict
from calibrate.run.folder import Figure, read_json, write_json
from calibrate.run.traces import read_trace, shard_paths
from calibrate.validate.guarantees import write_splits

PLANE_KS, PLANE_GAMMAS = (1, 4, 16), (0.5, 1.0, 2.0)


def attenuation_row(num_temperatures: int, gap: float) -> dict[str, Any]:
    """A row of attenuation.json with r = 0.5, lambda = K/(K + 2) and a given gap."""
    reliability = num_temperatures / (num_temperatures + 2)
    predicted = reliability**0.5 * 0.5
    return {
        "num_temperatures": num_temperatures,
        "reliability": reliability,
        "exact_correlation": 0.5,
        "predicted_correlation": predicted,
        "predicted_slope": 0.8 * reliability,
        "measured_correlation": asdict(Figure(predicted + gap, predicted - 0.1, predicted + 0.1)),
        "measured_slope": asdict(Figure(0.8 * reliability, 0.6, 0.9)),
        "correlation_gap": asdict(Figure(gap, gap - 0.02, gap + 0.02)),
        "slope_gap": asdict(Figure(0.0, -0.1, 0.1)),
        "num_tokens": 640,
        "num_prompts": 20,
    }


def add_evidence(run: Path) -> None:
    """Splits, attenuation and the importance plane of a derived run."""
    write_splits(run, num_splits=40)
    gaps = {100: 0.03, 5: -0.01, 20: 0.0}
    write_json(
        run / "attenuation.json", {"rows": [attenuation_row(k, gap) for k, gap in gaps.items()]}
    )
    derived = read_json(run, "operating_points.json")
    economics = Economics(
        link_from_dict(derived["link"]),
        profile_from_dict(derived["profile"]),
        derived["pair"]["vocab_size"],
        derived["accounting"],
    )
    calibration = read_json(run, "calibration.json")
    trace = read_trace(shard_paths(run))
    plane = importance_plane(
        trace, calibration, economics, PLANE_KS, PLANE_GAMMAS, plane_rule(derived)
    )
    write_json(run / "operating_points.json", derived | {"importance_plane": asdict(plane)})


def plane_rule(derived: dict[str, Any]) -> str:
    """A feasible rule of ui-hlm whose threshold depends on the line alone, so is u-hlm's too."""
    rules = ("risk-averse", "risk-prone")
    feasible = {
        p["rule"] for p in derived["operating_points"] if p["policy"] == "ui-hlm" and p["feasible"]
    }
    return next(rule for rule in rules if rule in feasible)


def add_quality(run: Path, policies: tuple[str, ...]) -> None:
    """Text scores of every validated point of some policies."""
    cells = read_json(run, "validation.json")["cells"]
    keys = dict.fromkeys((cell["policy"], cell["rule"]) for cell in cells)
    rows = [
        {
            "policy": policy,
            "rule": rule,
            "bertscore": asdict(Figure(0.9, 0.88, 0.92)),
            "cosine": asdict(Figure(0.7, 0.6, 0.8)),
        }
        for policy, rule in keys
        if policy in policies
    ]
    write_json(run / "quality.json", {"rows": rows, "num_prompts": 12})
