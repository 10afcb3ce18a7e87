"""Speed of the engine beside three yardsticks, in one process, on the same prompts and pair.

floor: both models' forwards alone, at the same batch and lengths. assisted: transformers' assisted
generation with sampling at the same temperature. loop: one prompt and one token at a time, the
device model without a key-value cache, twenty multinomial draws over the vocabulary a token, as
public replications of U-HLM decode. Medians of interleaved repeats; the two slow yardsticks run on
a few prompts spread over the lengths and are scaled by their own tokens, with the models as
transformers loads them.

Beside the speeds: the arithmetic limit, which is the operations of every prompt and answer token
once at the rate of the fastest matrix product of this process; the same held also to reading every
weight once a step from main memory, at the rate of the fastest read; and the exact uncertainty's
share of a step of both models.

    python -m benchmarks.engine --pair smollm2 --limit 64 --max-new-tokens 48
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.workload import Workload, load_workload
from calibrate.decode.clock import synchronise
from calibrate.decode.engine import batches_by_length, decode
from calibrate.decode.models import transformer_models
from calibrate.pairs.attention import RECORDING
from calibrate.run.prompts import template_prefix
from hlmtheory import domain
from hlmtheory.policies import calibration_policy
from hlmtheory.uncertainty import exact_uncertainty, log_partitions, temperatures

NUM_PERTURBATIONS = 20


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one way to decode, median over repeats."""

    name: str
    tok_s: float
    num_tokens: int
    forward_share: float | None


def engine_run(work: Workload, trace: str) -> Any:
    """Decode with the engine; (tokens, seconds, share of it in forwards)."""
    slm, llm = transformer_models(work.pair)
    settings = work.settings(trace)
    begin = time.perf_counter()
    tokens, wall, forward = 0, 0.0, 0.0
    for batch in decode(slm, llm, work.prompts, calibration_policy(), settings, ()):
        tokens += len(batch.columns["row"])
        wall += batch.wall_s
        forward += batch.forward_s
    return tokens, time.perf_counter() - begin, forward / wall


def floor_run(work: Workload) -> Any:
    """Only the forwards of both models, on tokens that cost nothing to choose."""
    models = transformer_models(work.pair)
    begin = time.perf_counter()
    tokens = 0
    with torch.inference_mode():
        for batch in batches_by_length(work.prompts, work.batch_size):
            sessions = [model.start([p.tokens[:-1] for p in batch], False) for model in models]
            last = torch.tensor([p.tokens[-1] for p in batch], device=models[0].device)
            for _ in range(work.max_new_tokens):
                for session in sessions:
                    session.step(last)
                tokens += len(batch)
    return tokens, time.perf_counter() - begin, 1.0


def assisted_run(work: Workload) -> Any:
    """transformers' assisted generation, one prompt at a time, as it requires."""
    from transformers import GenerationConfig

    pair = work.pair
    config = GenerationConfig(
        do_sample=True,
        temperature=work.settings("minimal").sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work.max_new_tokens,
        eos_token_id=None,
        pad_token_id=pair.eos_token_ids[0],
    )
    begin = time.perf_counter()
    tokens = 0
    for prompt in work.prompts:
        ids = torch.tensor([prompt.tokens], device=pair.llm.device)
        with torch.inference_mode():
            out = pair.llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=pair.slm,
                generation_config=config,
            )
        tokens += out.shape[1] - ids.shape[1]
    synchronise(pair.llm.device)
    return tokens, time.perf_counter() - begin, None


def loop_run(work: Workload) -> Any:
    """The per-token loop of the module's docstring; the server model keeps its cache."""
    pair, settings = work.pair, work.settings("minimal")
    temperature = settings.sampling.temperature
    slm, llm = transformer_models(pair)
    generator = torch.Generator(slm.device).manual_seed(settings.seed)
    thetas = np.linspace(0, 2, NUM_PERTURBATIONS)[1:].tolist()
    begin = time.perf_counter()
    tokens = 0
    with torch.inference_mode():
        for prompt in work.prompts:
            context = list(prompt.tokens)
            session = llm.start([context[:-1]], False, fill=False)
            for _ in range(settings.max_new_tokens):
                ids = torch.tensor([context], device=slm.device)
                z = pair.slm(ids, use_cache=False).logits[0, -1]
                z = z[: pair.vocab_size].float()
                x = torch.softmax(z / temperature, -1)
                draft = int(torch.multinomial(x, 1, generator=generator))
                for theta in thetas:
                    torch.multinomial(torch.softmax(z / theta, -1), 1, generator=generator)
                w = session.step(ids[0, -1:]).logits[0]
                y = torch.softmax(w / temperature, -1)
                accept = torch.rand(1, generator=generator, device=slm.device)
                if float(accept) >= float(y[draft] / x[draft]):
                    residual = (y - x).clamp(min=0)
                    draft = int(torch.multinomial(residual, 1, generator=generator))
                context.append(draft)
                tokens += 1
    return tokens, time.perf_counter() - begin, None


