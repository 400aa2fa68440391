"""metrics.jsonl: whole lines after any kill, strict JSON for any float, and what a resume takes back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatscale.errors import UserError
from qatscale.files import decode, encode, write_json
from qatscale.tracking.records import Appender, Tail, live, repair


def lines(path: Path) -> list[dict[str, object]]:
    """What a reader that knows strict JSON only makes of the file."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@given(st.floats())
def test_every_float_survives_strict_json(value: float) -> None:
    text = json.dumps(encode({"loss": [value]}), allow_nan=False)
    back = decode(json.loads(text))["loss"][0]
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_floats_that_are_not_finite_are_the_strings_of_protocol_buffers_json(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "m.jsonl")
    appender.append({"event": "metrics", "loss": math.nan, "grad_norm": math.inf, "mfu": -math.inf})
    assert lines(tmp_path / "m.jsonl") == [
        {"event": "metrics", "loss": "NaN", "grad_norm": "Infinity", "mfu": "-Infinity"}
    ]


def test_scalars_of_other_libraries_paths_and_dataclasses_are_plain_values() -> None:
    @dataclasses.dataclass
    class Report:
        shape: tuple[int, ...]

    value = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": Path("x/y"),
        "d": Report((2, 3)),
        "e": np.arange(2),
        "f": None,
    }
    assert encode(value) == {"a": 0.5, "b": 3, "c": "x/y", "d": {"shape": [2, 3]}, "e": [0, 1], "f": None}


def test_what_has_no_form_in_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no form in JSON"):
        encode({"a": object()})


@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        (b'{"event": "metrics", "st', 1),  # torn: cut off
        (b'{"event": "metrics", "step": 2}', 2),  # whole but for its newline: terminated
        (b"", 1),
        (b"\x00" * 200_000, 1),  # what some file systems leave after a power failure, longer than a block
    ],
)
def test_a_torn_last_line_is_repaired_before_the_next_append(tmp_path: Path, torn: bytes, kept: int) -> None:
    file = tmp_path / "m.jsonl"
    file.write_bytes(b'{"event": "metrics", "step": 1}\n' + torn)
    appender = Appender(file)
    appender.append({"event": "resume", "step": 1})
    assert [line["event"] for line in lines(file)] == ["metrics"] * kept + ["resume"]


def test_repair_of_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    repair(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_tail_leaves_an_unfinished_line_for_later(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    tail = Tail(file)
    assert tail.read() == []
    file.write_bytes(b'{"event": "a"}\n{"event":')
    assert tail.read() == [{"event": "a"}]
    assert tail.read() == []
    with file.open("ab") as more:
        more.write(b' "b"}\n')
    assert tail.read() == [{"event": "b"}]
    assert tail.offset == file.stat().st_size


def test_a_small_limit_reads_the_same_records(tmp_path: Path) -> None:
    appender = Appender(tmp_path / "m.jsonl")
    records = [{"event": "start", "step": step, "text": "x" * step} for step in range(200)]
    for record in records:
        appender.append(record)
    tail, found = Tail(tmp_path / "m.jsonl"), []
    while chunk := tail.read(limit=64):
        found += chunk
    assert found == records


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"rubbish", "is not JSON"), (b"[" * 100_000, "is not JSON"), (b"\xff\xfe{}", "is not JSON"),
        (b"3", "is damaged: its text"), (b"[]", "is damaged: its text"), (b'{"event": 3}', "is damaged: event"),
        (b'{"event": "start", "step": "4"}', "is damaged: step"),
        (b'{"event": "start", "step": 1e30}', "is damaged: step"),
        (b'{"event": "resume", "time": 1}', "is damaged: step"),
        (b'{"event": "resume", "step": 1}', "is damaged: time"),
        (b'{"event": "metrics", "time": 1, "step": 4, "phase": "stable"}', "is damaged: loss"),
        (b'{"event": "metrics", "time": 1, "step": 4, "phase": 5, "loss": 3}', "is damaged: phase"),
        (b'{"event": "validation", "time": 1, "step": 4, "view": "fp", "loss": "x"}', "is damaged: loss"),
        (b'{"event": "switch", "time": 1, "step": 4}', "is damaged: report"),
        (b'{"event": "spike", "time": 1, "step": 4, "norm": null}', "is damaged: norm"),
        (b'{"event": "final", "time": 1, "step": 4, "metrics": []}', "is damaged: metrics"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_an_error_that_names_its_place(line: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"event": "a"}\n' + line + b'\n{"event": "b"}\n')
    with pytest.raises(UserError, match=rf"m\.jsonl': the line at byte 15 {re.escape(said)}"):
        list(Tail(tmp_path / "m.jsonl"))


def test_a_resume_takes_back_later_steps_and_a_switch_at_its_own_step() -> None:
    def event(name: str, step: int) -> dict[str, object]:
        return {"event": name, "step": step}

    before = [event("start", 0), event("metrics", 10), event("checkpoint", 10), event("switch", 10)]
    gone = [event("metrics", 20), event("validation", 20)]
    after = [event("resume", 10), event("switch", 10), event("metrics", 20)]
    assert live([*before, *gone, *after]) == [*before[:3], *after]


def test_a_final_evaluation_that_was_made_again_counts_once() -> None:
    final = [{"event": "validation", "step": 40, "view": view} for view in ("fp", "quantized")]
    before = [{"event": "start", "step": 0}, {"event": "validation", "step": 20, "view": "fp"}]
    resume = {"event": "resume", "step": 40}
    assert live([*before, *final, resume, *final]) == [*before, resume, *final]


def test_a_later_resume_further_back_takes_back_the_former_one() -> None:
    steps = [("start", 0), ("metrics", 5), ("resume", 4), ("metrics", 8), ("resume", 2), ("metrics", 3)]
    records = [{"event": name, "step": step} for name, step in steps]
    assert [(r["event"], r["step"]) for r in live(records)] == [("start", 0), ("resume", 2), ("metrics", 3)]


def test_a_json_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": math.nan})
    assert lines_of_json(tmp_path / "a.json") == {"x": "NaN"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def lines_of_json(path: Path) -> object:
    return json.loads(path.read_text())


def test_sigkill_costs_no_line_that_append_returned_from(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qatscale.tracking.records import Appender\n"
        "appender = Appender(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n"
        "    appender.append({'event': 'metrics', 'step': step, 'text': 'x' * 20_000})\n"
        "    print(step, flush=True)\n"
    )
    file = tmp_path / "m.jsonl"
    child = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    said = child.stdout.read().split()
    child.wait()
    repair(file)
    steps = [line["step"] for line in lines(file)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 50 + len(said)


def test_a_full_disk_names_the_file_that_could_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    appender, limit = Appender(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match=f"'{path}'"):
            appender.append({"event": "start", "time": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
