"""`hlm validate --wire`: server, link and device as processes, the clock against the prediction.

Skip rates and payloads are predicted from the calibration, as everywhere. Times of the machines are
measured where nothing delays a message, on calibration prompts, in turn with the validation prompts
that are decoded over the link, one at a time, while the clock is read: a machine's speed drifts,
and what the link adds is to be predicted, not that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrate.derive.predict import (
    RANGES,
    UNITS,
    PolicyTokens,
    drawn_tokens,
    economics_of,
    metrics,
    rate_of,
    unsent_before,
)
from calibrate.derive.presets import link_to_dict, load_link
from calibrate.derive.roads import Roads, read_roads
from calibrate.run.errors import UsageError, UserError
from calibrate.run.figure import as_figure, figure, share_figure
from calibrate.run.folder import provenance, read_record, record_path, write_record
from calibrate.run.prompts import (
    Prompt,
    draw_prompts,
    read_prompts,
    text_key,
    tokenize_prompts,
)
from calibrate.run.records import (
    Cell,
    Coverage,
    RunRecord,
    WireLinkRuns,
    WireProbe,
    WireRecord,
    WireRun,
    mean_off,
)
from calibrate.validate.comparison import cut, difference_error, prediction_interval
from calibrate.wire.device import WireAnswer, WireToken
from calibrate.wire.link import wire_link
from calibrate.wire.options import ServerOptions
from calibrate.wire.protocol import ask_bytes, reply_bytes
from calibrate.wire.run import Derived, read_derived, relaying, serving
from calibrate.wire.trace import write_wire_trace
from hlmtheory.clusters import (
    RatioEstimate,
    answer_rows,
    error_terms,
    joint_error,
    mean_over_tokens,
)
from hlmtheory.cost import WireCosts, payload_bits, wire_time_ms
from hlmtheory.link import Link
from hlmtheory.policies import Policy

if TYPE_CHECKING:
    from calibrate.pairs.loading import LoadedModel
    from calibrate.pairs.registry import PairSpec

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COUNTED = ("skip_rate", "uplink_bits_per_token")
CLOCKED = ("token_time_ms", "throughput_tok_s", "mean_throughput_tok_s")


@dataclass(frozen=True)
class WirePlan:
    """What is to be run over which links, checked before any model is loaded.

    Attributes
    ----------
    run, name : Path, str
    derived : Derived
    keys : tuple of str
        Operating points.
    links : dict of str to Link
    prompts, probes : tuple of Prompt
        As many of either: of validation, and of those that were calibrated on.
    num_threads : int or None
    command : tuple of str
    earlier : WireRecord or None
        What other links, or points, have shown before.
    """

    run: Path
    name: str
    derived: Derived
    keys: tuple[str, ...]
    links: dict[str, Link]
    prompts: tuple[Prompt, ...]
    probes: tuple[Prompt, ...]
    num_threads: int | None
    command: tuple[str, ...]
    earlier: WireRecord | None

    @property
    def spec(self) -> PairSpec:
        """The calibrated pair, resolved again."""
        from calibrate.pairs.registry import spec_from_settings

        return spec_from_settings(self.derived.calibration.settings)

    @property
    def num_tokens(self) -> int:
        """Most tokens that may be decoded."""
        answers = len(self.prompts) * (1 + len(self.links))
        return len(self.keys) * answers * self.derived.settings.max_new_tokens

    @property
    def policies(self) -> dict[str, Policy]:
        """Of every point."""
        return {key: self.derived.policy(key) for key in self.keys}


def prepare_wire(
    run: Path,
    name: str,
    keys: Sequence[str],
    links: Sequence[str],
    limit: int,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    num_threads: int | None = None,
    replace_earlier: bool = False,
    command: Sequence[str] = (),
) -> WirePlan:
    """Choose points, links and prompts; loads no model.

    Raises
    ------
    UserError, UsageError
        If a point is not derived or infeasible, a link is unknown, no fresh prompt is left, answers
        are to be longer than the calibration's, or what is asked for was run before and
        `replace_earlier` is not given.
    """
    derived = read_derived(run, name)
    calibrated = read_record(run, RunRecord)
    for key in keys:
        derived.policy(key)
    changes: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens}
    changes = {key: value for key, value in changes.items() if value is not None}
    derived = replace(derived, settings=replace(derived.settings, **changes))
    of = derived.calibration.settings
    if derived.settings.max_new_tokens > of.max_new_tokens:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens}: allowed is at most {of.max_new_tokens}, to which "
            "the calibration looked; calibrate with more"
        )
    every = read_prompts(None if of.prompts == "shipped" else of.prompts)
    used = set(calibrated.prompt_keys)
    prompts = draw_prompts(every, "validation", limit, derived.settings.seed, "random", used)
    # Of those that were calibrated on, again from the first where they are fewer.
    pool = [prompt for prompt in every if text_key(prompt.text) in used]
    if not pool:
        raise UserError(f"{of.prompts}: holds no prompt that was calibrated on; give the file back")
    probes = islice(cycle(pool), len(prompts))
    loaded = _named_links(links)
    earlier = None
    if record_path(run, WireRecord, name).is_file() and not replace_earlier:
        earlier = _kept(read_record(run, WireRecord, name), derived, prompts, keys, loaded)
    return WirePlan(
        run,
        name,
        derived,
        tuple(dict.fromkeys(keys)),
        loaded,
        tuple(prompts),
        tuple(probes),
        num_threads,
        tuple(command),
        earlier,
    )


def _named_links(links: Sequence[str]) -> dict[str, Link]:
    """Links by their names: of a file, without folder and ending."""
    out: dict[str, Link] = {}
    for source in links:
        link, name = load_link(source), Path(source).stem
        if out.setdefault(name, link) != link:
            raise UsageError(f"--link {source}: another link is called {name}; rename the file")
    return out


def _kept(
    earlier: WireRecord,
    derived: Derived,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    links: Mapping[str, Link],
) -> WireRecord:
    """Earlier runs that new ones may stand beside."""
    way_out = "--replace writes wire.json anew"
    ids = tuple(prompt.prompt_id for prompt in prompts)
    now = (derived.settings.seed, derived.settings.max_new_tokens, ids)
    if (earlier.seed, earlier.max_new_tokens, earlier.prompt_ids) != now:
        raise UsageError(
            f"--seed, --limit, --max-new-tokens: wire.json is of seed {earlier.seed}, "
            f"{len(earlier.prompt_ids)} prompts and {earlier.max_new_tokens} tokens; {way_out}"
        )
    for one in earlier.links:
        there = {f"{run.policy}/{run.rule}" for run in one.runs}
        if one.link_name not in links:
            continue
        if one.link != link_to_dict(links[one.link_name]):
            raise UsageError(
                f"--link {one.link_name}: wire.json has another link of this name; {way_out}, or "
                "rename the file"
            )
        if there & set(keys):
            again = sorted(there & set(keys))[0]
            raise UsageError(f"--point {again} over {one.link_name}: was run; {way_out}")
    return earlier


OnToken = Callable[[WireToken], None]


def run_wire(
    plan: WirePlan, model: LoadedModel, on_token: OnToken, on_part: Callable[[str], None]
) -> WireRecord:
    """Decode over every link and write the record.

    Parameters
    ----------
    plan : WirePlan
    model : LoadedModel
        The device's.
    on_token : callable
        For a progress bar.
    on_part : callable
        Told what is run next.
    """
    import torch

    roads = read_roads(plan.run, plan.derived.calibration)
    roads = roads.first(plan.derived.settings.max_new_tokens)
    policies = plan.policies
    answers: dict[tuple[str, str], list[WireAnswer]] = {}
    probes: dict[str, Probe] = {}
    options = ServerOptions(port=0)
    serve = serving(plan.spec.llm, options, model.dtype, model.device, plan.num_threads)
    with serve as port, ExitStack() as relays:
        on_part("warming up")
        for policy in policies.values():
            _decode(plan, model, policy, port, plan.probes[:1], lambda token: None)
        ports = {
            name: relays.enter_context(relaying(wire_link(link), port))
            for name, link in plan.links.items()
        }
        for key, policy in policies.items():
            on_part(key)
            beside: list[WireAnswer] = []
            for prompt, probe in zip(plan.prompts, plan.probes, strict=True):
                beside += _decode(plan, model, policy, port, [probe], on_token)
                for name, own in ports.items():
                    there = _decode(plan, model, policy, own, [prompt], on_token)
                    answers.setdefault((name, key), []).extend(there)
            probes[key] = Probe.of(beside)
            for name in ports:
                _keep_trace(plan, name, key, answers[name, key])
    on_part("the same prompts in one process")
    same = _one_process(plan, model.dtype, model.device)
    runs = {
        name: tuple(
            _judge(plan, roads, key, link, probes[key], answers[name, key], same[key])
            for key in plan.keys
        )
        for name, link in plan.links.items()
    }
    settings, links = plan.derived.settings, _joined(plan, runs)
    every = [run for one in links for run in one.runs]
    result = WireRecord(
        derivation=plan.name,
        provenance=provenance(plan.command),
        pair=plan.derived.derivation.pair,
        dtype=model.dtype,
        num_threads=plan.num_threads or torch.get_num_threads(),
        prob_bits=plan.derived.prob_bits,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        prompt_ids=tuple(prompt.prompt_id for prompt in plan.prompts),
        confidence=plan.derived.derivation.confidence,
        links=links,
        mean_time_error=mean_off(run.token_time for run in every),
        mean_time_error_replayed=mean_off(run.replayed for run in every),
        mean_time_error_before=mean_off(run.token_time_before for run in every),
        coverage=_coverage(links, plan.derived.derivation.confidence),
    )
    write_record(plan.run, result, plan.name)
    return result


def _coverage(links: Sequence[WireLinkRuns], confidence: float) -> Coverage:
    held = [
        cell.covered
        for one in links
        for run in one.runs
        for cell in run.cells
        if cell.source == "clock" and cell.covered is not None
    ]
    share = share_figure(sum(held), len(held), confidence)
    return Coverage(covered=sum(held), total=len(held), share=share)


def _joined(plan: WirePlan, runs: Mapping[str, tuple[WireRun, ...]]) -> tuple[WireLinkRuns, ...]:
    before = {one.link_name: one for one in plan.earlier.links} if plan.earlier else {}
    for name, found in runs.items():
        kept = before[name].runs if name in before else ()
        entry = link_to_dict(plan.links[name])
        before[name] = WireLinkRuns(link_name=name, link=entry, runs=(*kept, *found))
    return tuple(before.values())


def _decode(
    plan: WirePlan,
    model: LoadedModel,
    policy: Policy,
    port: int,
    prompts: Sequence[Prompt],
    on_token: OnToken,
) -> list[WireAnswer]:
    """One policy's answers, one prompt at a time."""
    from calibrate.wire.client import ServerLink

    ready = tokenize_prompts(
        prompts, model.tokenizer, plan.derived.settings.max_new_tokens, model.max_context
    )
    with ServerLink(f"ws://127.0.0.1:{port}") as link:
        device = plan.derived.device(policy, model, link)
        return [device.decode(prompt, on_token) for prompt in ready]