def uncertainty_share(work: Workload, num_rows: int = 32, num_steps: int = 15) -> dict[str, float]:
    """Exact uncertainty at K = 20 beside one step of both models: medians, interleaved, in ms."""
    batch = [work.prompts[i % len(work.prompts)] for i in range(num_rows)]
    models = transformer_models(work.pair)
    device = models[0].device
    thetas = temperatures()
    forward, exact = [], []
    with torch.inference_mode(), domain.unchecked():
        sessions = [model.start([p.tokens[:-1] for p in batch], False) for model in models]
        tokens = torch.tensor([p.tokens[-1] for p in batch], device=device)
        for _ in range(num_steps + 2):
            synchronise(device)
            begin = time.perf_counter()
            logits = [session.step(tokens).logits for session in sessions]
            synchronise(device)
            middle = time.perf_counter()
            tokens = logits[0].argmax(-1)
            synchronise(device)
            start = time.perf_counter()
            exact_uncertainty(logits[0], tokens[:, None], thetas, log_partitions(logits[0], thetas))
            synchronise(device)
            exact.append(time.perf_counter() - start)
            forward.append(middle - begin)
    forward_ms, exact_ms = (1e3 * statistics.median(times[2:]) for times in (forward, exact))
    return {"forward_ms": forward_ms, "uncertainty_ms": exact_ms, "share": exact_ms / forward_ms}


MATRIX_SIZES = ((512, 4096, 4096), (2048, 2048, 8192), (2048, 4096, 4096), (4096, 4096, 4096))
"""Rows, inner size and columns of products whose rate is tried."""


def largest_product_rate(dtype: torch.dtype, device: torch.device, repeats: int = 4) -> float:
    """Floating-point operations a second of the fastest matrix product, the best of all tries."""
    best = 0.0
    for rows, inner, columns in MATRIX_SIZES:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)
        with torch.inference_mode():
            for _ in range(repeats):
                synchronise(device)
                begin = time.perf_counter()
                torch.nn.functional.linear(left, right)
                synchronise(device)
                best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - begin))
    return best


def largest_read_rate(device: torch.device, repeats: int = 4) -> float:
    """Bytes a second of the fastest sum over an array that fits no cache, the best of all tries."""
    array, best = torch.ones(2**28, device=device), 0.0
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        array.sum()
        synchronise(device)
        best = max(best, 4.0 * array.numel() / (time.perf_counter() - begin))
    return best


@dataclass(frozen=True)
class Need:
    """What both models cannot do without.

    Attributes
    ----------
    prompts, answers : float
        Floating-point operations of every prompt and of every answer token once, of what prompts
        of a template share once in all: two for each weight of a matrix product and token, the
        output head for answer tokens alone. What attention does between tokens is left out, under
        2 % at these lengths.
    weights : float
        Bytes that a step of both has to read.
    """

    prompts: float
    answers: float
    weights: float

    def seconds(
        self, product_rate: float, read_rate: float = math.inf, num_steps: int = 0
    ) -> float:
        """At a rate of products alone, or with every weight read once a step."""
        decoding = max(self.answers / product_rate, num_steps * self.weights / read_rate)
        return self.prompts / product_rate + decoding


def needed(work: Workload) -> Need:
    """Operations and bytes of a workload."""
    answers = len(work.prompts) * work.max_new_tokens
    prefix = template_prefix(work.pair.tokenizer)
    begun = [prompt for prompt in work.prompts if prompt.tokens[: len(prefix)] == tuple(prefix)]
    shared = len(prefix) * max(0, len(begun) - 1)
    prompts = sum(len(prompt.tokens) - 1 for prompt in work.prompts) - shared
    layers = heads = item = 0
    for model in (work.pair.slm, work.pair.llm):
        layers += sum(
            one.weight.numel()
            for one in model.base_model.modules()
            if isinstance(one, torch.nn.Linear)
        )
        head = model.get_output_embeddings().weight
        heads, item = heads + head.numel(), head.element_size()
    return Need(2.0 * layers * prompts, 2.0 * (layers + heads) * answers, (layers + heads) * item)


