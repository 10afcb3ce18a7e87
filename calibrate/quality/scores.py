r"""`hlm quality`: how close the texts of a rerun are to the server model's own.

Two scores of a text against a reference text of the same prompt: BERTScore F1 (the papers' metric,
by the `bert-score` library) and the cosine of sentence embeddings. The backbone is not the papers':
theirs is not known to us, and BERTScore changes with it, so these figures are to be compared with
each other and not with published ones.

**Yardsticks.** Two texts drawn from the server model for one prompt differ, so even the server
itself does not score 1. What a second draw from its law scores is the mark that lossless decoding
reaches: the `hlm` rerun is such a draw. It is called the ceiling, but bounds nothing: a policy with
a narrower law (truncated, sharper) lies nearer to the middle of the server's texts and can score
more without being closer in law, so a difference above 0 is a deviation like one below. The floor
is the `slm` rerun; what the server's text scores against its text for another prompt says where the
scale begins.

**Coupled reruns.** All reruns of one `hlm validate` share their random numbers: the stream of
(seed, prompt) gives every policy the same columns (calibrate/decode/streams.py). Where the server
samples (`llm`, `ask-llm`, `r-hlm`) a token comes from the RESAMPLE columns; where the device's
draft stands (`slm`, `hlm`, and whatever a gate skips) it comes from the DRAFT columns, which no
text of `llm` has seen. So the texts of `r-hlm` and of `llm` begin with long identical prefixes,
often to the end, as do those of `u-hlm` and `hlm`, and scoring one against the other would measure
the shared random numbers and not the quality. But there are two draws of the server's law, `llm`
and `hlm`, of different columns. Each policy is

- scored against the draw that it shares the shorter prefixes with, its `reference`. F1 and cosine
  are symmetric, so the ceiling is one figure, F1(hlm, llm), for both references;
- compared with the other draw, `coupled_with`: the paired difference of their scores against the
  same reference, of which the shared random numbers take the noise out.

The two are not independent either: what `hlm` resamples after a rejection comes from the columns of
`llm`, from another law. They agree in more tokens than two draws would, so the ceiling is somewhat
too high.

What coupling is left shows in `shared_prefix`, the tokens until the first that differs from the
reference's: it should be about that of `hlm` with `llm`. It grows where a policy mixes skipped
drafts with tokens that the server samples (`r-hlm` at a middling skip rate), and its score is then
too high.

`identical` is the share of prompts whose tokens are those of `coupled_with`. By the coupling
inequality, TV(P, Q) <= P(X != Y) for any joint law, so 1 - identical bounds from above the total
variation between the policy's and the server's law of *texts*, on average over prompts. Limits:
threshold below every uncertainty gives identical = 1 and difference 0; `slm` gives 0 (the bound
says nothing).

A text ends at the rerun's --max-new-tokens. Prompts are the unit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import mean_figure, share_figure
from calibrate.run.folder import Figure, provenance, read_json, write_json
from calibrate.run.traces import read_header, read_trace
from hlmtheory.policies import POLICY_NAMES

Measure = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(candidates, references) to scores (N,); symmetric, 1 for equal texts."""


@dataclass(frozen=True)
class Rerun:
    """Output tokens of one operating point, prompt by prompt.

    Attributes
    ----------
    policy, rule : str
    seed : int
    prompt_ids : tuple of str
        Ascending.
    tokens : tuple of tuple of int
        One entry a prompt.
    """

    policy: str
    rule: str
    seed: int
    prompt_ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class QualityRow:
    """Scores of one operating point.

    Attributes
    ----------
    policy, rule : str
    reference : str
        The server's draw it is scored against: the one it shares the shorter prefixes with.
    coupled_with : str or None
        The other, which shares most of its random numbers; None for `hlm`, the draw itself.
    bertscore, cosine : Figure
        Means over prompts, with Student-t intervals.
    bertscore_difference, cosine_difference : Figure
        Paired by prompt: the score less that of the coupled draw against the same reference.
    identical : Figure
        Share of prompts with the coupled draw's very tokens, with its exact binomial interval.
    shared_prefix : Figure
        Leading tokens that are those of the reference: coupling that is left.
    num_prompts : int
    """

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


@dataclass(frozen=True)
class QualityPlan:
    """What is to be scored, checked before any model is loaded."""

    run: Path
    reruns: tuple[Rerun, ...]
    confidence: float
    model: str | None
    num_layers: int | None
    batch_size: int
    settings: dict[str, Any]
    command: tuple[str, ...]


