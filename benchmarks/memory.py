"""Peak memory of one process that calibrates, beside the size of the two models' weights.

    python -m benchmarks.memory --pair smollm2

Prints JSON. The peak is that of the process: weights are mapped from disk and counted in it once
they have been read, also those that were then put into another order: the system takes these pages
back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys

from benchmarks.workload import load_workload
from calibrate.decode.engine import decode
from calibrate.decode.models import transformer_models
from calibrate.pairs.prepack import PrepackedLinear
from hlmtheory.policies import calibration_policy


def main() -> None:
    """Calibrate with full traces at the automatic batch size and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    work = load_workload(options.pair, options.limit, options.max_new_tokens, attention=True)
    slm, llm = transformer_models(work.pair)
    num_tokens = 0
    for batch in decode(slm, llm, work.prompts, calibration_policy(), work.settings("full"), ()):
        num_tokens += len(batch.columns["row"])
    # A device model made from the server model shares its tensors: they are held once.
    models = (work.pair.slm, work.pair.llm)
    weights = {
        parameter.data_ptr(): parameter.numel() * parameter.element_size()
        for model in models
        for parameter in model.parameters()
    } | {
        id(layer): layer.nbytes
        for model in models
        for layer in model.modules()
        if isinstance(layer, PrepackedLinear)
    }
    unit = 2**30 if sys.platform == "darwin" else 2**20
    result = {
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "weights_gib": sum(weights.values()) / 2**30,
        "batch_size": work.batch_size,
        "num_tokens": num_tokens,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
