"""Theory against the embedded pair: attenuation (6), and r-hlm beside cu-hlm, (12), (21), (24)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from calibrate.run.prompts import TokenizedPrompt, draw_prompts, read_prompts, tokenize_prompts
from hlmtheory import domain
from hlmtheory.clusters import mean_over_tokens
from hlmtheory.coupling import coupled_output_law
from hlmtheory.policies import Policy, policy_from_settings
from hlmtheory.steps import LawStep
from hlmtheory.uncertainty import attenuation, exact_uncertainty, temperatures
from hlmtheory.verification import bias_lower_bound, output_bias, output_law

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]
THRESHOLD = 0.5
NUM_ENTRIES = 30
SETTINGS = {"cu-hlm-offline": {"num_entries": NUM_ENTRIES}}


def a_policy(name: str, threshold: float = THRESHOLD) -> Policy:
    return policy_from_settings(name, SETTINGS.get(name, {}), threshold)


@pytest.fixture(scope="module")
def pair():
    """The pair in float32: the same weights, so that only float32 rounding blurs comparisons."""
    from calibrate.pairs.registry import load_pair, resolve_pair

    spec = resolve_pair("smollm2", None, None, None)
    return load_pair(spec, dtype="float32", attention=True)


def tokenized(pair, num_prompts: int, max_new_tokens: int) -> list[TokenizedPrompt]:
    return tokenize_prompts(
        draw_prompts(read_prompts(None), "calibration", num_prompts, 0, order="file"),
        pair.tokenizer,
        max_new_tokens,
        pair.max_context,
    )


# --- attenuation ---------------------------------------------------------------------------------


def simulated_trace(rng, num_prompts: int = 200, num_tokens: int = 300):
    """Tokens with known u, beta depending on u and on the prompt, and u_K from Bernoulli draws."""
    from calibrate.validate.attenuation import NUM_TEMPERATURES, AttenuationTrace

    num = num_prompts * num_tokens
    prompt_index = np.repeat(np.arange(num_prompts), num_tokens)
    level = rng.beta(1.0, 1.0, size=num)
    shift = rng.normal(scale=0.05, size=num_prompts)[prompt_index]
    beta = np.clip(0.7 * level**2 + shift + rng.normal(scale=0.15, size=num), 0, 1)
    exact, sampled, variance = [], [], []
    for number in NUM_TEMPERATURES:
        # Probabilities that fall with the temperature, at a rate of the token's own.
        p = np.exp(-3 * level[:, None] * np.linspace(0, 1, number))
        draws = rng.uniform(size=p.shape) >= p
        exact.append(1 - p.mean(1))
        sampled.append(draws.mean(1))
        variance.append((p * (1 - p)).sum(1) / number**2)
    columns = (np.stack(values, axis=1) for values in (exact, sampled, variance))
    return AttenuationTrace(NUM_TEMPERATURES, *columns, beta, prompt_index, num_prompts)


def test_predicted_line_is_the_measured_one_on_simulated_tokens(rng) -> None:
    from calibrate.validate.attenuation import attenuation_table

    trace = simulated_trace(rng)
    for column, row in enumerate(attenuation_table(trace, confidence=0.999)):
        # The moments give what the closed form gives.
        u, beta = trace.exact[:, column], trace.rejection_prob
        slope = np.cov(u, beta, bias=True)[0, 1] / u.var()
        closed = attenuation(
            u.var(), trace.variance[:, column].mean(), slope, np.corrcoef(u, beta)[0, 1]
        )
        assert row.reliability == pytest.approx(closed.reliability, abs=1e-10)
        assert row.predicted_slope == pytest.approx(closed.slope, abs=1e-10)
        assert row.predicted_correlation == pytest.approx(closed.correlation, abs=1e-10)
        drawn = trace.sampled[:, column]
        measured = np.corrcoef(drawn, beta)[0, 1]
        assert row.measured_correlation.value == pytest.approx(measured, abs=1e-10)
        # And the prediction holds within Monte Carlo error, prompts being the unit.
        for gap in (row.correlation_gap, row.slope_gap):
            assert gap.low <= 0 <= gap.high
    # Negative controls, where the noise is largest: lambda in place of its root, and no
    # attenuation at all, are both outside the same interval.
    first = attenuation_table(trace, confidence=0.999)[0]
    right = first.predicted_correlation
    for wrong in (first.reliability * first.exact_correlation, first.exact_correlation):
        shift = right - wrong
        assert not first.correlation_gap.low + shift <= 0 <= first.correlation_gap.high + shift


def test_attenuation_refuses_a_grid_without_uniforms(pair) -> None:
    from calibrate.decode.engine import DecodingSettings
    from calibrate.run.errors import UsageError
    from calibrate.validate.attenuation import decode_attenuation_trace

    with pytest.raises(UsageError, match="num_temperatures = 129"):
        decode_attenuation_trace(pair, [], DecodingSettings(), (5, 129))


def test_correlation_at_every_k_is_predicted_from_one_trace(pair, capsys) -> None:
    """(6) on real tokens: K = 5 to 100 from one run under hlm."""
    from calibrate.decode.engine import DecodingSettings
    from calibrate.validate.attenuation import (
        NUM_TEMPERATURES,
        attenuation_table,
        decode_attenuation_trace,
    )

    settings = DecodingSettings(max_new_tokens=32, batch_size=32, seed=6, trace="minimal")
    trace = decode_attenuation_trace(pair, tokenized(pair, 32, 32), settings)
    assert trace.num_prompts == 32
    table = attenuation_table(trace)
    with capsys.disabled():
        print(f"\nattenuation (6), {table[0].num_tokens} tokens of {trace.num_prompts} prompts")
        for row in table:
            print(
                f"  K = {row.num_temperatures:3d}: lambda {row.reliability:.4f}, "
                f"r exact {row.exact_correlation:.4f}, predicted {row.predicted_correlation:.4f}, "
                f"measured {row.measured_correlation}, gap {row.correlation_gap}; slope predicted "
                f"{row.predicted_slope:.4f}, measured {row.measured_slope}"
            )
    assert tuple(row.num_temperatures for row in table) == NUM_TEMPERATURES == (5, 10, 20, 50, 100)
    for row in table:
        measured = row.measured_correlation
        assert measured.low <= row.predicted_correlation <= measured.high
        assert row.measured_slope.low <= row.predicted_slope <= row.measured_slope.high
    # The sharper question, the choice of prompts cancelled. Ten intervals that share their
    # uniforms: at 99.9 % all of them hold, barring one run in a hundred.
    for row in attenuation_table(trace, confidence=0.999):
        for gap in (row.correlation_gap, row.slope_gap):
            assert gap.low <= 0 <= gap.high
    reliabilities = [row.reliability for row in table]
    assert reliabilities == sorted(reliabilities)


# --- r-hlm beside cu-hlm -------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactTokens:
    """The exact law at every context of a run, recomputed without the engine: (N,) each."""

    bias: np.ndarray
    lower_bound: np.ndarray
    residual_bias: np.ndarray
    truncated_bias: np.ndarray
    skipped_mass: np.ndarray
    rejected_mass: np.ndarray
    skip_set_size: np.ndarray
    distance: np.ndarray
    expected_output_above: np.ndarray
    target_above: np.ndarray
    output_above: np.ndarray
    threshold_gap: np.ndarray


def engine_tokens(pair, policy: Policy, prompts: list[TokenizedPrompt], max_new_tokens: int):
    """The engine's columns, ordered by prompt of `prompts` and step."""
    from calibrate.decode.engine import DecodingSettings, decode
    from calibrate.decode.models import TransformerModel

    settings = DecodingSettings(
        max_new_tokens=max_new_tokens, batch_size=len(prompts), seed=8, trace="minimal"
    )
    slm = TransformerModel(pair.slm, pair.vocab_size)
    llm = TransformerModel(pair.llm, pair.vocab_size)
    (batch,) = decode(slm, llm, prompts, policy, settings, pair.eos_token_ids)
    place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    columns = dict(batch.columns)
    columns["prompt"] = np.array([place[i] for i in batch.prompt_ids])[columns.pop("row")]
    order = np.lexsort((columns["step"], columns["prompt"]))
    return {
        name: values[order].astype(np.float64 if values.dtype == np.float32 else values.dtype)
        for name, values in columns.items()
    }


