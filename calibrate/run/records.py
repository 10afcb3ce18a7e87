"""Every JSON file of a run as a typed record: one class a shape, one schema version a file.

Records are frozen, refuse unknown keys, and go both ways through pydantic: what a stage writes is
what the next one reads, field by field. docs/formats.md is made from them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hlmtheory.kinds import Certified, TestMethod
from hlmtheory.sampled_law import Sampling

if TYPE_CHECKING:
    import pandas as pd

Share = Annotated[float, Field(ge=0, le=1)]
MonitorUnit = Literal["tokens", "answers"]


class Record(BaseModel):
    """What all records are: frozen, strict about their keys, and without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(Record):
    """A number with its interval and unit; low and high are null only where none is defined.

    Intervals of shares and amounts are cut where these end: at 0, and at 1.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""


def flat(name: str, figure: Figure) -> dict[str, float | None]:
    """A figure as three columns of a table: NAME, NAME_low and NAME_high."""
    return {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}


class Curve(Record):
    """Values along a grid with their intervals, point by point; null where none is defined."""

    grid: tuple[float, ...]
    value: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]

    def figures(self) -> list[Figure]:
        """Its points, one by one."""
        parts = zip(self.value, self.low, self.high, strict=True)
        return [Figure(value=value, low=low, high=high) for value, low, high in parts]


class StageRecord(Record):
    """A file of its own: it says its schema and how it came to be."""

    schema_version: ClassVar[int] = 2
    file_name: ClassVar[str]
    made_by: ClassVar[str]
    """The command that writes it."""

    def summary(self) -> str:
        """What it holds, in a few words."""
        return self.file_name

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"


class Provenance(Record):
    """Versions of all that can change a number, revision of the checkout, command line."""

    versions: dict[str, str]
    revision: str | None
    command: tuple[str, ...]


class ModelIdentity(Record):
    """Which model: its hash is of the .gguf file, else of the weights, else the hub commit."""

    label: str
    sha256: str | None
    drop_layers: tuple[int, ...]
    num_parameters: int
    num_layers: int


class PairIdentity(Record):
    """Both models, the vocabulary that they share, and the arithmetic they ran in."""

    name: str
    slm: ModelIdentity
    llm: ModelIdentity
    vocab_size: int
    dtype: str
    device: str


class GivenModels(Record):
    """--slm, --llm and --drop-layers as they were given, so that a rerun finds the models."""

    slm: str | None = None
    llm: str | None = None
    drop_layers: str | None = None


READ_TOKENS = 250_000
"""Tokens that are looked at unless told otherwise."""
READ_BYTES = 13_000
"""Memory that each of them takes while operating points are derived (docs/performance.md)."""


class RunSettings(Record):
    """Everything that decides the tokens of a calibration, and which of them are looked at."""

    pair: str
    given: GivenModels
    prompts: str
    """File or hub id; 'shipped' for the project's own."""
    order: Literal["random", "file"]
    limit: int
    max_new_tokens: int
    batch_size: int | None
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int
    dtype: str
    device: str
    trace: Literal["full", "minimal"]
    pilot: int = 0
    """Prompts that are decoded again on a policy's own road."""
    read_tokens: int = READ_TOKENS
    """Tokens that are looked at once recorded; of more, those of prompts drawn at random."""

    @property
    def sampling(self) -> Sampling:
        """What makes both models' laws of their logits."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)


class Timings(Record):
    """Milliseconds of one token of one user: medians with order-statistic intervals."""

    t_slm_ms: Figure
    t_llm_ms: Figure
    t_uncertainty_ms: Figure
    waited_share: float | None = None
    """Time that threads waited for a processor that others used, over the time of the measurement;
    null where the system does not say."""

    @property
    def medians(self) -> dict[str, Figure]:
        """The three times, by name."""
        return {name: number for name, number in self if isinstance(number, Figure)}


class Pilot(Record):
    """A policy that was run on its own road, so that predictions know what that does."""

    policy: str
    threshold: float
    """On the uncertainty."""
    risk: float
    """Rejection risk that the threshold has on the calibration's traces."""
    prompt_ids: tuple[str, ...]
    num_tokens: int
    wall_s: float


