"""The page of a run: complete, self-contained, and deaf to markup in names."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import paper_records
import pytest

from calibrate.derive.presets import published_audit
from calibrate.run.records import Certificate
from paper_figs import draw
from paper_figs.figures import attention
from paper_figs.loaded import LoadedRun
from paper_figs.report import report
from paper_figs.report.report import render, settings_rows, with_code, write_report
from paper_figs.report.verdict import headline, verdict
from paper_figs.style import caption_of, question_of, styled
from paper_figs.words import GLOSSARY

NASTY = 'x"><script src=//evil.example/x.js></script>$\\frac{$.jsonl'
HEADER = b"\x89PNG\r\n\x1a\n" + bytes(8) + (700).to_bytes(4, "big") + (400).to_bytes(4, "big")


class Page(HTMLParser):
    """Tags, attributes and whether they nest."""

    VOID = ("meta", "img", "source", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def words(page: str) -> str:
    """What a reader sees, on one line."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


@pytest.fixture(scope="module")
def loaded() -> LoadedRun:
    return paper_records.full_run()


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = paper_records.write_run(tmp_path_factory.mktemp("report") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "PNG_DPI", 40)
        return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def stub_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built, but not rendered."""
    monkeypatch.setattr(report, "png_bytes", lambda drawn: HEADER)


def test_report_holds_every_figure_and_section(page_text: str) -> None:
    page = Page(page_text)
    assert page.open == []
    figure_ids = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert figure_ids == [f"figure-{name}" for name in draw.figure_names()]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    for_phones = [attrs for tag, attrs in page.tags if tag == "source"]
    assert len(images) == len(for_phones) == len(figure_ids)
    png = "data:image/png;base64,iVBOR"
    assert all((image["src"] or "").startswith(png) for image in images)
    assert all((image["srcset"] or "").startswith(png) for image in for_phones)
    assert all(int(n["width"] or 0) < int(w["width"] or 0)
               for n, w in zip(for_phones, images, strict=True))  # fmt: skip
    assert all(image["alt"] for image in images)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert targets
    assert {f"#{name}" for name in ids} >= targets


def test_report_asks_nothing_of_the_network(page_text: str) -> None:
    assert not re.search(r"https?://", page_text)
    assert not re.search(r"@import|url\(", page_text)
    page = Page(page_text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action"):
            target = attrs.get(name)
            assert target is None or target.startswith(("data:", "#"))


def test_every_figure_has_question_answer_and_caveat(page_text: str, loaded: LoadedRun) -> None:
    """In that order, with the figure between answer and caveat."""
    text = words(page_text)
    at = 0
    for module in draw.MODULES:
        with styled():
            question = question_of(module.figure(loaded))
        for said in (question, module.answer(loaded), f"But: {module.CAVEAT}"):
            part = " ".join(said.split())
            assert part in text[at:], f"{module.__name__}: {part}"
            at = text.index(part, at)


def test_report_counts_covered_cells(page_text: str, loaded: LoadedRun) -> None:
    text = words(page_text)
    for metric, label in (
        ("skip_rate", "skip rate (share of tokens)"), ("tv_bias", "TV bias (probability)")
    ):  # fmt: skip
        cells = [cell for cell in loaded.cells if cell.metric == metric]
        assert f"{label} {sum(bool(cell.covered) for cell in cells)} {len(cells)}" in text
    assert page_text.count("✗ ") == sum(not cell.covered for cell in loaded.cells)
    note = " ".join(loaded.coverage_note.split())
    assert note in text
    assert note.startswith(
        "The predictions hold: 111 of 135 counted figures fall inside their 95 %"
    )


def test_report_says_how_it_came_to_be(page_text: str) -> None:
    text = words(page_text)
    assert "made up: " + "ab" * 32 in text
    assert f"derived hlm derive (revision {'cd' * 20})" in text
    assert "derivation default" in text
    assert "validation default, of derivation default" in text
    assert "prompts shipped, 12 used, drawn at random" in text


def test_a_measured_trace_is_counted_and_not_listed(loaded: LoadedRun) -> None:
    assert loaded.derivation is not None
    link = {"name": "drive.csv", "model": "trace", "rates_bps": [1e6] * 1500, "round_trip_ms": 0.0}
    derivation = loaded.derivation.model_copy(
        update={"link": link, "profile": {"name": "mine", "assumed": ["p_tx_w", "p_llm_w"]}}
    )
    rows = dict(settings_rows(replace(loaded, derivation=derivation)))
    assert rows["link"] == "name drive.csv, model trace, rates_bps 1,500 values, round_trip_ms 0"
    assert rows["device profile"] == "name mine, assumed p_tx_w and p_llm_w"


def test_report_holds_texts_and_audit(page_text: str) -> None:
    text = words(page_text)
    assert "slm none 0.9 [0.88, 0.92] 0.7 [0.6, 0.8]" in text.replace("\N{NO-BREAK SPACE}", " ")
    for row in published_audit()[0]:
        assert row.explanation in text


def test_every_term_is_in_the_glossary(page_text: str) -> None:
    text = words(page_text)
    for term, meaning in GLOSSARY.items():
        assert f"{term} {meaning}" in text


def test_a_narrow_page_names_every_number(page_text: str) -> None:
    """Where rows become cards, each cell carries its column's title."""
    page = Page(page_text)
    cells = [attrs for tag, attrs in page.tags if tag == "td"]
    assert len(cells) > 300
    assert all(attrs.get("data-label") for attrs in cells)