def exact_tokens(pair, policy: Policy, prompts: list[TokenizedPrompt], columns) -> ExactTokens:
    """One plain forward of each whole text in each model, then the laws in float64."""
    import torch

    rows = []
    for i, prompt in enumerate(prompts):
        outputs = columns["output_token"][columns["prompt"] == i]
        text = torch.tensor([[*prompt.tokens, *outputs[:-1].tolist()]])
        with torch.inference_mode():
            z, w = (
                model(text).logits[0, len(prompt.tokens) - 1 :, : pair.vocab_size].double().numpy()
                for model in (pair.slm, pair.llm)
            )
        for j, token in enumerate(outputs):
            rows.append(exact_token(policy, z[j], w[j], int(token)))
    return ExactTokens(*(np.array(values, dtype=float) for values in zip(*rows, strict=True)))


def exact_token(policy: Policy, z: np.ndarray, w: np.ndarray, output: int) -> tuple[float, ...]:
    """One context, from the logits of both models, over the whole vocabulary."""
    x, y = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (z, w))
    uncertainty = exact_uncertainty(z, np.arange(len(z)), temperatures())
    sigma = (uncertainty <= policy.threshold).astype(float)
    size = getattr(policy, "num_entries", None)
    residual = a_policy("r-hlm").rule
    truncated = a_policy("cu-hlm-offline").rule
    law = output_law(policy.rule, x, y, sigma, size)
    accepts = policy.rule.acceptance(policy.rule.reference_law(x, size), y)
    above = law > y
    return (
        output_bias(policy.rule, x, y, sigma, size),
        bias_lower_bound(x, y, sigma),
        output_bias(residual, x, y, sigma),
        output_bias(truncated, x, y, sigma, NUM_ENTRIES),
        (sigma * x).sum(),
        ((1 - sigma) * x * (1 - accepts)).sum(),
        sigma.sum(),
        np.abs(x - y).sum() / 2,
        law[above].sum(),
        y[above].sum(),
        above[output],
        np.abs(uncertainty - policy.threshold).min(),
    )