class RunRecord(StageRecord):
    """run.json: what is being calibrated, and how far it is."""

    file_name: ClassVar[str] = "run.json"
    made_by: ClassVar[str] = "hlm calibrate"

    complete: bool
    pair: PairIdentity
    settings: RunSettings
    prompt_ids: tuple[str, ...]
    """The prompts that were drawn."""
    prompt_keys: tuple[str, ...]
    """Hashes of their texts, so that nobody validates on them."""
    provenance: Provenance
    timings: Timings
    num_threads: int
    """Processor threads of the models."""
    num_together: int | None = None
    """Prompts decoded together, and no more of them when the run is resumed; null in older runs."""
    num_prompts: int
    """Of the whole run, as is the number of tokens."""
    num_tokens: int
    wall_s: float
    """Decoding, without loading; the times of several workers are added up."""
    forward_s: float
    """The part of it inside the two models' forwards."""
    pilot: Pilot | None = None
    """Null where none was asked for, or nothing can be skipped at its risk."""


class WaldTest(Record):
    """A chi-square statistic of a joint hypothesis, clustered by prompt."""

    statistic: float
    degrees: int
    p_value: float


class LineFit(Record):
    """Least squares of beta on u, everything clustered by prompt; docs/theory.md, (7)."""

    slope: Figure
    intercept: Figure
    correlation: Figure
    correlation_binned: Figure
    mean_rejection: Figure
    delta: Figure
    """P(y_d < x_d), the share of drafts that can be rejected at all."""
    curvature: Figure
    """Coefficient of u squared beside the line: 0 if the relation is one."""
    lack_of_fit: WaldTest | None = None
    """Do the bins' means lie on the line? Null with fewer than two prompts for every bin."""
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Cluster-robust, of (slope, intercept)."""
    num_bins: int
    degenerate: str = ""
    """Why there is no line, but a level: slope and what rests on it have no value then."""


class Bin(Record):
    """Mean uncertainty and rejection probability of one bin of tokens."""

    uncertainty: float
    rejection_prob: Figure
    num_tokens: int


class Histogram(Record):
    """How many tokens lie in each cell of (uncertainty, rejection probability)."""

    uncertainty_edges: tuple[float, ...]
    rejection_edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    """By uncertainty, then by rejection probability."""


class Relation(Record):
    """What stands beside the line: bins of equal count, the line's band, the best rising curve."""

    bins: tuple[Bin, ...]
    line: Curve
    """Clipped to [0, 1]."""
    isotonic_uncertainty: tuple[float, ...]
    isotonic_rejection: tuple[float, ...]
    tokens: Histogram


class EstimatorScore(Record):
    """How well one device-side score tells rejections: same trace and metrics for all."""

    name: str
    label: str
    correlation: Figure
    """With beta, token by token."""
    auroc: Figure
    """Each token counted as rejected with weight beta."""
    skip_rate_at_risk: dict[str, Figure]
    """Largest share of tokens skipped with rejection risk at most the key."""
    less_uncertainty: dict[str, Figure] = {}
    """The same less that of the exact uncertainty, on the same resampled prompts."""
    risk: tuple[float, ...]
    """Rejection risk along the curve of the score, rising from 0."""
    skip_rate: tuple[float, ...]


class AttentionSummary(Record):
    """Statistics of the attention row behind each draft, over the answers and along them."""

    entropy: Figure
    sink: Figure
    context: Figure
    normalised_entropy_by_step: Curve
    sink_by_step: Curve


class LearnedModel(Record):
    """Logistic regression of beta on device-side features, standardised: the score `learned`."""

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float


class CalibrationRecord(StageRecord):
    """calibration.json: what the traces say."""

    file_name: ClassVar[str] = "calibration.json"
    made_by: ClassVar[str] = "hlm calibrate"

    pair: PairIdentity
    settings: RunSettings
    num_prompts: int
    """Prompts that are looked at: all of the run, unless `read_tokens` are fewer than it has."""
    num_tokens: int
    """Theirs."""
    confidence: float
    fit: LineFit
    rejection_excess: Figure
    """Mean of beta less total variation: 0 but for the draws; docs/theory.md, (49)."""
    relation: Relation
    estimators: tuple[EstimatorScore, ...]
    learned: LearnedModel | None
    """Null with too few prompts to fit on."""
    attention: AttentionSummary | None
    timings: Timings

    def summary(self) -> str:
        """Pair, sample, line and correlation."""
        slope, intercept = self.fit.slope.value, self.fit.intercept.value
        line = self.fit.degenerate or f"beta = {slope:.3g} u {intercept or 0.0:+.3g}"
        return f"{self.pair.name}, {self.num_prompts} prompts, {self.num_tokens} tokens; {line}"

    def to_pandas(self) -> pd.DataFrame:
        """One row a quantity of the fitted line, with its interval."""
        import pandas as pd

        found = {
            key: one for key in LineFit.model_fields
            if isinstance(one := getattr(self.fit, key), Figure)
        }  # fmt: skip
        rows = [{"quantity": key, **flat("value", one)} for key, one in found.items()]
        return pd.DataFrame(rows)


