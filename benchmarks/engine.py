"""Speed of the engine beside three yardsticks, in one process, on the same prompts and pair.

floor: both models' forwards alone, at the same batch and lengths. assisted: transformers' assisted
generation with sampling at the same temperature. loop: one prompt and one token at a time, the
device model without a key-value cache, twenty multinomial draws over the vocabulary a token, as
public replications of U-HLM decode. Interleaved repeats, medians; the two slow yardsticks run on
the first few prompts only and are scaled by their own tokens.

    python -m benchmarks.engine --pair smollm2 --limit 64 --max-new-tokens 48
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from calibrate.engine import DecodingSettings, decode
from calibrate.models import TransformerModel
from calibrate.pairs import LoadedPair, load_pair, resolve_pair
from calibrate.prompts import (
    TokenizedPrompt,
    calibration_prompts,
    read_prompts,
    tokenize_prompts,
)
from hlmtheory.policies import make_policy

NUM_PERTURBATIONS = 20


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one way to decode, median over repeats."""

    name: str
    tok_s: float
    num_tokens: int
    forward_share: float | None


def engine_run(pair: LoadedPair, prompts: list[TokenizedPrompt], settings: DecodingSettings) -> Any:
    """Decode with the engine; (tokens, seconds, share of it in forwards)."""
    slm = TransformerModel(pair.slm, pair.vocab_size)
    llm = TransformerModel(pair.llm, pair.vocab_size)
    begin = time.perf_counter()
    tokens, wall, forward = 0, 0.0, 0.0
    for batch in decode(slm, llm, prompts, make_policy("hlm"), settings, ()):
        tokens += len(batch.columns["row"])
        wall += batch.wall_s
        forward += batch.forward_s
    return tokens, time.perf_counter() - begin, forward / wall


def floor_run(pair: LoadedPair, prompts: list[TokenizedPrompt], settings: DecodingSettings) -> Any:
    """Only the forwards of both models, on tokens that cost nothing to choose."""
    models = [TransformerModel(model, pair.vocab_size) for model in (pair.slm, pair.llm)]
    order = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.prompt_id))
    begin = time.perf_counter()
    tokens = 0
    with torch.inference_mode():
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            sessions = [model.start([p.tokens[:-1] for p in batch], False) for model in models]
            last = torch.tensor([p.tokens[-1] for p in batch], device=models[0].device)
            for _ in range(settings.max_new_tokens):
                for session in sessions:
                    session.step(last)
                tokens += len(batch)
    return tokens, time.perf_counter() - begin, 1.0


def assisted_run(
    pair: LoadedPair, prompts: list[TokenizedPrompt], settings: DecodingSettings
) -> Any:
    """transformers' assisted generation, one prompt at a time, as it requires."""
    begin = time.perf_counter()
    tokens = 0
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens], device=pair.llm.device)
        with torch.inference_mode():
            out = pair.llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=pair.slm,
                do_sample=True,
                temperature=settings.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.max_new_tokens,
                pad_token_id=pair.eos_token_ids[0],
            )
        tokens += out.shape[1] - ids.shape[1]
    return tokens, time.perf_counter() - begin, None


def loop_run(pair: LoadedPair, prompts: list[TokenizedPrompt], settings: DecodingSettings) -> Any:
    """The per-token loop of the module's docstring; the server model keeps its cache."""
    llm = TransformerModel(pair.llm, pair.vocab_size)
    generator = torch.Generator().manual_seed(settings.seed)
    thetas = np.linspace(0, 2, NUM_PERTURBATIONS)[1:].tolist()
    begin = time.perf_counter()
    tokens = 0
    with torch.inference_mode():
        for prompt in prompts:
            context = list(prompt.tokens)
            session = llm.start([context[:-1]], False, fill=False)
            for _ in range(settings.max_new_tokens):
                z = pair.slm(torch.tensor([context]), use_cache=False).logits[0, -1]
                z = z[: pair.vocab_size].float()
                x = torch.softmax(z / settings.temperature, -1)
                draft = int(torch.multinomial(x, 1, generator=generator))
                for theta in thetas:
                    torch.multinomial(torch.softmax(z / theta, -1), 1, generator=generator)
                y = torch.softmax(
                    session.step(torch.tensor([context[-1]])).logits[0] / settings.temperature, -1
                )
                if float(torch.rand(1, generator=generator)) >= float(y[draft] / x[draft]):
                    residual = (y - x).clamp(min=0)
                    draft = int(torch.multinomial(residual, 1, generator=generator))
                context.append(draft)
                tokens += 1
    return tokens, time.perf_counter() - begin, None


def main() -> None:
    """Run every way `--repeats` times, interleaved, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-prompts", type=int, default=2, help="for assisted and loop")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spec = resolve_pair(options.pair, None, None, None)
    plain, eager = load_pair(spec), load_pair(spec, attention=True)
    prompts = tokenize_prompts(
        calibration_prompts(read_prompts(None), options.limit),
        plain.tokenizer,
        options.max_new_tokens,
        plain.max_context,
    )

    def settings(trace: str) -> DecodingSettings:
        return DecodingSettings(
            max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, trace=trace
        )

    few = prompts[: options.slow_prompts]
    ways: dict[str, Callable[[], Any]] = {
        "floor": lambda: floor_run(plain, prompts, settings("minimal")),
        "engine, full trace": lambda: engine_run(eager, prompts, settings("full")),
        "engine, minimal trace": lambda: engine_run(plain, prompts, settings("minimal")),
        "assisted generation": lambda: assisted_run(plain, few, settings("minimal")),
        "per-token loop": lambda: loop_run(plain, few, settings("minimal")),
    }
    rows: dict[str, list[tuple[int, float, float | None]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, run in ways.items():
            rows[name].append(run())
    speeds = {name: _summary(name, rows[name]) for name in ways}
    full, minimal = speeds["engine, full trace"].tok_s, speeds["engine, minimal trace"].tok_s
    ratios = {
        "full trace / floor": full / speeds["floor"].tok_s,
        "minimal trace / floor": minimal / speeds["floor"].tok_s,
        "full trace / assisted generation": full / speeds["assisted generation"].tok_s,
        "full trace / per-token loop": full / speeds["per-token loop"].tok_s,
    }
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.json:
        content = {
            "options": vars(options),
            "speeds": [asdict(speed) for speed in speeds.values()],
            "ratios": ratios,
            "peak_gib": peak_gib,
        }
        print(json.dumps(content, indent=1))
        return
    print(
        f"{options.pair}: {len(prompts)} prompts x {options.max_new_tokens} tokens, "
        f"batch {options.batch_size}, median of {options.repeats}"
    )
    for speed in speeds.values():
        share = "" if speed.forward_share is None else f", {speed.forward_share:.0%} in forwards"
        print(f"  {speed.name:24s} {speed.tok_s:8.2f} token/s{share}")
    for name, ratio in ratios.items():
        print(f"  {name:34s} {ratio:6.2f}")
    print(f"  peak memory {peak_gib:.1f} GiB, both attention variants loaded")


def _summary(name: str, rows: list[tuple[int, float, float | None]]) -> Speed:
    shares = [share for _, _, share in rows if share is not None]
    return Speed(
        name,
        statistics.median(tokens / seconds for tokens, seconds, _ in rows),
        rows[0][0],
        statistics.median(shares) if shares else None,
    )


if __name__ == "__main__":
    main()
