"""Fuzzing: whatever a file or an override holds, it is accepted or refused in a sentence, soon and in bounded memory.

QATSCALE_FUZZ=N tries N damaged files of each kind, and 20 N configurations, instead of a few. It prints the counts:
`QATSCALE_FUZZ=250 pytest -s tests/cli/test_cli_fuzz.py`. Records are in analysis/benchmarks/robustness.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from qatlaw.errors import InputError
from qatscale.config.settings import settings as keys
from qatscale.errors import EXIT_BAD_INPUT
from tests.cli.bad_inputs import run_command
from tests.damage import HOSTILE, KINDS, Kind, damages, expand, flipped

TRIES = int(os.environ.get("QATSCALE_FUZZ", "3"))
SECONDS = 10
"""Of CPU time, for one file or configuration."""
LONGEST = 4000
"""Characters of a message."""
MEMORY = 2 << 30

fuzz = settings(
    max_examples=TRIES, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "world"
    shutil.copytree(world, place)
    expand(place)
    return place


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


def outcome(kind: Kind, folder: Path) -> str:
    """`refused` if any reader refuses, in a message that one can read; else `accepted`."""
    found = "accepted"
    for read in kind.readers:
        try:
            with bounded():
                read(folder)
        except InputError as error:
            found, said = "refused", str(error)
            assert len(said) < LONGEST, f"{len(said)} characters: {said[:200]}"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    told = KINDS[kind]
    path = folder / told.path
    raw = path.read_bytes()
    seen: Counter[str] = Counter()

    @fuzz
    @given(content=damages(raw, path.name))
    def damage(content: bytes) -> None:
        path.write_bytes(content)
        seen[outcome(told, folder)] += 1

    try:
        assert outcome(told, folder) == "accepted" or kind == "gzip"
        damage()
        draw = random.Random(0)
        flips = [(draw.randrange(len(raw)), draw.randrange(8)) for _ in range(math.ceil(TRIES / 4))]
        for at, bit in flips:
            path.write_bytes(flipped(raw, at, bit))
            found = outcome(told, folder)
            seen[f"flip {found}"] += 1
            assert found == "refused" or not told.sealed, f"bit {bit} of byte {at} flipped, and read"
    finally:
        path.write_bytes(raw)
    print(f"\n{kind}: {dict(seen)}")


VALUES = st.one_of(
    st.sampled_from([str(value) for value in HOSTILE]),
    st.sampled_from(["auto", "1e9999999K", "1e-9999999999999999999", "[" * 2000, "!!timestamp 2020-99-99", "&a [*a]",
                     "0x", "1_0", "null", "{a: 1}", "[1, 0.5, 0]", "2.3B", ".inf", "1" * 5000, "fused", "sequential",
                     "scratch", "fp", "zero3_bf16", "zero1_fp32", "piecewise", "true"]),
    st.integers(-3, 300).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=10),
)  # fmt: skip
COMMAND = ("train", "debug", "data.path=data", "tracking.uri=none")
OVERRIDES = st.lists(st.tuples(st.sampled_from(list(keys())), VALUES), min_size=1, max_size=4)


def test_a_configuration_is_planned_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    seen: Counter[str] = Counter()

    @settings(fuzz, max_examples=20 * TRIES)
    @given(overrides=OVERRIDES)
    @example([("schedule.cooldown_fraction", "\ud800")])
    def configure(overrides: list[tuple[str, str]]) -> None:
        words = [f"{key}={value}" for key, value in overrides]
        with bounded():
            code, out, error = run_command([*COMMAND, *words, "--dry-run"])
        assert code in (0, EXIT_BAD_INPUT), f"{code}: {error}"
        assert "Traceback" not in out + error
        assert code == 0 or (error.startswith("error: ") and len(error) < LONGEST), error
        seen[str(code)] += 1

    configure()
    print(f"\nconfigurations: {dict(seen)}")