def _keep_trace(plan: WirePlan, link: str, key: str, answers: Sequence[WireAnswer]) -> None:
    path = plan.run / "wire" / link / f"{key.replace('/', '-')}.parquet"
    made = provenance(plan.command).model_dump(mode="json")
    tokens = [token for answer in answers for token in answer.tokens]
    write_wire_trace(path, tokens, {"point": key, "link": link, "provenance": made})


@dataclass(frozen=True)
class Probe:
    """A policy's tokens where nothing delays a message: means, and what each prompt adds to them.

    Attributes
    ----------
    decide, ask : RatioEstimate
        Milliseconds; the second of sent tokens alone.
    server_ms : float
        Of the second, inside the server's forward pass.
    num_tokens : int
    """

    decide: RatioEstimate
    ask: RatioEstimate
    server_ms: float
    num_tokens: int

    @classmethod
    def of(cls, answers: Sequence[WireAnswer]) -> Probe:
        """From answers; the first token of each waits for the prefill, and is left out."""
        index = np.repeat(np.arange(len(answers)), [len(one.tokens) - 1 for one in answers])
        tokens = [token for answer in answers for token in answer.tokens[1:]]
        asked = np.array([bool(one.received_bytes) for one in tokens])

        def mean(values: Sequence[float], where: np.ndarray) -> RatioEstimate:
            if not where.any():
                return RatioEstimate(0.0, 0.0, len(answers), np.zeros(len(answers)))
            chosen = np.where(where, np.array(values, dtype=float), np.nan)
            return mean_over_tokens(chosen, index, len(answers))

        every = np.ones(len(tokens), dtype=bool)
        return cls(
            mean([one.device_ms + one.score_ms for one in tokens], every),
            mean([one.frame_ms + one.wait_ms for one in tokens], asked),
            mean([one.server_ms for one in tokens], asked).value,
            len(tokens),
        )

    @property
    def costs(self) -> WireCosts:
        """The means."""
        return WireCosts(self.decide.value, self.ask.value)

    def influence(self, of: Callable[[WireCosts], float]) -> np.ndarray:
        """What each prompt adds to the error of a figure made of the means, to first order."""
        at, step = of(self.costs), 1e-4
        decide = WireCosts(self.decide.value + step, self.ask.value)
        ask = WireCosts(self.decide.value, self.ask.value + step)
        slopes = [(of(one) - at) / step for one in (decide, ask)]
        return slopes[0] * self.decide.influence + slopes[1] * self.ask.influence

    def record(self) -> WireProbe:
        """As it is kept."""
        return WireProbe(
            num_prompts=len(self.decide.influence),
            num_tokens=self.num_tokens,
            decide_ms=self.decide.value,
            ask_ms=self.ask.value,
            server_ms=self.server_ms,
        )