@pytest.fixture(scope="module")
def runs(pair):
    """Both policies at one threshold: the engine's tokens, and the exact laws at their contexts."""
    prompts = tokenized(pair, 24, 24)
    out = {}
    for name in ("r-hlm", "cu-hlm-offline"):
        policy = a_policy(name)
        columns = engine_tokens(pair, policy, prompts, 24)
        out[name] = columns, exact_tokens(pair, policy, prompts, columns)
    return out


def z_score(values: np.ndarray, columns) -> float:
    """Standard errors, clustered by prompt, that the mean lies from zero."""
    estimate = mean_over_tokens(values, columns["prompt"], int(columns["prompt"].max()) + 1)
    assert estimate.standard_error > 0
    return abs(estimate.value) / estimate.standard_error


@pytest.mark.parametrize("name", ["r-hlm", "cu-hlm-offline"])
def test_engine_columns_are_those_of_the_exact_law(runs, name) -> None:
    columns, exact = runs[name]
    # Plain and cached float32 forwards differ by about 1e-4 in a logit, so by no more than that in
    # a probability or a total variation distance. A token whose u is that close to the threshold
    # may fall on either side, and takes its whole mass with it: such contexts are set aside.
    clear = exact.threshold_gap > 1e-4
    assert clear.mean() > 0.99
    for column, values in (
        ("policy_bias", exact.bias),
        ("policy_skip_prob", exact.skipped_mass),
        ("tv_distance", exact.distance),
    ):
        np.testing.assert_allclose(columns[column][clear], values[clear], rtol=0, atol=1e-4)
    entries = exact.skip_set_size if name == "r-hlm" else np.full(len(clear), NUM_ENTRIES)
    entries = np.where(columns["skipped"], 0, entries)
    np.testing.assert_array_equal(columns["policy_entries"][clear], entries[clear])


