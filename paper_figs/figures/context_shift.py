"""Do the outputs of a policy lead it into contexts unlike those it was predicted on?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from calibrate.run.figure import excludes_zero
from paper_figs.figures.curves import error_lengths
from paper_figs.loaded import LoadedRun
from paper_figs.style import BLUE, VERMILLION, finish, new_figure, panel_letter

QUESTION = "Do skipped tokens lead a policy into other contexts than the server's?"
PANELS = (
    ("below_threshold", "tokens below\nthe threshold"),
    ("risk_below_threshold", "rejection risk\nof those tokens"),
    ("uncertainty", "mean\nuncertainty"),
)


def shift_rows(loaded: LoadedRun) -> list[dict[str, Any]]:
    """Reruns with a shift that could be anything but 0, in the order they were validated."""
    rows = (loaded.validation or {}).get("context_shift", [])
    return [row for row in rows if any(_varies(row[key]) for key, _ in PANELS)]


def _varies(number: dict[str, Any]) -> bool:
    return number["low"] is not None and number["high"] > number["low"]


def figure(loaded: LoadedRun) -> Figure | None:
    """One row a rerun: what its contexts are like, less what those of the server's law are."""
    rows = shift_rows(loaded)
    if not rows:
        return None
    drawn, axes = new_figure(1, len(PANELS), 1.0 + 0.19 * len(rows), share_y=True)
    height = np.arange(len(rows))
    for axis, (key, label), letter in zip(axes[0], PANELS, "abc", strict=True):
        value, low, high = (
            100 * np.array([row[key][part] for row in rows], dtype=float)
            for part in ("value", "low", "high")
        )
        outside = (low > 0) | (high < 0)
        axis.axvline(0, color="#9a9a9a", linewidth=0.8)
        for chosen, color, marker in ((~outside, BLUE, "o"), (outside, VERMILLION, "X")):
            if chosen.any():
                axis.errorbar(
                    value[chosen], height[chosen],
                    xerr=error_lengths(value[chosen], low[chosen], high[chosen]),
                    fmt=marker, color=color, markersize=4.5, elinewidth=1.0,
                )  # fmt: skip
        axis.set_xlabel("change (points)")
        axis.grid(visible=False, axis="y")
        panel_letter(axis, letter, label)
    axes[0, 0].set_yticks(height, [f"{row['policy']}/{row['rule']}" for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 0].set_ylabel("policy")
    return finish(drawn, QUESTION, _caption(loaded, rows))


def _caption(loaded: LoadedRun, rows: list[dict[str, Any]]) -> str:
    if loaded.validation is None:
        raise ValueError("validation is None: this figure needs validation.json")
    away = {key: sum(excludes_zero(row[key]) for row in rows) for key, _ in PANELS}
    return (
        f"{loaded.sample} {loaded.validation_sample} Each rerun's figure at its threshold, less "
        "that of the same threshold along the rerun of hlm, whose outputs follow the server's law "
        "as those of the calibration do, in percentage points; docs/theory.md (37). "
        "Where uncertainty alone decides, (a) is the skip rate and (b) the risk taken. Bars: "
        f"{loaded.validation['confidence']:.0%} intervals, paired and clustered by prompt"
        f"{', prompts by category' if loaded.validation.get('strata') else ''}. "
        f"Crosses: 0 is outside; of {len(rows)} reruns (a) {away['below_threshold']}, "
        f"(b) {away['risk_below_threshold']}, (c) {away['uncertainty']}. All reruns share prompts, "
        "random numbers and the rerun they are held against, so their bars move together, and one "
        "in twenty leaves 0 by chance."
    )