class PolicyInfo(Record):
    """A policy as figures and tables name and draw it."""

    name: str
    label: str
    source: str | None
    """FILE.py:NAME of somebody's own policy."""
    source_sha256: str | None = None
    """Of that file when it was derived: another file is another policy."""
    paper: str | None
    """The published system that it is, if any."""
    gated: bool
    color: str
    dashes: tuple[float, ...]
    """Matplotlib's on-off pattern; empty for a solid line."""
    marker: str


class OperatingPoint(Record):
    """One policy at one derived setting, with what it is predicted to do."""

    policy: str
    rule: str
    """Unique within its policy: the threshold rule, its budget and the setting's label."""
    family: str
    """The threshold rule alone: none, risk-averse, risk-prone, risk, answer, conformal or
    ltt."""
    variant: str
    """Label of a further setting (tolerance, importance, answer cap); empty for the first."""
    score: str | None
    """What the gate compares with its threshold; null for a policy without a gate."""
    budget: float | None
    weighting: Certified | None
    """What the budget is about: the rejection risk over tokens or over prompts, or whole answers:
    the share that differs from the server's (ltt, conformal), or the distance of their law
    (answer). Null where there is no budget."""
    confidence: float | None
    """1 - delta of a certified threshold; null where nothing is certified with confidence."""
    bound: float | None
    """What was held against the budget of a certified threshold; null where none is certified."""
    uncertainty_threshold: Figure
    """Threshold on the score, with its cluster-bootstrap interval where its rule has one."""
    feasible: bool
    reason: str
    """Why infeasible, or what is degenerate; empty otherwise."""
    settings: dict[str, Any]
    """The policy's own fields, as its class reads them back."""
    predicted: dict[str, Figure]
    at_most: tuple[str, ...] = ()
    """Predicted figures that are upper bounds: a rerun may well lie below them."""

    @property
    def key(self) -> str:
        """policy/rule."""
        return f"{self.policy}/{self.rule}"


class DeriveRequest(Record):
    """Everything `hlm derive` was asked for."""

    policies: tuple[str, ...]
    """Names, or FILE.py:NAME."""
    score: str = "uncertainty"
    risks: tuple[float, ...] = (0.01,)
    confidence: float = 0.95
    link: str = "wifi"
    profile: str = "measured"
    accounting: Literal["paper", "full"] = "full"
    thetas: tuple[float, ...] = (0.1,)
    eta: float = 1.0
    importances: tuple[str, ...] = ("topk:16:1",)
    draft_from_sent: bool = False
    answer_risks: tuple[float, ...] = ()
    """Budgets for the total variation of whole answers."""
    certify: Certified = "prompts"
    """What certified budgets are about."""
    answer_caps: tuple[str, ...] = ()
    """Caps of gated policies beside no cap: shares, or auto."""


class Certificate(Record):
    """The largest threshold that one test certifies for one budget, for the score's plain gate."""

    rule: str
    """The test, and the cap it is under."""
    test: TestMethod
    certified: Certified
    """What the budget is about."""
    guaranteed: bool
    """Whether the test promises its confidence: not the asymptotic t, nor wsr for prompts drawn by
    category."""
    cap: float | None
    """Largest share of an answer's drafts that is skipped."""
    budget: float
    confidence: float
    feasible: bool
    reason: str
    threshold: float | None
    skip_rate: Figure
    """Predicted share of tokens."""
    bound: float | None
    """Upper confidence bound on the risk at the threshold, or at the lowest one if none passes."""


class ScoreDefinition(Record):
    """How a device works out the score that it holds against a threshold."""

    name: str
    formula: str
    """Of z, the device's logits behind a repetition penalty and before any temperature, and x, its
    law as it is sampled."""
    temperatures: tuple[float, ...]
    """theta_k of the uncertainty; other scores need none."""
    learned: LearnedModel | None
    low: float | None
    """Least value; null for minus infinity."""
    high: float | None
    """Greatest value, at which everything is kept; null for infinity."""


