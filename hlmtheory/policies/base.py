"""What a policy is: how it decides, what it sends, how the server answers, and what that costs.

A policy is one class in one file. The defaults here are those of a policy that decides by a score
and verifies with the whole of x; a file says only what is its own. Everything is a function of a
step, so the engine and a prediction run the very same code: live, a step knows both laws; recorded,
it knows the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_type_hints

import numpy as np
from array_api_compat import array_namespace, device

from hlmtheory.answer_cap import cap_fraction, may_skip
from hlmtheory.domain import Array
from hlmtheory.order import largest, put_along_last_axis
from hlmtheory.sampling import sample_inverse_cdf
from hlmtheory.scores import Atoms, ExactUncertainty, Score
from hlmtheory.steps import (
    HEAD_SIZE,
    LawStep,
    Noise,
    Skip,
    Step,
    candidates,
    no_skip,
    support_size,
)
from hlmtheory.truncation_bias import ENTRIES, bias_from_table
from hlmtheory.verification import FullDistribution, output_bias, output_law

OUTPUT = ("output_prob", "output_target_prob")
"""Columns of x and y at the emitted token."""


@dataclass(frozen=True)
class Outcome:
    """What a policy does in each of B contexts, (B,) each.

    Attributes
    ----------
    skip : array
        Probability that the draft is emitted without the server.
    risk : array
        Rejection risk of the skipped drafts; docs/theory.md, (11).
    bias : array
        TV between the law of the output and the server's; NaN where a recorded step cannot tell.
    entries : array
        Probabilities sent, 0 where nothing is.
    rho : array
        Expected rejection risk: `risk`, or its mean over the draft where `risk` is of one draft.
    """

    skip: Array
    risk: Array
    bias: Array
    entries: Array
    rho: Array


@dataclass(frozen=True)
class Answer:
    """Tokens emitted (B,), and which drafts the server accepted or would have, bool (B,)."""

    output: Array
    accepted: Array


@dataclass(frozen=True)
class Fitted:
    """What a calibration knows, for policies that derive settings of their own from it.

    Attributes
    ----------
    slope, intercept : float
        The fitted line of beta on u.
    step : Step
        The recorded steps of the calibration.
    """

    slope: float
    intercept: float
    step: Step


@dataclass(frozen=True)
class DeriveOptions:
    """Options of a derivation that are about single policies.

    Attributes
    ----------
    thetas : tuple of float
        Tolerances of the truncation bound.
    eta : float
        Its sharpness.
    importances : tuple of dict
        variant, k, gamma each.
    draft_from_sent : bool
        Whether truncating policies are derived with drafts from the sent law too.
    """

    thetas: tuple[float, ...] = (0.1,)
    eta: float = 1.0
    importances: tuple[dict[str, Any], ...] = ()
    draft_from_sent: bool = False


class Memory:
    """What a policy remembers of the steps before, row by row; nothing, unless it says so."""

    def update(self, step: Step) -> dict[str, Array]:
        """Columns that the policy reads beside the step's own, and the state moved on."""
        return {}

    def advance(self, step: Step) -> None:
        """Take in the step's draft, all that later decisions need; it has update's columns."""

    def observe(self, step: Step) -> dict[str, Array]:
        """Columns of the step's output, from both laws at it; decisions do not need them."""
        return {}

    def keep(self, rows: Any) -> None:
        """Keep only these rows, in this order; one may come several times."""