@pytest.mark.parametrize("name", ["r-hlm", "cu-hlm-offline"])
def test_drawn_frequencies_are_those_of_the_exact_law(runs, name) -> None:
    columns, exact = runs[name]
    skipped, accepted = columns["skipped"], columns["accepted"]
    assert z_score(skipped - exact.skipped_mass, columns) < 4
    assert z_score((~skipped & ~accepted) - exact.rejected_mass, columns) < 4
    # Payload: entries of the tokens that were sent.
    size = exact.skip_set_size if name == "r-hlm" else NUM_ENTRIES
    assert z_score(columns["policy_entries"] - size * (1 - exact.skipped_mass), columns) < 4
    # The bias itself, drawn: on the set where the law exceeds y, P less y is the TV.
    surplus = exact.expected_output_above - exact.target_above
    np.testing.assert_allclose(surplus, exact.bias, rtol=0, atol=1e-9)
    assert z_score(exact.output_above - exact.expected_output_above, columns) < 4


def test_r_hlm_beside_cu_hlm_at_the_same_threshold(runs, capsys) -> None:
    means = {}
    for name, (columns, exact) in runs.items():
        num_prompts = int(columns["prompt"].max()) + 1

        def mean(values, columns=columns, num_prompts=num_prompts):
            return mean_over_tokens(np.asarray(values, float), columns["prompt"], num_prompts)

        sent = ~columns["skipped"]
        entries = columns["policy_entries"]
        not_skipped = 1 - exact.skipped_mass
        means[name] = {
            "bias, engine": mean(columns["policy_bias"]),
            "exact law": mean(exact.bias),
            "drawn": mean(exact.output_above - exact.target_above),
            "lower bound": mean(exact.lower_bound),
        }
        sent_entries = mean(np.where(sent, entries, np.nan)).value
        size = exact.skip_set_size if name == "r-hlm" else NUM_ENTRIES + 0 * not_skipped
        exact_entries = (size * not_skipped).sum() / not_skipped.sum()
        means[name]["entries"] = sent_entries
        with capsys.disabled():
            biases = ", ".join(
                f"{key} {e.value:.5f} +- {e.standard_error:.5f}"
                for key, e in means[name].items()
                if key != "entries"
            )
            print(
                f"\n{name} at u_th = {THRESHOLD}, {len(sent)} tokens of {num_prompts} prompts: "
                f"skip rate {1 - sent.mean():.3f} (exact {exact.skipped_mass.mean():.3f}), entries "
                f"a sent token {sent_entries:.3f} (exact {exact_entries:.3f}), {biases}"
            )
        # At every context of either run: (24) attains the bound (13), and truncation only adds.
        np.testing.assert_allclose(exact.residual_bias, exact.lower_bound, rtol=0, atol=1e-12)
        assert (exact.truncated_bias >= exact.lower_bound - 1e-12).all()
        extra = mean(exact.truncated_bias - exact.residual_bias)
        assert extra.value > 4 * extra.standard_error
    assert means["r-hlm"]["entries"] < 1
    assert means["cu-hlm-offline"]["entries"] == NUM_ENTRIES
    residual, truncated = (means[name]["bias, engine"] for name in ("r-hlm", "cu-hlm-offline"))
    error = np.hypot(residual.standard_error, truncated.standard_error)
    assert residual.value + 4 * error < truncated.value


def test_another_policys_law_fails_the_same_test(runs) -> None:
    """Negative control: the engine's cu-hlm is not the law of u-hlm, which truncates nothing."""
    columns, exact = runs["cu-hlm-offline"]
    assert np.abs(columns["policy_bias"] - exact.lower_bound).max() > 5e-4
    # u-hlm's own bias is the bound, (12) and (13): on average too the engine is far from it.
    assert z_score(columns["policy_bias"] - exact.lower_bound, columns) > 4


