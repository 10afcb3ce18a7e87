"""`hlm derive`: read a calibrated run, derive its operating points, write them."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.run.errors import UsageError
from calibrate.run.folder import read_json, write_json

DEFAULT_LINK = "wifi"
MEASURED = "measured"


def policy_names() -> tuple[str, ...]:
    """Policies of the command line."""
    from hlmtheory.policies import POLICY_NAMES

    return POLICY_NAMES


def derive_run(
    run: Path,
    policies: tuple[str, ...],
    risks: tuple[float, ...] = (0.01,),
    confidence: float = 0.95,
    link_name: str = DEFAULT_LINK,
    profile_name: str = MEASURED,
    accounting: str = "paper",
    thetas: tuple[float, ...] = (0.1,),
    importances: tuple[str, ...] = ("topk:16:1",),
    draft_from_sent: bool = False,
) -> dict[str, Any]:
    """Derive operating points and write operating_points.json.

    Parameters
    ----------
    run : Path
        A calibrated run.
    policies : tuple of str
    risks : tuple of float
    confidence : float
    link_name, profile_name : str
        Preset or JSON file; profile `measured` takes model times from the calibration.
    accounting : {"paper", "full"}
    thetas : tuple of float
        Tolerances of the truncation bound; see :class:`DeriveRequest` for the rules' names.
    importances : tuple of str
        variant:k:gamma each.
    draft_from_sent : bool
        Whether to derive cu-hlm-offline with drafts from the sent law too.

    Returns
    -------
    dict
        The content of operating_points.json.
    """
    # Rules are named by their budget as it is printed: one of each name.
    risks = tuple({f"{risk:g}": risk for risk in risks}.values())
    thetas = tuple({f"{theta:g}": theta for theta in thetas}.values())
    parsed = tuple(
        {setting.label: setting for setting in map(parse_importance, importances)}.values()
    )
    calibration = read_json(run, "calibration.json")
    from calibrate.derive.importance_plane import derive_plane
    from calibrate.derive.operating_points import DeriveRequest, derive
    from calibrate.derive.optimum import optima
    from calibrate.derive.policy_tokens import Economics
    from calibrate.derive.presets import link_to_dict, load_link, load_profile
    from calibrate.run.traces import read_trace, shard_paths

    link = load_link(link_name)
    profile = load_profile(profile_name, calibration["timings"])
    economics = Economics(link, profile, calibration["pair"]["vocab_size"], accounting)
    request = DeriveRequest(
        policies=policies,
        risks=risks,
        confidence=confidence,
        thetas=thetas,
        importances=parsed,
        draft_from_sent=draft_from_sent,
    )
    trace = read_trace(shard_paths(run))
    points = derive(trace, calibration, request, economics)
    best = optima(trace, economics, risks) if "skip_set_bias" in trace else []
    result: dict[str, Any] = {
        "pair": calibration["pair"],
        "num_prompts": calibration["num_prompts"],
        "num_tokens": calibration["num_tokens"],
        "confidence": confidence,
        "link": {"name": link_name, **link_to_dict(link)},
        "profile": {"name": profile_name, **asdict(profile)},
        "accounting": accounting,
        "operating_points": [asdict(point) for point in points],
        "optima": [asdict(optimum) for optimum in best],
        "importance_plane": derive_plane(trace, calibration, economics, parsed, risks, confidence),
    }
    write_json(run / "operating_points.json", result)
    return result


def parse_importance(text: str) -> Any:
    """Read variant:k:gamma."""
    from calibrate.decode.recording import topk_column
    from hlmtheory.policies import ImportanceSettings

    parts = text.split(":")
    way_out = "give variant:k:gamma, like topk:16:1 or context:0:0.9"
    if len(parts) != 3 or parts[0] not in ("topk", "context"):
        raise UsageError(f"--importance {text}: {way_out}")
    try:
        k, gamma = float(parts[1]), float(parts[2])
    except ValueError:
        raise UsageError(f"--importance {text}: k and gamma are numbers; {way_out}") from None
    if not (math.isfinite(k) and math.isfinite(gamma)):
        raise UsageError(f"--importance {text}: k and gamma must be finite")
    try:
        settings = ImportanceSettings(parts[0], k, gamma)  # type: ignore[arg-type]
        if settings.variant == "topk":
            topk_column(settings)
        return settings
    except ValueError as error:
        raise UsageError(f"--importance {text}: {error}") from None
