r"""`hlm quality`: how close the texts of a rerun are to the server model's own.

Two scores of a text against a reference text of the same prompt: BERTScore F1 (the papers' metric,
by the `bert-score` library) and the cosine of sentence embeddings. The backbone is not the papers':
theirs is not known to us, and BERTScore changes with it, so these figures are to be compared with
each other and not with published ones.

**Yardsticks.** Two texts drawn from the server model for one prompt differ, so even the server
itself does not score 1. The mark that lossless decoding reaches is what a second draw from its law
scores: the rerun of a lossless policy. It is called the ceiling, but bounds nothing: a policy with
a narrower law (truncated, sharper) lies nearer to the middle of the server's texts and can score
more without being closer in law, so a difference above 0 is a deviation like one below. The floor
is the device alone; the server's text against its text for another prompt says where the scale
begins.

**Shared random numbers.** All reruns of one validation share them (calibrate/decode/streams.py).
Where the server samples, a token comes from the RESAMPLE columns; where the device's draft stands,
from the DRAFT columns, which the server alone never reads. So the texts of a policy and of one of
the server's draws may begin with long identical prefixes, and scoring one against the other would
measure the shared numbers and not the quality. But there are two draws, of different columns: the
server's alone, and a lossless policy's. Each policy is

- scored against the draw that it shares the shorter prefixes with, its `reference`. F1 and cosine
  are symmetric, so the ceiling is one figure for both references;
- compared with the other draw, `coupled_with`: the paired difference of their scores against the
  same reference, of which the shared random numbers take the noise out.

The two draws are not independent either, for the lossless policy resamples from the server's
columns: the ceiling is somewhat too high. What coupling is left shows in `shared_prefix`, the
tokens until the first that differs from the reference's: far above that of the two draws, a score
is too high.

`identical` is the share of prompts whose tokens are those of `coupled_with`. By the coupling
inequality, TV(P, Q) <= P(X != Y) for any joint law, so 1 - identical bounds from above the total
variation between the policy's and the server's law of *texts*, on average over prompts. Limits:
a threshold below every score gives identical = 1 and difference 0; the device alone gives 0 (the
bound says nothing).

A text ends at the rerun's --max-new-tokens. Prompts are the unit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import AMOUNT, mean_figure, share_figure
from calibrate.run.folder import provenance, read_record, write_record
from calibrate.run.records import (
    Backbone,
    DerivationRecord,
    Figure,
    QualityRecord,
    QualityRow,
    RunRecord,
    RunSettings,
    ValidationRecord,
)
from calibrate.run.traces import read_trace, shards_in
from hlmtheory.policies import Policy, policy_class, policy_names, server_policies

Measure = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(candidates, references) to scores (N,); symmetric, 1 for equal texts."""


@dataclass(frozen=True)
class Rerun:
    """Output tokens of one operating point, prompt by prompt.

    Attributes
    ----------
    kind : type of Policy
    policy, rule : str
    prompt_ids : tuple of str
        Ascending.
    tokens : tuple of tuple of int
        One entry a prompt.
    """

    kind: type[Policy]
    policy: str
    rule: str
    prompt_ids: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class QualityPlan:
    """What is to be scored, checked before any model is loaded."""

    run: Path
    name: str
    reruns: tuple[Rerun, ...]
    validation: ValidationRecord
    settings: RunSettings
    model: str | None
    num_layers: int | None
    batch_size: int
    command: tuple[str, ...]