class ExportRecord(StageRecord):
    """point.json: one operating point, for an application; docs/how-to/export.md reads it."""

    file_name: ClassVar[str] = "point.json"
    made_by: ClassVar[str] = "hlm export RUN --point POINT --output-path point.json"

    point: str
    """policy/rule."""
    policy: PolicyInfo
    settings: dict[str, Any]
    """The policy's own, such as k, and an answer cap."""
    threshold: float | None
    """A draft is kept where its score is at most this; null for a policy without a gate."""
    score: ScoreDefinition | None
    """Null for a policy without a gate."""
    family: str
    """The threshold rule alone, as in OperatingPoint."""
    budget: float | None
    weighting: Certified | None
    """What the budget is about."""
    certified: bool
    """Whether the budget is kept with `confidence`; if not, it was met on the calibration alone."""
    confidence: float | None
    predicted: dict[str, Figure]
    pair: PairIdentity
    sampling: Sampling
    """Of both models."""
    max_new_tokens: int
    derivation: str
    """Its name."""
    derived: Provenance
    provenance: Provenance
    valid_while: tuple[str, ...]
    """What has to stay as it was; derive again when it does not."""


class Optimum(Record):
    """The best choice within one bias budget for one objective; docs/theory.md, (30)."""

    budget: float
    objective: str
    feasible: bool
    reason: str
    policy: str | None
    num_entries: int | None
    uncertainty_threshold: float | None
    predicted: dict[str, float]


class PlaneCell(Record):
    """Predictions at one k and gamma of the importance."""

    k: int
    gamma: float
    predicted: dict[str, Figure]


class ImportancePlane(Record):
    """Predictions over the two strictness parameters, at one threshold for all cells."""

    policy: str
    threshold_rule: str
    uncertainty_threshold: float | None
    reason: str
    num_prompts: int
    num_tokens: int
    ks: tuple[int, ...]
    gammas: tuple[float, ...]
    cells: tuple[PlaneCell, ...]
    """Every pair, gamma the faster index."""


class ThresholdCurves(Record):
    """Skip rate and rejection risk at every threshold of the score."""

    score: str
    skip_rate: Curve
    risk: Curve


class PolicyPath(Record):
    """A gated policy's predicted payload and bias as its threshold rises."""

    policy: str
    thresholds: tuple[float, ...]
    skip_rate: tuple[float, ...]
    uplink_bits_per_token: tuple[float, ...]
    tv_bias: tuple[float, ...]


class ThroughputCurves(Record):
    """Both throughputs of one operating point along the sweep of the derivation's link."""

    policy: str
    rule: str
    throughput_tok_s: Curve
    mean_throughput_tok_s: Curve


class AnswerCurve(Record):
    """Total variation between an operating point's answers and the server's, by their length."""

    policy: str
    rule: str
    at_most: bool
    """Whether it is an upper bound."""
    divergence: Curve
    """Along the number of tokens that answers are cut after; docs/theory.md, (46)."""


class LinkSweep(Record):
    """Throughput along what makes the derivation's own link better, all else of it kept."""

    rule: str
    """The rule that gated policies are compared at."""
    quantity: str
    """Of the link: an SNR, a rate, or the mean rate of a trace, all of whose rates are scaled."""
    unit: str
    spacing: Literal["linear", "log"]
    own: float
    """What the derivation's link has of it; on the grid."""
    grid: tuple[float, ...]
    series: tuple[ThroughputCurves, ...]


class SizeDistribution(Record):
    """Distribution of the sizes of sent tokens: quantiles at evenly spaced levels from 0 to 1."""

    levels: tuple[float, ...]
    quantiles: tuple[float, ...]
    mean: float
    num_tokens: int


class PayloadDistribution(Record):
    """Uplink bits of those tokens that a policy sends at an operating point."""

    policy: str
    rule: str
    bits: SizeDistribution


class TruncationCurves(Record):
    """What sending k probabilities costs: bound (19), bound (22) and the exact bias (21)."""

    theta: float
    soft_bound: Curve
    sharp_bound: Curve
    exact: Curve
    num_tokens: int
    """Tokens with N(k)."""
    num_exact: int
    """Tokens with the exact bias."""
    chosen_size: int | None
    """k of the fixed size, where one was derived."""
    online: SizeDistribution | None
    """Predicted sizes of sent tokens under the per-token rule, at `online_point`."""
    online_point: str | None


class ImportanceExample(Record):
    """Importance and its threshold along the longest answer of the calibration."""

    prompt_id: str
    setting: str
    """variant-k-gamma."""
    step: tuple[int, ...]
    importance: tuple[float, ...]
    threshold: tuple[float | None, ...]
    important: tuple[bool, ...]


