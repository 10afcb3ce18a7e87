"""The main job on the embedded pair: real models, real prompts, fetched once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from calibrate.run.prompts import draw_prompts, read_prompts, tokenize_prompts

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def hlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=560,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def pair():
    from calibrate.pairs.registry import load_pair, resolve_pair

    return load_pair(resolve_pair("smollm2", None, None, None), attention=True)


def decode_tokens(pair, batch_size: int, num_prompts: int = 16, max_new_tokens: int = 24):
    from calibrate.decode.engine import DecodingSettings, decode
    from calibrate.decode.models import TransformerModel
    from hlmtheory.policies import calibration_policy

    prompts = tokenize_prompts(
        draw_prompts(read_prompts(None), "calibration", num_prompts, 0),
        pair.tokenizer,
        max_new_tokens,
        pair.max_context,
    )
    settings = DecodingSettings(batch_size=batch_size, max_new_tokens=max_new_tokens, seed=1)
    slm = TransformerModel(pair.slm, pair.vocab_size)
    llm = TransformerModel(pair.llm, pair.vocab_size)
    rows = {}
    for batch in decode(slm, llm, prompts, calibration_policy(), settings, pair.eos_token_ids):
        columns = batch.columns
        for i in range(len(columns["row"])):
            key = (batch.prompt_ids[columns["row"][i]], int(columns["step"][i]))
            rows[key] = tuple(
                columns[name][i]
                for name in ("draft_token", "output_token", "uncertainty", "rejection_prob")
            )
    return rows


def test_the_same_tuples_at_batch_4_and_16(pair, capsys) -> None:
    """float32 rounds too little to flip a draw; bfloat16 may, by as much as is printed.

    How often depends on the processor's matrix kernels, so a bound on it would test the machine.
    """
    from calibrate.pairs.registry import REGISTRY, load_pair

    exact = load_pair(REGISTRY["smollm2"], dtype="float32", device="cpu", attention=True)
    small, large = decode_tokens(exact, 4), decode_tokens(exact, 16)
    assert small.keys() == large.keys()
    assert [k for k in small if small[k][:2] != large[k][:2]] == []
    assert max(abs(small[k][2] - large[k][2]) for k in small) < 1e-4
    small, large = decode_tokens(pair, 4), decode_tokens(pair, 16)
    prompts = {prompt for prompt, _ in small}
    parted = [
        prompt
        for prompt in prompts
        if any(small[k][:2] != large.get(k, (None,))[:2] for k in small if k[0] == prompt)
    ]
    with capsys.disabled():
        print(f"\n{pair.dtype}: {len(parted)} of {len(prompts)} texts part between batches")


def test_in_float32_fast_paths_give_the_tuples_of_plain_ones() -> None:
    """Batches and fused kernels against one prompt at a time with transformers' eager attention."""
    from calibrate.pairs.registry import load_pair, resolve_pair

    spec = resolve_pair("smollm2", None, None, None)
    exact = load_pair(spec, dtype="float32", attention=True)
    fast = decode_tokens(exact, 4, num_prompts=4, max_new_tokens=8)
    for model in (exact.slm, exact.llm):
        model.set_attn_implementation("eager")
    plain = decode_tokens(exact, 1, num_prompts=4, max_new_tokens=8)
    assert fast.keys() == plain.keys()
    assert [fast[key][:2] for key in fast] == [plain[key][:2] for key in fast]
    # Sums of 49,152 float32 terms: 1.4e-5 was the most in 128 tuples.
    for key, values in fast.items():
        assert values[2:] == pytest.approx(plain[key][2:], abs=1e-4)


