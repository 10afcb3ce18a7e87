"""`hlm quality` on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibrate.run.records import QualityRecord
from calibrate.terminal.page import Page


def print_quality(result: QualityRecord) -> None:
    """Scores of every rerun between floor and ceiling, and what they are measured with."""
    page, model, second = Page(), result.model, result.second_draw
    page.say(
        f"texts against the server model's own ({result.num_prompts} prompts, at most "
        f"{result.max_new_tokens} tokens each; {result.confidence:.0%} intervals over prompts)"
    )
    scores: list[Sequence[Any]] = []
    laws: list[Sequence[Any]] = []
    for row in result.rows:
        is_ceiling = row.coupled_with is None
        name = (row.policy, "second draw (ceiling)" if is_ceiling else row.rule)
        bertscore, cosine, same = (
            "" if is_ceiling else one
            for one in (row.bertscore_difference, row.cosine_difference, row.identical)
        )
        scores.append((*name, row.reference, row.bertscore, bertscore, row.shared_prefix))
        laws.append((*name, row.cosine, cosine, same, row.coupled_with or ""))
    name = (second, "another prompt's text")
    scores.append((*name, result.reference, result.mismatched["bertscore"], "", ""))
    laws.append((*name, result.mismatched["cosine"], "", "", ""))
    page.table(
        ("policy", "rule", "against", ">BERTScore F1", ">less second draw", ">shared tokens"),
        scores,
    )
    page.say("sentence embeddings, and texts equal token for token")
    page.table(("policy", "rule", ">cosine", ">less second draw", ">same text", "as"), laws)
    notes = [
        f"second draw: {second} is lossless, so its text is another draw from the server's law; a "
        "policy above it is not better but differs, as one below does",
        "against: the server's draw with which the policy shares fewer random numbers; shared "
        f"tokens, until the first that differs: far above those of {second} the score is too high",
        "same text: as the draw that shares its random numbers, token for token; 1 less that share "
        "bounds the total variation between the policy's and the server's law of texts",
        f"backbone {model.name}, layer {model.layer}: {model.note}",
    ]
    notes += [
        f"{block.num_cut} of {result.num_texts} texts are cut at {block.max_tokens} tokens of "
        f"{block.name}"
        for block in (model, result.embedding)
        if block.num_cut
    ]
    if result.num_empty:
        notes.append(f"{result.num_empty} texts are empty: 1 against an empty one, else 0")
    for note in notes:
        page.say(f"  {note}")
    page.say()
