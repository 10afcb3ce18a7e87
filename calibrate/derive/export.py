"""`hlm export`: one operating point as an application needs it, in one small file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibrate.derive.operating_points import score_of
from calibrate.derive.predict import feasible_point
from calibrate.run.errors import UserError
from calibrate.run.figure import share_text
from calibrate.run.folder import DEFAULT_NAME, provenance, read_record
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    ExportRecord,
    ModelIdentity,
    OperatingPoint,
    ScoreDefinition,
)
from calibrate.run.traces import read_axes, shard_paths


def export_point(
    run: Path, key: str, name: str = DEFAULT_NAME, command: Sequence[str] = ()
) -> ExportRecord:
    """An operating point of a derivation with all that deciding by it takes.

    Parameters
    ----------
    run : Path
    key : str
        policy/rule.
    name : str
        Of the derivation.
    command : sequence of str
        The command line, for the record.

    Raises
    ------
    UsageError
        If the derivation has no such point, or it is infeasible.
    UserError
        If the run's traces are gone: they say what the score is made of.
    """
    calibration = read_record(run, CalibrationRecord)
    derivation = read_record(run, DerivationRecord, name)
    point = feasible_point(derivation, key)
    info = next(one for one in derivation.policies if one.name == point.policy)
    return ExportRecord(
        point=point.key,
        policy=info,
        settings=point.settings,
        threshold=None if point.score is None else point.uncertainty_threshold.value,
        score=None if point.score is None else _definition(run, point.score, calibration),
        family=point.family,
        budget=point.budget,
        weighting=point.weighting,
        certified=point.family == "ltt",
        confidence=point.confidence,
        predicted=point.predicted,
        pair=derivation.pair,
        sampling=calibration.settings.sampling,
        max_new_tokens=calibration.settings.max_new_tokens,
        derivation=derivation.name,
        derived=derivation.provenance,
        provenance=provenance(command),
        valid_while=_conditions(calibration, derivation, point),
    )


def _definition(run: Path, name: str, calibration: CalibrationRecord) -> ScoreDefinition:
    shards = shard_paths(run)
    if not shards:
        raise UserError(f"RUN {run}: traces are missing, which say what the score is made of")
    score = score_of(name, calibration.learned)
    bounds = (score.low, score.high)
    return ScoreDefinition(
        name=name,
        formula=score.formula,
        temperatures=read_axes(shards[0]).thetas,
        learned=calibration.learned if name == "learned" else None,
        low=bounds[0] if np.isfinite(bounds[0]) else None,
        high=bounds[1] if np.isfinite(bounds[1]) else None,
    )


def _conditions(
    calibration: CalibrationRecord, derivation: DerivationRecord, point: OperatingPoint
) -> tuple[str, ...]:
    """What has to stay as it was for the threshold to mean what it meant."""
    settings, pair = calibration.settings, derivation.pair
    out = [
        f"the device model is {_model(pair.slm)}",
        f"the server model is {_model(pair.llm)}",
        f"both run in {pair.dtype} and are sampled alike: {settings.sampling}",
        f"prompts are like the {derivation.num_prompts:,} that were calibrated on "
        f"({settings.prompts}), in their mix",
        f"answers have at most {settings.max_new_tokens} tokens",
    ]
    if point.budget is not None and point.family == "ltt":
        out.append(
            f"it is the one point that is taken of the derivation: each certificate of "
            f"{share_text(point.confidence or 0.0)} stands alone"
        )
    elif point.budget is not None:
        out.append("nobody takes its budget for a guarantee: it was met on the calibration prompts")
    if point.budget is not None and point.weighting in ("tokens", "prompts"):
        out.append("`hlm monitor` on audited tokens raises no alarm at its budget")
    return tuple(out)


def _model(model: ModelIdentity) -> str:
    layers = ", ".join(map(str, model.drop_layers))
    return f"{model.label}, {model.sha256 or 'of no known hash'}" + (
        f", without layers {layers}" if layers and layers not in model.label else ""
    )
