"""The estimate of memory and traffic against what real steps on CPU allocate and send, and against the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.engine.estimate.memory import ZeroSettings, between_steps, start_bytes
from qatscale.engine.estimate.traffic import traffic_of
from tests.engine.estimate.memory_layouts import MORE, RUNS, estimate, fullest, layout_of, measure, sizes_of

Measured = dict[str, list[dict[str, int]]]
RECORD = Path(__file__).parents[3] / "analysis/benchmarks/memory_estimate.md"
PROMISED = 0.10


def recorded() -> list[tuple[str, int, str, int]]:
    """(layout, stage, phase, measured bytes) of the record's rows."""
    cells = [line.strip("| ").split(" | ") for line in RECORD.read_text().splitlines()]
    return [
        (row[0], int(row[1]), row[2], int(row[3].replace(",", ""))) for row in cells if row[2:3] in (["fp"], ["qat"])
    ]


def test_every_row_of_the_record() -> None:
    rows = recorded()
    assert len(rows) == 64
    for name, stage, phase, found in rows:
        moment, kinds = estimate((RUNS | MORE)[name], stage, phase)
        assert sum(kinds.values()) == pytest.approx(found, rel=PROMISED), f"{name}, stage {stage}, {phase}, {moment}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("memory"), RUNS)


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_the_fullest_moment_of_a_step(measured: Measured, name: str) -> None:
    for stage in range(layout_of(RUNS[name]).pipeline):
        for phase in ("fp", "qat"):
            moment, kinds = estimate(RUNS[name], stage, phase)
            found = fullest(measured[name], RUNS[name], stage, phase)
            assert sum(kinds.values()) == pytest.approx(found, rel=PROMISED), f"stage {stage}, {phase}, {moment}"


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_what_is_held_between_steps_to_the_byte(measured: Measured, name: str) -> None:
    run = RUNS[name]
    zero = ZeroSettings(run.ds_config, layout_of(run).data)
    for sizes in sizes_of(run):
        held = between_steps(sizes, zero)
        for kind in ("weights", "gradients", "optimizer", "scales"):
            assert held[kind] == fullest(measured[name], run, sizes.stage.index, kind), f"{sizes.stage}, {kind}"


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_what_is_sent(measured: Measured, name: str) -> None:
    """Within 2 %: gradient norms and flags are sent too. Where ZeRO-3 prefetches less than a matrix, the weights that
    stay gathered are known more roughly."""
    run = RUNS[name]
    zero = ZeroSettings(run.ds_config, layout_of(run).data)
    for sizes in sizes_of(run):
        sent = sum(traffic_of(sizes, zero, quantized=True).values())
        found = fullest(measured[name], run, sizes.stage.index, "sent")
        assert sent == pytest.approx(found, rel=0.15 if "prefetching one" in name else 0.02), sizes.stage


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_the_start(measured: Measured, name: str) -> None:
    """Never below what building the engine takes: on CPU it is on the device from the beginning."""
    run = RUNS[name]
    zero = ZeroSettings(run.ds_config, layout_of(run).data)
    for sizes in sizes_of(run):
        most = max(start_bytes(sizes, zero), sum(between_steps(sizes, zero).values()))
        assert fullest(measured[name], run, sizes.stage.index, "start") <= 1.1 * most, sizes.stage