class CapMemory(Memory):
    """Drafts skipped so far in each answer, beside what the gate itself remembers.

    And how likely each number of them is given the tokens: tokens do not tell which drafts were
    skipped, so the law of an answer is a sum over all they might have been; docs/theory.md, (46d).
    """

    def __init__(self, policy: GatedPolicy, cap: float, inner: Memory) -> None:
        self._policy, self._cap, self._inner = policy, cap, inner
        self._skipped: Array | None = None
        self._odds: list[Array] = []  # P(n skipped | tokens) from P_o at its least and greatest

    def update(self, step: Step) -> dict[str, Array]:
        """The gate's own columns, and `may_skip`, bool (B,)."""
        tokens = step["step"]
        if self._skipped is None:
            self._skipped = 0 * tokens
        return self._inner.update(step) | {"may_skip": may_skip(self._skipped, tokens, self._cap)}

    def advance(self, step: Step) -> None:
        """Count the draft where it was skipped."""
        self._inner.advance(step)
        skipped = self._policy.skips(step)
        count = array_namespace(skipped).astype(skipped, step["step"].dtype)
        self._skipped = count if self._skipped is None else self._skipped + count

    def observe(self, step: Step) -> dict[str, Array]:
        """`capped_log_ratio` (B, 2)."""
        return self._inner.observe(step) | {"capped_log_ratio": self._log_ratio(step)}

    def _log_ratio(self, step: Step) -> Array:
        """(46d): one step of the sum over what may have been skipped."""
        policy, y = self._policy, step[OUTPUT[1]]
        xp = array_namespace(y)
        wanted = policy.gate(step)
        closed = policy.output_probability(step, wanted.only(wanted.zeros > 0))
        taken = wanted.of_output(step) * policy.draft_probability(step)
        if not self._odds:
            self._odds = [0 * y[:, None] + 1.0] * 2
        ratios = []
        for end, p in enumerate(_where_decided(policy, step, wanted)):
            odds = self._odds[end]
            num = xp.arange(odds.shape[-1], device=device(odds))
            may = may_skip(num, step["step"][:, None], self._cap)
            stay = odds * xp.where(
                may, xp.clip(p - taken, 0.0, None)[:, None], closed[end][:, None]
            )
            move = odds * xp.where(may, taken[:, None], 0 * odds)
            none = 0 * odds[:, :1]
            both = xp.concat([stay, none], axis=-1) + xp.concat([none, move], axis=-1)
            total = xp.sum(both, axis=-1)
            self._odds[end] = both / xp.where(total > 0, total, xp.ones_like(total))[:, None]
            ratios.append(_log_of(total, y))
        return xp.stack(ratios, axis=-1)

    def keep(self, rows: Any) -> None:
        """Keep only these rows."""
        self._inner.keep(rows)
        if self._skipped is not None:
            self._skipped = self._skipped[rows]
            self._odds = [odds[rows] for odds in self._odds]


