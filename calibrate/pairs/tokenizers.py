"""Do two models share a tokenizer, and which tokens end a text?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from calibrate.run.errors import UserError

# Rows that converters add so that the vocabulary fills a round size; no text ever becomes one.
_PADDING_TOKEN = re.compile(r"\[PAD\d+\]")

# Tokens that end a turn or a document, by the names that the common families give them.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")


def common_vocabulary(slm_tokenizer: Any, llm_tokenizer: Any, slm_size: int, llm_size: int) -> int:
    """Number of tokens that the two models share, from id 0 upwards.

    It is the smaller of the two sizes, which are numbers of logits: a model may have more than its
    tokenizer has tokens, and what lies behind in the larger one is padding.

    Raises
    ------
    UserError
        Some id means different text to the two: with both sizes and the first such id.
    """
    slm_tokens = _tokens_by_id(slm_tokenizer, slm_size)
    llm_tokens = _tokens_by_id(llm_tokenizer, llm_size)
    if slm_tokens != llm_tokens:
        differing = [
            token_id
            for token_id in slm_tokens.keys() | llm_tokens.keys()
            if slm_tokens.get(token_id) != llm_tokens.get(token_id)
        ]
        first = min(differing)
        raise UserError(
            "the two models do not share a tokenizer: "
            f"device {slm_size} tokens, server {llm_size}; they differ first at token {first}: "
            f"{_shown(slm_tokens.get(first))} against {_shown(llm_tokens.get(first))} "
            f"({len(differing)} differ): choose two models of one family ('hlm pairs list')"
        )
    return min(slm_size, llm_size)


def _tokens_by_id(tokenizer: Any, size: int) -> dict[int, str]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    # ids from `size` on have no logit: such a token (often an added pad) is never generated
    return {
        token_id: token
        for token, token_id in vocabulary.items()
        if token_id < size and not _PADDING_TOKEN.fullmatch(token)
    }


def vocabulary_sha256(tokenizer: Any, size: int) -> str:
    """SHA-256 of the tokens below an id: the same of two tokenizers that share them."""
    digest = hashlib.sha256()
    for token_id, token in sorted(_tokens_by_id(tokenizer, size).items()):
        digest.update(f"{token_id} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def end_token_ids(
    tokenizers: Iterable[Any], models: Iterable[Any], vocab_size: int
) -> tuple[int, ...]:
    """Ids that end a text: what tokenizers and configs declare, and the known names among tokens.

    A .gguf file declares one id only, so the end-of-document token of a chat model is found by
    its name.
    """
    declared: list[int | list[int] | None] = []
    for tokenizer in tokenizers:
        declared.append(tokenizer.eos_token_id)
        vocabulary = tokenizer.get_vocab()
        declared.append([vocabulary[token] for token in _END_TOKENS if token in vocabulary])
    for model in models:
        for config in (model.config, getattr(model, "generation_config", None)):
            declared.append(getattr(config, "eos_token_id", None))
    found = {
        i for ids in declared if ids is not None for i in ([ids] if isinstance(ids, int) else ids)
    }
    return tuple(sorted(token_id for token_id in found if 0 <= token_id < vocab_size))
