"""BERTScore F1 by the bert-score library, and where its backbone comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.pairs.convert import first_line
from calibrate.pairs.quiet import quiet
from calibrate.quality.encoder import count_cut
from calibrate.run.errors import UsageError, UserError

# bert-score tunes its layer for each model it knows; ours is not among them. For the encoders of
# six layers in its table (distilbert-base-uncased, distilroberta-base) it is the fifth.
ENCODER_LAYER = 5

BACKBONE_NOTE = (
    "not the papers' backbone, which is not known to us: compare these figures with each other, "
    "not with published ones"
)


class BertScore:
    """BERTScore F1 by the bert-score library, with a backbone that lies in a folder.

    Raises
    ------
    UserError
        If bert-score cannot use the folder or has no such layer.
    """

    def __init__(self, folder: Path, num_layers: int, device: str, batch_size: int) -> None:
        from bert_score import BERTScorer

        path = str(folder.absolute())
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = str(config["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"--model {folder}: no model (its config.json is not readable)"
            ) from None
        # bert-score goes by the name: it would fill a T5 network with random weights.
        if "t5" in path and "t5" not in kind:
            raise UserError(
                f"bert-score takes {path} for a T5 model, for 't5' is in the path: move it, or "
                "set HLM_CACHE to another folder"
            )
        try:
            with quiet():
                self._scorer = BERTScorer(model_type=path, num_layers=num_layers, device=device)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
            raise UserError(f"bert-score cannot use {path}: {first_line(error)}") from error
        self._batch_size = batch_size
        tokenizer = self._scorer._tokenizer
        # bert-score cuts at what the tokenizer declares, and some declare no limit. RoBERTa's kind
        # leaves two positions unused.
        positions = getattr(self._scorer._model.config, "max_position_embeddings", 512)
        declared = int(tokenizer.model_max_length)
        self.max_tokens = declared if declared <= positions else max(int(positions) - 2, 1)
        tokenizer.model_max_length = self.max_tokens

    def f1(self, candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """F1 (N,) of each candidate with its reference; neither may be empty."""
        with quiet():
            _, _, f1 = self._scorer.score(
                list(candidates), list(references), batch_size=self._batch_size
            )
        scores: np.ndarray = f1.double().numpy()
        return scores

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the backbone reads."""
        return count_cut(self._scorer._tokenizer, texts, self.max_tokens)


def own_backbone(model: str, num_layers: int | None) -> tuple[Path, int, dict[str, Any]]:
    """Folder, layer and identity of the model that --model names.

    Raises
    ------
    UsageError
        bert-score has no tuned layer for it and --num-layers is not given.
    UserError
        It is neither here nor to be had from the hub.
    """
    from calibrate.pairs.fetch import cached_repo, fetch_repo
    from calibrate.pairs.loading import weights_sha256
    from calibrate.pairs.sources import HubRepo

    folder = Path(model)
    source = f"folder {folder.absolute()}"
    if not folder.is_dir():
        if num_layers is None:
            from bert_score.utils import model2layers

            if model not in model2layers:
                raise UsageError(
                    f"--num-layers is needed with --model {model}: bert-score has no tuned layer "
                    "for it"
                )
            num_layers = model2layers[model]
        repo = HubRepo(model)
        source = str(repo)
        try:
            folder = cached_repo(repo) or fetch_repo(repo, model, None)
        except UserError as error:
            raise UserError(
                f"--model {model}: no folder here, and not to be had from the model hub; connect "
                "once, log in where it is gated, or give a folder"
            ) from error
    assert num_layers is not None  # prepare_quality has asked for it; for the type checker
    identity = {"name": model, "source": source, "sha256": weights_sha256(folder)}
    return folder, num_layers, identity