@dataclass(frozen=True)
class Policy:
    """A policy without a gate: every draft is verified with the whole of x.

    Attributes
    ----------
    name, label : str
        On the command line, and in figures.
    color, dashes, marker : str, tuple of float, str
        Its line and marker: Matplotlib's on-off pattern, empty for a solid line.
    paper : str or None
        The published system that it is.
    role : {"both", "device", "server"}
        Who decodes.
    gated : bool
        Whether it has a threshold to derive.
    follows_server : bool
        Whether its outputs have the server's law in every context.
    draft_sent : bool
        Whether the server learns the draft; only `full` accounting counts it.
    needs_attention, entries_vary, in_quickstart : bool
        Whether it looks at attention; whether its size differs from token to token; whether
        `hlm quickstart` reruns it.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    color: ClassVar[str] = "#6b6b6b"
    dashes: ClassVar[tuple[float, ...]] = (1, 3)
    marker: ClassVar[str] = ">"
    paper: ClassVar[str | None] = None
    role: ClassVar[Literal["both", "device", "server"]] = "both"
    gated: ClassVar[bool] = False
    follows_server: ClassVar[bool] = False
    draft_sent: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    entries_vary: ClassVar[bool] = False
    in_quickstart: ClassVar[bool] = False

    @property
    def rule(self) -> FullDistribution:
        """What the server verifies against, and what it draws instead."""
        return FullDistribution()

    @property
    def verifies_whole(self) -> bool:
        """Whether what is sent is verified with the whole of x: accept/resample, its bias rho."""
        own = type(self)
        plain = own.answer is Policy.answer and own.draft is Policy.draft
        return plain and type(self.rule) is FullDistribution

    @property
    def skips_all(self) -> bool:
        """Whether every draft is skipped."""
        return self.role == "device"

    # Settings: what a derivation stores, and builds again.

    @classmethod
    def variants(cls, fitted: Fitted, options: DeriveOptions) -> list[tuple[str, dict[str, Any]]]:
        """Settings to derive: (label, fields without threshold and score); the first label ""."""
        return [("", {})]

    def settings(self) -> dict[str, Any]:
        """The policy's own fields, JSON-able; threshold and score are told apart from them."""
        values = asdict(self)
        return {key: values[key] for key in values if key not in ("threshold", "score")}

    @classmethod
    def build(cls, settings: Mapping[str, Any], **gate: Any) -> Self:
        """The policy of some settings.

        Raises
        ------
        ValueError
            If a setting is unknown or missing, or its value is not allowed.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(f"policy {cls.name}: unknown setting {unknown[0]!r}")
        hints = get_type_hints(cls)
        try:
            values = {
                key: hints[key](**value) if is_dataclass(hints[key]) else value
                for key, value in settings.items()
            }
            return cls(**values, **gate)
        except TypeError as error:
            raise ValueError(f"policy {cls.name}: {error}") from None

    @property
    def fixed_size(self) -> int | None:
        """k of a policy that sends as many probabilities with every draft, and has a choice."""
        return None

    def with_size(self, num_entries: int) -> Policy:
        """The same policy with another k, where it has one."""
        raise ValueError(f"policy {self.name}: has no size of its own")

    @property
    def importance_settings(self) -> Any:
        """Variant, k and gamma of a policy that looks at importance; None of others."""
        return None

    def with_importance(self, k: float, gamma: float) -> GatedPolicy:
        """The same policy with a `topk` importance of this k and gamma, where it has one."""
        raise ValueError(f"policy {self.name}: looks at no importance")

    @property
    def remark(self) -> str:
        """What is degenerate about the settings; empty otherwise."""
        return ""

    # Deciding and sending: functions of a step, live or recorded.

    def memory(self) -> Memory:
        """State of a batch of answers."""
        return Memory()

    def num_candidates(self, vocab_size: int) -> int:
        """How many of the likeliest tokens a live step must look at."""
        return HEAD_SIZE

    def skip_probability(self, step: Step) -> Skip:
        """Sigma: which drafts are emitted without the server."""
        return no_skip(step)

    def skips(self, step: Step) -> Array:
        """Bool (B,): whether the drawn draft is."""
        return no_skip(step).whole

    def size(self, step: Step) -> Array | int | None:
        """Entries of a truncated law; None where nothing is truncated."""
        return None

    def entries(self, step: Step, skip: Skip) -> Array:
        """Probabilities sent with a draft that is sent, (B,): all of x, where it is not 0."""
        return skip.zeros + support_size(step)

    def bias(self, step: Step, skip: Skip) -> Array:
        """TV between the output's law and the server's, (B,): rho, for full verification (12)."""
        return skip.risk(step)

    def output_probability(self, step: Step, skip: Skip) -> tuple[Array, Array]:
        """Least and greatest probability P_o that the policy emits the output, (B,) each.

        Equal where the step says P_o exactly, NaN where it says nothing. For full verification
        docs/theory.md, (46a). Another rule's law is worked out live, and is unknown recorded; a
        policy that answers by itself must say its own.
        """
        exact = skip.zeros + float("nan")
        if self.verifies_whole:
            exact = self._verified(step, skip)
        elif type(self).answer is Policy.answer and isinstance(step, LawStep):
            sigma = skip.over_vocabulary(step)
            law = output_law(self.rule, step.x, step.y, sigma, self.size(step))
            exact = step.at(law, step["output_token"])
        return exact, exact

    def draft_probability(self, step: Step) -> Array:
        """Probability of the output as a draft, (B,): x, or live what is sent of it."""
        if not self.rule.drafts_from_sent:
            return step[OUTPUT[0]]
        if isinstance(step, LawStep):
            return step.at(self.rule.reference_law(step.x, self.size(step)), step["output_token"])
        return step[OUTPUT[0]] + float("nan")

    def _verified(self, step: Step, skip: Skip) -> Array:
        """P_o under full verification: y moved towards x, by sigma_o or by rho/TV(x, y)."""
        x, y, distance = (step[name] for name in (*OUTPUT, "tv_distance"))
        xp = array_namespace(x)
        share = skip.risk(step) / xp.where(distance > 0, distance, xp.ones_like(distance))
        weight = xp.where(x > y, skip.of_output(step), xp.clip(share, None, 1.0))
        return (1.0 - weight) * y + weight * x

    def log_ratio(self, step: Step) -> tuple[Array, Array]:
        r"""Least and greatest :math:`\ln(P_o/y_o)` at the output, (B,) each; docs/theory.md, (46).

        Equal where it is exact, NaN where the step says nothing of it. Infinite where one of the
        two laws never emits the output.
        """
        low, high = _where_decided(self, step, self.skip_probability(step))
        y = step[OUTPUT[1]]
        return _log_of(low, y), _log_of(high, y)

    def as_drafted(self, step: Step) -> Step:
        """The step with the law that drafts come from in the place of x."""
        return step

    def outcome(self, step: Step) -> Outcome:
        """What the policy does, averaged over the draft wherever the head decides."""
        skip, step = self.skip_probability(step), self.as_drafted(step)
        mass = skip.mass(step)
        entries = (1.0 - mass) * self.entries(step, skip)
        rho = skip.risk(step)
        return Outcome(mass, rho, self.bias(step, skip), entries, rho)

    def drawn(self, step: Step) -> Outcome:
        """What it does with the very draft that was drawn; the bias stays that of the law."""
        skip, entries = self.skip_probability(step), self.drawn_entries(step)
        skipped = array_namespace(skip.zeros).astype(self.skips(step), skip.zeros.dtype)
        step = self.as_drafted(step)
        risk = skipped * step["rejection_prob"]
        return Outcome(skipped, risk, self.bias(step, skip), entries, skip.risk(step))

    def drawn_entries(self, step: Step) -> Array:
        """Probabilities sent with the drawn draft, (B,): 0 where it is skipped."""
        entries = self.entries(self.as_drafted(step), self.skip_probability(step))
        return array_namespace(entries).where(self.skips(step), 0 * entries, entries)

    # Drawing: live steps only.

    def draft(self, step: LawStep) -> Array:
        """The device's draft, (B,)."""
        return sample_inverse_cdf(step.x, step.noise.draft)

    def answer(self, step: LawStep) -> Answer:
        """The tokens emitted: skipped and accepted drafts, and what the server draws instead."""
        xp = array_namespace(step.x)
        draft, skipped = step["draft_token"], self.skips(step)
        reference = self.rule.reference_law(step.x, self.size(step))
        accepted = self._accepts(reference, draft, step["target_prob"], step.noise)
        asks = xp.nonzero(~(skipped | accepted))[0]
        output = xp.asarray(draft, copy=True)
        if len(asks):
            taken = self.skip_probability(step).over_vocabulary(step) * step.x
            output[asks] = self._redrawn(
                reference[asks], taken[asks], step.y[asks], step.noise.resample[asks]
            )
        return Answer(output, accepted)

    def sent_law(self, step: LawStep) -> Array:
        """Probabilities that go with a draft that is sent, (B, V), 0 where none does: all of x.

        As many are not 0 as :meth:`entries` counts.
        """
        return step.x

    def reply(self, sent: Array, draft: Array, y: Array, noise: Noise) -> Answer:
        """What a server answers, from what it learns alone: :meth:`answer` where nothing skips.

        Parameters
        ----------
        sent : array (B, V)
            Of :meth:`sent_law`.
        draft : integer array (B,)
            Any token where the draft is not sent.
        y : array (B, V)
            The server's own law.
        noise : Noise
        """
        xp = array_namespace(y)
        reference = self.rule.reference_of(sent)
        target_prob = xp.take_along_axis(y, draft[:, None], axis=-1)[:, 0]
        accepted = self._accepts(reference, draft, target_prob, noise)
        output = xp.asarray(draft, copy=True)
        asks = xp.nonzero(~accepted)[0]
        if len(asks):
            output[asks] = self._redrawn(reference[asks], sent[asks], y[asks], noise.resample[asks])
        return Answer(output, accepted)

    def _accepts(self, reference: Array, draft: Array, target_prob: Array, noise: Noise) -> Array:
        draft_prob = array_namespace(reference).take_along_axis(reference, draft[:, None], axis=-1)[
            :, 0
        ]
        return noise.accept < self.rule.acceptance(draft_prob, target_prob)

    def _redrawn(self, reference: Array, taken: Array, y: Array, uniforms: Array) -> Array:
        """What the server draws in the place of a draft, (B,); `taken` is sigma x."""
        xp = array_namespace(y)
        weights = self.rule.resample_weights(reference, y, taken)
        # No residual mass: rounding sent a draft here that x = y would have accepted.
        empty = xp.sum(weights, axis=-1, keepdims=True) <= 0
        return sample_inverse_cdf(xp.where(empty, y, weights), uniforms)


