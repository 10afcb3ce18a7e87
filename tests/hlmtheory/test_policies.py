"""Policies: the registry, files of one's own, settings there and back, thresholds, importance."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_models import law_step, random_logits, stored

from hlmtheory import policies
from hlmtheory.policies import (
    REGISTRY,
    DeriveOptions,
    Fitted,
    GatedPolicy,
    Memory,
    Policy,
    calibration_policy,
    policy_class,
    policy_from_settings,
    policy_names,
    server_policies,
)
from hlmtheory.policies.base import CapMemory
from hlmtheory.policies.cu_hlm_offline import FixedTruncation
from hlmtheory.policies.ui_hlm import ImportanceGated, ImportanceMemory, ImportanceSettings
from hlmtheory.scores import SCORE_NAMES, Entropy, MaxLogit, SampledUncertainty, score_named
from hlmtheory.steps import Axes, LawStep, Step
from hlmtheory.verification import DraftFromSent, TruncatedDistribution

SETTINGS = {
    "cu-hlm-offline": {"num_entries": 30, "tolerance": 0.2, "draft_from_sent": True},
    "cu-hlm-online": {"theta": 0.1, "eta": 1.0, "slope": 0.815, "intercept": -0.066},
    "ui-hlm": {"importance": {"variant": "context", "k": 0.5, "gamma": 0.9}},
}
GATED = tuple(name for name in policy_names() if policy_class(name).gated)

MINE = """
from dataclasses import dataclass
from typing import ClassVar

from hlmtheory.policies import GatedPolicy

other = 3


@dataclass(frozen=True)
class Mine(GatedPolicy):
    name: ClassVar[str] = "mine"
    factor: float = 2.0

    def entries(self, step, skip):
        return skip.zeros + self.factor


@dataclass(frozen=True)
class Twin(GatedPolicy):
    name: ClassVar[str] = "u-hlm"


class Nameless(GatedPolicy):
    pass