# --- what the head says ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadRun:
    """A trace as it lies on disk, and the laws over the whole vocabulary at each of its rows."""

    trace: object
    x: np.ndarray
    y: np.ndarray
    uncertainty: np.ndarray
    order: np.ndarray


@pytest.fixture(scope="module")
def head_run(pair, tmp_path_factory) -> HeadRun:
    """12 prompts x 16 tokens of a calibration, with both laws kept by an observer."""
    from calibrate.decode.engine import DecodingSettings, decode
    from calibrate.decode.models import TransformerModel
    from calibrate.run.traces import read_trace, write_shard

    kept: list[tuple[np.ndarray, ...]] = []

    def observer(step: LawStep) -> dict[str, np.ndarray]:
        kept.append(tuple(a.numpy().copy() for a in (step.x, step.y, step.logits)))
        first = sum(len(one[0]) for one in kept[:-1])
        return {"kept": np.arange(first, first + len(step.x))}

    prompts = tokenized(pair, 12, 16)
    settings = DecodingSettings(max_new_tokens=16, batch_size=12, seed=4)
    slm, llm = (TransformerModel(model, pair.vocab_size) for model in (pair.slm, pair.llm))
    policy = policy_from_settings("hlm")
    (batch,) = decode(slm, llm, prompts, policy, settings, pair.eos_token_ids, observer=observer)
    path = tmp_path_factory.mktemp("head") / "000.parquet"
    axes = settings.axes(pair.vocab_size)
    write_shard(path, batch.columns, batch.prompt_ids, {}, axes)
    trace = read_trace([path])
    x, y, z = (np.concatenate(a)[trace["kept"]].astype(np.float64) for a in zip(*kept, strict=True))
    for law in (x, y):  # single precision leaves 1e-7; torch's softmax alone would leave 1e-5
        np.testing.assert_allclose(law.sum(-1), 1, rtol=0, atol=1e-6)
    x, y = np.exp(z - z.max(-1, keepdims=True)), y / y.sum(-1, keepdims=True)
    x /= x.sum(-1, keepdims=True)
    # Uncertainty of the 2,048 likeliest: all that any threshold below 0.9995 may skip, (24).
    order = np.argsort(-z, axis=-1, kind="stable")[:, :2048]
    return HeadRun(trace, x, y, exact_uncertainty(z, order, temperatures()), order)


@dataclass(frozen=True)
class ExactRows:
    """Skip probability, rho, bias and entries of a policy from the whole vocabulary."""

    run: HeadRun
    name: str
    known: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)

    def at(self, threshold: float) -> np.ndarray:
        """(N, 4): the skip set is a prefix in the order of logits, so each is worked out once."""
        assert (self.run.uncertainty[:, -1] > threshold).all()
        sizes = (self.run.uncertainty <= threshold).sum(-1)
        return np.array([self._row(row, int(size)) for row, size in enumerate(sizes)])

    def _row(self, row: int, size: int) -> tuple[float, ...]:
        if (row, size) not in self.known:
            x, y = self.run.x[row], self.run.y[row]
            skipped = self.run.order[row, :size]
            sigma = np.zeros_like(x)
            sigma[skipped] = 1.0
            skip, rho = sigma @ x, sigma @ np.maximum(x - y, 0)
            if self.name == "coupled":
                bias = coupled_bias(x, y, skipped)
            else:
                bias = float(output_bias(a_policy(self.name).rule, x, y, sigma))
            sent = {"u-hlm": len(x), "r-hlm": size}.get(self.name, 0)
            self.known[row, size] = (skip, rho, bias, (1 - skip) * sent)
        return self.known[row, size]