def test_cached_batched_logits_are_those_of_a_plain_forward() -> None:
    """Right padding, the masked gap and row dropping against one prompt without any of them."""
    import torch

    from calibrate.decode.models import TransformerModel
    from calibrate.pairs.registry import REGISTRY, load_pair

    pair = load_pair(REGISTRY["smollm2"], dtype="float32", device="cpu")
    prompts = tokenize_prompts(
        draw_prompts(read_prompts(None), "calibration", 6, 0), pair.tokenizer, 8, pair.max_context
    )
    model = TransformerModel(pair.llm, pair.vocab_size)
    with torch.inference_mode():
        session = model.start([p.tokens[:-1] for p in prompts], False)
        tokens = torch.tensor([p.tokens[-1] for p in prompts])
        contexts = [list(p.tokens) for p in prompts]
        for step in range(4):
            logits = session.step(tokens).logits
            for i, context in enumerate(contexts):
                plain = pair.llm(torch.tensor([context])).logits[0, -1, : pair.vocab_size]
                torch.testing.assert_close(logits[i], plain.float(), rtol=1e-3, atol=2e-3)
            tokens = logits.argmax(-1)
            for context, token in zip(contexts, tokens.tolist(), strict=True):
                context.append(token)
            if step in (1, 2):  # rows dropped, moved, and one that forks beyond the first six
                left = torch.tensor([5, 0, 3] if step == 1 else [1, 1, 2, 0, 2, 2, 1, 0])
                session.keep(left)
                tokens = tokens[left]
                contexts = [list(contexts[i]) for i in left.tolist()]
                tokens = tokens + torch.arange(len(tokens))  # the twins part
                for context, token in zip(contexts, tokens.tolist(), strict=True):
                    context[-1] = token


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A calibrated and derived run of 40 prompts."""
    path = tmp_path_factory.mktemp("smollm2") / "run"
    result = hlm(
        "calibrate", "--pair", "smollm2", "--limit", "40", "--max-new-tokens", "32",
        "--batch-size", "20", "--seed", "2", "--output-path", str(path), "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((path / "calibration.json").read_text())
    derived = hlm("derive", str(path), "--risk", "0.02", "--json")
    assert derived.returncode == 0, derived.stderr
    return path


def test_uncertainty_predicts_rejection(run: Path) -> None:
    summary = json.loads((run / "calibration.json").read_text())
    assert summary["num_prompts"] == 40
    assert summary["fit"]["slope"]["low"] > 0
    assert summary["fit"]["correlation_binned"]["value"] > 0.9
    timings = summary["timings"]
    assert all(timings[key]["value"] > 0 for key in ("t_slm_ms", "t_llm_ms", "t_uncertainty_ms"))
    info = json.loads((run / "run.json").read_text())
    assert info["complete"]
    assert 0 < info["forward_s"] < info["wall_s"]


def test_trace_identities_hold_on_real_tokens(run: Path) -> None:
    """Drawn and exact forms of the same expectation agree within their own standard error."""
    from calibrate.derive.predict import drawn_tokens, predicted_tokens
    from calibrate.run.traces import read_trace, shard_paths
    from hlmtheory.clusters import mean_over_tokens
    from hlmtheory.policies import policy_from_settings
    from hlmtheory.policies.base import recorded_bias
    from hlmtheory.steps import no_skip

    trace = read_trace(shard_paths(run))

    def z_score(values: np.ndarray) -> float:
        estimate = mean_over_tokens(values, trace.prompt_index, trace.num_prompts)
        return abs(estimate.value) / estimate.standard_error

    # (3): mean rejection probability is the mean total variation distance.
    assert z_score(trace["rejection_prob"] - trace["tv_distance"]) < 4
    # Acceptance happens with probability 1 - beta.
    assert z_score(trace["accepted"] - (1 - trace["rejection_prob"])) < 4
    # E[u_K] = u, and its spread is the predicted one.
    noise = trace["uncertainty_sampled"] - trace["uncertainty"]
    assert z_score(noise) < 4
    assert z_score(noise**2 - trace["uncertainty_variance"]) < 4
    # (11): risk and skip rate at a threshold, of the drawn draft and summed over all.
    policy = policy_from_settings("u-hlm", {}, 0.5)
    drawn, expected = drawn_tokens(trace, policy), predicted_tokens(trace, policy)
    assert z_score(drawn.risk - expected.risk) < 4
    assert z_score(drawn.skip - expected.skip) < 4
    # (22): exact truncation bias within N(k)/2, where both are recorded.
    sizes = trace.axes.truncation_sizes
    kept = trace.step(np.flatnonzero(trace.step().recorded("truncation_table")))
    assert len(kept["step"])
    for i, k in enumerate(sizes):
        bias = recorded_bias(kept, no_skip(kept), np.full(len(kept["step"]), k))
        assert (bias <= kept["tail_deviation"][:, i] / 2 + 1e-5).all()


def test_derived_points_follow_the_contract(run: Path) -> None:
    from calibrate.derive.predict import METRICS, OF_SERVER_ANSWERS
    from hlmtheory.policies import policy_names

    points = json.loads((run / "operating_points.json").read_text())["operating_points"]
    assert {point["policy"] for point in points} == set(policy_names())
    for point in points:
        assert set(point["predicted"]) == set(METRICS)
        if not point["feasible"]:
            assert point["reason"]
            continue
        for metric, figure in point["predicted"].items():
            assert set(figure) == {"value", "low", "high", "unit"}
            if figure["value"] is None:
                # What recorded steps of a truncation cannot tell, and who never asks a server.
                skipped = point["predicted"]["skip_rate"]["value"]
                never = metric == "devices_per_server" and skipped == 1
                assert metric in OF_SERVER_ANSWERS or never
            else:
                assert figure["low"] <= figure["value"] <= figure["high"]
    by_key = {(p["policy"], p["rule"]): p["predicted"] for p in points if p["feasible"]}
    rule = "risk-0.02"
    # The budget is kept along the server's outputs, the prediction is of the policy's own road.
    assert by_key["u-hlm", rule]["rejection_risk"]["low"] <= 0.02
    entries = {p: by_key[p, rule]["uplink_bits_per_token"]["value"] for p in ("u-hlm", "r-hlm")}
    assert entries["r-hlm"] < entries["u-hlm"] / 1000


def test_validation_on_own_prompts(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Why is the sky blue?\nName a fruit.\nHow do planes fly?\nWhat is tea?\n")
    result = hlm(
        "validate", str(run), "--policy", "u-hlm", "--policy", "r-hlm", "--rule", "risk-0.02",
        "--prompts", str(mine), "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["num_prompts"] == 4
    own = [c for c in report["cells"] if c["source"] == "counted" and not c["fixed"]]
    judged = [cell["covered"] for cell in own if cell["covered"] is not None]
    assert report["coverage"]["total"] == len(judged)
    assert report["coverage"]["covered"] == sum(judged)
    # The payload of full verification is its skip rate in another unit; that of r-hlm is not.
    bits = {c["policy"]: c["source"] for c in report["cells"] if "uplink" in c["metric"]}
    assert bits == {"u-hlm": "implied", "r-hlm": "counted"}
    assert len(list((run / "reruns").iterdir())) == 2


def test_what_draws_do_to_the_line_is_a_command(run: Path) -> None:
    result = hlm("attenuation", str(run), "--limit", "6", "--max-new-tokens", "8", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["num_temperatures"] for row in rows] == [5, 10, 20, 50, 100]
    reliability = [row["reliability"] for row in rows]
    assert reliability == sorted(reliability)
    assert json.loads((run / "attenuation.json").read_text())["rows"] == rows
    again = hlm("attenuation", str(run), "--limit", "6", "--max-new-tokens", "8")
    assert again.returncode == 2
    assert "--replace measures it anew" in again.stderr
    counted = hlm("guarantees", str(run), "--risk", "0.05", "--num-draws", "40", "--json")
    assert counted.returncode == 0, counted.stderr
    assert all(row["budget"] == 0.05 for row in json.loads(counted.stdout)["rows"])


def test_interrupted_calibration_can_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "cli.py"), "calibrate", "--limit", "12", "--max-new-tokens",
        "12", "--batch-size", "4", "--output-path", str(run),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # Children of a shell's background jobs ignore interrupts unless told otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not list((run / "traces").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    finished = list((run / "traces").iterdir())
    assert all(path.suffix == ".parquet" for path in finished)
    assert 1 <= len(finished) < 3
    refused = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert refused.returncode == 2
    resumed = hlm(*command[2:], "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole = tmp_path / "whole"
    assert hlm(*command[2:-1], str(whole)).returncode == 0

    from calibrate.run.traces import read_trace, shard_paths

    first, second = read_trace(shard_paths(run)), read_trace(shard_paths(whole))
    assert first.prompt_ids == second.prompt_ids
    np.testing.assert_array_equal(first["output_token"], second["output_token"])
