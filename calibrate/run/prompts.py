"""Prompts: read, split, and turned into tokens with the pair's chat template."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from calibrate.run.errors import UsageError, UserError
from calibrate.run.resources import data_path

Split: TypeAlias = Literal["calibration", "validation"]
Order: TypeAlias = Literal["random", "file"]

MIN_PROMPTS = 16
"""Fewer say nothing of their own spread."""

# Beside the seed, so that the two draws of one seed have nothing to do with each other.
_DRAW_TAGS: dict[Split, int] = {"calibration": 1, "validation": 2}


@dataclass(frozen=True)
class Prompt:
    """One prompt; its id, unique in the file, keys the random stream.

    The category is empty if the file has none; the split is None where the file is not divided.
    """

    prompt_id: str
    text: str
    category: str
    split: Split | None


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt ready to decode: its id, at least two tokens, and its category if it has one."""

    prompt_id: str
    tokens: tuple[int, ...]
    category: str = ""


def text_key(text: str) -> str:
    """Identity of a prompt's text, so that nobody validates on what was calibrated on."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def check_source(source: str | None) -> Path | None:
    """The file that prompts are read from; None for a dataset of the hub.

    Raises
    ------
    UsageError
        If it is neither.
    """
    path = data_path("prompts.jsonl") if source is None else Path(source)
    if path.is_dir():
        raise UsageError(f"--prompts {source}: is a folder; give a .jsonl or .txt file")
    if path.is_file():
        return path
    if source is not None and source.count("/") == 1 and not path.suffix:
        return None
    raise UsageError(f"--prompts {source}: no such file; give a .jsonl or .txt file")


def read_prompts(source: str | None) -> list[Prompt]:
    """Read a prompt file.

    Parameters
    ----------
    source : str or None
        A .jsonl file (objects with `prompt` or `text` and, if wanted, `id`, `category`, `split`;
        other keys are the user's own and not read), a .txt file (one prompt a line), a dataset of
        the model hub as `owner/name` (its `prompt`, `text` or `question` column; needs the
        `datasets` library), or None for the 320 prompts that ship with the project.

    Raises
    ------
    UserError
        If the file cannot be read, is empty, or a line of it is not a prompt.
    """
    path = check_source(source)
    if path is None:
        return _from_hub(source or "")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: not UTF-8 text ({error.reason})") from None
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".txt":
        prompts = [Prompt(f"line-{i:05d}", line.strip(), "", None) for i, line in numbered]
    else:
        prompts = [_from_json(path, i, line) for i, line in numbered]
    if not prompts:
        raise UserError(f"--prompts {path}: the file holds no prompt; give at least one line")
    (prompt_id, count), *_ = Counter(prompt.prompt_id for prompt in prompts).most_common(1)
    if count > 1:
        raise UserError(
            f"--prompts {path}: id {prompt_id!r} occurs twice; ids must be unique, for they key "
            "the random streams"
        )
    return prompts


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise UserError(f"--prompts {path}, line {number}: not JSON ({reason})") from None
    text = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UserError(f'--prompts {path}, line {number}: give an object with a "prompt" string')
    if not text.strip():
        raise UserError(f"--prompts {path}, line {number}: the prompt is empty")
    try:
        (text + str(entry.get("id"))).encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompts {path}, line {number}: a lone surrogate is no text") from None
    split = entry.get("split")
    if split not in (None, "calibration", "validation"):
        raise UserError(
            f"--prompts {path}, line {number}: split = {split!r}; "
            "allowed are 'calibration' and 'validation'"
        )
    prompt_id = entry.get("id")
    return Prompt(
        f"line-{number:05d}" if prompt_id is None else str(prompt_id),
        text,
        str(entry.get("category", "")),
        split,
    )


def _from_hub(name: str) -> list[Prompt]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(
            f"--prompts {name}: not a file here; to read it as a hub dataset, "
            "`pip install datasets`"
        ) from None
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise UserError(f"--prompts {name}: cannot load this dataset ({error})") from None
    column = next((c for c in ("prompt", "text", "question") if c in table.column_names), None)
    if column is None:
        raise UserError(
            f"--prompts {name}: no column prompt, text or question among {table.column_names}"
        )
    return [Prompt(f"row-{i:07d}", str(text), "", None) for i, text in enumerate(table[column])]


def draw_prompts(
    prompts: Sequence[Prompt],
    split: Split,
    limit: int,
    seed: int,
    order: Order = "random",
    exclude: Collection[str] = (),
) -> list[Prompt]:
    """Prompts to calibrate or to validate on.

    Drawn uniformly without replacement: a file ordered by topic would otherwise give two halves
    that are not exchangeable. Where every prompt has a category, each gets its share of the draw,
    rounded by largest remainder, so that both halves have the same mix.

    Parameters
    ----------
    prompts : sequence of Prompt
        Those of this half and, from files that are not divided, all others are drawn from.
    split : {"calibration", "validation"}
    limit : int
        Prompts to draw; all if there are no more.
    seed : int
        At least 0. With the ids of the prompts, not the order of their lines, it decides the draw;
        each split has draws of its own.
    order : {"random", "file"}
        "file" takes the first ones in the order of the file.
    exclude : collection of str
        `text_key` of the texts not to draw: those calibrated on.

    Returns
    -------
    list of Prompt
        By id, so that nothing after it depends on the order of lines; with "file" as they stand.

    Raises
    ------
    UsageError
        If none is left.
    """
    half = [prompt for prompt in prompts if prompt.split in (None, split)]
    if not half:
        raise UsageError(f"none of the prompts is in the {split} half; give others with --prompts")
    fresh = [prompt for prompt in half if text_key(prompt.text) not in exclude]
    if not fresh:
        raise UsageError(
            "no prompt is left to validate on: all were calibrated on; give others with --prompts"
        )
    if order == "file":
        return fresh[:limit]
    generator = np.random.default_rng([seed, _DRAW_TAGS[split]])
    fresh.sort(key=lambda prompt: prompt.prompt_id)
    categorised = all(prompt.category for prompt in fresh)
    categories = [prompt.category if categorised else "" for prompt in fresh]
    _, stratum, sizes = np.unique(categories, return_inverse=True, return_counts=True)
    counts = _shares(sizes, min(limit, len(fresh)), generator)
    shuffled = generator.permutation(len(fresh))
    drawn = [shuffled[stratum[shuffled] == i][:count] for i, count in enumerate(counts)]
    return [fresh[i] for i in np.sort(np.concatenate(drawn))]


def _shares(sizes: np.ndarray, num: int, generator: np.random.Generator) -> np.ndarray:
    """`num` divided in proportion to sizes (C,) by largest remainder; lots decide between ties."""
    counts, remainders = np.divmod(num * sizes, sizes.sum())
    order = np.lexsort((generator.permutation(len(sizes)), -remainders))
    counts[order[: num - counts.sum()]] += 1
    return counts


def duplicate_texts(prompts: Sequence[Prompt]) -> list[tuple[str, ...]]:
    """Ids of the prompts that share their text, a tuple for each text that occurs several times."""
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(text_key(prompt.text), []).append(prompt.prompt_id)
    return [tuple(group) for group in ids.values() if len(group) > 1]


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, max_new_tokens: int, max_context: int
) -> list[TokenizedPrompt]:
    """Apply the chat template (where the tokenizer has one) and check the lengths.

    Raises
    ------
    UserError
        If a prompt and its answer do not fit the context of both models.
    """
    out = []
    for prompt in prompts:
        tokens = _tokens_of(prompt.text, tokenizer)
        if len(tokens) + max_new_tokens > max_context:
            raise UserError(
                f"prompt {prompt.prompt_id!r} has {len(tokens)} tokens: with --max-new-tokens "
                f"{max_new_tokens} it exceeds the models' context of {max_context}; shorten it"
            )
        if len(tokens) < 2:
            raise UserError(f"prompt {prompt.prompt_id!r} has fewer than two tokens; lengthen it")
        out.append(TokenizedPrompt(prompt.prompt_id, tuple(tokens), prompt.category))
    return out


def prompt_sizes(prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, int]:
    """Tokens of each prompt, by its id."""
    return {prompt.prompt_id: len(_tokens_of(prompt.text, tokenizer)) for prompt in prompts}


def _tokens_of(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt, in the chat template where the tokenizer has one."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])


def template_prefix(tokenizer: Any) -> list[int]:
    """Tokens that the chat template puts in front of a prompt; a prompt whose first letters merge
    with the last of them begins otherwise."""
    pairs = zip(*(_tokens_of(text, tokenizer) for text in ("0", "Z")), strict=False)
    return [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def drawn_notes(prompts: Sequence[Prompt], limit: int) -> list[str]:
    """What a user should know of drawn prompts: fewer than asked for, texts more than once."""
    notes = []
    if len(prompts) < limit:
        num = len(prompts)
        notes.append(f"--limit {limit}: there are {num} such prompts; all of them are used")
    twice = duplicate_texts(prompts)
    if twice:
        notes.append(
            f"{len(twice)} prompt texts occur more than once, like {' and '.join(twice[0])}: "
            "intervals take them for independent"
        )
    return notes
