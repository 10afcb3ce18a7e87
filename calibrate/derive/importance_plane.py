"""What the two strictness parameters of an importance trade: predictions over (k, gamma).

Assumption: the importance is ours, docs/theory.md, (31); see hlmtheory.importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibrate.derive.operating_points import Study
from calibrate.derive.optimum import thin_prompts
from calibrate.derive.predict import UNITS, metrics, predicted_tokens
from calibrate.fit.thresholds import DerivedThreshold
from calibrate.run.figure import as_figure
from calibrate.run.records import ImportancePlane, PlaneCell
from calibrate.run.traces import Trace

MAX_TOKENS = 200_000
NUM_GAMMAS = 9
NEUTRAL_GAMMA = 1.0
"""Where a uniform attention row lies on its own threshold: docs/theory.md, (31)."""
PLANE_METRICS = ("skip_rate", "tv_bias", "throughput_tok_s", "energy_j_per_token")


def gamma_grid(trace: Trace, num_gammas: int = NUM_GAMMAS) -> tuple[float, ...]:
    r"""Values of gamma between "every context counts" and "none does", for every recorded k.

    A context is important when :math:`q_t = I_t e^{H(A_t)} \ge \gamma`, so only the range of q
    matters: from its first percentile at the k where it is least to its last percentile at the k
    where it is largest. Evenly spaced in ln gamma, for gamma multiplies the threshold; the nearest
    value gives way to gamma = 1, where a uniform row lies on the threshold.
    """
    q = trace["topk_attention"] * np.exp(trace["attention_entropy"])[:, None]  # (N, K)
    low, high = np.quantile(q, 0.01, axis=0).min(), np.quantile(q, 0.99, axis=0).max()
    if not 0 < low < high:
        return (NEUTRAL_GAMMA,)
    grid = np.geomspace(low, high, num_gammas)
    if low < NEUTRAL_GAMMA < high:
        grid[int(np.argmin(np.abs(np.log(grid / NEUTRAL_GAMMA))))] = NEUTRAL_GAMMA
    return tuple(sorted({float(f"{gamma:.2g}") for gamma in grid}))


def importance_plane(study: Study, gammas: Sequence[float] | None = None) -> ImportancePlane | None:
    """Predict the first policy with a `topk` importance at every recorded k and these gammas.

    One threshold for all cells, that of the score alone, so that only the importance differs: the
    risk-averse one, or the first risk budget's where that has no solution. Unless given, gammas
    are :func:`gamma_grid` with the derived ones in it, so that their reruns have a place; values
    within a tenth of a derived one give way to it. None without such a policy.
    """
    found = [one for one in study.policies if one.importance_settings is not None]
    if not found or "topk_attention" not in study.trace:
        return None
    chosen = [one.importance_settings for one in found]
    own = sorted({one.gamma for one in chosen if one.variant == "topk"})
    if gammas is None:
        free = (g for g in gamma_grid(study.trace) if all(abs(g - o) >= 0.1 * o for o in own))
        gammas = sorted({*own, *free})
    threshold = _plain_threshold(study, found[0]).threshold
    ks = study.trace.axes.attention_sizes
    thinned = thin_prompts(study.trace, MAX_TOKENS)
    cells: list[PlaneCell] = []
    for k in ks if threshold.feasible else ():
        for gamma in gammas:
            moved = found[0].with_importance(k, gamma).with_threshold(threshold.value)
            estimates = metrics(predicted_tokens(thinned, moved), study.economics)
            predicted = {
                name: as_figure(estimates[name], UNITS[name], study.request.confidence)
                for name in PLANE_METRICS
            }
            cells.append(PlaneCell(k=k, gamma=gamma, predicted=predicted))
    return ImportancePlane(
        policy=found[0].name,
        threshold_rule=threshold.rule,
        uncertainty_threshold=threshold.value if threshold.feasible else None,
        reason=threshold.reason,
        num_prompts=thinned.num_prompts,
        num_tokens=thinned.num_tokens,
        ks=ks,
        gammas=tuple(gammas),
        cells=tuple(cells),
    )


def _plain_threshold(study: Study, policy: Any) -> DerivedThreshold:
    """Of the score alone: gamma = 0 calls every context important."""
    everywhere = policy.with_importance(study.trace.axes.attention_sizes[0], 0.0)
    _, derived = study.gate(everywhere)
    by_family = {one.threshold.family: one for one in reversed(derived)}  # the first budget's
    averse = by_family["risk-averse"]
    return averse if averse.threshold.feasible else by_family["risk"]
