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
from pathlib import Path

from benchmarks.workload import transformer_models
from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.derive.predict import point_policy
from calibrate.pairs.registry import load_pair, resolve_pair
from calibrate.run.folder import read_record
from calibrate.run.prompts import read_prompts, tokenize_prompts
from calibrate.run.records import CalibrationRecord, DerivationRecord
from calibrate.run.traces import finished_prompts, next_shard, shards_in, write_shard
from calibrate.terminal.progress import token_progress

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


def main() -> None:
    """Decode or judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["decode", "judge"])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    if options.what == "decode":
        decode(options.run, options.folder, options.limit, options.batch_size)


if __name__ == "__main__":
    main()