def main() -> None:
    """Run every way `--repeats` times, interleaved, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, help="default: automatic")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--slow-prompts", type=int, default=2, help="for assisted and loop")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = load_workload(
        options.pair, options.limit, options.max_new_tokens, options.batch_size, attention=True
    )
    options.batch_size = work.batch_size

    # The slow ways run on a spread of lengths that stands for all.
    by_length = sorted(work.prompts, key=lambda prompt: len(prompt.tokens))
    stride = len(work.prompts) / options.slow_prompts
    plain = load_workload(options.pair, 1, 1, 1, prepack=False).pair
    few = replace(
        work,
        pair=plain,
        prompts=[by_length[int((i + 0.5) * stride)] for i in range(options.slow_prompts)],
    )

    def with_attention(implementation: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def switched() -> Any:
            work.pair.slm.set_attn_implementation(implementation)
            return run()

        return switched

    # Only a full trace needs the attention weights, which the fast kernels do not give.
    ways: dict[str, Callable[[], Any]] = {
        "floor": with_attention("sdpa", lambda: floor_run(work)),
        "engine, full trace": with_attention(RECORDING, lambda: engine_run(work, "full")),
        "engine, minimal trace": with_attention("sdpa", lambda: engine_run(work, "minimal")),
        "assisted generation": lambda: assisted_run(few),
        "per-token loop": lambda: loop_run(few),
    }
    weight = plain.llm.get_output_embeddings().weight
    rate = largest_product_rate(weight.dtype, weight.device)
    read_rate = largest_read_rate(weight.device)
    # The weights are read from disk once.
    for pair in (work.pair, plain):
        floor_run(replace(work, pair=pair, prompts=work.prompts[:4]))
    rows: dict[str, list[tuple[int, float, float | None]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, run in ways.items():
            rows[name].append(run())
    exact = uncertainty_share(work)
    num_tokens, need = len(work.prompts) * work.max_new_tokens, needed(replace(work, pair=plain))
    num_steps = work.max_new_tokens * math.ceil(len(work.prompts) / work.batch_size)
    limit = num_tokens / need.seconds(rate)
    with_memory = num_tokens / need.seconds(rate, read_rate, num_steps)
    speeds = {name: _summary(name, rows[name]) for name in ways}
    full, minimal = speeds["engine, full trace"].tok_s, speeds["engine, minimal trace"].tok_s
    ratios = {
        "full trace / floor": full / speeds["floor"].tok_s,
        "minimal trace / floor": minimal / speeds["floor"].tok_s,
        "full trace / assisted generation": full / speeds["assisted generation"].tok_s,
        "full trace / per-token loop": full / speeds["per-token loop"].tok_s,
        "exact uncertainty / two forwards": exact["share"],
        "full trace / arithmetic limit": full / limit,
        "full trace / limit with memory": full / with_memory,
        "floor / arithmetic limit": speeds["floor"].tok_s / limit,
        "floor / limit with memory": speeds["floor"].tok_s / with_memory,
    }
    if options.json:
        content = {
            "options": vars(options),
            "speeds": [asdict(speed) for speed in speeds.values()],
            "ratios": ratios,
            "uncertainty": exact,
            "product_rate_flop_s": rate,
            "read_rate_bytes_s": read_rate,
            "arithmetic_limit_tok_s": limit,
            "limit_with_memory_tok_s": with_memory,
        }
        print(json.dumps(content, indent=1))
        return
    print(
        f"{options.pair}: {len(work.prompts)} prompts x {options.max_new_tokens} tokens, "
        f"batch {options.batch_size}, median of {options.repeats}"
    )
    for speed in speeds.values():
        share = "" if speed.forward_share is None else f", {speed.forward_share:.0%} in forwards"
        print(f"  {speed.name:24s} {speed.tok_s:8.2f} token/s{share}")
    print(
        f"  {'arithmetic limit':24s} {limit:8.2f} token/s, at {1e-9 * rate:,.0f} GFLOP/s of the "
        "fastest matrix product"
    )
    print(
        f"  {'limit with memory':24s} {with_memory:8.2f} token/s, weights read once a step at "
        f"{1e-9 * read_rate:,.1f} GB/s"
    )
    for name, ratio in ratios.items():
        print(f"  {name:34s} {ratio:6.3f}")
    print(
        f"  exact uncertainty, batch 32: {exact['uncertainty_ms']:.1f} ms beside "
        f"{exact['forward_ms']:.0f} ms of both models"
    )


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