@dataclass(frozen=True)
class WireTimes:
    """What a policy's tokens take over a wire; docs/theory.md, (63).

    Attributes
    ----------
    sent : float array (N,)
        Probability that the server is asked.
    bits : float array (N,)
        Of the payload, if it is.
    skipped_ms, sent_ms : float array (N,)
        Time of the token if it is skipped, and if it is sent.
    later : bool array (N,)
        Whether it is behind the first of its answer, which waits for both prefills.
    """

    sent: np.ndarray
    bits: np.ndarray
    skipped_ms: np.ndarray
    sent_ms: np.ndarray
    later: np.ndarray

    @classmethod
    def of(
        cls, tokens: PolicyTokens, link: Link, costs: WireCosts, vocab_size: int, prob_bits: int
    ) -> WireTimes:
        """By (63), of what the policy does at each token."""
        sent = 1.0 - tokens.skip
        some = np.where(sent > 0, sent, 1.0)
        role = tokens.policy.role
        bits = np.asarray(
            payload_bits(
                np.where(sent > 0, tokens.entries / some, 0.0),
                vocab_size,
                prob_bits,
                draft_sent=tokens.policy.draft_sent,
                num_unsent=unsent_before(
                    tokens.skip, tokens.prompt_index, np.zeros(tokens.num_prompts)
                ),
            )
        )
        frames = np.array([8.0 * ask_bytes(int(one)) for one in np.round(bits)])
        up = np.asarray(link.uplink_time_ms(frames))
        down = float(link.downlink_time_ms(8.0 * reply_bytes(vocab_size)))
        none, ones = np.zeros_like(sent), np.ones_like(sent)
        if role != "both":
            bits, up, sent = none, none, none
        rest = (down, costs, link.round_trip_ms, role == "server")
        later = np.ones(len(sent), dtype=bool)
        later[answer_rows(tokens.prompt_index)[0]] = False
        return cls(
            sent, bits, wire_time_ms(none, none, *rest), wire_time_ms(ones, up, *rest), later
        )

    def quantiles(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Of the times of later tokens, skipped or sent as likely as they are."""
        times = np.concatenate([self.skipped_ms[self.later], self.sent_ms[self.later]])
        weights = np.concatenate([1.0 - self.sent[self.later], self.sent[self.later]])
        found = np.quantile(times, levels, weights=weights, method="inverted_cdf")
        return tuple(found.tolist())


def wire_means(
    tokens: PolicyTokens, link: Link, costs: WireCosts, vocab_size: int, prob_bits: int
) -> dict[str, RatioEstimate]:
    """Means over the wire of what a policy does at each token; docs/theory.md, (63).

    Times are of tokens behind the first of an answer.
    """
    times = WireTimes.of(tokens, link, costs, vocab_size, prob_bits)
    sent = times.sent

    def mean(values: np.ndarray) -> RatioEstimate:
        return mean_over_tokens(values, tokens.prompt_index, tokens.num_prompts)

    def later(if_skipped: np.ndarray, if_sent: np.ndarray) -> RatioEstimate:
        values = (1.0 - sent) * if_skipped + sent * if_sent
        return mean(np.where(times.later, values, np.nan))

    time_ms = later(times.skipped_ms, times.sent_ms)
    return {
        "skip_rate": mean(tokens.skip),
        "uplink_bits_per_token": mean(sent * times.bits),
        "token_time_ms": time_ms,
        "throughput_tok_s": rate_of(time_ms),
        "mean_throughput_tok_s": later(1e3 / times.skipped_ms, 1e3 / times.sent_ms),
    }


def _replayed(
    policy: Policy,
    rows: Sequence[WireToken],
    index: np.ndarray,
    num_prompts: int,
    link: Link,
    costs: WireCosts,
) -> RatioEstimate:
    """(63) at tokens that were decoded, with their own skips and bytes."""
    up = np.asarray(link.uplink_time_ms(np.array([8.0 * one.sent_bytes for one in rows])))
    asked = np.array([float(one.received_bytes > 0) for one in rows])
    down = float(link.downlink_time_ms(8.0 * max(one.received_bytes for one in rows)))
    alone = policy.role == "server"
    values = wire_time_ms(asked, up, down, costs, link.round_trip_ms, alone)
    return mean_over_tokens(values, index, num_prompts)


def _judge(
    plan: WirePlan,
    roads: Roads,
    key: str,
    link: Link,
    probe: Probe,
    answers: Sequence[WireAnswer],
    same: Mapping[str, Sequence[int]],
) -> WireRun:
    """One point over one link: what the clock says, and what was predicted."""
    derived, policy = plan.derived, plan.derived.policy(key)
    point, confidence = derived.point(key), derived.derivation.confidence
    size, bits = derived.derivation.pair.vocab_size, derived.prob_bits
    tokens = [token for answer in answers for token in answer.tokens]
    index = np.repeat(np.arange(len(answers)), [len(answer.tokens) for answer in answers])

    def clock(values: Sequence[float]) -> RatioEstimate:
        return mean_over_tokens(np.array(values, dtype=float), index, len(answers))

    # The first token of an answer waits for both prefills: it has a figure of its own.
    later = np.concatenate([np.arange(len(answer.tokens)) > 0 for answer in answers])
    times = np.array([one.token_ms for one in tokens])
    later_index, later_ms = index[later], times[later]
    later_tokens = [one for one, is_later in zip(tokens, later, strict=True) if is_later]

    def of_later(values: np.ndarray) -> RatioEstimate:
        return mean_over_tokens(values, later_index, len(answers))

    measured = {
        "skip_rate": clock([one.skipped for one in tokens]),
        "uplink_bits_per_token": clock([one.payload_bits for one in tokens]),
        "token_time_ms": of_later(later_ms),
        "throughput_tok_s": rate_of(of_later(later_ms)),
        "mean_throughput_tok_s": of_later(1e3 / later_ms),
    }

    def means(one: PolicyTokens) -> dict[str, RatioEstimate]:
        return wire_means(one, link, probe.costs, size, bits)

    prediction = roads.prediction(policy)

    def probed(name: str) -> np.ndarray:
        def figure_of(costs: WireCosts) -> float:
            return wire_means(prediction.server, link, costs, size, bits)[name].value

        return probe.influence(figure_of)

    ran = drawn_tokens(roads.server, policy)
    predicted, drawn = prediction.mean(means), means(ran)
    # The prompt has crossed the link when the tokens that the clock is read of begin.
    economics = replace(
        economics_of(derived.derivation), link=link, accounting="full", prompts_sent=False
    )
    cells = tuple(
        _cell(point.policy, point.rule, name, predicted[name], drawn[name], measured[name],
              confidence, probed(name))
        for name in (*COUNTED, *CLOCKED)
    )  # fmt: skip
    plain, plain_drawn = metrics(prediction, economics), metrics(ran, economics)
    before = tuple(
        _cell(point.policy, point.rule, name, plain[name], plain_drawn[name], measured[name],
              confidence)
        for name in CLOCKED
    )  # fmt: skip

    def replay(costs: WireCosts) -> RatioEstimate:
        return _replayed(policy, later_tokens, later_index, len(answers), link, costs)

    replayed = _replay_cell(
        point.policy, point.rule, replay(probe.costs), of_later(later_ms), confidence,
        probe.influence(lambda costs: replay(costs).value),
    )  # fmt: skip
    asked = [one for one in tokens if one.sent_bytes]
    beyond = [one.sent_bytes - -(-one.payload_bits // 8) for one in asked]
    total_s = 1e-3 * float(times.sum())
    return WireRun(
        policy=point.policy,
        rule=point.rule,
        probe=probe.record(),
        num_prompts=len(answers),
        num_tokens=len(tokens),
        first_token_ms=as_figure(
            mean_over_tokens(
                np.array([answer.first_ms for answer in answers]),
                np.arange(len(answers)),
                len(answers),
            ),
            "ms",
            confidence,
            0.0,
        ),
        token_ms_quantiles=tuple(float(one) for one in np.quantile(later_ms, QUANTILES)),
        predicted_ms_quantiles=WireTimes.of(
            prediction.server, link, probe.costs, size, bits
        ).quantiles(QUANTILES),
        server_busy_share=min(1e-3 * sum(one.server_ms for one in tokens) / total_s, 1.0),
        uplink_bytes_per_token=as_figure(
            clock([one.sent_bytes for one in tokens]), "byte/token", confidence, 0.0
        ),
        downlink_bytes_per_token=as_figure(
            clock([one.received_bytes for one in tokens]), "byte/token", confidence, 0.0
        ),
        framing_bytes_per_ask=float(np.mean(beyond)) if beyond else 0.0,
        framing_as_stated=all(
            one.sent_bytes == ask_bytes(one.payload_bits)
            and one.received_bytes == reply_bytes(size)
            for one in asked
        ),
        same_tokens_share=_same_share(answers, same),
        before=before,
        cells=cells,
        replayed=replayed,
    )


def _one_process(plan: WirePlan, dtype: str, device: str) -> dict[str, dict[str, Sequence[int]]]:
    """The tokens of every point and prompt from the engine, under the same random numbers."""
    from calibrate.decode.engine import decode_together
    from calibrate.decode.models import transformer_models
    from calibrate.pairs.loading import load_pair

    policies = plan.policies
    attention = any(policy.needs_attention for policy in policies.values())
    pair = load_pair(plan.spec, dtype=dtype, device=device, attention=attention)
    settings = replace(plan.derived.settings, batch_size=len(plan.prompts), trace="minimal")
    length = settings.max_new_tokens
    prompts = tokenize_prompts(plan.prompts, pair.tokenizer, length, pair.max_context)
    out: dict[str, dict[str, Sequence[int]]] = {key: {} for key in policies}
    slm, llm = transformer_models(pair)
    for batches in decode_together(slm, llm, prompts, policies, settings, pair.eos_token_ids):
        for key, batch in batches.items():
            rows, tokens = batch.columns["row"], batch.columns["output_token"]
            for row, name in enumerate(batch.prompt_ids):
                out[key][name] = tokens[rows == row].tolist()
    return out


def _same_share(answers: Sequence[WireAnswer], same: Mapping[str, Sequence[int]]) -> float:
    """Share of tokens before the first that differs."""
    equal = total = 0
    for answer in answers:
        mine = [token.output_token for token in answer.tokens]
        other = same[answer.tokens[0].prompt_id]
        pairs = zip(mine, other, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
        equal, total = equal + first, total + max(len(mine), len(other))
    return equal / total


def _cell(
    policy: str,
    rule: str,
    metric: str,
    predicted: RatioEstimate,
    drawn: RatioEstimate,
    measured: RatioEstimate,
    confidence: float,
    probed: np.ndarray | None = None,
) -> Cell:
    """`probed` is what the prompts of a probe add to the error.

    A clock's spread between prompts is not that of a calibration, which has one time for each kind
    of token. So the interval is of three independent errors: prediction, probe, and the clock.
    """
    error = difference_error(predicted.influence, drawn.influence, measured.influence, None)
    if metric in CLOCKED:
        parts = [predicted.influence, measured.influence, *([] if probed is None else [probed])]
        error = joint_error(*map(error_terms, parts))
    low = high = covered = None
    if error is not None:
        low, high = prediction_interval(predicted.value, error, confidence)
        covered = bool(low <= measured.value <= high)
    return Cell(
        policy=policy,
        rule=rule,
        metric=metric,
        source="clock" if metric in CLOCKED else "counted",
        predicted=figure(predicted.value, *cut(low, high, RANGES[metric]), UNITS[metric]),
        measured=as_figure(measured, UNITS[metric], confidence, *RANGES[metric]),
        covered=covered,
        fixed=bool(np.all(drawn.influence == 0) and np.all(measured.influence == 0)),
    )


def _replay_cell(
    policy: str,
    rule: str,
    replayed: RatioEstimate,
    measured: RatioEstimate,
    confidence: float,
    probed: np.ndarray,
) -> Cell:
    """The same tokens on both sides: errors are of their difference, prompt by prompt."""
    metric = "token_time_ms"
    paired = error_terms(measured.influence - replayed.influence)
    low, high = prediction_interval(
        replayed.value, joint_error(paired, error_terms(probed)), confidence
    )
    return Cell(
        policy=policy,
        rule=rule,
        metric=metric,
        source="clock",
        predicted=figure(replayed.value, *cut(low, high, RANGES[metric]), UNITS[metric]),
        measured=as_figure(measured, UNITS[metric], confidence, *RANGES[metric]),
        covered=bool(low <= measured.value <= high),
        fixed=False,
    )