def prepare_quality(
    run: Path,
    model: str | None = None,
    num_layers: int | None = None,
    batch_size: int = 32,
    command: Sequence[str] = (),
) -> QualityPlan:
    """Read the reruns of a validated run; loads no model.

    Parameters
    ----------
    run : Path
    model : str, optional
        Hub id or folder of BERTScore's backbone; the embedded encoder by default.
    num_layers : int, optional
        Layer whose outputs are compared, from 1; by default bert-score's own for the model.
    batch_size : int
        Texts encoded together.
    command : sequence of str

    Raises
    ------
    UserError, UsageError
        The run is not validated, lacks the `llm` or `hlm` rerun, mixes reruns, or bert-score is
        not installed.
    """
    validation = read_json(run, "validation.json")
    reruns = read_reruns(run)
    if importlib.util.find_spec("bert_score") is None:
        raise UserError("BERTScore needs the bert-score library: pip install bert-score")
    if model is not None and num_layers is None and Path(model).is_dir():
        raise UsageError(
            f"--num-layers is needed with --model {model}: a folder has no tuned layer"
        )
    return QualityPlan(
        run=run,
        reruns=reruns,
        confidence=validation["confidence"],
        model=model,
        num_layers=num_layers,
        batch_size=batch_size,
        settings=read_json(run, "run.json")["settings"],
        command=tuple(command),
    )


def read_reruns(run: Path) -> tuple[Rerun, ...]:
    """Tokens of every rerun, baselines first.

    Raises
    ------
    UserError
        If the server's two draws are not both there, or the reruns do not belong together.
    """
    reruns = [_read_rerun(path) for path in sorted((run / "reruns").glob("*.parquet"))]
    missing = [name for name in ("llm", "hlm") if name not in {r.policy for r in reruns}]
    if missing:
        raise UserError(
            f"RUN {run}: no rerun of {' and '.join(missing)} to compare with; run `hlm validate "
            f"{run} --policy llm --policy hlm` with every other --policy to be scored (it replaces "
            "the reruns)"
        )
    if len({(rerun.seed, rerun.prompt_ids) for rerun in reruns}) > 1:
        raise UserError(
            f"RUN {run}: its reruns differ in seed or prompts; run `hlm validate` again"
        )
    reruns.sort(key=lambda rerun: (POLICY_NAMES.index(rerun.policy), rerun.rule))
    return tuple(reruns)


def _read_rerun(path: Path) -> Rerun:
    header = read_header(path)
    trace = read_trace([path], ["output_token"])
    ends = np.cumsum(np.bincount(trace.prompt_index, minlength=trace.num_prompts))[:-1]
    tokens = np.split(trace["output_token"].astype(np.int64), ends)
    point = header["operating_point"]
    return Rerun(
        point["policy"],
        point["rule"],
        header["seed"],
        tuple(trace.prompt_ids),
        tuple(tuple(part.tolist()) for part in tokens),
    )