def coupled_bias(x: np.ndarray, y: np.ndarray, skipped: np.ndarray) -> float:
    """TV of the coupled output law to y, written over the whole vocabulary.

    P_v - y_v = sigma_v x_v - sum_i sigma_i P(d = i, o = v); the joint law from its integral:
    x_i y_v times that of ds/A(s)^2 between the shares of i and v, A linear between sorted shares.
    """
    if not len(skipped):
        return 0.0
    share = y / (x + y)
    order = np.argsort(share, kind="stable")
    s = share[order]
    behind, ahead = np.cumsum(x[order]), y[order][::-1].cumsum()[::-1]
    level = s * behind + (1 - s) * np.append(ahead[1:], 0.0)
    before = np.append(0.0, s[:-1])
    pieces = (s - before) / (np.append(1.0, level[:-1]) * level)
    phi, at = np.empty_like(x), np.empty_like(x)
    phi[order], at[order] = np.cumsum(pieces), level
    change = np.zeros_like(x)
    change[skipped] = x[skipped]
    for i in skipped:
        joint = x[i] * y * np.maximum(phi - phi[i], 0.0)
        joint[i] = x[i] * share[i] / at[i]
        change -= joint
    return float(np.maximum(change, 0.0).sum())


def test_that_coupled_bias_is_the_output_laws_own(rng) -> None:
    x, y = rng.dirichlet(np.full(40, 0.3), size=2)
    for skipped in ([], [3], [5, 1, 30], list(range(40))):
        sigma = np.zeros(40)
        sigma[skipped] = 1.0
        law = coupled_output_law(x, y, sigma)
        found = coupled_bias(x, y, np.array(skipped, dtype=int))
        assert found == pytest.approx(np.abs(law - y).sum() / 2, abs=1e-12)


ROUNDING_OF_U = 4e-6
"""Of u in single precision: a logit 20 below the largest, over theta = 0.1, is off by 1e-5."""


def test_predicted_from_the_head_is_the_exact_law(head_run, capsys) -> None:
    """|difference| < 1e-6 at 50 random thresholds, for four policies, where the head decides.

    The engine's u is in single precision, the exact one in double. A candidate whose u is within
    rounding of a threshold may fall on either side: there the prediction must be the law of one
    side or of the other. Entries of u-hlm are counted in vocabularies, of which it sends one.
    """
    from calibrate.derive.predict import predicted_tokens

    trace, vocab = head_run.trace, head_run.x.shape[1]
    recorded = np.isfinite(trace["head_race"][:, 0])
    assert trace.num_tokens > 150
    assert 30 < recorded.sum() < 60
    u = trace["head_uncertainty"].astype(np.float64)
    thresholds = np.random.default_rng(12).uniform(size=50)
    exact = {name: ExactRows(head_run, name) for name in ("u-hlm", "r-hlm", "ask-llm", "coupled")}
    worst = {name: np.zeros(4) for name in exact}
    undecided = ties = compared = 0
    for threshold in thresholds:
        decides = u[:, -1] > threshold + ROUNDING_OF_U
        tie = decides & (np.abs(u - threshold) < ROUNDING_OF_U).any(1)
        undecided, ties = undecided + (~decides).sum(), ties + tie.sum()
        for name in exact:
            found = predicted_tokens(trace, a_policy(name, threshold))
            head = np.stack([found.skip, found.risk, found.bias, found.entries], -1)
            unit = np.array([1, 1, 1, vocab if name == "u-hlm" else 1])
            difference = np.abs(head - exact[name].at(threshold)) / unit
            sides = [
                np.abs(head - exact[name].at(threshold + side * ROUNDING_OF_U)) / unit
                for side in (-1, 1)
            ]
            difference[tie] = np.minimum(*sides)[tie]
            rows = decides & (recorded if name == "coupled" else True)
            if name == "coupled":
                assert np.isnan(head[~recorded, 2]).all()
            compared += rows.sum()
            worst[name] = np.maximum(worst[name], difference[rows].max(axis=0, initial=0))
    with capsys.disabled():
        print(
            f"\nhead against the full vocabulary, V = {vocab}, {trace.num_tokens} tokens x "
            f"{len(thresholds)} thresholds: {undecided} rows where the head does not "
            f"decide, {ties} within rounding of u; largest |difference| of skip probability, rho, "
            "bias, entries:"
        )
        for name, values in worst.items():
            print(f"  {name:8s} " + ", ".join(f"{value:.1e}" for value in values))
    assert ties < 20
    assert compared > 20_000
    for values in worst.values():
        assert (values < 1e-6).all()