def prepare_quality(
    run: Path,
    name: str = "default",
    model: str | None = None,
    num_layers: int | None = None,
    batch_size: int = 32,
    command: Sequence[str] = (),
) -> QualityPlan:
    """Read the reruns of a validation; loads no model.

    Parameters
    ----------
    run : Path
    name : str
        Of the validation.
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
        The run is not validated, lacks one of the server's two draws, or bert-score is not
        installed.
    """
    validation = read_record(run, ValidationRecord, name)
    reruns = read_reruns(run, validation, read_record(run, DerivationRecord, validation.derivation))
    if importlib.util.find_spec("bert_score") is None:
        raise UserError("BERTScore needs the bert-score library: pip install bert-score")
    if model is not None and num_layers is None and Path(model).is_dir():
        raise UsageError(
            f"--num-layers is needed with --model {model}: a folder has no tuned layer"
        )
    settings = read_record(run, RunRecord).settings
    return QualityPlan(
        run, name, reruns, validation, settings, model, num_layers, batch_size, tuple(command)
    )


def read_reruns(
    run: Path, validation: ValidationRecord, derivation: DerivationRecord
) -> tuple[Rerun, ...]:
    """Tokens of every rerun of a validation, baselines first; one seed and the same prompts.

    Raises
    ------
    UserError
        If the server's two draws are not both there.
    """
    kinds = {info.name: policy_class(info.source or info.name) for info in derivation.policies}
    reruns = []
    for one in validation.reruns:
        trace = read_trace(shards_in(run / "reruns" / one.folder), ["output_token"])
        ends = np.cumsum(np.bincount(trace.prompt_index, minlength=trace.num_prompts))[:-1]
        tokens = np.split(trace["output_token"].astype(np.int64), ends)
        texts = tuple(tuple(part.tolist()) for part in tokens)
        kind = kinds[one.policy]
        reruns.append(Rerun(kind, one.policy, one.rule, tuple(trace.prompt_ids), texts))
    place = {name: i for i, name in enumerate(policy_names())}
    reruns.sort(key=lambda rerun: (place.get(rerun.policy, len(place)), rerun.rule))
    try:
        server_draws(reruns)
    except ValueError:
        needed = " ".join(f"--policy {kind.name}" for kind in server_policies())
        raise UserError(
            f"RUN {run}: no reruns of the server's law to compare with; run `hlm validate {run} "
            f"{needed}`, which adds them to the others"
        ) from None
    return tuple(reruns)


