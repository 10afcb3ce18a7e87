"""A step: everything that a policy reads of one next-token decision, live or recorded.

One record serves both. While decoding, a :class:`LawStep` works its columns out of the two laws
when they are asked for; in a trace the same columns lie stored, and :class:`Step` reads them.
Policies are functions of columns, so a prediction is the policy itself run on recorded steps.

Of the vocabulary a trace keeps the *head*: the HEAD_SIZE likeliest candidates in falling order,
with x, y and u of each. Exact uncertainty falls with the logit, so a gate's skip set is a prefix of
the vocabulary in that order, and as long as the head's last candidate is above the threshold the
head says everything. Where it is not (thresholds near 1), tokens beyond it are represented by the
draft that was drawn; see :class:`Skip`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from hlmtheory.acceptance import rejection_probability, total_variation
from hlmtheory.coupling import coupling_columns
from hlmtheory.domain import Array
from hlmtheory.order import largest, on_accelerator, put_along_last_axis
from hlmtheory.sampled_law import PLAIN, Sampling
from hlmtheory.truncation import tail_deviation_at
from hlmtheory.truncation_bias import ENTRIES, truncation_table
from hlmtheory.uncertainty import (
    Temperatures,
    entropy,
    exact_uncertainty,
    log_partitions,
    perturbed_probabilities,
    sampled_uncertainty,
    sampled_uncertainty_variance,
    temperatures,
)

HEAD_SIZE = 32
"""Candidates of each step that a trace keeps."""


@dataclass(frozen=True)
class Axes:
    """What the columns of a step mean: stored with them, and read from there.

    Attributes
    ----------
    vocab_size : int
        V, tokens of the shared vocabulary.
    sampling : Sampling
        What makes both laws of the models' logits.
    thetas : tuple of float
        Perturbation temperatures of the uncertainty.
    truncation_sizes : tuple of int
        k of the columns `tail_deviation` and `truncation_table`, at most V.
    attention_sizes : tuple of int
        k of the column `topk_attention`.
    """

    vocab_size: int
    sampling: Sampling = PLAIN
    thetas: tuple[float, ...] = temperatures().values
    truncation_sizes: tuple[int, ...] = (
        1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 48, 64, 96, 128, 256, 512, 832, 1024, 2048, 4096, 8192,
    )  # fmt: skip
    attention_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        for name in ("thetas", "truncation_sizes", "attention_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        cut = (min(size, self.vocab_size) for size in self.truncation_sizes)
        object.__setattr__(self, "truncation_sizes", tuple(dict.fromkeys(cut)))

    @property
    def truncation_entries(self) -> tuple[tuple[int, str], ...]:
        """What stands along `truncation_table`: k, and one of hlmtheory.truncation_bias.ENTRIES."""
        return tuple((size, entry) for size in self.truncation_sizes for entry in ENTRIES)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of these axes; those of the sampling lie beside the others."""
        own = asdict(self)
        return {**own.pop("sampling"), **own}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Axes:
        """Axes from their JSON object; every field is needed, none may be unknown."""
        sampling, own = ({one.name for one in fields(kind)} for kind in (Sampling, cls))
        own -= {"sampling"}
        needed = own | sampling
        odd = sorted(needed ^ entry.keys())
        if odd:
            raise ValueError(f"axes: {odd[0]} is {'missing' if odd[0] in needed else 'unknown'}")
        found = Sampling(**{name: entry[name] for name in sampling})
        return cls(sampling=found, **{name: entry[name] for name in own})


class Noise(Protocol):
    """Random numbers of one step of a batch; a pure function of seed, prompt and step."""

    draft: Array
    """Uniforms (B, 2) of the draft."""
    accept: Array
    """Uniforms (B,) of the acceptance."""
    resample: Array
    """Uniforms (B, 2) of the server's own draw."""
    perturbation: Array
    """Uniforms (B, K) of the sampled uncertainty."""

    def races(self) -> Array:
        """Standard exponentials (B, V) that device and server share."""
        ...

    def rows(self, index: Array) -> Noise:
        """The numbers of some contexts."""
        ...


