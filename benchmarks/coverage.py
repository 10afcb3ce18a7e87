"""Do predictions hold on a policy's own road? Coverage over many splits of one set of prompts.

    python -m benchmarks.coverage decode RUN FOLDER [--limit N]
    python -m benchmarks.coverage judge RUN FOLDER

`decode` runs every prompt of the project under the policies of POINTS, at the settings that RUN's
derivation holds, once and together. `judge` then draws prompts for calibration, with the pilot
inside, and others for validation, many times, and counts how often the prediction's interval holds
the validation's figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.decode.models import transformer_models
from calibrate.derive.optimum import in_double
from calibrate.derive.predict import (
    PolicyTokens,
    drawn_tokens,
    economics_of,
    measured_tokens,
    path_means,
    point_policy,
    predicted_tokens,
    prompt_lengths,
)
from calibrate.derive.roads import Prediction, parted_share
from calibrate.fit.pilot import DEFAULT_PROMPTS
from calibrate.pairs.registry import load_pair, resolve_pair
from calibrate.run.folder import read_record
from calibrate.run.prompts import read_prompts, tokenize_prompts
from calibrate.run.records import CalibrationRecord, DerivationRecord
from calibrate.run.traces import (
    Trace,
    finished_prompts,
    next_shard,
    read_trace,
    shards_in,
    write_shard,
)
from calibrate.terminal.progress import token_progress
from calibrate.validate.comparison import common_strata, difference_error, prediction_interval
from hlmtheory.clusters import RatioEstimate

SERVER, PILOT = "hlm/none", "u-hlm/risk-0.02"
"""The road that predictions are made on, and the pilot's."""

POINTS = (
    SERVER, PILOT, "u-hlm/risk-0.01", "u-hlm/risk-0.05", "r-hlm/risk-0.02", "coupled/risk-0.02",
    "ask-llm/risk-0.02", "cu-hlm-online/risk-0.02", "cu-hlm-offline/risk-0.02",
)  # fmt: skip


def decode(run: Path, folder: Path, limit: int | None, batch_size: int) -> None:
    """Decode what is not there yet, batch by batch."""
    calibration, derivation = (
        read_record(run, kind) for kind in (CalibrationRecord, DerivationRecord)
    )
    points = {point.key: point for point in derivation.operating_points}
    policies = {key: point_policy(derivation, points[key], calibration.learned) for key in POINTS}
    of = calibration.settings
    pair = load_pair(resolve_pair(of.pair, None, None, None), attention=True)
    prompts = tokenize_prompts(
        read_prompts(None)[:limit], pair.tokenizer, of.max_new_tokens, pair.max_context
    )
    settings = DecodingSettings(
        sampling=of.sampling,
        max_new_tokens=of.max_new_tokens,
        batch_size=batch_size,
        seed=of.seed + 1,
    )
    places = {key: folder / key.replace("/", "-") for key in POINTS}
    done = set.intersection(*(finished_prompts(shards_in(place)) for place in places.values()))
    left = [prompt for prompt in prompts if prompt.prompt_id not in done]
    models = transformer_models(pair)
    minimal = set(POINTS) - {SERVER, PILOT}
    with token_progress("decoding") as bar:
        bar.set_total(len(left) * of.max_new_tokens * len(POINTS))
        for batches in decode_together(
            *models, left, policies, settings, pair.eos_token_ids, bar.advance, minimal=minimal
        ):
            for key, batch in batches.items():
                write_shard(
                    next_shard(places[key]),
                    batch.columns,
                    batch.prompt_ids,
                    {"point": key},
                    settings.axes(pair.vocab_size),
                    batch.categories,
                )


@dataclass(frozen=True)
class Seen:
    """One policy at every token of all prompts: by its contexts, as drawn, and as it ran."""

    server: PolicyTokens
    pilot: PolicyTokens
    drawn: PolicyTokens
    ran: PolicyTokens


