"""A run's stored results, read once for every figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.derive.operating_points import OperatingPoint, policy_from_settings
from calibrate.derive.policy_tokens import METRICS, Economics, PolicyTokens, measured_tokens
from calibrate.derive.presets import link_from_dict, profile_from_dict
from calibrate.run.errors import UserError
from calibrate.run.folder import Figure, read_json
from calibrate.run.traces import Trace, read_header, read_trace, shard_paths
from calibrate.validate.comparison import Cell, coverage_text
from hlmtheory.policies import Policy

RERUN_COLUMNS = ["rejection_prob", "skipped", "policy_bias", "policy_entries"]

PointKey = tuple[str, str]


@dataclass(frozen=True)
class Rerun:
    """The tokens of one validation rerun and the operating point that it ran.

    Attributes
    ----------
    point : OperatingPoint
    trace : Trace
        Its RERUN_COLUMNS only.
    """

    point: OperatingPoint
    trace: Trace

    def tokens(self) -> PolicyTokens:
        """What the policy did, as :func:`calibrate.derive.policy_tokens.metrics` takes it."""
        return measured_tokens(self.trace, self.point.to_policy())


@dataclass(frozen=True)
class LoadedRun:
    """Everything the figures draw from.

    Attributes
    ----------
    run : Path
    trace : Trace
        The calibration trace.
    info : dict or None
        run.json.
    calibration : dict
        calibration.json.
    derived : dict or None
        operating_points.json without its points; None if nothing was derived yet.
    points : tuple of OperatingPoint
    validation : dict or None
        validation.json without its cells; None if nothing was rerun yet.
    cells : tuple of Cell
        Every cell of validation.json.
    reruns : tuple of Rerun
        Those that ran the points of `points`; older ones are left out.
    splits, attenuation, quality : dict or None
        splits.json, attenuation.json and quality.json, where the run has them.
    """

    run: Path
    trace: Trace
    info: dict[str, Any] | None
    calibration: dict[str, Any]
    derived: dict[str, Any] | None = None
    points: tuple[OperatingPoint, ...] = ()
    validation: dict[str, Any] | None = None
    cells: tuple[Cell, ...] = ()
    reruns: tuple[Rerun, ...] = ()
    splits: dict[str, Any] | None = None
    attenuation: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None

    @property
    def confidence(self) -> float:
        """Confidence of the intervals drawn."""
        return float(self.calibration["confidence"])

    @property
    def pair_name(self) -> str:
        """Name of the pair."""
        return str(self.calibration["pair"]["name"])

    @property
    def vocab_size(self) -> int:
        """Tokens of the shared vocabulary, V."""
        return int(self.calibration["pair"]["vocab_size"])

    @property
    def sample(self) -> str:
        """What was measured, on how much: the first words of a caption."""
        temperature = self.calibration["settings"]["temperature"]
        return (
            f"Pair {self.pair_name}, T = {temperature:g}; calibration: "
            f"n = {self.trace.num_prompts:,} prompts, {self.trace.num_tokens:,} tokens."
        )

    @property
    def validation_sample(self) -> str:
        """The same of the reruns."""
        if self.validation is None:
            return ""
        return (
            f"Reruns: n = {self.validation['num_prompts']:,} fresh prompts, "
            f"{self.validation['num_tokens']:,} tokens over all of them."
        )

    @property
    def coverage_note(self) -> str:
        """Cells inside their intervals, and how many to expect; empty without reruns."""
        if self.validation is None or not self.cells:
            return ""
        return coverage_text(self.validation)

    @property
    def interval_note(self) -> str:
        """What every interval of the calibration is."""
        return f"{self.confidence:.0%} intervals, clustered by prompt"

    @property
    def derived_confidence(self) -> float:
        """Of the derived settings and their reruns: what `hlm derive` was asked for."""
        return float(self.derived["confidence"]) if self.derived is not None else self.confidence

    @property
    def derived_note(self) -> str:
        """What every interval of derived settings and their reruns is."""
        return f"{self.derived_confidence:.0%} intervals, clustered by prompt"

    @property
    def feasible(self) -> tuple[OperatingPoint, ...]:
        """Points that a policy can be run at."""
        return tuple(point for point in self.points if point.feasible)

    @property
    def shown(self) -> tuple[OperatingPoint, ...]:
        """Feasible points that were rerun; all of them where none was.

        A derivation over several tolerances holds far more settings than anybody reads.
        """
        return tuple(point for point in self.feasible if self.measured(point)) or self.feasible

    def measured(self, point: OperatingPoint) -> dict[str, Cell]:
        """Cells of a point by metric; empty where it was not rerun, or was derived anew since."""
        found = {
            cell.metric: cell
            for cell in self.cells
            if (cell.policy, cell.rule) == (point.policy, point.rule)
        }
        current = all(
            metric in point.predicted
            and _close(cell.predicted.value, point.predicted[metric].value)
            for metric, cell in found.items()
        )
        return found if current else {}

    def quality_of(self, point: OperatingPoint, score: str) -> Figure | None:
        """A text score of a point's rerun; None where it was not scored, or derived anew since."""
        if self.quality is None or not self.measured(point):
            return None
        for row in self.quality["rows"]:
            if (row["policy"], row["rule"]) == (point.policy, point.rule) and score in row:
                return Figure(**row[score])
        return None

    @property
    def outdated(self) -> tuple[PointKey, ...]:
        """Points of validation.json that operating_points.json no longer holds as they were."""
        keys = list(dict.fromkeys((cell.policy, cell.rule) for cell in self.cells))
        points = {(point.policy, point.rule): point for point in self.points}
        return tuple(key for key in keys if key not in points or not self.measured(points[key]))

    def policy_at(self, policy: str, threshold: float | None) -> Policy | None:
        """A derived policy moved to another threshold; None if it was never derived."""
        for point in self.feasible:
            if point.policy == policy:
                return policy_from_settings(policy, threshold, point.settings)
        return None

    def economics(self) -> Economics:
        """Link, device and accounting that the predictions were made with.

        Raises
        ------
        UserError
            If nothing was derived.
        """
        if self.derived is None:
            raise UserError(f"RUN {self.run}: no operating points; run `hlm derive {self.run}`")
        return Economics(
            link_from_dict(self.derived["link"]),
            profile_from_dict(self.derived["profile"]),
            self.vocab_size,
            self.derived["accounting"],
        )