class Step:
    """Columns of B contexts, (B, ...) each, with their axes.

    Parameters
    ----------
    axes : Axes
    columns : mapping of str to array (N, ...)
    rows : slice or integer array
        Which of the N rows are this step's.
    """

    has_laws = False

    def __init__(self, axes: Axes, columns: Mapping[str, Array], rows: Any = slice(None)) -> None:
        self.axes = axes
        self._columns = columns
        self._rows = rows

    def __getitem__(self, name: str) -> Array:
        """One column; floats of a recorded step come in float64."""
        if name not in self._columns:
            raise ValueError(f"column {name!r} is not recorded in this step")
        values = self._columns[name][self._rows]
        if isinstance(values, np.ndarray) and values.dtype == np.float32:
            return values.astype(np.float64)
        return values

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def recorded(self, name: str) -> Array:
        """Bool (B,): in which contexts a column that is kept at some steps only was kept."""
        return np.isfinite(self._columns[name][self._rows][:, 0])

    def rows(self, index: Array) -> Step:
        """Some of its contexts."""
        num = len(next(iter(self._columns.values())))
        return Step(self.axes, self._columns, np.arange(num)[self._rows][index])

    def with_columns(self, columns: Mapping[str, Array]) -> Step:
        """The same step with further columns, (B, ...) each."""
        own = {name: self[name] for name in self._columns}
        return Step(self.axes, own | dict(columns))