def _where_decided(policy: Policy, step: Step, skip: Skip) -> tuple[Array, Array]:
    """P_o from below and from above; NaN where what the gate skips is not recorded."""
    unknown = skip.undecided & ~skip.whole
    low, high = (
        array_namespace(p).where(unknown, p + float("nan"), p)
        for p in policy.output_probability(step, skip)
    )
    return low, high


def _log_of(p: Array, y: Array) -> Array:
    """ln(p/y), infinite where either is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return array_namespace(p).log(p / y)


@dataclass(frozen=True)
class GatedPolicy(Policy):
    """A policy that skips a draft whose score is at most a threshold.

    A gate of one's own changes :meth:`gate` and :meth:`gate_of_draft`; what is skipped is what the
    gate wants and the cap allows.

    Attributes
    ----------
    also_skips : str
        Class attribute: which drafts it skips beside those at most the threshold, in words.
    threshold : float
        Values above the score's upper bound are read as that bound: everything is skipped.
    score : Score
        What is compared with it.
    cap : float or None
        Largest share of an answer's drafts that is skipped, at any length: hlmtheory.answer_cap.
    """

    gated: ClassVar[bool] = True
    also_skips: ClassVar[str] = ""

    threshold: float = field(kw_only=True)
    score: Score = field(default_factory=ExactUncertainty, kw_only=True)
    cap: float | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, own in (("skip_probability", "gate"), ("skips", "gate_of_draft")):
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name}: a gate of one's own is `{own}`")

    def __post_init__(self) -> None:
        threshold, score = self.threshold, self.score
        if threshold is None or not np.isfinite(threshold) or threshold < score.low:
            raise ValueError(
                f"threshold = {threshold}: policy {self.name} needs one in "
                f"[{score.low:g}, {score.high:g}], as its score {score.name} has"
            )
        object.__setattr__(self, "threshold", min(float(threshold), score.high))
        if self.cap is not None:
            cap_fraction(self.cap)

    def settings(self) -> dict[str, Any]:
        """The policy's own fields and its cap, if it has one."""
        values = super().settings()
        return {key: values[key] for key in values if key != "cap" or self.cap is not None}

    def with_threshold(self, threshold: float) -> Self:
        """The same policy at another threshold."""
        return replace(self, threshold=threshold)

    @property
    def skips_all(self) -> bool:
        """Whether every draft is skipped."""
        return self.threshold >= self.score.high and self.cap is None

    def memory(self) -> Memory:
        """Of the gate, and of the cap."""
        inner = self.gate_memory()
        return inner if self.cap is None else CapMemory(self, self.cap, inner)

    def gate_memory(self) -> Memory:
        """State of a gate that looks back."""
        return Memory()

    def num_candidates(self, vocab_size: int) -> int:
        """As many as the score asks for."""
        return self.score.num_candidates(self.threshold, vocab_size)

    def gate(self, step: Step) -> Skip:
        """Sigma that the gate wants: the score's."""
        return self.score.skip_probability(step, self.threshold)

    def gate_of_draft(self, step: Step) -> Array:
        """Bool (B,): whether the gate wants to skip the drawn draft; the score's."""
        return self.score.skips(step, self.threshold)

    def skip_probability(self, step: Step) -> Skip:
        """What the gate wants, where the cap allows it."""
        skip = self.gate(step)
        return skip if self.cap is None else skip.only(step["may_skip"])

    def skips(self, step: Step) -> Array:
        """What the gate wants, where the cap allows it."""
        wanted = self.gate_of_draft(step)
        return wanted if self.cap is None else wanted & step["may_skip"]

    def log_ratio(self, step: Step) -> tuple[Array, Array]:
        """Under a cap the memory has it, for it depends on what may have been skipped before."""
        if self.cap is None:
            return super().log_ratio(step)
        both = step["capped_log_ratio"]
        return both[:, 0], both[:, 1]

    def atoms(self, step: Step) -> Atoms:
        """Pieces of the draft's probability with the score that the gate sees; see Score.atoms."""
        return self.score.atoms(step)


