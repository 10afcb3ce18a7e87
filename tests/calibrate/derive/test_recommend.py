"""The recommendation: which point, whether certified, whether it pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_run

from calibrate.derive.derivation import derive_run
from calibrate.derive.recommend import (
    fixed_size,
    recommendation_texts,
    recommendations,
    risk_texts,
)
from calibrate.run.records import DerivationRecord, DeriveRequest, Figure, Pilot
from hlmtheory.policies import policy_names


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("advice") / "run"
    synthetic_run.make_calibration(path)
    return path


def derived(run: Path, *policies: str, **asked: object) -> DerivationRecord:
    request = DeriveRequest(policies=policies or policy_names(), **asked)  # type: ignore[arg-type]
    return derive_run(run, request)


def said(derivation: DerivationRecord) -> list[str]:
    (one,) = recommendations(derivation)
    return [" ".join(text.split()) for text in recommendation_texts(derivation, one)]


def test_of_the_policies_without_added_bias_the_one_that_sends_least(run: Path) -> None:
    derivation = derived(run, risks=(0.02, 0.05))
    for one, budget in zip(recommendations(derivation), (0.02, 0.05), strict=True):
        assert one.point is not None
        assert one.point.key == f"r-hlm/risk-{budget:g}"
        assert not one.hidden_bias
        predicted = one.point.predicted
        assert predicted["rejection_risk"].value <= budget * (1 + 1e-5)  # type: ignore[operator]
        rivals = ("u-hlm", "cu-hlm-online", "ask-llm")
        alike = [
            other
            for other in derivation.operating_points
            if other.rule == one.point.rule and other.policy in rivals
        ]
        assert len(alike) == 3
        for other in alike:
            sends_less = (
                other.predicted["uplink_bits_per_token"].value
                < predicted["uplink_bits_per_token"].value
            )  # type: ignore[operator]
            adds = other.predicted["tv_bias"].value > predicted["tv_bias"].value * 1.01  # type: ignore[operator]
            assert adds or not sends_less


def test_bias_above_the_risk_is_told_where_nothing_else_was_asked_for(run: Path) -> None:
    derivation = derived(run, "ask-llm", "coupled", risks=(0.05,))
    (one,) = recommendations(derivation)
    assert one.hidden_bias
    assert one.point is not None
    assert one.point.policy == "coupled"  # the less biased of the two
    assert any("bias is above its risk" in text for text in said(derivation))
    assert not any("bias is above its risk" in text for text in said(derived(run, "u-hlm")))


def test_a_risk_above_the_budget_on_its_own_road_is_told(run: Path) -> None:
    derivation = derived(run, "u-hlm", risks=(0.05,))
    pilot = Pilot(
        policy="u-hlm", threshold=0.3, risk=0.02, prompt_ids=("a",), num_tokens=9, wall_s=1.0
    )

    def with_risk(risk: float) -> list[str]:
        points = tuple(
            point.model_copy(
                update={
                    "predicted": point.predicted
                    | {"rejection_risk": Figure(value=risk, low=0.9 * risk, high=1.1 * risk)}
                }
            )
            for point in derivation.operating_points
            if point.feasible
        )
        return said(derivation.model_copy(update={"operating_points": points, "pilot": pilot}))

    assert any("a risk of 6 [5.4, 6.6] % is predicted" in text for text in with_risk(0.06))
    assert not any("is predicted" in text for text in [*with_risk(0.05), *said(derivation)])


def test_the_device_alone_where_it_keeps_the_budget(run: Path) -> None:
    derivation = derived(run, risks=(0.5,))
    (one,) = recommendations(derivation)
    assert one.point is not None
    assert one.point.policy == "slm"
    assert "no server is needed" in said(derivation)[0]
    derivation = derived(run, risks=(0.05,))  # its bias is 14 %
    assert "no server is needed" not in said(derivation)[0]


def test_a_certificate_is_named_or_what_it_lacks_is(run: Path) -> None:
    texts = said(derived(run, "u-hlm", risks=(0.05,)))
    assert "certified? no: 12 prompts certify no threshold at risk 0.05" in texts[1]
    derivation = derived(run, "u-hlm", risks=(0.3,), confidence=0.8)
    (one,) = recommendations(derivation)
    assert one.certified is not None
    assert one.certified.key == "u-hlm/ltt-0.3"
    assert "certified? u-hlm/ltt-0.3 is, with 80 % confidence over prompts" in said(derivation)[1]


def test_whether_it_pays_is_said_against_the_server_alone(run: Path, tmp_path: Path) -> None:
    texts = said(derived(run, "llm", "r-hlm", risks=(0.05,)))
    assert "for one user llm alone is faster" in texts[-1]
    assert "users who share the server, r-hlm is faster" in texts[-1]
    slow = tmp_path / "slow.json"
    slow.write_text(
        '{"t_slm_ms": 5, "t_uncertainty_ms": 0, "t_llm_ms": 300, "p_slm_w": 4, "p_tx_w": 1,'
        ' "p_llm_w": 300}'
    )
    texts = said(derived(run, "llm", "r-hlm", risks=(0.05,), profile=str(slow)))
    assert "for one user llm alone is slower" in texts[-1]
    assert "users who share" not in texts[-1]
    assert not any("worth it?" in text for text in said(derived(run, "r-hlm", risks=(0.05,))))


def test_nothing_to_skip_is_said(run: Path) -> None:
    texts = said(derived(run, "hlm", risks=(0.05,)))
    assert texts == ["for risk 5 % on wifi: nothing can be skipped: no policy has a gate"]


def test_budgets_of_answers_have_one_too(run: Path) -> None:
    derivation = derived(run, "u-hlm", "r-hlm", risks=(0.05,), answer_risks=(0.3,))
    of_token, of_answer = recommendations(derivation)
    assert (of_token.kind, of_answer.kind) == ("risk", "answer")
    assert of_answer.point is not None
    assert of_answer.point.family == "answer"
    assert recommendation_texts(derivation, of_answer)[0].startswith("for answers within 30")


def test_what_risk_is_divided_by_is_said_in_numbers(run: Path) -> None:
    derivation = derived(run, "r-hlm", risks=(0.05,))
    (one,) = recommendations(derivation)
    assert one.point is not None
    predicted = one.point.predicted
    share = predicted["rejection_risk"].value / predicted["skip_rate"].value  # type: ignore[operator]
    assert (
        f"of the skipped ones alone, {100 * share:.2g} % at risk-0.05"
        in risk_texts(derivation, [one.point])[0]
    )


def test_sizes_are_those_that_policies_choose_once(run: Path) -> None:
    derivation = derived(run, risks=(0.05,))
    sizes = {point.policy: fixed_size(derivation, point) for point in derivation.operating_points}
    assert sizes.pop("cu-hlm-offline") in synthetic_run.AXES.truncation_sizes
    assert set(sizes.values()) == {None}
