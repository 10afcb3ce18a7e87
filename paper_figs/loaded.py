"""The records of one run, read once for every figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calibrate.run.folder import DEFAULT_NAME, read_record, record_names
from calibrate.run.records import (
    AttenuationRecord,
    CalibrationRecord,
    Cell,
    DerivationRecord,
    Figure,
    GuaranteesRecord,
    OperatingPoint,
    PolicyInfo,
    QualityRecord,
    RerunInfo,
    RunRecord,
    StageRecord,
    ValidationRecord,
    WireRecord,
)
from calibrate.run.wording import coverage_text
from paper_figs.style import SERIES, SeriesStyle, policy_style

PointKey = tuple[str, str]
AnyRecord = TypeVar("AnyRecord", bound=StageRecord)
AnyJudge = TypeVar("AnyJudge", ValidationRecord, QualityRecord, WireRecord)

RECORDS: dict[str, type[StageRecord]] = {
    "calibration": CalibrationRecord,
    "derivation": DerivationRecord,
    "validation": ValidationRecord,
    "wire": WireRecord,
    "guarantees": GuaranteesRecord,
    "attenuation": AttenuationRecord,
}
"""Fields of a loaded run that figures need, and what each is read from."""


@dataclass(frozen=True)
class LoadedRun:
    """Everything that figures draw from; a field is None where its stage was not run.

    Attributes
    ----------
    run : Path
    calibration : CalibrationRecord
    info : RunRecord or None
    name : str
        Of the derivation.
    derivation : DerivationRecord or None
    validation, quality : ValidationRecord, QualityRecord or None
        Those of that derivation.
    validation_name : str
        Empty without one.
    wire : WireRecord or None
        Of that derivation.
    guarantees, attenuation : GuaranteesRecord, AttenuationRecord or None
    """

    run: Path
    calibration: CalibrationRecord
    info: RunRecord | None = None
    name: str = DEFAULT_NAME
    derivation: DerivationRecord | None = None
    validation: ValidationRecord | None = None
    validation_name: str = ""
    quality: QualityRecord | None = None
    wire: WireRecord | None = None
    guarantees: GuaranteesRecord | None = None
    attenuation: AttenuationRecord | None = None

    @property
    def pair_name(self) -> str:
        """Name of the pair."""
        return self.calibration.pair.name

    @property
    def sample(self) -> str:
        """What was measured, on how much: the first words of a caption."""
        return (
            f"Pair {self.pair_name}, {self.calibration.settings.sampling}; calibration: "
            f"n = {self.calibration.num_prompts:,} prompts, "
            f"{self.calibration.num_tokens:,} tokens."
        )

    @property
    def validation_sample(self) -> str:
        """The same of the reruns."""
        if self.validation is None:
            return ""
        return (
            f"Reruns: n = {self.validation.num_prompts:,} fresh prompts, "
            f"{self.validation.num_tokens:,} tokens over all of them."
        )

    @property
    def interval_note(self) -> str:
        """What every interval of the calibration is."""
        return f"{self.calibration.confidence:.0%} intervals, clustered by prompt"

    @property
    def derived_note(self) -> str:
        """What every interval of derived settings and their reruns is."""
        confidence = (self.derivation or self.calibration).confidence
        return f"{confidence:.0%} intervals, clustered by prompt"

    @cached_property
    def policies(self) -> dict[str, PolicyInfo]:
        """Derived policies by name."""
        derived = () if self.derivation is None else self.derivation.policies
        return {info.name: info for info in derived}

    def style(self, policy: str) -> SeriesStyle:
        """Look of a policy; one that was not derived looks like the last spare series."""
        return policy_style(self.policies[policy]) if policy in self.policies else SERIES[-1]

    def label(self, policy: str) -> str:
        """What figures call a policy."""
        return self.policies[policy].label if policy in self.policies else policy

    def legend(self, policy: str) -> str:
        """The same with the name that commands, tables and captions call it by."""
        label = self.label(policy)
        return label if label.lower() == policy else f"{label}\n({policy})"

    def label_lines(self, axes: Any, policies: Sequence[str], with_markers: bool) -> None:
        """Legend of policies whose lines are drawn as one, the first's.

        One entry with all names, or one for each where their markers tell them apart.
        """
        line = self.style(policies[0])
        if with_markers:
            for policy in policies:
                look = self.style(policy).on_line_of(line)
                axes.plot([], [], **look, label=self.legend(policy))
            return
        names = [self.legend(policy) for policy in policies]
        label = names[0] if len(names) == 1 else "\n".join(n.replace("\n", " ") for n in names)
        axes.plot([], [], **line.on_line_of(line), label=label)

    def score_label(self, score: str) -> str:
        """What figures call a score."""
        labels = {entry.name: entry.label for entry in self.calibration.estimators}
        return labels.get(score, score.replace("_", " "))

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """Every derived setting."""
        return () if self.derivation is None else self.derivation.operating_points

    @cached_property
    def feasible(self) -> tuple[OperatingPoint, ...]:
        """Points that a policy can be run at."""
        return tuple(point for point in self.points if point.feasible)

    @cached_property
    def compared(self) -> tuple[OperatingPoint, ...]:
        """Feasible points that policies are compared at: one rule for all gates, and no gate."""
        sweep = None if self.derivation is None else self.derivation.sweep
        if sweep is None:
            return ()
        return tuple(p for p in self.feasible if p.score is None or p.rule == sweep.rule)

    @property
    def gates(self) -> tuple[OperatingPoint, ...]:
        """Those of them that have a gate."""
        return tuple(point for point in self.compared if point.score is not None)

    def figure_of(self, point: OperatingPoint, metric: str) -> Figure:
        """What the rerun measured of a point, or what is predicted where it was not rerun."""
        cell = self.measured(point).get(metric)
        return point.predicted[metric] if cell is None else cell.measured

    @property
    def source_note(self) -> str:
        """Whether figures of compared points are of reruns, of some of them, or predictions."""
        rerun = {bool(self.measured(point)) for point in self.compared}
        if rerun == {True}:
            return "measured in reruns"
        return "predicted" if True not in rerun else "measured where rerun, else predicted"

    @cached_property
    def shown(self) -> tuple[OperatingPoint, ...]:
        """Feasible points that were rerun; all of them where none was.

        A derivation over several tolerances holds far more settings than anybody reads.
        """
        return tuple(point for point in self.feasible if self.measured(point)) or self.feasible

    def on_curve(self, point: OperatingPoint) -> bool:
        """Whether the score alone decides at a point: it skips what its threshold says.

        Predictions are moved to the policy's own contexts by a pilot, the curve is not: so to
        within the prediction's interval.
        """
        curves = None if self.derivation is None else self.derivation.thresholds
        threshold = point.uncertainty_threshold.value
        skipped = point.predicted.get("skip_rate")
        if curves is None or curves.score != point.score or threshold is None:
            return False
        if skipped is None or skipped.value is None:
            return False
        grid, rates = np.array(curves.skip_rate.grid), np.array(curves.skip_rate.value, dtype=float)
        above = min(int(np.searchsorted(grid, threshold)), len(grid) - 1)
        below = max(int(np.searchsorted(grid, threshold, side="right")) - 1, 0)
        low, high = (skipped.value if end is None else end for end in (skipped.low, skipped.high))
        return bool(rates[below] - 1e-6 <= high and low <= rates[above] + 1e-6)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell of the validation."""
        return () if self.validation is None else self.validation.cells

    @cached_property
    def cells_of(self) -> dict[PointKey, dict[str, Cell]]:
        """The same by point and metric."""
        found: dict[PointKey, dict[str, Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.policy, cell.rule), {})[cell.metric] = cell
        return found

    def measured(self, point: OperatingPoint) -> dict[str, Cell]:
        """Cells of a point by metric; empty where it was not rerun, or was derived anew since."""
        found = self.cells_of.get((point.policy, point.rule), {})
        current = all(
            metric in point.predicted
            and _close(cell.predicted.value, point.predicted[metric].value)
            for metric, cell in found.items()
        )
        return found if current else {}

    def rerun_of(self, point: OperatingPoint) -> RerunInfo | None:
        """The rerun of a point, under the same condition."""
        if self.validation is None or not self.measured(point):
            return None
        key = (point.policy, point.rule)
        return next((r for r in self.validation.reruns if (r.policy, r.rule) == key), None)

    def quality_of(self, point: OperatingPoint, score: str) -> Figure | None:
        """A text score of a point's rerun; None where it was not scored, or derived anew since."""
        if self.quality is None or not self.measured(point):
            return None
        key = (point.policy, point.rule)
        scores = (getattr(r, score) for r in self.quality.rows if (r.policy, r.rule) == key)
        return next(scores, None)

    @property
    def outdated(self) -> tuple[PointKey, ...]:
        """Rerun points that the derivation no longer holds as they were."""
        points = {(point.policy, point.rule): point for point in self.points}
        return tuple(
            key for key in self.cells_of if key not in points or not self.measured(points[key])
        )

    @property
    def coverage_note(self) -> str:
        """Cells inside their intervals, and how many to expect; empty without reruns."""
        validation = self.validation
        if validation is None or not validation.cells:
            return ""
        return coverage_text(validation)


