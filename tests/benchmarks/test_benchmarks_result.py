"""Timing in turns, ratios and the JSON of a benchmark."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from measure import Skipped, Variant, interleaved
from result import Result, Table, quartiles, shown_seconds


def test_every_round_calls_every_variant_once_and_the_order_turns() -> None:
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]  # type: ignore[misc]
    seconds = interleaved(variants, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_sleep_of_twice_the_time_has_about_twice_the_seconds() -> None:
    variants = [Variant("short", lambda: time.sleep(0.02)), Variant("long", lambda: time.sleep(0.04))]
    table = Table.of("sleeps", "calls", variants, interleaved(variants, rounds=5), reference="short")
    assert 1.5 < table.row("long").ratio < 2.5
    assert table.row("short").ratio == 1


def test_ratios_are_of_the_same_round() -> None:
    # the machine is twice as slow in the second and third round, the ratio stays
    seconds = {"a": [1.0, 2.0, 2.0], "b": [3.0, 6.0, 6.0]}
    table = Table.of("t", "tokens", [Variant("a", print, 10), Variant("b", print, 10)], seconds, reference="a")
    row = table.row("b")
    assert (row.ratio, row.ratio_quartiles, row.seconds, row.rounds) == (3, (3, 3), 6, 3)
    assert row.per_second == pytest.approx(10 / 6)
    assert row.seconds_quartiles == (4.5, 6)


def test_quartiles_of_one_value() -> None:
    assert quartiles([2.0]) == (2.0, 2.0)


def test_the_file_says_what_it_was_measured_on_and_not_where(tmp_path: Path) -> None:
    variants = [Variant("a", print)]
    table = Table.of("t", "calls", variants, {"a": [1.0]}, reference="a", skipped=[Skipped("b", "not installed")])
    result = Result("example", {"rounds": 1}, [table])
    result.write(tmp_path / "new" / "result.json")
    content = json.loads((tmp_path / "new" / "result.json").read_text())
    assert content["tables"][0]["rows"][0]["seconds"] == 1
    assert content["tables"][0]["skipped"] == [{"name": "b", "why": "not installed"}]
    assert content["environment"]["packages"]["torch"]
    assert "host" not in content["environment"]


def test_times_are_shown_in_the_unit_that_suits() -> None:
    assert [shown_seconds(s) for s in (123.4, 1.234, 0.01234, 1.234e-5)] == ["123 s", "1.23 s", "12.3 ms", "12.3 µs"]
