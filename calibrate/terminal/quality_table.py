"""`hlm quality` on the terminal."""

from __future__ import annotations

from typing import Any

from calibrate.terminal.tables import compact, new_console, new_table


def print_quality(result: dict[str, Any]) -> None:
    """Scores of every rerun between floor and ceiling, and what they are measured with."""
    console = new_console()
    model = result["model"]
    console.print(
        f"texts against the server model's own ({result['num_prompts']} prompts, at most "
        f"{result['max_new_tokens']} tokens each; {result['confidence']:.0%} intervals over "
        "prompts)"
    )
    scores = new_table(
        "policy", "rule", "against", ">BERTScore F1", ">less second draw", ">shared tokens"
    )
    laws = new_table("policy", "rule", ">cosine", ">less second draw", ">same text", "as")
    for row in result["rows"]:
        is_ceiling = row["coupled_with"] is None
        rule = "floor" if row["policy"] == "slm" else row["rule"]
        name = (row["policy"], "second draw (ceiling)" if is_ceiling else rule)

        def shown(key: str, row: dict[str, Any] = row, hidden: bool = is_ceiling) -> str:
            return "-" if hidden else compact(row[key])

        bertscore, cosine = (compact(row[key]) for key in ("bertscore", "cosine"))
        scores.add_row(
            *name, row["reference"], bertscore, shown("bertscore_difference"),
            compact(row["shared_prefix"]),
        )  # fmt: skip
        laws.add_row(
            *name, cosine, shown("cosine_difference"), shown("identical"), row["coupled_with"]
        )
    mismatched = result["mismatched"]
    name = ("hlm", "another prompt's text")
    scores.add_row(*name, "llm", compact(mismatched["bertscore"]), "", "")
    laws.add_row(*name, compact(mismatched["cosine"]), "", "", "")
    console.print(scores)
    console.print("sentence embeddings, and texts equal token for token")
    console.print(laws)
    notes = [
        "second draw: hlm is lossless, so its text is another draw from the server's law; a policy "
        "above it is not better but differs, as one below does",
        "against: the server's draw with which the policy shares fewer random numbers; shared "
        "tokens, until the first that differs: far above those of hlm the score is too high",
        "same text: as the draw that shares its random numbers, token for token; 1 less that share "
        "bounds the total variation between the policy's and the server's law of texts",
        f"backbone {model['name']}, layer {model['layer']}: {model['note']}",
    ]
    for block in (model, result["embedding"]):
        if block["num_cut"]:
            notes.append(
                f"{block['num_cut']} of {result['num_texts']} texts are cut at "
                f"{block['max_tokens']} tokens of {block['name']}"
            )
    if result["num_empty"]:
        notes.append(f"{result['num_empty']} texts are empty: 1 against an empty one, else 0")
    for note in notes:
        console.print(f"  {note}", soft_wrap=True)
    console.print()
