"""`hlm quality` on the terminal."""

from __future__ import annotations

from calibrate.run.figure import number_text
from calibrate.run.records import QualityRecord
from calibrate.terminal.tables import new_console, new_table


def print_quality(result: QualityRecord) -> None:
    """Scores of every rerun between floor and ceiling, and what they are measured with."""
    console, model = new_console(), result.model
    console.print(
        f"texts against the server model's own ({result.num_prompts} prompts, at most "
        f"{result.max_new_tokens} tokens each; {result.confidence:.0%} intervals over prompts)"
    )
    scores = new_table(
        "policy", "rule", "against", ">BERTScore F1", ">less second draw", ">shared tokens"
    )
    laws = new_table("policy", "rule", ">cosine", ">less second draw", ">same text", "as")
    for row in result.rows:
        is_ceiling = row.coupled_with is None
        name = (row.policy, "second draw (ceiling)" if is_ceiling else row.rule)
        bertscore, cosine, same = (
            "" if is_ceiling else number_text(one)
            for one in (row.bertscore_difference, row.cosine_difference, row.identical)
        )
        scores.add_row(
            *name, row.reference, number_text(row.bertscore), bertscore,
            number_text(row.shared_prefix),
        )  # fmt: skip
        laws.add_row(*name, number_text(row.cosine), cosine, same, row.coupled_with)
    mismatched = {key: number_text(value) for key, value in result.mismatched.items()}
    name = (result.second_draw, "another prompt's text")
    scores.add_row(*name, result.reference, mismatched["bertscore"], "", "")
    laws.add_row(*name, mismatched["cosine"], "", "", "")
    console.print(scores)
    console.print("sentence embeddings, and texts equal token for token")
    console.print(laws)
    notes = [
        f"second draw: {result.second_draw} is lossless, so its text is another draw from the "
        "server's law; a policy above it is not better but differs, as one below does",
        "against: the server's draw with which the policy shares fewer random numbers; shared "
        f"tokens, until the first that differs: far above those of {result.second_draw} the score "
        "is too high",
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
        console.print(f"  {note}", soft_wrap=True)
    console.print()
