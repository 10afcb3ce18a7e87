"""What do skipped tokens cost in whole answers?"""

from __future__ import annotations

from matplotlib.figure import Figure

from calibrate.run.figure import number_text
from paper_figs import style
from paper_figs.figures import answers
from paper_figs.loaded import LoadedRun
from paper_figs.words import percent

QUESTION = "How far do answers move for what is skipped?"
NEEDS, LACKS = "derivation", "no gated policy's answers are known at a budget"
CAVEAT = (
    "The shipped prompts have no right answers to be marked by, so this is a bound on the loss of "
    "any score in [0, 1], accuracy among them, and not accuracy itself."
)


def answer(loaded: LoadedRun) -> str:
    """Skip rate and distance of answers of the compared gate."""
    metric = answers.METRIC
    known = [p for p in loaded.gates if p.predicted[metric].value is not None]
    if not known:
        return "At the compared rule recorded steps do not tell what becomes of answers."
    point = known[0]
    return (
        f"At {point.rule} {loaded.label(point.policy)} skips "
        f"{percent(loaded.figure_of(point, 'skip_rate'))} of the tokens, and its answers are "
        f"{number_text(loaded.figure_of(point, metric))} from the server's."
    )


def figure(loaded: LoadedRun) -> Figure | None:
    """Total variation of answers against the skip rate, at each policy's budgets."""
    points = answers.budget_points(loaded)
    if not points:
        return None
    drawn, axes = style.new_figure(1, 1, 3.4)
    plane = axes[0, 0]
    plane.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    answers.draw_along(loaded, points, "skip_rate", plane)
    plane.set_xlabel("skip rate (share of tokens)")
    plane.set_ylabel("TV between answers (probability)")
    style.outer_legend(plane)
    reached = any(loaded.measured(point) for members in points.values() for point in members)
    reruns = f" Full: measured in reruns. {loaded.validation_sample}" if reached else ""
    caption = (
        f"{loaded.sample} One answer a prompt. Hollow: predicted at the derived budgets, from left "
        f"to right by rising risk.{reruns} Bars: {loaded.derived_note}. Policies that coincide are "
        "drawn as one; those whose answers recorded steps do not tell are left out. Better is "
        "lower and further right."
    )
    return style.finish(drawn, QUESTION, caption)