def draw(categories: np.ndarray, shares: tuple[int, ...], rng: np.random.Generator) -> list[Any]:
    """Disjoint sets of prompts, by category in the same mix, in rising order."""
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for name in np.unique(categories):
        mixed = rng.permutation(np.flatnonzero(categories == name))
        ends = np.cumsum([round(share * len(mixed) / len(categories)) for share in shares])
        for part, chosen in zip(parts, np.split(mixed, ends), strict=False):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def judge(run: Path, folder: Path, num_splits: int, num_pilot: int, seed: int) -> None:
    """Count how often intervals hold, with the pilot and without."""
    calibration, derivation = (
        read_record(run, kind) for kind in (CalibrationRecord, DerivationRecord)
    )
    points = {point.key: point for point in derivation.operating_points}
    economics = economics_of(derivation)

    def trace(key: str) -> Trace:
        return in_double(read_trace(shards_in(folder / key.replace("/", "-"))))

    def means(tokens: PolicyTokens) -> dict[str, RatioEstimate]:
        return path_means(tokens, economics)

    server, pilot = trace(SERVER), trace(PILOT)
    policies = {key: point_policy(derivation, points[key], calibration.learned) for key in POINTS}
    seen = {
        key: Seen(
            predicted_tokens(server, policy),
            predicted_tokens(pilot, policy),
            drawn_tokens(server, policy),
            measured_tokens(trace(key), policy, prompt_lengths(server)),
        )
        for key, policy in policies.items()
        if key != SERVER
    }
    categories, rng = np.array(server.categories), np.random.default_rng(seed)
    counts = {"pilot": 1.0 * num_pilot, "calibration": 160.0, "validation": 64.0}
    scale = len(categories) / 320
    sizes = tuple(round(scale * counts[name]) for name in ("pilot", "calibration", "validation"))
    held: dict[tuple[str, str, str], int] = {}
    wide: dict[tuple[str, str, str], float] = {}
    for _ in track(range(num_splits), "splits"):
        inside, rest, fresh = draw(categories, (sizes[0], sizes[1] - sizes[0], sizes[2]), rng)
        known = np.sort(np.concatenate([inside, rest]))
        place = np.searchsorted(known, inside)
        strata = common_strata(categories[known].tolist(), categories[fresh].tolist())
        parted = parted_share(seen[PILOT].server.of_prompts(inside))
        for key, one in seen.items():
            at_server = one.server.of_prompts(known)
            moved = Prediction(
                at_server,
                one.pilot.of_prompts(inside),
                parted_share(at_server),
                parted,
                place,
            )
            drawn, ran = means(one.drawn.of_prompts(known)), means(one.ran.of_prompts(fresh))
            for kind, prediction in (("with", moved), ("without", Prediction(at_server))):
                for metric, found in prediction.mean(means).items():
                    influence = (drawn[metric].influence, ran[metric].influence)
                    error = difference_error(found.influence, *influence, strata)
                    assert error is not None
                    low, high = prediction_interval(found.value, error, derivation.confidence)
                    at = (kind, key, metric)
                    held[at] = held.get(at, 0) + (low <= ran[metric].value <= high)
                    wide[at] = wide.get(at, 0.0) + (high - low) / 2
    metrics = list(dict.fromkeys(metric for *_, metric in held))
    print(f"{num_splits} splits; {sizes[1]} calibration prompts, {sizes[0]} in the pilot; "
          f"{sizes[2]} validation prompts; held, and mean half-width")  # fmt: skip
    for kind in ("without", "with"):
        print(f"\n{kind} the pilot: " + ", ".join(metrics))
        for key in (*seen, "all"):
            keys = list(seen) if key == "all" else [key]
            shares = [np.mean([held[kind, k, m] for k in keys]) / num_splits for m in metrics]
            widths = [np.mean([wide[kind, k, m] for k in keys]) / num_splits for m in metrics]
            cells = (f"{s:.3f} ({w:.3g})" for s, w in zip(shares, widths, strict=True))
            print(f"  {key:26s}" + "  ".join(f"{cell:>18s}" for cell in cells))
    shifts = {
        key: (means(one.ran)["skip_rate"].value, means(one.server)["skip_rate"].value)
        for key, one in seen.items()
    }
    print("\nskip rate on its own road less on the server's, and as the pilot says, points")
    whole = np.arange(len(categories))
    for key, one in seen.items():
        parted = parted_share(seen[PILOT].server)
        moved = Prediction(one.server, one.pilot, parted_share(one.server), parted, whole)
        own, before = shifts[key]
        print(f"  {key:26s}{100 * (own - before):+8.2f}"
              f"{100 * (moved.mean(means)['skip_rate'].value - before):+8.2f}")  # fmt: skip


def main() -> None:
    """Decode or judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["decode", "judge"])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--splits", type=int, default=500)
    parser.add_argument("--pilot", type=int, default=DEFAULT_PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "decode":
        decode(options.run, options.folder, options.limit, options.batch_size)
    else:
        judge(options.run, options.folder, options.splits, options.pilot, options.seed)


if __name__ == "__main__":
    main()