class TruncatingPolicy(GatedPolicy):
    """A gated policy that sends a truncation of x; live its bias is that of its exact law.

    Recorded it comes from the step's truncation table: exact at a recorded size, up to the chords
    of the table, and linear in log k between two. Where the head does not decide, what is skipped
    beyond it is read off the draft and added: on average an upper bound. NaN where the table was
    not recorded.
    """

    def sent_law(self, step: LawStep) -> Array:
        """The k largest entries of x."""
        size: Any = self.size(step)
        x = step.x
        xp = array_namespace(x)
        most = size if isinstance(size, int) else int(xp.max(size))
        values, tokens = largest(x, most)
        inside = xp.arange(most, device=device(x)) < (
            size if isinstance(size, int) else size[:, None]
        )
        return put_along_last_axis(
            xp.zeros_like(x), tokens, xp.where(inside, values, xp.zeros_like(values))
        )

    @classmethod
    def recorded(cls, step: Step) -> bool:
        """Whether sizes and biases can be told from a recorded step."""
        return "tail_deviation" in step and "truncation_table" in step

    def bias(self, step: Step, skip: Skip) -> Array:
        """Of gate and truncation together; TV(x, y) where everything is skipped."""
        size = self.size(step)
        if isinstance(step, LawStep):
            return output_bias(self.rule, step.x, step.y, skip.over_vocabulary(step), size)
        out = skip.risk(step)
        if self.rule.drafts_from_sent or size is None or self.skips_all:
            return out
        out = np.full(out.shape, np.nan)
        if self.recorded(step):
            rows = np.flatnonzero(step.recorded("truncation_table"))
            sizes = np.broadcast_to(size, out.shape)[rows]
            out[rows] = recorded_bias(step.rows(rows), skip.rows(rows), sizes)
        return out


