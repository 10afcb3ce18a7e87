"""The page of a run: complete, self-contained, and deaf to markup in names."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import paper_records
import pytest

from calibrate.derive.presets import published_audit
from paper_figs import draw
from paper_figs.figures import attention
from paper_figs.loaded import LoadedRun
from paper_figs.report import report
from paper_figs.report.report import findings, render, write_report
from paper_figs.style import caption_of, styled

NASTY = 'x"><script src=//evil.example/x.js></script>$\\frac{$.jsonl'
HEADER = b"\x89PNG\r\n\x1a\n" + bytes(8) + (700).to_bytes(4, "big") + (400).to_bytes(4, "big")


class Page(HTMLParser):
    """Tags, attributes and whether they nest."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

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
    assert len(images) == len(figure_ids)
    assert all((image["src"] or "").startswith("data:image/png;base64,iVBOR") for image in images)
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
    assert "Derivation default" in text
    assert "Validation default , of derivation default" in text
    assert "prompts shipped, 12 used, drawn at random" in text


def test_report_holds_texts_and_audit(page_text: str) -> None:
    text = words(page_text)
    assert "slm none 0.9 [0.88, 0.92] 0.7 [0.6, 0.8]" in text.replace("\N{NO-BREAK SPACE}", " ")
    for row in published_audit()[0]:
        assert row.explanation in text


def test_report_tells_the_policies_that_send_least_and_most(loaded: LoadedRun) -> None:
    told = [line.split(" ")[0] for line in findings(loaded) if " at risk-0.02 " in line]
    assert told == ["coupled", "r-hlm", "u-hlm"]


@pytest.mark.usefixtures("stub_png")
def test_report_of_a_calibration_alone(loaded: LoadedRun) -> None:
    bare = replace(
        loaded, derivation=None, validation=None, quality=None, guarantees=None, attenuation=None,
        info=None,
    )  # fmt: skip
    text = words(render(bare))
    assert "Nothing was derived yet" in text
    assert "Nothing was rerun yet" in text
    assert "No texts of current reruns were scored yet" in text
    assert "guarantees: the run has no guarantees.json; make it with `hlm guarantees RUN`" in text


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
    assert "elsewhere on this page: u-hlm/risk-0.02. Run hlm validate again" in words(render(other))


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
