"""Tables of every width: no number is cut, no line is too long, columns leave by priority."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qatlaw.text import plural
from qatlaw.text_table import TextTable

NUMBERS = st.floats(-1e12, 1e12).map(lambda value: f"{value:,.4f}")
A, B, C = (NUMBERS.map(unit.__add__).map(lambda text: text[1:] + text[0]) for unit in "abc")
NAMES = st.text("abcdefgh-_ ", min_size=1, max_size=60).map(str.strip)
ROWS = st.lists(st.tuples(NAMES, NUMBERS, NUMBERS, NAMES, A, B, C), min_size=1, max_size=5)
HEADERS = ("run", "validation loss", "PTQ 2-bit", "branched from", "tokens", "tok/s FP", "tok/s QAT")


@given(ROWS, st.integers(60, 200))
def test_every_number_of_every_column_that_stays_is_in_one_piece(rows: list[tuple[str, ...]], width: int) -> None:
    drop = HEADERS[-1:-5:-1]
    text = TextTable(HEADERS, ("run", "branched from"), drop=drop, rows=rows).text(width)
    assert max(map(len, text.split("\n"))) <= width
    shown = text.split()
    for index in (1, 2):  # these may not be dropped
        assert all(row[index] in shown for row in rows)
    left = [index for index in (6, 5, 4) if not all(row[index] in shown for row in rows)]
    assert left == list(range(6, 6 - len(left), -1)), "the first to go is the first of `drop`"


def test_a_wide_table_is_plain_and_a_narrow_one_breaks_headers_then_folds_words() -> None:
    table = TextTable(
        ("run", "validation loss"), ["run"], "title", rows=[("a-rather-long-name", "3.1234"), ("b", "12")]
    )
    assert table.text(80).split("\n") == [
        "title",
        "",
        "run                 validation loss",
        "------------------  ---------------",
        "a-rather-long-name           3.1234",
        "b                                12",
    ]
    assert table.text(30).split("\n")[2:6] == [
        "                    validation",
        "run                       loss",
        "------------------  ----------",
        "a-rather-long-name      3.1234",
    ]
    assert table.text(24).split("\n")[4:7] == [
        "------------  ----------",
        "a-rather-lon      3.1234",
        "g-name",
    ]


def test_a_column_without_values_leaves_where_it_may() -> None:
    table = TextTable(("run", "tok/s", "bits"), ["run"], drop=["tok/s"], rows=[("a", "–", "–"), ("b", "–", "–")])
    assert table.text(80).splitlines()[0] == "run  bits"


def test_what_no_column_holds_becomes_a_list() -> None:
    table = TextTable(("run", "validation loss"), ["run"], rows=[("some-run", "3.1234"), ("b", "12.5")])
    assert table.text(16).split("\n") == [
        "run: some-run", "validation loss:", "3.1234", "",
        "run: b", "validation loss:", "12.5", "",
    ]  # fmt: skip


def test_a_footer_and_a_cell_of_two_lines() -> None:
    table = TextTable(
        ("layer", "loss"), ["layer"], caption="A caption.", rows=[("q", "2.5\n(12.18)")], footer=("all", "1")
    )
    assert table.text(60).split("\n") == [
        "layer     loss", "-----  -------", "q          2.5", "       (12.18)",
        "-----  -------", "all          1", "A caption.",
    ]  # fmt: skip


def test_a_style_colours_cells_and_nothing_else() -> None:
    out = io.StringIO()
    table = TextTable(("run", "status"), ("run", "status"), styles={"done": "green"}, rows=[("done-run", "done")])
    Console(file=out, force_terminal=True, width=80, color_system="standard").print(table)
    assert out.getvalue().count("\x1b[32mdone\x1b[0m") == 1
    assert "done-run" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "process", "1 process"), (2, "process", "2 processes"), (1, "step", "1 step"), (1200, "step", "1,200 steps"),
     (0, "run", "0 runs"), (3, "micro-batch", "3 micro-batches")],
)  # fmt: skip
def test_one_is_singular(count: int, noun: str, text: str) -> None:
    assert plural(count, noun) == text
