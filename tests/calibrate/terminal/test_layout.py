"""Tables as text: they fit, and nothing in them is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from calibrate.terminal.layout import folded, table_lines

NAMES = ("~name", "kind", ">first number", ">second", "~why", ">third")
WORDS = st.text("abcxyz-,", min_size=1, max_size=9)
NUMBERS = st.floats(-1e6, 1e6).map(lambda value: f"{value:,.3g} [{value:.3g}, {value:.3g}]")
ROWS = st.lists(
    st.tuples(
        st.lists(WORDS, min_size=1, max_size=5).map(" ".join), WORDS, NUMBERS, NUMBERS,
        st.lists(WORDS, max_size=12).map(" ".join), NUMBERS,
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@given(ROWS, st.integers(80, 200))
def test_every_line_fits_and_every_number_stands_whole(rows, width):
    lines = table_lines(NAMES, rows, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for row in rows:
        for place in (1, 2, 3, 5):
            assert row[place] in text
        for place in (0, 4):
            assert all(word in text for word in row[place].split())


@given(ROWS)
def test_what_fits_is_one_table_with_a_line_a_row(rows):
    lines = table_lines(NAMES, rows, 1000)
    assert len(lines) == 2 + len(rows)
    assert all(line.startswith(row[0]) for line, row in zip(lines[2:], rows, strict=True))


def test_what_does_not_fit_is_set_in_parts_that_all_name_their_rows():
    rows = [
        ("u-hlm", "1" * 20, "2" * 20, "3" * 20),
        "a line of its own",
        (),
        ("hlm", "4", "5", "6"),
    ]
    lines = table_lines(("policy", ">a", ">b", ">c"), rows, 50)
    parts = "\n".join(lines).split("\n\npolicy")
    assert len(parts) == 2
    for part in parts:
        assert all(name in part for name in ("u-hlm", "\nhlm", "a line of its own"))
    assert max(map(len, lines)) <= 50


def test_the_columns_that_name_rows_may_be_told():
    rows = [("0.01", "x", "1" * 20, "2" * 20), ("0.05", "x", "3" * 20, "4" * 20)]
    columns = (">budget", "rule", ">a", ">b")
    for told, with_rule in ((None, 2), (2, 4)):
        lines = table_lines(columns, rows, 40, told)
        assert sum(line.startswith(("  0.01", "  0.05")) for line in lines) == 4
        assert sum(" x" in line for line in lines) == with_rule


def test_a_single_cell_that_is_wider_is_not_cut():
    lines = table_lines(("name", ">number"), [("x", "9" * 60)], 40)
    assert any("9" * 60 in line for line in lines)


def test_texts_fold_between_words_and_numbers_with_their_interval_stay_together():
    interval = "0.249\N{NO-BREAK SPACE}[0.236,\N{NO-BREAK SPACE}0.263]"
    lines = folded(f"  the threshold is {interval} and more words", 30, "  ")
    assert any(interval in line for line in lines)
    assert all(len(line) <= 30 for line in lines)
    assert lines[0].startswith("  the")
    assert lines[1].startswith("    ")