def load_run(run: Path, name: str = DEFAULT_NAME) -> LoadedRun:
    """Read a run folder: its calibration, one of its derivations, and what belongs to that.

    Raises
    ------
    UserError, UsageError
        If there is no such run or derivation, it has no calibration, or a file of it is broken.
    """
    calibration = read_record(run, CalibrationRecord)
    derivation = None
    if name != DEFAULT_NAME or record_names(run, DerivationRecord)[:1] == [DEFAULT_NAME]:
        derivation = read_record(run, DerivationRecord, name)
    validation_name, validation = _judging(run, ValidationRecord, name)
    return LoadedRun(
        run=run,
        calibration=calibration,
        info=_optional(run, RunRecord),
        name=name,
        derivation=derivation,
        validation=validation,
        validation_name=validation_name,
        quality=_judging(run, QualityRecord, name)[1],
        wire=_judging(run, WireRecord, name)[1],
        guarantees=_optional(run, GuaranteesRecord),
        attenuation=_optional(run, AttenuationRecord),
    )


def _optional(run: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """A file that a run may lack."""
    return read_record(run, kind) if DEFAULT_NAME in record_names(run, kind) else None


def _judging(run: Path, kind: type[AnyJudge], name: str) -> tuple[str, AnyJudge | None]:
    """The record that judged a derivation, with its name: its namesake before all others."""
    for own in sorted(record_names(run, kind), key=lambda own: own != name):
        record = read_record(run, kind, own)
        if record.derivation == name:
            return own, record
    return "", None


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


METRIC_LABELS: dict[str, str] = {
    "skip_rate": "skip rate (share of tokens)",
    "rejection_risk": "rejection risk R (probability)",
    "uplink_bits_per_token": "uplink payload (bit/token)",
    "downlink_bits_per_token": "downlink payload (bit/token)",
    "token_time_ms": "token time (ms)",
    "throughput_tok_s": "throughput, 1/mean time (token/s)",
    "mean_throughput_tok_s": "throughput, mean of 1/time (token/s)",
    "energy_j_per_token": "energy (J/token)",
    "devices_per_server": "load (devices per server)",
    "tv_bias": "TV bias (probability)",
    "answer_divergence": "TV of answers (probability)",
    "tokens_in_agreement": "agreement (tokens before answers differ)",
}
"""Name and unit of every metric, for axes and tables."""


def metric_label(metric: str) -> str:
    """Label of a metric; a new one shows under its own name."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def metric_names(cells: tuple[Cell, ...]) -> list[str]:
    """Metrics that occur, in the contract's order, new ones last."""
    present = {cell.metric for cell in cells}
    return [m for m in METRIC_LABELS if m in present] + sorted(present - set(METRIC_LABELS))