"""


def build(name: str, threshold: float = 0.3) -> Policy:
    return policy_from_settings(name, SETTINGS.get(name, {}), threshold)


# --- the registry --------------------------------------------------------------------------------


def test_each_policy_is_one_file_of_its_name():
    folder = Path(inspect.getfile(policies)).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert files == set(REGISTRY)
    assert [name.replace("-", "_") for name in policy_names()] == REGISTRY
    looks = set()
    for name in policy_names():
        kind = policy_class(name)
        assert kind.name == name
        assert Path(inspect.getfile(kind)).stem == name.replace("-", "_")
        assert kind.label
        looks.add((kind.color, kind.dashes, kind.marker))
    assert len(looks) == len(REGISTRY)  # no two are drawn alike


def test_a_registered_file_may_hold_its_base_classes_but_one_policy():
    """A truncating policy imports its base; only the class that the file defines counts."""
    assert policy_class("cu-hlm-offline") is FixedTruncation
    assert issubclass(FixedTruncation, GatedPolicy)


def test_who_follows_the_server_and_who_calibrates():
    assert {one.name for one in server_policies()} == {"llm", "hlm"}
    assert calibration_policy() == build("hlm")
    assert not calibration_policy().gated


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"^policy vlm: unknown; known are slm, llm, hlm[^\n]*own$"
    ):
        policy_class("vlm")
    with pytest.raises(ValueError, match=r"^policy mine.txt:Mine: unknown"):
        policy_class("mine.txt:Mine")


# --- a file of one's own -------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_file_of_ones_own_loads_and_runs(mine, rng):
    source = f"{mine}:Mine"
    assert policy_class(source) is policy_class(source)
    policy = policy_from_settings(source, {"factor": 5.0}, 0.4)
    assert (policy.name, policy.factor, policy.threshold) == ("mine", 5.0, 0.4)
    step = law_step(rng, *random_logits(rng, 6, 50))
    for one in (step, stored(step)):
        found = policy.outcome(one)
        np.testing.assert_allclose(found.entries, 5 * (1 - found.skip))
    assert "mine" not in policy_names()


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("Yours", "the file holds no subclass of Policy of that name"),
        ("other", "the file holds no subclass of Policy of that name"),
        ("Twin", "name = 'u-hlm'; give it one of its own, of letters, digits, - and _"),
        ("Nameless", "name = ''; give it one of its own, of letters, digits, - and _"),
    ],
)
def test_wrong_names_in_a_file_are_answered_in_one_line(mine, attribute, says):
    with pytest.raises(ValueError, match=rf"^policy .*mine\.py:{attribute}: {says}$"):
        policy_class(f"{mine}:{attribute}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError on import"),
        ("def broken(:", "SyntaxError on import"),
        ("1 / 0", "ZeroDivisionError on import"),
    ],
)
def test_broken_files_are_answered_in_one_line(tmp_path, text, says):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^policy .*broken\.py:Mine: {says}[^\n]*$"):
        policy_class(f"{path}:Mine")
    with pytest.raises(ValueError, match=r"^policy .*none\.py:Mine: no such file$"):
        policy_class(f"{tmp_path / 'none.py'}:Mine")


def test_an_edited_file_of_the_same_stem_elsewhere_is_another_policy(mine, tmp_path):
    other = tmp_path / "sub" / "mine.py"
    other.parent.mkdir()
    other.write_text(MINE.replace('"mine"', '"other"'))
    assert policy_class(f"{other}:Mine").name == "other"
    assert policy_class(f"{mine}:Mine").name == "mine"


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy_names())
def test_settings_survive_json(name):
    policy = build(name)
    text = json.dumps(policy.settings())
    assert "threshold" not in text
    assert "score" not in text
    again = policy_from_settings(name, json.loads(text), 0.3)
    assert again == policy
    assert again.settings() == policy.settings()


def test_gates_keep_their_score_and_threshold():
    for name in GATED:
        for score in SCORE_NAMES[:-1]:
            policy = policy_from_settings(name, SETTINGS.get(name, {}), 0.25, score_named(score))
            assert policy.score.name == score
            assert policy.with_threshold(0.5) == policy_from_settings(
                name, SETTINGS.get(name, {}), 0.5, score_named(score)
            )
        assert build(name).score.name == "uncertainty"


@pytest.mark.parametrize("name", policy_names())
def test_unknown_settings_are_refused(name):
    with pytest.raises(ValueError, match=rf"^policy {name}: unknown setting 'colour'$"):
        policy_from_settings(name, SETTINGS.get(name, {}) | {"colour": 1}, 0.3)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("cu-hlm-offline", {}, "missing .*'num_entries'"),
        ("cu-hlm-online", {"theta": 0.1, "eta": 1.0, "slope": 0.8}, "missing .*'intercept'"),
    ],
)
def test_missing_settings_are_named(name, settings, says):
    with pytest.raises(ValueError, match=rf"^policy {name}: .*{says}"):
        policy_from_settings(name, settings, 0.3)


def test_unknown_keys_inside_a_setting_are_one_line_too():
    with pytest.raises(ValueError, match=r"^policy ui-hlm: .*'strictness'"):
        policy_from_settings("ui-hlm", {"importance": {"strictness": 3}}, 0.3)


def test_values_of_settings_are_checked():
    for bad in (0, -3):
        with pytest.raises(ValueError, match=rf"^num_entries = {bad}: allowed is >= 1"):
            policy_from_settings("cu-hlm-offline", {"num_entries": bad}, 0.3)
    for key in ("theta", "eta"):
        for value in (0.0, -0.1, math.nan, math.inf):
            settings = SETTINGS["cu-hlm-online"] | {key: value}
            with pytest.raises(ValueError, match=rf"^{key} = .*\(0, inf\)"):
                policy_from_settings("cu-hlm-online", settings, 0.3)
    for settings, says in (
        ({"variant": "mean"}, r"^variant = 'mean'"),
        ({"gamma": math.nan}, "^gamma"),
        ({"k": 0.5}, r"^k = 0\.5: allowed is >= 1 for topk"),
        ({"variant": "context", "gamma": 1.5}, r"^gamma = 1\.5"),
    ):
        with pytest.raises(ValueError, match=says):
            ImportanceSettings(**settings)


# --- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("threshold", [None, math.nan, math.inf, -0.2])
def test_gated_policies_need_a_threshold(name, threshold):
    with pytest.raises(ValueError, match=rf"^threshold = {threshold}: policy {name} .*\[0, 1\]"):
        build(name, threshold)


def test_a_threshold_above_the_score_is_read_as_its_bound():
    assert build("u-hlm", 1.7).threshold == 1.0
    assert policy_from_settings("u-hlm", {}, 1.7, Entropy()).threshold == 1.7
    assert policy_from_settings("u-hlm", {}, -31.0, MaxLogit()).threshold == -31.0
    with pytest.raises(ValueError, match=r"^threshold = -1: .*\[0, inf\], as its score entropy"):
        policy_from_settings("u-hlm", {}, -1, Entropy())


def test_policies_without_a_gate_take_no_threshold():
    for name in set(policy_names()) - set(GATED):
        assert build(name, 0.3) == build(name, 0.7)


def test_policies_cannot_be_changed():
    policy = build("u-hlm")
    with pytest.raises(AttributeError):
        policy.threshold = 0.5  # type: ignore[misc]
    assert hash(policy) == hash(build("u-hlm"))
    assert policy != build("u-hlm", 0.31)


# --- sizes and variants --------------------------------------------------------------------------


def test_a_fixed_size_never_exceeds_the_vocabulary(rng):
    step = law_step(rng, *random_logits(rng, 3, 20))
    policy = policy_from_settings("cu-hlm-offline", {"num_entries": 1_000}, 0.0)
    np.testing.assert_array_equal(policy.outcome(step).entries, 20)
    assert type(policy.rule) is TruncatedDistribution
    assert type(build("cu-hlm-offline").rule) is DraftFromSent


def test_variants_are_settings_that_build(rng):
    step = stored(law_step(rng, *random_logits(rng, 40, 300)))
    fitted = Fitted(0.8, -0.05, step)
    options = DeriveOptions(
        thetas=(0.5, 0.05),
        importances=({"variant": "topk", "k": 2}, {"variant": "context", "k": 1.0, "gamma": 0.9}),
        draft_from_sent=True,
    )
    labels = {}
    attention = {name: np.ones(40) for name in ("topk_attention",)}
    with_attention = Fitted(0.8, -0.05, step.with_columns(attention))
    for name in policy_names():
        variants = policy_class(name).variants(with_attention, options)
        assert variants[0][0] == ""
        for _, settings in variants:
            built = policy_from_settings(name, json.loads(json.dumps(settings)), 0.3)
            assert built.name == name
        labels[name] = [label for label, _ in variants]
    assert labels["cu-hlm-offline"] == ["", "@theta-0.05", "@draft-from-sent"]
    assert labels["cu-hlm-online"] == ["", "@theta-0.05"]
    assert labels["ui-hlm"] == ["", "@context-1-0.9"]
    # A minimal trace has neither truncation nor attention.
    bare = Fitted(0.8, -0.05, Step(step.axes, {"uncertainty": step["uncertainty"]}))
    for name in ("cu-hlm-offline", "cu-hlm-online", "ui-hlm"):
        assert policy_class(name).variants(bare, options) == []
    sizes = [one["num_entries"] for _, one in FixedTruncation.variants(fitted, options)[:2]]
    assert sizes[0] < sizes[1]  # a stricter tolerance needs more


def test_a_size_that_misses_its_tolerance_says_so():
    settings = {"num_entries": 30, "tolerance": 0.01, "tolerance_met": False}
    remark = policy_from_settings("cu-hlm-offline", settings, 0.3).remark
    assert remark == "no stored size meets theta = 0.01: k = 30, the largest"
    assert build("cu-hlm-offline").remark == ""


# --- drafts from the sent law --------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_drafting_from_the_sent_law_is_the_gate_on_that_law(rng, threshold):
    """(23): x replaced by the sent law throughout; live, recorded, expected and drawn agree."""
    from toy_models import softmax

    from hlmtheory.truncation import truncated_distribution
    from hlmtheory.uncertainty import exact_uncertainty, temperatures
    from hlmtheory.verification import output_bias

    z, w = random_logits(rng, 12, 30)
    settings = {"num_entries": 4, "draft_from_sent": True}
    policy = policy_from_settings("cu-hlm-offline", settings, threshold)
    step = law_step(rng, z, w)
    sent, y = truncated_distribution(softmax(z), 4), softmax(w)
    u = exact_uncertainty(z, np.tile(np.arange(30), (12, 1)), temperatures())
    sigma = (u <= threshold).astype(float)
    bias = output_bias(policy.rule, softmax(z), y, sigma, 4)
    skip, risk = (sigma * sent).sum(-1), (sigma * np.maximum(sent - y, 0)).sum(-1)
    np.testing.assert_allclose(risk, bias, atol=1e-12)
    for one in (step, stored(step)):
        found = policy.outcome(one)
        for name, exact in (("skip", skip), ("risk", risk), ("bias", bias)):
            np.testing.assert_allclose(getattr(found, name), exact, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found.entries, 4 * (1 - skip), atol=1e-12)
        np.testing.assert_allclose(policy.drawn(one).bias, bias, atol=1e-12)


# --- importance ----------------------------------------------------------------------------------


def attention_step(rng, num: int) -> Step:
    step = stored(law_step(rng, *random_logits(rng, num, 40)))
    return step.with_columns(
        {
            "topk_attention": rng.uniform(0, 0.5, (num, len(step.axes.attention_sizes))),
            "attention_entropy": rng.uniform(1, 2, num),
            "context_attention": rng.uniform(0.2, 0.8, num),
        }
    )


def test_unimportant_contexts_are_skipped_whole(rng):
    step = attention_step(rng, 200)
    settings = ImportanceSettings("topk", 2, 1.0)
    columns = ImportanceMemory(settings).update(step)
    focus = step["topk_attention"][:, step.axes.attention_sizes.index(2)]
    important = focus >= np.exp(-step["attention_entropy"])
    np.testing.assert_array_equal(columns["important"], important)
    assert 0.1 < important.mean() < 0.9
    step = step.with_columns(columns)
    for threshold in (0.0, 0.3, 1.0):
        policy = ImportanceGated(settings, threshold=threshold)
        plain = policy_from_settings("u-hlm", {}, threshold).outcome(step)
        found = policy.outcome(step)
        np.testing.assert_allclose(found.skip, np.where(important, plain.skip, 1), atol=1e-12)
        expected = np.where(important, plain.risk, step["tv_distance"])
        np.testing.assert_allclose(found.risk, expected, atol=1e-12)
        np.testing.assert_array_equal(
            policy.drawn(step).skip > 0, (step["uncertainty"] <= threshold) | ~important
        )


@pytest.mark.parametrize("score", ["uncertainty", "uncertainty_sampled", "entropy", "max_logit"])
def test_atoms_of_importance_are_its_gate(rng, score):
    """Cumulative atoms are the skip probability, also below every score that occurs."""
    step = attention_step(rng, 60)
    step = Step(step.axes, dict(step.with_columns({})._columns))
    step = step.with_columns(ImportanceMemory(ImportanceSettings("topk", 2, 1.0)).update(step))
    one = score_named(score)
    seen = one.of_draft(step)
    grid = [0.0, 0.02, 0.3, 0.8] if one.low == 0 else np.quantile(seen, [0.1, 0.5, 0.9])
    for threshold in grid:
        policy = ImportanceGated(threshold=float(threshold), score=one)
        values, mass, rejection = policy.atoms(step)
        assert np.isfinite(values).all()
        inside = values <= threshold + 1e-9 * isinstance(one, SampledUncertainty)
        skip = policy.skip_probability(step)
        head = step["head_uncertainty"][:, -1] > threshold
        rows = head if score == "uncertainty" else np.full(60, score != "uncertainty_sampled")
        rows = rows | ~step["important"]
        np.testing.assert_allclose((mass * inside).sum(-1)[rows], skip.mass(step)[rows], atol=1e-9)
        np.testing.assert_allclose(
            (rejection * inside).sum(-1)[rows], skip.risk(step)[rows], atol=1e-9
        )


def test_a_size_that_traces_do_not_record_is_refused(rng):
    memory = ImportanceMemory(ImportanceSettings("topk", 3))
    with pytest.raises(ValueError, match=r"^k = 3: allowed for topk are 1, 2, 4, 8, 16, the sizes"):
        memory.update(attention_step(rng, 3))
    axes = Axes(40, attention_sizes=(3,))
    step = Step(axes, {"topk_attention": np.ones((2, 1)), "attention_entropy": np.ones(2)})
    assert memory.update(step)["important"].all()


def test_running_importance_follows_its_rows(rng):
    """The context variant: everything important at first, then against mean + k deviations."""
    from hlmtheory.importance import RunningThreshold

    memory = ImportanceMemory(ImportanceSettings("context", 0.5, 0.8))
    values = rng.uniform(size=(4, 3))
    assert memory.update(Step(Axes(9), {"context_attention": values[0]}))["important"].all()
    running = RunningThreshold.start(values[0])
    found = memory.update(Step(Axes(9), {"context_attention": values[1]}))
    np.testing.assert_array_equal(found["important"], values[1] >= running.threshold(0.5))
    memory.keep(np.array([0, 2]))
    running = running.update(values[1], 0.8)
    found = memory.update(Step(Axes(9), {"context_attention": values[2][[0, 2]]}))
    np.testing.assert_allclose(found["importance_threshold"], running.threshold(0.5)[[0, 2]])


# --- the server's side ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.7])
def test_a_server_that_knows_what_is_sent_answers_as_the_policy_does(rng, name, threshold):
    policy = build(name, threshold)
    if policy.role == "device":
        return
    z, w = random_logits(rng, 400, 60)
    step = law_step(rng, z, w)
    step = step.with_columns({"important": np.ones(400, dtype=bool)})
    step = step.with_columns({"draft_token": policy.draft(step)})
    answer, skipped = policy.answer(step), policy.skips(step)
    sent = policy.sent_law(step)
    unknown = step["draft_token"] if policy.draft_sent else np.zeros(400, dtype=int)
    reply = policy.reply(sent, unknown, step.y, step.noise)
    asked = ~skipped
    assert asked.any()
    assert np.array_equal(reply.output[asked], answer.output[asked])
    if policy.draft_sent:
        assert np.array_equal(reply.accepted[asked], answer.accepted[asked])


@pytest.mark.parametrize("name", policy_names())
def test_as_many_probabilities_are_sent_as_are_counted(rng, name):
    policy = build(name)
    if policy.role == "device":
        return
    z, w = random_logits(rng, 300, 60)
    step = law_step(rng, z, w).with_columns({"important": np.ones(300, dtype=bool)})
    counted = np.broadcast_to(policy.drawn_entries(step), 300)
    asked = ~policy.skips(step)
    assert np.array_equal((policy.sent_law(step) > 0).sum(-1)[asked], counted[asked])


def test_a_device_decides_without_the_servers_law(rng):
    """What a phone computes reads nothing of y."""
    z, w = random_logits(rng, 200, 60)
    whole = law_step(rng, z, w).with_columns({"important": np.ones(200, dtype=bool)})
    alone = LawStep(whole.axes, whole.logits, whole.x, None, whole.noise)
    alone = alone.with_columns({"step": np.ones(200, dtype=int), "important": whole["important"]})
    for name in GATED:
        policy = replace(build(name), cap=0.5)
        draft = policy.draft(alone)
        step = alone.with_columns({"draft_token": draft})
        memory = policy.memory() if name != "ui-hlm" else CapMemory(policy, 0.5, Memory())
        step = step.with_columns(memory.update(step))
        memory.advance(step)
        assert np.array_equal(
            policy.skips(step), replace(policy, cap=None).skips(whole.drafted(draft))
        )
        policy.sent_law(step)
    with pytest.raises(ValueError, match="made without the server's law"):
        alone.drafted(alone.x.argmax(-1))["target_prob"]
