"""The estimate of memory and traffic against what real steps on CPU allocate and send."""

from __future__ import annotations

import pytest
from memory_layouts import RUNS, estimate, fullest, layout_of, measure, total

from qatscale.config import load_run_config
from qatscale.engine.dry_run.replay import start_bytes
from qatscale.engine.dry_run.share import share_of
from qatscale.engine.dry_run.traffic import traffic_of_stage
from qatscale.engine.dry_run.zero_plan import zero_plan
from qatscale.engine.layout import stages_of

pytestmark = pytest.mark.dist

Measured = dict[str, list[dict[str, int]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("memory"), RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_fullest_moment_of_a_step(measured: Measured, name: str) -> None:
    for stage, phases in estimate(RUNS[name]).items():
        for phase, ledger in phases.items():
            found = fullest(measured[name], RUNS[name], stage, phase)
            assert total(ledger) == pytest.approx(found, rel=0.05), f"stage {stage}, {phase}, {ledger.peak_at}"


@pytest.mark.parametrize("name", RUNS)
def test_what_is_held_between_steps_to_the_byte(measured: Measured, name: str) -> None:
    for stage, phases in estimate(RUNS[name]).items():
        for kind in ("weights", "gradients", "optimizer", "scales"):
            found = fullest(measured[name], RUNS[name], stage, kind)
            assert phases["qat"].held[kind] == found, f"stage {stage}, {kind}"


@pytest.mark.parametrize("name", RUNS)
def test_what_is_sent(measured: Measured, name: str) -> None:
    """Within 2 %: gradient norms and flags are sent too."""
    run = RUNS[name]
    config, layout = load_run_config("debug", run.all_overrides), layout_of(run)
    plan = zero_plan(run.ds_config, layout.data)
    for stage in stages_of(config):
        share = share_of(config, layout, stage)
        sent = sum(traffic_of_stage(config, layout, share, plan, quantized=True).values())
        assert sent == pytest.approx(fullest(measured[name], run, stage.index, "sent"), rel=0.02), stage


@pytest.mark.parametrize("name", RUNS)
def test_the_start(measured: Measured, name: str) -> None:
    """Never below what building the engine takes: on CPU it is on the device from the beginning."""
    run = RUNS[name]
    config, layout = load_run_config("debug", run.all_overrides), layout_of(run)
    plan = zero_plan(run.ds_config, layout.data)
    for stage in stages_of(config):
        held = sum(estimate(run)[stage.index]["fp"].held.values())
        most = max(start_bytes(share_of(config, layout, stage), plan), held)
        assert fullest(measured[name], run, stage.index, "start") <= 1.1 * most, stage