class LawStep(Step):
    """A live step: the device's logits and both laws, its columns worked out when asked for.

    Parameters
    ----------
    axes : Axes
    logits : array (B, V)
        z of the device model, behind the repetition penalty and before any temperature.
    x, y : array (B, V)
        The laws that device and server sample from; y is None where only the device is at hand.
    noise : Noise, optional
        Needed by `uncertainty_sampled` and by policies that draw.
    head_size : int
        Candidates to look at: as many as a policy's gate may skip, at least HEAD_SIZE.
    columns : mapping, optional
        Columns known beforehand, such as those of attention.
    """

    has_laws = True

    def __init__(
        self,
        axes: Axes,
        logits: Array,
        x: Array,
        y: Array | None,
        noise: Noise | None = None,
        head_size: int = HEAD_SIZE,
        columns: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(axes, dict(columns or {}))
        self.logits, self.x, self._y, self._noise = logits, x, y, noise
        self.head_size = min(max(head_size, HEAD_SIZE), logits.shape[-1])

    @property
    def y(self) -> Array:
        """The server's law."""
        if self._y is None:
            raise ValueError("y is None: this step was made without the server's law")
        return self._y

    @property
    def noise(self) -> Noise:
        """The random numbers of this step."""
        if self._noise is None:
            raise ValueError("noise is None: this step was made without random numbers")
        return self._noise

    def __getitem__(self, name: str) -> Array:
        """One column, worked out once."""
        known: dict[str, Array] = self._columns  # type: ignore[assignment]
        if name not in known:
            column = COLUMNS.get(name)
            if column is None or column.compute is None:
                raise ValueError(f"column {name!r} cannot be worked out of the laws alone")
            known[name] = column.compute(self)
        return known[name]

    def __contains__(self, name: str) -> bool:
        column = COLUMNS.get(name)
        return name in self._columns or (column is not None and column.compute is not None)

    def with_columns(self, columns: Mapping[str, Array]) -> LawStep:
        """The same step with further columns: the draft, the output, what a policy remembers."""
        own = dict(self._columns) | dict(columns)
        return LawStep(self.axes, self.logits, self.x, self._y, self._noise, self.head_size, own)

    def rows(self, index: Array) -> LawStep:
        """Some of its contexts, with what is known of them already."""
        known = self._columns.items()
        own = {name: values[index] for name, values in known if not isinstance(values, tuple)}
        laws = (self.logits[index], self.x[index], None if self._y is None else self._y[index])
        noise = None if self._noise is None else self._noise.rows(index)
        return LawStep(self.axes, *laws, noise, self.head_size, own)

    def drafted(self, tokens: Array) -> LawStep:
        """The same step with its draft."""
        return self.with_columns({"draft_token": tokens})

    def at(self, law: Array, tokens: Array) -> Array:
        """Entries of a law (B, V) at one token a row, (B,)."""
        return array_namespace(law).take_along_axis(law, tokens[:, None], axis=-1)[:, 0]


@dataclass(frozen=True)
class Column:
    """One column of a step.

    Attributes
    ----------
    text : str
        What it is.
    axis : str
        Name of the axis of its second dimension; empty for one number a token.
    compute : callable or None
        From a live step; None for what the engine or a policy decides.
    """

    text: str
    axis: str = ""
    compute: Callable[[LawStep], Array] | None = field(default=None, repr=False)


def _thetas(step: LawStep) -> Temperatures:
    return Temperatures(step.axes.thetas)


def _head(name: str) -> Callable[[LawStep], Array]:
    """The first HEAD_SIZE entries of a candidate column."""
    return lambda step: step[name][:, :HEAD_SIZE]


def _at_candidates(law: Callable[[LawStep], Array]) -> Callable[[LawStep], Array]:
    return lambda step: array_namespace(step.x).take_along_axis(
        law(step), step["candidate_token"], axis=-1
    )


def _candidate_and_draft(step: LawStep) -> Array:
    """p_k of the candidates and of the draft behind them, (B, M + 1, K): one formula for both."""
    xp = array_namespace(step.logits)
    tokens = xp.concat([step["candidate_token"], step["draft_token"][:, None]], axis=-1)
    return perturbed_probabilities(step.logits, tokens, _thetas(step), step["log_partitions"])


def _uncertainties(step: LawStep) -> Array:
    xp = array_namespace(step.logits)
    return xp.clip(1.0 - xp.mean(step["candidate_and_draft_perturbed"], axis=-1), 0.0, 1.0)


def _candidate_tokens(step: LawStep) -> Array:
    """The likeliest tokens, falling; the one drawn at temperature 0 leads those it ties with."""
    logits = step.logits
    if step.axes.sampling.temperature == 0:
        xp = array_namespace(logits)
        logits = xp.where(step.x > 0, xp.full_like(logits, float("inf")), logits)
    return largest(logits, step.head_size)[1]


def _support_size(step: LawStep) -> Array:
    xp = array_namespace(step.x)
    return xp.sum(xp.astype(step.x > 0, xp.int64), axis=-1)


def _draft_rank(step: LawStep) -> Array:
    xp = array_namespace(step.logits)
    same = step["candidate_token"][:, :HEAD_SIZE] == step["draft_token"][:, None]
    place = xp.argmax(xp.astype(same, xp.int32), axis=-1)
    return xp.where(xp.any(same, axis=-1), place, xp.full_like(place, -1))


def _output_uncertainty(step: LawStep) -> Array:
    tokens = step["output_token"][:, None]
    return exact_uncertainty(step.logits, tokens, _thetas(step), step["log_partitions"])[:, 0]


def _draws(step: LawStep) -> Array:
    p = step["candidate_and_draft_perturbed"][:, -1]
    xp = array_namespace(p)
    return sampled_uncertainty(p, xp.astype(step.noise.perturbation[:, : p.shape[-1]], p.dtype))


COLUMNS: dict[str, Column] = {
    "prompt_id": Column("prompt that the token answers"),
    "step": Column("place of the token in its answer, from 0"),
    "draft_token": Column("token that the device drew"),
    "output_token": Column("token that was emitted"),
    "draft_prob": Column(
        "x of the draft", compute=lambda step: step.at(step.x, step["draft_token"])
    ),
    "target_prob": Column(
        "y of the draft", compute=lambda step: step.at(step.y, step["draft_token"])
    ),
    "rejection_prob": Column(
        "beta of the draft, max(0, 1 - y/x)",
        compute=lambda step: rejection_probability(step["draft_prob"], step["target_prob"]),
    ),
    "draft_rank": Column("place of the draft in the head, -1 beyond it", compute=_draft_rank),
    "uncertainty": Column(
        "exact uncertainty u of the draft",
        compute=lambda step: step["candidate_and_draft_uncertainty"][:, -1],
    ),
    "uncertainty_sampled": Column("u_K of the draft, from K drawn tokens", compute=_draws),
    "uncertainty_variance": Column(
        "variance of u_K given the draft",
        compute=lambda step: sampled_uncertainty_variance(
            step["candidate_and_draft_perturbed"][:, -1]
        ),
    ),
    "entropy": Column("entropy of x (nat)", compute=lambda step: entropy(step.x)),
    "max_prob": Column("largest entry of x", compute=lambda step: step["candidate_prob"][:, 0]),
    "margin": Column(
        "difference of the two largest entries of x",
        compute=lambda step: step["candidate_prob"][:, 0] - step["candidate_prob"][:, 1],
    ),
    "max_logit": Column(
        "largest logit of the device, behind the penalty and before any temperature",
        compute=lambda step: array_namespace(step.logits).max(step.logits, axis=-1),
    ),
    "tv_distance": Column(
        "total variation between x and y", compute=lambda step: total_variation(step.x, step.y)
    ),
    "support_size": Column(
        "tokens with x > 0; only where temperature 0, top-k or top-p leave but a few",
        compute=_support_size,
    ),
    "log_partitions": Column(
        "log of sum exp((z - max z)/theta) at every perturbation temperature",
        "thetas",
        lambda step: log_partitions(step.logits, _thetas(step)),
    ),
    "head_prob": Column("x of the head, falling", "head", _head("candidate_prob")),
    "head_target_prob": Column("y of the head", "head", _head("candidate_target_prob")),
    "head_uncertainty": Column("exact u of the head", "head", _head("candidate_uncertainty")),
    "head_agreement": Column(
        "P(device and server both draw it) under shared noise; NaN where not recorded",
        "head",
        lambda step: step["head_coupling"][0],
    ),
    "head_race": Column(
        "Phi at y/x of the head, docs/theory.md (41); NaN where not recorded",
        "head",
        lambda step: step["head_coupling"][1],
    ),
    "output_prob": Column(
        "x of the output", compute=lambda step: step.at(step.x, step["output_token"])
    ),
    "output_target_prob": Column(
        "y of the output", compute=lambda step: step.at(step.y, step["output_token"])
    ),
    "output_uncertainty": Column("exact u of the output", compute=_output_uncertainty),
    "tail_deviation": Column(
        "N(k), L1 distance between x and its truncation",
        "truncation_sizes",
        lambda step: tail_deviation_at(step.x, step.axes.truncation_sizes),
    ),
    "truncation_table": Column(
        "for each k what gives the bias of truncation and any gate together: rejected and residual "
        "mass, and the part beyond the head at 17 gates; NaN where not recorded",
        "truncation_entries",
        lambda step: truncation_table(
            step.x, step.y, step["candidate_token"][:, :HEAD_SIZE], step.axes.truncation_sizes
        ),
    ),
    "attention_sink": Column("attention on the first position"),
    "attention_entropy": Column("entropy of the attention row without its sink (nat)"),
    "context_attention": Column("attention on tokens other than the newest and the sink"),
    "num_attended": Column("positions of the attention row"),
    "topk_attention": Column("mean of the k largest attention weights", "attention_sizes"),
    "skipped": Column("whether the draft was emitted without the server"),
    "accepted": Column("whether the server accepted the draft, had it been sent"),
    "policy_skip_prob": Column("probability that the policy skips here, over the draft"),
    "policy_risk": Column("rejection risk rho of the policy here, over the draft"),
    "policy_bias": Column("total variation between the policy's output law and y"),
    "policy_log_ratio": Column(
        "log of the policy's law over y at the output; its sum weighs the whole answer, "
        "docs/theory.md (46)"
    ),
    "policy_entries": Column("probabilities sent with this draft, 0 where it was skipped"),
    # Of a live step only: candidates are the head, or more where a gate may skip more.
    "head_coupling": Column(
        "",
        compute=lambda step: coupling_columns(
            step.x, step.y, step["candidate_token"][:, :HEAD_SIZE]
        ),
    ),
    "candidate_token": Column("", compute=_candidate_tokens),
    "candidate_prob": Column("", compute=_at_candidates(lambda step: step.x)),
    "candidate_target_prob": Column("", compute=_at_candidates(lambda step: step.y)),
    "candidate_and_draft_perturbed": Column("", compute=_candidate_and_draft),
    "candidate_and_draft_uncertainty": Column("", compute=_uncertainties),
    "candidate_uncertainty": Column(
        "", compute=lambda step: step["candidate_and_draft_uncertainty"][:, :-1]
    ),
}
"""Every column of a step. Those without a text are of live steps only and never stored."""


def support_size(step: Step) -> Array | int:
    """Tokens that the device may draw, (B,) or one number: what the whole of x is sent as."""
    return step["support_size"] if step.axes.sampling.filtered else step.axes.vocab_size


def candidates(step: Step) -> tuple[Array, Array, Array]:
    """x, y and u of the candidates that a gate may look at, (B, M) each."""
    return (
        of_candidates(step, "prob"),
        of_candidates(step, "target_prob"),
        of_candidates(step, "uncertainty"),
    )


def of_candidates(step: Step, name: str) -> Array:
    """One of x (`prob`), y (`target_prob`) and u (`uncertainty`) of them; a device has no y."""
    return step[f"{'candidate' if step.has_laws else 'head'}_{name}"]


def is_output(step: Step, width: int) -> Array:
    """Which of the first `width` candidates the emitted token is, bool (B, width).

    A trace keeps the head's x and y, and no names of tokens: recorded, the output is where both
    are its own. Tokens of one context that share x and y are the same to every gate but at the
    head's very edge.
    """
    if step.has_laws:
        return step["candidate_token"][:, :width] == step["output_token"][:, None]
    x, y, _ = candidates(step)
    same_x = x[:, :width] == step["output_prob"][:, None]
    return same_x & (y[:, :width] == step["output_target_prob"][:, None])


def at_output(step: Step, values: Array) -> Array:
    """Values >= 0 of the first candidates (B, M) at the emitted token, (B,); 0 if beyond."""
    xp = array_namespace(values)
    own = is_output(step, values.shape[-1])
    return xp.max(xp.where(own, values, xp.zeros_like(values)), axis=-1)


@dataclass(frozen=True)
class Skip:
    r"""Which drafts a gate emits unverified: sigma, on the candidates and beyond them.

    Attributes
    ----------
    candidates : array (B, M)
        sigma of the first M candidates, M at most the head's; 0 from there to its end.
    whole : bool array (B,)
        sigma = 1 on the whole vocabulary.
    undecided : bool array (B,)
        The gate skips the whole head, and what it skips beyond is not recorded.
    of_draft : array (B,)
        sigma of the drawn draft. Where undecided it stands for the context: right on average over
        drafts, and in [0, 1].
    """

    candidates: Array
    whole: Array
    undecided: Array
    of_draft: Array

    def of_output(self, step: Step) -> Array:
        """Sigma of the emitted token, (B,); NaN where undecided."""
        xp = array_namespace(self.candidates)
        found = at_output(step, self.candidates)
        found = xp.where(self.undecided, xp.full_like(found, float("nan")), found)
        return xp.where(self.whole, xp.ones_like(found), found)

    def mass(self, step: Step) -> Array:
        r"""P(skip), :math:`\sum_v \sigma_v x_v`, (B,)."""
        x = of_candidates(step, "prob")
        total = self._total(self.candidates * x[:, : self.width], self.of_draft, 1.0)
        return array_namespace(x).clip(total, None, 1.0)  # single precision may add up to more

    def risk(self, step: Step) -> Array:
        r"""Rejection risk :math:`\rho = \sum_v \sigma_v (x_v - y_v)_+`, (B,): (11)."""
        x, y, _ = candidates(step)
        excess = array_namespace(x).clip(x - y, 0.0, None)[:, : self.width]
        return self._total(self.candidates * excess, self._of_drawn(step), step["tv_distance"])

    def floor(self, step: Step) -> Array:
        r"""Least bias of any scheme with this gate, :math:`\sum_v (\sigma_v x_v - y_v)_+`: (13)."""
        x, y, _ = candidates(step)
        sigma_x = self.candidates * x[:, : self.width]
        excess = array_namespace(x).clip(sigma_x - y[:, : self.width], 0.0, None)
        return self._total(excess, self._of_drawn(step), step["tv_distance"])

    def count(self, step: Step) -> Array:
        """Number of tokens with sigma x > 0, (B,); a draft beyond the head stands for 1/x_d."""
        xp = array_namespace(self.candidates)
        x = of_candidates(step, "prob")
        inside = xp.astype(self.candidates * x[:, : self.width] > 0, self.candidates.dtype)
        beyond = xp.astype(step["draft_rank"] < 0, inside.dtype) * self.of_draft
        more = xp.sum(inside, axis=-1) + beyond / xp.clip(step["draft_prob"], 1e-12, None)
        return self._total(inside, more, float(step.axes.vocab_size))

    def only(self, contexts: Array) -> Skip:
        """The same in these contexts, bool (B,); nothing is skipped in others."""
        kept = array_namespace(self.candidates).astype(contexts, self.candidates.dtype)
        return Skip(
            self.candidates * kept[:, None],
            self.whole & contexts,
            self.undecided & contexts,
            self.of_draft * kept,
        )

    def rows(self, index: Array) -> Skip:
        """The same of some contexts."""
        parts = (self.candidates, self.whole, self.undecided, self.of_draft)
        return Skip(*(part[index] for part in parts))

    @property
    def zeros(self) -> Array:
        """0 for each context, (B,)."""
        return 0 * self.of_draft

    def _of_drawn(self, step: Step) -> Array:
        return self.of_draft * step["rejection_prob"]

    def over_vocabulary(self, step: LawStep) -> Array:
        """Sigma of every token, (B, V)."""
        xp = array_namespace(step.x)
        tokens = step["candidate_token"][:, : self.width]
        values = xp.astype(self.candidates, step.x.dtype)
        sigma = put_along_last_axis(xp.zeros_like(step.x), tokens, values)
        if not on_accelerator(sigma) and not bool(xp.any(self.whole)):
            return sigma
        return xp.where(self.whole[:, None], xp.ones_like(sigma), sigma)

    @property
    def width(self) -> int:
        """M."""
        return int(self.candidates.shape[-1])

    def _total(self, pieces: Array, undecided: Array, whole: Array | float) -> Array:
        xp = array_namespace(pieces)
        total = xp.where(self.undecided, undecided, xp.sum(pieces, axis=-1))
        return xp.where(self.whole, 0 * total + whole, total)


def no_skip(step: Step) -> Skip:
    """Sigma = 0."""
    x = of_candidates(step, "prob")
    never = x[:, 0] < 0
    return Skip(0 * x[:, :1], never, never, 0 * x[:, 0])


def whole_skip(step: Step, whole: Array | None = None) -> Skip:
    """Sigma = 1 in the contexts `whole`, bool (B,), or in all; 0 in the others."""
    none = no_skip(step)
    return replace(none, whole=~none.whole if whole is None else whole)


def used_width(sigma: Array) -> int:
    """Columns of sigma (B, M) up to the last that is above 0 anywhere; at least one."""
    xp = array_namespace(sigma)
    used = xp.nonzero(xp.any(sigma > 0, axis=0))[0]
    return int(used[-1]) + 1 if len(used) else 1