def recorded_bias(step: Step, skip: Skip, size: Array) -> Array:
    """Bias (B,) of a gate and a truncation to k entries (B,), from recorded tables."""
    sizes = np.array(step.axes.truncation_sizes)
    table = step["truncation_table"].reshape(-1, len(sizes), len(ENTRIES))
    x, y, _ = candidates(step)
    sigma = np.zeros_like(x)
    sigma[:, : skip.width] = skip.candidates

    def at(place: Array) -> Array:
        of = table[np.arange(len(table)), place]
        return bias_from_table(of, x, y, sigma, sizes[place], step.axes.vocab_size)

    size = np.clip(size, sizes[0], sizes[-1])
    upper = np.searchsorted(sizes, size)
    lower = upper - (sizes[upper] > size)
    bias = at(lower)
    if np.any(lower < upper):
        edge = np.clip(support_size(step), sizes[lower], sizes[upper])  # nothing is cut from there
        span = np.log(edge / sizes[lower])
        weight = np.minimum(np.log(size / sizes[lower]) / np.where(span > 0, span, 1.0), 1.0)
        bias += weight * (at(upper) - bias)
    drafts = skip.undecided & (step["draft_rank"] < 0)
    bias = np.minimum(bias + drafts * skip.of_draft * step["rejection_prob"], 1.0)
    return np.where(skip.whole, step["tv_distance"], bias)