def load_run(run: Path) -> LoadedRun:
    """Read a run folder.

    Raises
    ------
    UserError, UsageError
        If there is no such run, it has no calibration, or a file of it is broken.
    """
    calibration = read_json(run, "calibration.json")
    info = read_json(run, "run.json") if (run / "run.json").is_file() else None
    trace = read_trace(shard_paths(run))
    derived: dict[str, Any] | None = None
    points: tuple[OperatingPoint, ...] = ()
    if (run / "operating_points.json").is_file():
        derived = read_json(run, "operating_points.json")
        points = tuple(_point(entry) for entry in derived.pop("operating_points"))
    validation: dict[str, Any] | None = None
    cells: tuple[Cell, ...] = ()
    if (run / "validation.json").is_file():
        validation = read_json(run, "validation.json")
        cells = tuple(_cell(entry) for entry in validation.pop("cells"))
    return LoadedRun(
        run, trace, info, calibration, derived, points, validation, cells,
        _reruns(run, points, cells), _optional(run, "splits.json"),
        _optional(run, "attenuation.json"), _optional(run, "quality.json"),
    )  # fmt: skip


def _optional(run: Path, name: str) -> dict[str, Any] | None:
    """A file that a run may lack."""
    return read_json(run, name) if (run / name).is_file() else None


def _point(entry: dict[str, Any]) -> OperatingPoint:
    return OperatingPoint(
        policy=entry["policy"],
        rule=entry["rule"],
        uncertainty_threshold=Figure(**entry["uncertainty_threshold"]),
        feasible=entry["feasible"],
        reason=entry["reason"],
        settings=entry["settings"],
        predicted={name: Figure(**figure) for name, figure in entry["predicted"].items()},
    )


def _cell(entry: dict[str, Any]) -> Cell:
    return Cell(
        entry["policy"],
        entry["rule"],
        entry["metric"],
        Figure(**entry["predicted"]),
        Figure(**entry["measured"]),
        entry["covered"],
    )


def _reruns(
    run: Path, points: tuple[OperatingPoint, ...], cells: tuple[Cell, ...]
) -> tuple[Rerun, ...]:
    """Reruns of current points that validation.json speaks of."""
    validated = {(cell.policy, cell.rule) for cell in cells}
    current = {(point.policy, point.rule): point for point in points}
    found: list[Rerun] = []
    for path in sorted((run / "reruns").glob("*.parquet")):
        header = read_header(path)
        ran = _point(header["operating_point"])
        key = (ran.policy, ran.rule)
        if key in validated and key in current and _same_setting(ran, current[key]):
            found.append(Rerun(current[key], read_trace([path], RERUN_COLUMNS)))
    order = {key: number for number, key in enumerate(current)}
    return tuple(sorted(found, key=lambda rerun: order[rerun.point.policy, rerun.point.rule]))


def _same_setting(one: OperatingPoint, other: OperatingPoint) -> bool:
    return one.settings == other.settings and _close(
        one.uncertainty_threshold.value, other.uncertainty_threshold.value
    )


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


METRIC_LABELS: dict[str, str] = {
    "skip_rate": "skip rate (share of tokens)",
    "rejection_risk": "rejection risk R (probability)",
    "uplink_bits_per_token": "uplink payload (bit/token)",
    "token_time_ms": "token time (ms)",
    "throughput_tok_s": "throughput, 1/mean time (token/s)",
    "mean_throughput_tok_s": "throughput, mean of 1/time (token/s)",
    "energy_j_per_token": "energy (J/token)",
    "tv_bias": "TV bias (probability)",
}
"""Name and unit of every metric, for axes and tables."""


def metric_label(metric: str) -> str:
    """Label of a metric; a new one shows under its own name."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def metric_names(cells: tuple[Cell, ...]) -> list[str]:
    """Metrics that occur, in the contract's order, new ones last."""
    present = {cell.metric for cell in cells}
    return [m for m in METRICS if m in present] + sorted(present - set(METRICS))