def score_texts(
    measure: Measure, candidates: Sequence[str], references: Sequence[str]
) -> np.ndarray:
    """Scores (N,) of pairs, with the rule for empty texts.

    A measure is not defined where a text holds nothing but white space: two such texts are equal
    and score 1, one alone scores 0 (as bert-score has it for an empty candidate).
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates, {len(references)} references: give pairs")
    pairs = [(a.strip(), b.strip()) for a, b in zip(candidates, references, strict=True)]
    scores = np.array([float(not a and not b) for a, b in pairs])
    known = [i for i, (a, b) in enumerate(pairs) if a and b]
    if known:
        scores[known] = measure([pairs[i][0] for i in known], [pairs[i][1] for i in known])
    return scores


def shared_prefix(mine: Rerun, other: Rerun) -> np.ndarray:
    """Number of leading tokens that two reruns have in common, prompt by prompt (N,)."""
    lengths = []
    for a, b in zip(mine.tokens, other.tokens, strict=True):
        differing = (i for i, (s, t) in enumerate(zip(a, b, strict=False)) if s != t)
        lengths.append(float(next(differing, min(len(a), len(b)))))
    return np.array(lengths)


def score_reruns(
    reruns: Sequence[Rerun],
    decode: Callable[[Sequence[int]], str],
    measures: Mapping[str, Measure],
    confidence: float,
    on_row: Callable[[str], None] | None = None,
) -> tuple[list[QualityRow], dict[str, Figure]]:
    """Every rerun but `llm` against the server's draws; see the module's head.

    Parameters
    ----------
    reruns : sequence of Rerun
        On the same prompts; `llm` and `hlm` among them.
    decode : callable
        Tokens to text.
    measures : mapping of str to Measure
        Named "bertscore" and "cosine".
    confidence : float
    on_row : callable, optional
        Told what is being scored.

    Returns
    -------
    rows : list of QualityRow
    mismatched : dict of str to Figure
        Scores of `hlm` texts against `llm` texts of other prompts; None with one prompt.
    """
    server = {name: next(r for r in reruns if r.policy == name) for name in ("llm", "hlm")}
    texts = {name: [decode(tokens) for tokens in draw.tokens] for name, draw in server.items()}
    ceiling = {
        name: score_texts(measure, texts["hlm"], texts["llm"]) for name, measure in measures.items()
    }
    rows = []
    for rerun in reruns:
        if rerun.policy == "llm":
            continue
        if on_row is not None:
            on_row(f"scoring {rerun.policy} {rerun.rule}")
        prefixes = {name: shared_prefix(rerun, draw) for name, draw in server.items()}
        is_ceiling = rerun is server["hlm"]
        reference = min(prefixes, key=lambda name: float(prefixes[name].mean()))
        coupled = "llm" if reference == "hlm" else "hlm"
        own_texts = [decode(tokens) for tokens in rerun.tokens]
        means, differences = {}, {}
        for name, measure in measures.items():
            scores = (
                ceiling[name] if is_ceiling else score_texts(measure, own_texts, texts[reference])
            )
            means[name] = mean_figure(scores, confidence)
            differences[name] = mean_figure(scores - ceiling[name], confidence)
        pairs = zip(rerun.tokens, server[coupled].tokens, strict=True)
        same = [mine == theirs for mine, theirs in pairs]
        rows.append(
            QualityRow(
                rerun.policy,
                rerun.rule,
                reference,
                None if is_ceiling else coupled,
                means["bertscore"],
                means["cosine"],
                Figure(0.0) if is_ceiling else differences["bertscore"],
                Figure(0.0) if is_ceiling else differences["cosine"],
                Figure(None) if is_ceiling else share_figure(sum(same), len(same), confidence),
                mean_figure(prefixes[reference], confidence, "token"),
                len(rerun.prompt_ids),
            )
        )
    num = len(texts["llm"])
    # half a file away, for neighbours by id may be about the same thing
    other = [texts["hlm"][(i + num // 2) % num] for i in range(num)]
    mismatched = {
        name: mean_figure(score_texts(measure, other, texts["llm"]), confidence)
        if num > 1
        else Figure(None)
        for name, measure in measures.items()
    }
    return rows, mismatched


def run_quality(
    plan: QualityPlan,
    encoder_folder: Path,
    device: str = "auto",
    on_row: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score every rerun and write quality.json.

    Parameters
    ----------
    plan : QualityPlan
    encoder_folder : Path
        From :func:`calibrate.quality.encoder.ensure_encoder`.
    device : str
    on_row : callable, optional
        Told what is being scored.

    Returns
    -------
    dict
        The content of quality.json.
    """
    from calibrate.pairs.loading import load_tokenizer, resolve_device
    from calibrate.pairs.store import ensure_folder
    from calibrate.quality.bertscore import BACKBONE_NOTE, ENCODER_LAYER, BertScore, own_backbone
    from calibrate.quality.encoder import ENCODER, MAX_TOKENS, SentenceEncoder
    from calibrate.validate.validation import spec_from_settings

    device = resolve_device(device)
    encoder_identity = {
        "name": ENCODER.label,
        "source": f"package {ENCODER.requirement}",
        "sha256": ENCODER.weights_sha256,
    }
    if plan.model is None:
        folder, layer = encoder_folder, plan.num_layers or ENCODER_LAYER
        identity = dict(encoder_identity)
    else:
        folder, layer, identity = own_backbone(plan.model, plan.num_layers)
    bert = BertScore(folder, layer, device, plan.batch_size)
    encoder = SentenceEncoder(encoder_folder, device, plan.batch_size)
    # The pair's tokenizer alone: its models stay on the disk.
    server = spec_from_settings(plan.settings).llm
    tokenizer = load_tokenizer(ensure_folder(server), server.label)

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    rows, mismatched = score_reruns(
        plan.reruns, decode, {"bertscore": bert.f1, "cosine": encoder.cosine},
        plan.confidence, on_row,
    )  # fmt: skip
    texts = sorted({decode(tokens) for rerun in plan.reruns for tokens in rerun.tokens})
    result: dict[str, Any] = {
        "model": {
            **identity, "layer": layer, "max_tokens": bert.max_tokens,
            "num_cut": bert.num_cut(texts), "note": BACKBONE_NOTE,
        },
        "embedding": {
            **encoder_identity, "max_tokens": MAX_TOKENS, "num_cut": encoder.num_cut(texts)
        },
        "reference": "llm",
        "second_draw": "hlm",
        "confidence": plan.confidence,
        "num_prompts": len(plan.reruns[0].prompt_ids),
        "num_texts": len(texts),
        "num_empty": sum(
            not decode(tokens).strip() for rerun in plan.reruns for tokens in rerun.tokens
        ),
        "max_new_tokens": plan.settings["max_new_tokens"],
        "seed": plan.reruns[0].seed,
        "mismatched": {name: asdict(figure) for name, figure in mismatched.items()},
        "rows": [asdict(row) for row in rows],
        **provenance(plan.command, "bert-score"),
    }  # fmt: skip
    write_json(plan.run / "quality.json", result)
    return result