@pytest.mark.parametrize("threshold", [0.997, 0.999])
def test_where_the_head_does_not_decide_it_is_right_in_the_mean(head_run, threshold, capsys):
    """Skip probability and rho of u-hlm: zero lies in the 99.9 % interval, clustered by prompt."""
    from calibrate.derive.predict import predicted_tokens

    trace = head_run.trace
    found = predicted_tokens(trace, a_policy("u-hlm", threshold))
    exact = ExactRows(head_run, "u-hlm").at(threshold)
    undecided = trace["head_uncertainty"][:, -1] <= threshold
    assert undecided.any()
    for column, (name, values) in enumerate((("skip", found.skip), ("rho", found.risk))):
        difference = values - exact[:, column]
        mean = mean_over_tokens(difference, trace.prompt_index, trace.num_prompts)
        low, high = mean.interval(0.999)
        with capsys.disabled():
            print(
                f"\nbeyond the head at {threshold}, {undecided.sum()} of {len(undecided)} rows: "
                f"mean {name} {exact[:, column].mean():.4f}, off by {low:.1e}..{high:.1e}"
            )
        assert low <= 0 <= high
        assert np.abs(difference[~undecided]).max() < 1e-6


def test_gate_and_truncation_are_predicted_together(head_run, capsys) -> None:
    """At recorded sizes the prediction lies above the exact law by its chords alone.

    That is less than 1e-3 a token and 5e-6 in the mean. Between recorded sizes it is linear in
    log k, off by less than a hundredth of the bias in the mean. Negative control: rho + tau, which
    only bounds.
    """
    from calibrate.derive.predict import predicted_tokens

    trace = head_run.trace
    recorded = np.flatnonzero(np.isfinite(trace["truncation_table"][:, 0]))
    u = trace["head_uncertainty"].astype(np.float64)
    x, y = head_run.x[recorded], head_run.y[recorded]

    def compare(k: int, threshold: float) -> np.ndarray:
        """(N, 3): predicted, exact, rho + tau."""
        decided = ~(np.abs(u[recorded] - threshold) < ROUNDING_OF_U).any(1)
        policy = policy_from_settings("cu-hlm-offline", {"num_entries": k}, threshold)
        sigma = np.zeros_like(x)
        skip = (head_run.uncertainty[recorded] <= threshold).astype(float)
        np.put_along_axis(sigma, head_run.order[recorded], skip, -1)
        with domain.unchecked():
            exact = output_bias(policy.rule, x, y, sigma, k)
            tau = output_bias(policy.rule, x, y, 0 * sigma, k)
        rho = (sigma * np.maximum(x - y, 0)).sum(-1)
        found = predicted_tokens(trace, policy).bias[recorded]
        return np.stack([found, exact, rho + tau], -1)[decided]

    thresholds = (0.1, 0.3, 0.6, 0.9)
    on, off = (
        np.concatenate([compare(k, threshold) for k in sizes for threshold in thresholds])
        for sizes in ((1, 3, 12, 30, 256, 2048), (5, 20, 40, 400, 1500))
    )
    error, apart = on[:, 0] - on[:, 1], off[:, 0] - off[:, 1]
    with capsys.disabled():
        print(
            f"\ngate and truncation, {len(on)} contexts, thresholds and recorded k: off by "
            f"{error.mean():.1e} in the mean, {error.max():.1e} at most, of {on[:, 1].mean():.4f}; "
            f"rho + tau by {np.mean(on[:, 2] - on[:, 1]):.1e}; between recorded k by "
            f"{apart.mean():.1e} in the mean, {np.abs(apart).max():.1e} at most"
        )
    assert error.min() > -1e-6  # single precision
    assert error.max() < 1e-3
    assert error.mean() < 5e-6
    assert abs(apart.mean()) < 0.01 * off[:, 1].mean()
    assert np.mean(on[:, 2] - on[:, 1]) > 100 * error.mean()
