"""What the benchmarks decode: a pair and shipped calibration prompts."""

from __future__ import annotations

from dataclasses import dataclass

from calibrate.decode.engine import DecodingSettings
from calibrate.decode.memory import automatic_batch_size
from calibrate.pairs.registry import LoadedPair, load_pair, resolve_pair
from calibrate.run.prompts import TokenizedPrompt, draw_prompts, read_prompts, tokenize_prompts


@dataclass(frozen=True)
class Workload:
    """A loaded pair and the prompts it is to decode.

    Attributes
    ----------
    pair : LoadedPair
    prompts : list of TokenizedPrompt
    max_new_tokens : int
        Tokens decoded of each prompt.
    batch_size : int
        Prompts decoded together.
    """

    pair: LoadedPair
    prompts: list[TokenizedPrompt]
    max_new_tokens: int
    batch_size: int

    def settings(self, trace: str) -> DecodingSettings:
        """Settings of the engine for these prompts."""
        return DecodingSettings(
            max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, trace=trace
        )


def load_workload(
    pair_name: str,
    limit: int,
    max_new_tokens: int,
    batch_size: int | None = None,
    attention: bool = False,
    dtype: str = "auto",
    prepack: bool | None = None,
) -> Workload:
    """Load a pair of the registry and tokenise shipped calibration prompts.

    Parameters
    ----------
    pair_name : str
    limit, max_new_tokens : int
    batch_size : int, optional
        None: as many as memory and lengths allow.
    attention : bool
        Whether the device model can record its attention, as full traces need.
    dtype : str
        Of the weights.
    prepack : bool or None
        Whether they are held in the order of the processor's kernels, as in `load_pair`.
    """
    spec = resolve_pair(pair_name, None, None, None)
    pair = load_pair(spec, dtype=dtype, attention=attention, prepack=prepack)
    prompts = tokenize_prompts(
        draw_prompts(read_prompts(None), "calibration", limit, seed=0),
        pair.tokenizer,
        max_new_tokens,
        pair.max_context,
    )
    batch_size = batch_size or automatic_batch_size(pair, prompts, max_new_tokens)
    return Workload(pair, prompts, max_new_tokens, batch_size)