# The verdict


def test_the_headline_is_measured_where_it_was_rerun(loaded: LoadedRun) -> None:
    """At risk-0.02 the gate skips 0.06**(1/3) = 39.1 % and 5 % more when rerun."""
    said = headline(loaded).replace("\N{NO-BREAK SPACE}", " ")
    assert said.startswith("At a risk of 2 % a token, met on the calibration prompts, not certif")
    assert "answers 41.1 [37, 45.2] % of the tokens alone (measured in a rerun)" in said
    bare = headline(replace(loaded, validation=None)).replace("\N{NO-BREAK SPACE}", " ")
    assert "answers 39.1 [35.2, 43.1] % of the tokens alone (predicted)" in bare


def test_the_verdict_names_what_sends_least_and_most(loaded: LoadedRun) -> None:
    told = next(line for line in verdict(loaded) if line.startswith("At risk-0.02"))
    least, _, most = told.partition("the most")
    assert "coupled draws" in least
    assert "U-HLM" not in least
    assert "U-HLM at a bias" in most


def test_the_verdict_finds_the_fastest_gate(loaded: LoadedRun) -> None:
    gates = {p.policy: loaded.figure_of(p, "throughput_tok_s").value for p in loaded.gates}
    fastest = max(gates, key=lambda name: gates[name] or 0.0)
    told = next(line for line in verdict(loaded) if line.startswith("Link wifi"))
    assert f"the fastest gated policy is {loaded.label(fastest)}," in told
    assert "device alone 50" in told, "who needs no gate stands beside it"


def test_the_verdict_says_what_is_certified(loaded: LoadedRun) -> None:
    assert loaded.derivation is not None

    def certified(*found: Certificate) -> str:
        other = loaded.derivation.model_copy(update={"certificates": found})  # type: ignore[union-attr]
        lines = verdict(replace(loaded, derivation=other))
        return next(line for line in lines if "ertified" in line)

    row = Certificate(
        rule="betting", test="betting", certified="prompts", guaranteed=True, cap=None, budget=0.05,
        confidence=0.95, feasible=True, reason="", threshold=0.3, skip_rate=paper_records.fig(0.2),
        bound=0.04,
    )  # fmt: skip
    assert "Nothing was asked to be certified" in certified()
    assert "a risk of 5" in certified(row)
    refused = row.model_copy(update={"budget": 0.01, "feasible": False, "threshold": None})
    assert "a risk of 5" in certified(refused, row), "one budget of two is certified"
    assert "`hlm plan RUN`" in certified(refused)
    unproved = row.model_copy(update={"guaranteed": False})
    assert "Nothing was asked to be certified" in certified(unproved), "asymptotic: no promise"


def test_code_is_marked_and_markup_is_not() -> None:
    assert with_code("run `hlm <x>` & wait") == "run <code>hlm &lt;x&gt;</code> &amp; wait"


@pytest.mark.usefixtures("stub_png")
def test_report_of_a_calibration_alone(loaded: LoadedRun) -> None:
    bare = replace(
        loaded, derivation=None, validation=None, quality=None, guarantees=None, attenuation=None,
        info=None,
    )  # fmt: skip
    text = words(render(bare))
    assert "Nothing was derived yet" in text
    assert "validation: the run has no validation.json; make it with hlm validate RUN" in text
    assert "How close the texts" not in text
    assert "guarantees: the run has no guarantees.json; make it with hlm guarantees RUN" in text


@pytest.mark.usefixtures("stub_png")
def test_report_warns_of_reruns_of_an_earlier_derivation(loaded: LoadedRun) -> None:
    assert loaded.derivation is not None
    points = tuple(
        point.model_copy(
            update={"predicted": point.predicted | {"skip_rate": paper_records.fig(0.9)}}
        )
        if point.key == "u-hlm/risk-0.02"
        else point
        for point in loaded.points
    )
    other = replace(
        loaded, derivation=loaded.derivation.model_copy(update={"operating_points": points})
    )
    assert "today's settings: u-hlm/risk-0.02. Run hlm validate again" in words(render(other))


@pytest.mark.usefixtures("stub_png")
def test_malicious_names_stay_text(loaded: LoadedRun) -> None:
    """A prompt file, or a prompt id that a figure's caption cites, may hold anything."""
    assert loaded.derivation is not None
    assert loaded.derivation.importance_example is not None
    example = loaded.derivation.importance_example.model_copy(update={"prompt_id": NASTY})
    other = replace(
        loaded,
        calibration=paper_records.calibration_record(NASTY),
        derivation=loaded.derivation.model_copy(update={"importance_example": example}),
    )
    text = render(other)
    assert not any(tag == "script" for tag, _ in Page(text).tags)
    assert "<script" not in text
    assert "&lt;script" in text
    with styled():
        drawing = attention.figure(other)
        assert drawing is not None
        assert NASTY in caption_of(drawing)
        draw.png_bytes(drawing)  # a dollar sign must not be read as a formula