def server_draws(reruns: Sequence[Rerun]) -> tuple[Rerun, Rerun]:
    """The two draws of the server's law: the server's alone, and a lossless policy's.

    Raises
    ------
    ValueError
        If one of them is missing.
    """
    found = [
        next((r for r in reruns if r.kind.follows_server and r.kind.role == role), None)
        for role in ("server", "both")
    ]
    first, second = found
    if first is None or second is None:
        raise ValueError("reruns holds no two draws of the server's law")
    return first, second


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
    """Every rerun but the server's own against its two draws; see the module's head.

    Parameters
    ----------
    reruns : sequence of Rerun
        On the same prompts; the two draws among them.
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
        Scores of the second draw's texts against the server's of other prompts; no value with one
        prompt.
    """
    server, second = draws = server_draws(reruns)
    first_texts, second_texts = ([decode(tokens) for tokens in draw.tokens] for draw in draws)
    ceiling = {name: score_texts(m, second_texts, first_texts) for name, m in measures.items()}
    none = Figure(value=None)
    rows = []
    for rerun in reruns:
        if rerun is server:
            continue
        if on_row is not None:
            on_row(f"scoring {rerun.policy} {rerun.rule}")
        prefixes = [shared_prefix(rerun, draw) for draw in draws]
        apart = int(prefixes[1].mean() < prefixes[0].mean())
        reference, coupled = draws[apart], draws[1 - apart]
        own_texts = [decode(tokens) for tokens in rerun.tokens]
        scores = {
            name: ceiling[name]
            if rerun is second
            else score_texts(measure, own_texts, (first_texts, second_texts)[apart])
            for name, measure in measures.items()
        }
        means = {name: mean_figure(found, confidence) for name, found in scores.items()}
        same = [mine == theirs for mine, theirs in zip(rerun.tokens, coupled.tokens, strict=True)]
        rows.append(
            QualityRow(
                policy=rerun.policy,
                rule=rerun.rule,
                reference=reference.policy,
                coupled_with=None if rerun is second else coupled.policy,
                **means,
                **{
                    f"{name}_difference": Figure(value=0.0)
                    if rerun is second
                    else mean_figure(found - ceiling[name], confidence)
                    for name, found in scores.items()
                },
                identical=none
                if rerun is second
                else share_figure(sum(same), len(same), confidence),
                shared_prefix=mean_figure(prefixes[apart], confidence, "token", *AMOUNT),
                num_prompts=len(rerun.prompt_ids),
            )
        )
    num = len(first_texts)
    # half a file away, for neighbours by id may be about the same thing
    other = [second_texts[(i + num // 2) % num] for i in range(num)]
    mismatched = {
        name: mean_figure(score_texts(measure, other, first_texts), confidence) if num > 1 else none
        for name, measure in measures.items()
    }
    return rows, mismatched


def run_quality(
    plan: QualityPlan,
    encoder_folder: Path,
    device: str = "auto",
    on_row: Callable[[str], None] | None = None,
) -> QualityRecord:
    """Score every rerun and write the quality of that name.

    Parameters
    ----------
    plan : QualityPlan
    encoder_folder : Path
        From :func:`calibrate.quality.encoder.ensure_encoder`.
    device : str
    on_row : callable, optional
        Told what is being scored.
    """
    from calibrate.pairs.loading import load_tokenizer, resolve_device
    from calibrate.pairs.registry import spec_from_settings
    from calibrate.pairs.store import ensure_folder
    from calibrate.quality.bertscore import BACKBONE_NOTE, ENCODER_LAYER, BertScore, own_backbone
    from calibrate.quality.encoder import ENCODER, MAX_TOKENS, SentenceEncoder

    device = resolve_device(device)
    encoder_identity: dict[str, Any] = {
        "name": ENCODER.label,
        "source": f"package {ENCODER.requirement}",
        "sha256": ENCODER.weights_sha256,
    }
    folder, layer, identity = (
        (encoder_folder, plan.num_layers or ENCODER_LAYER, encoder_identity)
        if plan.model is None
        else own_backbone(plan.model, plan.num_layers)
    )
    bert = BertScore(folder, layer, device, plan.batch_size)
    encoder = SentenceEncoder(encoder_folder, device, plan.batch_size)
    # The pair's tokenizer alone: its models stay on the disk.
    server = spec_from_settings(plan.settings).llm
    tokenizer = load_tokenizer(ensure_folder(server), server.label)

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    confidence = plan.validation.confidence
    measures = {"bertscore": bert.f1, "cosine": encoder.cosine}
    rows, mismatched = score_reruns(plan.reruns, decode, measures, confidence, on_row)
    all_texts = [decode(tokens) for rerun in plan.reruns for tokens in rerun.tokens]
    texts = sorted(set(all_texts))
    draws = server_draws(plan.reruns)
    result = QualityRecord(
        derivation=plan.validation.derivation,
        model=Backbone(
            **identity,
            layer=layer,
            max_tokens=bert.max_tokens,
            num_cut=bert.num_cut(texts),
            note=BACKBONE_NOTE,
        ),
        embedding=Backbone(
            **encoder_identity, max_tokens=MAX_TOKENS, num_cut=encoder.num_cut(texts)
        ),
        reference=draws[0].policy,
        second_draw=draws[1].policy,
        confidence=confidence,
        num_prompts=len(plan.reruns[0].prompt_ids),
        num_texts=len(texts),
        num_empty=sum(not text.strip() for text in all_texts),
        max_new_tokens=plan.settings.max_new_tokens,
        seed=plan.validation.seed,
        mismatched=mismatched,
        rows=tuple(rows),
        provenance=provenance(plan.command, "bert-score"),
    )
    write_record(plan.run, result, plan.name)
    return result