class DerivationRecord(StageRecord):
    """operating_points.json: settings and what they are predicted to do, kept under a name."""

    file_name: ClassVar[str] = "operating_points.json"
    made_by: ClassVar[str] = "hlm derive"

    name: str
    request: DeriveRequest
    provenance: Provenance
    pair: PairIdentity
    num_prompts: int
    num_tokens: int
    confidence: float
    link: dict[str, Any]
    profile: dict[str, Any]
    accounting: Literal["paper", "full"]
    num_prompt_tokens: float
    """Of a prompt, in the mean; each is read once an answer, and `full` accounting bills it at its
    own length. 0 where the trace does not say."""
    policies: tuple[PolicyInfo, ...]
    operating_points: tuple[OperatingPoint, ...]
    optima: tuple[Optimum, ...]
    pilot: Pilot | None = None
    """What predictions were moved by, each to its policy's own road; null: they stand on the
    server's."""
    certificates: tuple[Certificate, ...] = ()
    thresholds: ThresholdCurves | None
    answers: tuple[AnswerCurve, ...] = ()
    """Of every gated policy at its budgets, where it is known, and of the device alone."""
    paths: tuple[PolicyPath, ...]
    sweep: LinkSweep | None
    payloads: tuple[PayloadDistribution, ...]
    """Of every policy that sends something at the sweep's rule, or without a gate, with the drafts
    that the calibration drew."""
    truncation: TruncationCurves | None
    importance_plane: ImportancePlane | None
    importance_example: ImportanceExample | None

    def summary(self) -> str:
        """Name, link, profile and how many settings."""
        able = sum(point.feasible for point in self.operating_points)
        return (
            f"{self.name}, link {self.link['name']}, profile {self.profile['name']}; {able} of "
            f"{len(self.operating_points)} operating points are feasible"
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row an operating point, with every prediction and its interval."""
        import pandas as pd

        rows = []
        for point in self.operating_points:
            row = {"policy": point.policy, "rule": point.rule, "family": point.family,
                   "budget": point.budget, "feasible": point.feasible, "reason": point.reason,
                   **flat("threshold", point.uncertainty_threshold)}  # fmt: skip
            for metric, figure in point.predicted.items():
                row |= flat(metric, figure)
            rows.append(row)
        return pd.DataFrame(rows)


class RerunInfo(Record):
    """One rerun that a validation rests on."""

    policy: str
    rule: str
    folder: str
    """In RUN/reruns."""
    num_tokens: int
    entries_per_sent_token: Figure
    """Probabilities sent with a token that is sent; no value where nothing is ever sent."""
    throughput: ThroughputCurves | None
    """Its tokens priced along the sweep of the derivation's link."""
    payload: SizeDistribution | None
    """Uplink bits of its sent tokens, where the derivation has their distribution."""
    sizes: SizeDistribution | None
    """Sizes of its sent tokens, where the size is chosen token by token."""


class Cell(Record):
    """One predicted figure against its measurement."""

    policy: str
    rule: str
    metric: str
    source: Literal["counted", "implied", "clock"]
    """Counted token by token; implied by other counts and given times; or read from a clock."""
    predicted: Figure
    """Interval for the *rerun's* figure: calibration and rerun sampling both."""
    measured: Figure
    covered: bool | None
    fixed: bool
    """Whether the policy alone fixes the figure, so that it cannot miss."""

    @property
    def off(self) -> float:
        """Predicted over measured, less 1; NaN without both."""
        predicted, measured = self.predicted.value, self.measured.value
        return math.nan if predicted is None or not measured else predicted / measured - 1.0


def mean_off(cells: Iterable[Cell]) -> float:
    """Mean of |predicted - measured| / measured."""
    return statistics.fmean(abs(cell.off) for cell in cells)


class Coverage(Record):
    """Covered cells out of those judged; the exact binomial interval takes cells as independent."""

    covered: int
    total: int
    share: Figure


class Repeats(Record):
    """What counts of covered cells to expect of predictions that hold; docs/theory.md, (36)."""

    num_repeats: int
    share: Figure
    probability_of_at_most: float
    probability_of_at_least: float
    widest_error: float
    probability_of_as_wide: float


class CoverageSummary(Coverage):
    """Each distinct quantity once, none that a policy fixes; and with prompts as independent."""

    if_predictions_hold: Repeats | None
    unstratified: Coverage


class ContextShift(Record):
    """How a policy's contexts differ from the server's; docs/theory.md, (37)."""

    policy: str
    rule: str
    below_threshold: Figure
    """Share of tokens below the threshold, the skip rate where the score alone decides: on the
    policy's own road, less that along the server's outputs."""
    predicted: Figure
    """The same, as the calibration's pilot says; no value without one."""
    risk: Figure
    score: Figure
    by_step: Curve
    """Of `below_threshold`, by the part of the answer that begins at each step."""
    num_references: int
    """Reruns whose outputs follow the server's law."""
    num_prompts: int


class PooledShift(Record):
    """The mean shift of all gated reruns, and one test of it; docs/theory.md, (37)."""

    below_threshold: Figure
    p_value: float | None
    predicted: Figure
    by_step: Curve
    num_reruns: int
    num_prompts: int


class Infeasible(Record):
    """A chosen point that was not rerun, and why."""

    policy: str
    rule: str
    reason: str


class ValidationRecord(StageRecord):
    """validation.json: reruns held against the predictions of the derivation that it names."""

    file_name: ClassVar[str] = "validation.json"
    made_by: ClassVar[str] = "hlm validate"

    derivation: str
    provenance: Provenance
    pair: PairIdentity
    seed: int
    order: Literal["random", "file"]
    prompt_ids: tuple[str, ...]
    confidence: float
    num_prompts: int
    num_calibration_prompts: int
    num_tokens: int
    strata: Literal["category"] | None
    reruns: tuple[RerunInfo, ...]
    infeasible: tuple[Infeasible, ...]
    context_shift: tuple[ContextShift, ...]
    pooled_shift: PooledShift | None
    cells: tuple[Cell, ...]
    coverage: CoverageSummary

    def summary(self) -> str:
        """Of what, and how many predictions held."""
        held = self.coverage
        return (
            f"of {self.derivation}, {len(self.reruns)} reruns on {self.num_prompts} prompts; "
            f"{held.covered} of {held.total} counted figures inside their intervals"
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row a cell: predicted and measured with their intervals, and whether it held."""
        import pandas as pd

        rows = [
            {"policy": cell.policy, "rule": cell.rule, "metric": cell.metric,
             "covered": cell.covered, **flat("predicted", cell.predicted),
             **flat("measured", cell.measured)}
            for cell in self.cells
        ]  # fmt: skip
        return pd.DataFrame(rows)


class WireProbe(Record):
    """Times of a policy's tokens where nothing delays a message, on calibration prompts."""

    num_prompts: int
    num_tokens: int
    decide_ms: float
    """Device's forward pass, law, draft and gate."""
    ask_ms: float
    """What a sent token takes beside it; 0 where none is sent."""
    server_ms: float
    """Of it, inside the server's forward pass, by the server's clock."""


class WireRun(Record):
    """One operating point over one link, by the clock."""

    policy: str
    rule: str
    probe: WireProbe
    """In turn with what was run over the link."""
    num_prompts: int
    num_tokens: int
    first_token_ms: Figure
    """From the prompt to the first token, both prefills and the connection's session included."""
    token_ms_quantiles: tuple[float, ...]
    """5, 25, 50, 75 and 95 % of the tokens take no longer."""
    predicted_ms_quantiles: tuple[float, ...]
    """The same by (63), of the calibration's tokens, where a machine takes its mean time always."""
    server_busy_share: float
    """Of the decoding time, inside the server's forward passes: one over it is how many such
    devices a server that runs them one by one can carry."""
    uplink_bytes_per_token: Figure
    downlink_bytes_per_token: Figure
    """On the wire, WebSocket framing included."""
    framing_bytes_per_ask: float
    """Of the uplink, beyond the payload in whole bytes."""
    framing_as_stated: bool
    """Whether every frame had the length that the protocol states for its payload."""
    same_tokens_share: Share
    """Share of tokens equal to those of one process under the same random numbers, prompt by prompt
    up to the first that differs."""
    before: tuple[Cell, ...]
    """(27), with the times of the calibration, against the clock."""
    cells: tuple[Cell, ...]
    """(63), against the clock."""
    replayed: Cell
    """Token time by (63) at the very tokens that were decoded: what is left of the error is the
    machines' and the link's, and none of which tokens these prompts have."""

    @property
    def token_time(self) -> Cell:
        """Token time by (63), against the clock."""
        return _token_time(self.cells)

    @property
    def token_time_before(self) -> Cell:
        """Token time by (27), against the clock."""
        return _token_time(self.before)

    @property
    def gated(self) -> bool:
        """Whether a threshold decides about skips."""
        return self.rule != "none"


def _token_time(cells: tuple[Cell, ...]) -> Cell:
    return next(cell for cell in cells if cell.metric == "token_time_ms")


class WireLinkRuns(Record):
    """All that was run over one link."""

    link_name: str
    link: dict[str, Any]
    runs: tuple[WireRun, ...]

    @property
    def by_time(self) -> list[WireRun]:
        """Its runs, the fastest first, by the clock."""
        return sorted(self.runs, key=lambda run: run.token_time.measured.value or 0.0)


class WireRecord(StageRecord):
    """wire.json: server, link and device as processes, the clock against the prediction."""

    file_name: ClassVar[str] = "wire.json"
    made_by: ClassVar[str] = "hlm validate --wire --point POINT"

    derivation: str
    provenance: Provenance
    pair: PairIdentity
    dtype: str
    num_threads: int
    """Of each of the two processes that run a model."""
    prob_bits: int
    seed: int
    max_new_tokens: int
    prompt_ids: tuple[str, ...]
    confidence: float
    links: tuple[WireLinkRuns, ...]
    mean_time_error: float
    """Of the token time, |predicted - clock| over clock, in the mean over points and links."""
    mean_time_error_replayed: float
    """The same of `replayed`."""
    mean_time_error_before: float
    """The same of (27)."""
    coverage: Coverage
    """Of the figures that a clock gave."""


class GuaranteeRow(Record):
    """How one rule at one budget did over many redrawn calibrations."""

    rule: str
    """Unique at its source and budget: family, or test and cap where it is not the usual one."""
    family: str
    test: TestMethod | None
    """Of Learn-then-Test; t is asymptotic and guarantees nothing."""
    budget: float
    cap: float | None
    """Answer cap, chosen from budget, confidence and number of prompts alone."""
    source: Literal["all-prompts", "halves"]
    weighting: Certified
    """What the budget is about."""
    num_draws: int
    num_calibration_prompts: int
    violation_share: Figure
    infeasible_share: Figure
    skip_rate: Figure
    risk: Figure


class GuaranteesRecord(StageRecord):
    """guarantees.json: do the rules keep their promise on the run's own prompts?"""

    file_name: ClassVar[str] = "guarantees.json"
    made_by: ClassVar[str] = "hlm guarantees"

    score: str
    num_draws: int
    num_prompts: int
    num_tokens: int
    confidence: float
    seed: int
    provenance: Provenance
    certificates: tuple[Certificate, ...]
    """What each test certifies from the run's own prompts."""
    rows: tuple[GuaranteeRow, ...]


class PlanRow(Record):
    """Prompts that one rule needs for one budget."""

    budget: float
    rule: str
    test: TestMethod | None
    """Null for the conformal rule."""
    guaranteed: bool
    """Whether the rule promises its confidence: not the asymptotic t, nor conformal, which
    promises a mean, nor wsr for prompts drawn by category."""
    cap: float | None
    """Answer cap at that number of prompts."""
    goal_skip_rate: float
    """Share of tokens that the certified threshold is to skip at least."""
    without_loss: int
    """Prompts below which nothing can be certified."""
    num_prompts: int | None
    """Prompts that certify the goal with the wanted power; null if `most` do not."""
    wall_s: float | None
    """Decoding of so many prompts, by the run's own clock."""


class PlanInterval(Record):
    """Prompts at which a figure's interval is so wide from end to end."""

    metric: str
    budget: float
    """The figure is that of the threshold that the rows' goal stands for."""
    width: float
    num_prompts: int
    wall_s: float


class PlanRecord(StageRecord):
    """What `hlm plan --json` prints; it is kept in no file."""

    num_prompts: int
    """Of the run's calibration."""
    num_tokens: int
    score: str
    certified: Certified
    confidence: float
    power: float
    """Chance of getting the certificate."""
    most: int
    """Prompts beyond which nothing was tried."""
    ms_per_prompt: float
    rows: tuple[PlanRow, ...]
    intervals: tuple[PlanInterval, ...]


class AttenuationRow(Record):
    """One K: the line predicted from exact u, and the one measured on drawn u_K."""

    num_temperatures: int
    reliability: float
    exact_correlation: float
    predicted_correlation: float
    predicted_slope: float
    measured_correlation: Figure
    measured_slope: Figure
    correlation_gap: Figure
    slope_gap: Figure
    num_tokens: int
    num_prompts: int


class AttenuationRecord(StageRecord):
    """attenuation.json: what drawing K tokens does to the fitted line; docs/theory.md, (6)."""

    file_name: ClassVar[str] = "attenuation.json"
    made_by: ClassVar[str] = "hlm attenuation"

    pair: PairIdentity
    confidence: float
    provenance: Provenance
    rows: tuple[AttenuationRow, ...]


class QualityRow(Record):
    """Text scores of one operating point against a draw of the server's law."""

    policy: str
    rule: str
    reference: str
    coupled_with: str | None
    bertscore: Figure
    cosine: Figure
    bertscore_difference: Figure
    cosine_difference: Figure
    identical: Figure
    shared_prefix: Figure
    num_prompts: int


class Backbone(Record):
    """An encoder that texts were scored with."""

    name: str
    source: str
    sha256: str | None
    max_tokens: int
    num_cut: int
    layer: int | None = None
    note: str = ""


class QualityRecord(StageRecord):
    """quality.json: the reruns' texts against the server model's own."""

    file_name: ClassVar[str] = "quality.json"
    made_by: ClassVar[str] = "hlm quality"

    derivation: str
    model: Backbone
    embedding: Backbone
    reference: str
    second_draw: str
    confidence: float
    num_prompts: int
    num_texts: int
    num_empty: int
    max_new_tokens: int
    seed: int
    mismatched: dict[str, Figure]
    rows: tuple[QualityRow, ...]
    provenance: Provenance


class AuditedToken(Record):
    """One line of what `hlm monitor` reads: one token that the policy emitted."""

    model_config = ConfigDict(strict=True)

    skipped: bool
    """Whether the device emitted its draft without the server's verification."""
    rejection: Share | None = None
    """beta of a skipped draft that was checked, or 0 or 1 of an acceptance test; else null."""
    audit_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Chance that the draft, if skipped, was checked; null for that of the command."""
    answer: str | None = None
    """Which answer the token belongs to; the lines of an answer follow one another."""


class MonitorSettings(Record):
    """What is watched; a state goes on with the settings that it began with."""

    risk: float
    confidence: float
    audit_rate: float
    """The least that any skipped draft is checked with."""
    unit: MonitorUnit
    """What the mean is over: tokens, or answers of each one's mean over its tokens."""
    window: int | None
    """Units after which the watch begins anew; null for never."""


class MonitorPlace(Record):
    """How far a file was read, so that nothing is counted twice."""

    file: str
    num_bytes: int
    num_lines: int
    tail_sha256: str
    """Of the last 1024 bytes that were read, or fewer: a file that changed there is refused."""


class MonitorTally(Record):
    """All that is kept of the losses of the present window; hlmtheory.monitoring.Tally."""

    num: int
    total: float
    rising: tuple[float, ...]
    falling: tuple[float, ...]


class OpenAnswer(Record):
    """An answer that no other has followed yet: it counts when one does."""

    answer: str
    num_tokens: int
    loss: float
    """Sum over its tokens."""


class MonitorAlarm(Record):
    """When the e-value first reached its level."""

    num_units: int
    """Tokens or answers until then, of all windows."""
    line: int
    """Lines read until then."""


class MonitorRecord(StageRecord):
    """monitor.json: the watch on a risk budget, and all it needs to go on; docs/theory.md, (42)."""

    file_name: ClassVar[str] = "monitor.json"
    made_by: ClassVar[str] = "hlm monitor --state monitor.json"

    settings: MonitorSettings
    alarm: MonitorAlarm | None
    """The first; null while it is quiet."""
    log_e_value: float
    """Natural logarithm of the present window's e-value."""
    log_alarm_level: float
    """What raises the alarm when log_e_value reaches it."""
    mean_risk: Figure
    """Of the units of the present window, with its confidence sequence."""
    num_lines: int
    num_units: int
    num_skipped: int
    num_checked: int
    expected_checked: float
    """Sum of the audit rates of all skipped drafts."""
    as_audited: bool
    """Whether num_checked is within chance of expected_checked: five times its square root."""
    window: int
    """The present window, from 1."""
    tally: MonitorTally
    open_answer: OpenAnswer | None
    closed_answers: tuple[str, ...]
    """The last that others have followed: none of them may come back."""
    place: MonitorPlace | None
    """Null after reading from a pipe."""


STAGES: tuple[type[StageRecord], ...] = (
    RunRecord,
    CalibrationRecord,
    DerivationRecord,
    ValidationRecord,
    WireRecord,
    GuaranteesRecord,
    AttenuationRecord,
    QualityRecord,
    MonitorRecord,
    ExportRecord,
)
"""Every file of a run, in the order they are made."""
