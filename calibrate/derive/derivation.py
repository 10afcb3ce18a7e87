"""`hlm derive`: read a calibrated run, derive its operating points, keep them under a name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrate.derive.certify import check_caps
from calibrate.run.errors import UsageError, UserError
from calibrate.run.folder import (
    DEFAULT_NAME,
    provenance,
    read_record,
    record_path,
    write_record,
)
from calibrate.run.records import (
    CalibrationRecord,
    DerivationRecord,
    DeriveRequest,
    QualityRecord,
    StageRecord,
    ValidationRecord,
    WireRecord,
)

if TYPE_CHECKING:
    from calibrate.derive.operating_points import Study

JUDGES: tuple[type[StageRecord], ...] = (ValidationRecord, WireRecord, QualityRecord)
"""What is held against a derivation, and so loses its meaning with it."""
MAX_IN_DOUBLE = 200_000
"""Tokens up to which a trace is kept in double precision while it is looked at many times."""


def derive_run(
    run: Path,
    request: DeriveRequest,
    name: str = DEFAULT_NAME,
    replace: bool = False,
    command: Sequence[str] = (),
) -> DerivationRecord:
    """Derive operating points, curves and optima, and keep them under a name.

    A derivation that was validated stays as it was judged: deriving the same again gives it back.

    Parameters
    ----------
    run : Path
        A calibrated run.
    request : DeriveRequest
    name : str
    replace : bool
        Whether another derivation may take the place of a validated one, whose validation and text
        scores go with it. Reruns stay: they are kept by their own settings.
    command : sequence of str
        The command line, for the record.

    Raises
    ------
    UsageError
        If the name's derivation was validated and would change, or the request is not possible.
    """
    request = tidy(request)
    check_caps(request.answer_caps, request.certify)
    replaced_note(run, request, name, replace)
    record = _derived(run, request, name, command)
    judges = _judges(run, name)
    if judges:
        before = _earlier(run, name)
        if isinstance(before, DerivationRecord):
            if _alike(_content(before), _content(record)):
                return before
            before = "would hold other numbers"
        if not replace:
            raise _refusal(run, name, judges, before)
    write_record(run, record, name)
    for judge in judges:
        judge.unlink()
    return record


def replaced_note(run: Path, request: DeriveRequest, name: str, replace: bool = False) -> str:
    """What deriving under this name replaces, in one line; empty if nothing.

    Raises
    ------
    UsageError
        If that was validated for another request, or cannot be read, and `replace` is not set.
    """
    path = record_path(run, DerivationRecord, name)
    if not path.is_file():
        return ""
    judges = _judges(run, name)
    if not judges:
        return f"{path.name} is replaced: nobody validated it"
    if replace:
        return f"{path.name} is replaced, and {', '.join(j.name for j in judges)} removed"
    before = _earlier(run, name)
    if isinstance(before, DerivationRecord):
        if before.request == tidy(request):
            return ""
        before = "was derived for another request"
    raise _refusal(run, name, judges, before)


def tidy(request: DeriveRequest) -> DeriveRequest:
    """The request with every option once: rules are named by their options as they are printed."""
    return request.model_copy(
        update={
            "policies": tuple(dict.fromkeys(request.policies)),
            "answer_risks": tuple({f"{one:g}": one for one in request.answer_risks}.values()),
            "risks": tuple({f"{risk:g}": risk for risk in request.risks}.values()),
            "thetas": tuple({f"{theta:g}": theta for theta in request.thetas}.values()),
            "importances": tuple(dict.fromkeys(request.importances)),
            "answer_caps": tuple(dict.fromkeys(request.answer_caps)),
        }
    )


def _derived(
    run: Path, request: DeriveRequest, name: str, command: Sequence[str]
) -> DerivationRecord:
    """The derivation itself: a function of traces, calibration and request alone."""
    from calibrate.derive import curves
    from calibrate.derive.importance_plane import importance_plane
    from calibrate.derive.operating_points import operating_points, policy_infos
    from calibrate.derive.optimum import optima, policy_paths
    from calibrate.derive.predict import prompt_lengths
    from calibrate.derive.presets import link_to_dict, profile_to_dict

    infos = policy_infos(request.policies)
    study = _study(run, request)
    points = operating_points(study)
    runnable = [(point, policy) for point, policy in points if policy is not None]
    paths, resized = policy_paths(study)
    economics = study.economics
    return DerivationRecord(
        name=name,
        request=request,
        provenance=provenance(command),
        pair=study.calibration.pair,
        num_prompts=study.trace.num_prompts,
        num_tokens=study.trace.num_tokens,
        confidence=request.confidence,
        link={"name": request.link, **link_to_dict(economics.link)},
        profile={"name": request.profile, **profile_to_dict(economics.profile)},
        accounting=request.accounting,
        num_prompt_tokens=float(prompt_lengths(study.trace).mean()),
        policies=infos,
        operating_points=tuple(point for point, _ in points),
        optima=tuple(optima(study, paths + resized)),
        pilot=study.roads.info,
        certificates=study.certificates(),
        thresholds=curves.threshold_curves(study),
        answers=curves.answer_curves(study, runnable),
        paths=tuple(path.record() for path in paths if path.policy.gated),
        sweep=curves.link_sweep(study, runnable),
        payloads=curves.payload_distributions(study, runnable),
        truncation=curves.truncation_curves(study, runnable),
        importance_plane=importance_plane(study),
        importance_example=curves.importance_example(study),
    )


def _study(run: Path, request: DeriveRequest) -> Study:
    """What the request is made from, all of it checked."""
    from calibrate.derive.operating_points import Study
    from calibrate.derive.optimum import in_double
    from calibrate.derive.predict import Economics
    from calibrate.derive.presets import load_link, load_profile
    from calibrate.derive.roads import read_roads
    from hlmtheory.policies import DeriveOptions

    calibration = read_record(run, CalibrationRecord)
    importances = tuple(parse_importance(text) for text in request.importances)
    link, profile = load_link(request.link), load_profile(request.profile, calibration.timings)
    roads = read_roads(run, calibration)
    trace = roads.server
    if "head_prob" not in trace:
        raise UserError(
            f"RUN {run}: minimal traces lack the candidates that predictions need; calibrate with "
            "--trace full"
        )
    if trace.num_tokens <= MAX_IN_DOUBLE:
        pilot = None if roads.pilot is None else in_double(roads.pilot)
        roads = replace(roads, server=in_double(trace), pilot=pilot)
    return Study(
        roads,
        calibration,
        request,
        Economics(
            link,
            profile,
            calibration.pair.vocab_size,
            request.accounting,
        ),
        DeriveOptions(request.thetas, request.eta, importances, request.draft_from_sent),
    )


def parse_importance(text: str) -> dict[str, Any]:
    """Read variant:k:gamma.

    Raises
    ------
    UsageError
        If it is not that.
    """
    variant, *numbers = text.split(":")
    way_out = "give variant:k:gamma, like topk:16:1 or context:0:0.9"
    try:
        k, gamma = (float(number) for number in numbers)
    except ValueError:
        raise UsageError(f"--importance {text}: k and gamma are two numbers; {way_out}") from None
    return {"variant": variant, "k": k, "gamma": gamma}


def _judges(run: Path, name: str) -> list[Path]:
    paths = [record_path(run, kind, name) for kind in JUDGES]
    return [path for path in paths if path.is_file()]


def _earlier(run: Path, name: str) -> DerivationRecord | str:
    """The derivation of that name as it is there, or why there is none."""
    if not record_path(run, DerivationRecord, name).is_file():
        return "is gone"
    try:
        return read_record(run, DerivationRecord, name)
    except UserError:
        return "is broken or of another version"


def _refusal(run: Path, name: str, judges: list[Path], why: str) -> UsageError:
    path = record_path(run, DerivationRecord, name)
    return UsageError(
        f"--name {name}: {path} {why}, and {judges[0].name} rests on it; give another --name, or "
        f"--replace to remove {' and '.join(judge.name for judge in judges)} with it"
    )


def _content(record: DerivationRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"provenance"})


def _alike(first: Any, second: Any) -> bool:
    """Whether two JSON values say the same, numbers up to rounding on another processor."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_alike(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_alike, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return bool(first == second)
