"""A process that keeps the others waiting is found and named."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from qatscale.train.metrics import SLOW_INTERVALS, Stragglers
from tests.processes import run
from tests.train.driving import records, spec


def test_a_process_is_reported_once_it_was_slow_for_long_enough() -> None:
    found = Stragglers()
    slow, even = [1.0, 1.0, 1.3, 1.1], [1.0, 1.1, 1.2, 1.0]
    assert [found.add(slow)[1] for _ in range(SLOW_INTERVALS + 2)] == [None] * (SLOW_INTERVALS - 1) + [2, None, None]
    assert found.add(slow)[0] == {"slowest_rank": 2, "slowest_seconds": 1.3, "median_seconds": 1.0}
    assert found.add(even)[1] is None, "a fifth above the median is usual"
    other = [1.4, *slow[1:]]
    reports = [found.add(seconds)[1] for seconds in [slow] * (SLOW_INTERVALS - 1) + [other] * SLOW_INTERVALS]
    assert reports == [None] * (2 * SLOW_INTERVALS - 2) + [0], "the count begins anew with another process"


@pytest.mark.dist
def test_a_slow_process_is_named(tmp_path: Path, prepared: Path) -> None:
    """Under ZeRO-1 by its forward passes. In a pipeline these wait for one another, and its blocks are timed; under
    ZeRO-3 blocks wait too, and attention is timed."""
    layouts = {"z1": ["zero1_fp32"], "z3": ["zero3_fp32"], "p2": ["zero1_fp32", "engine.pipeline_stages=2"]}
    own = ["tokens=10240", "qat.scheme=fp", "qat.fraction=auto", "evaluation.tokens=512"]  # 20 steps, 10 of warm-up
    runs = [spec(n, tmp_path, prepared, *own, f"engine.ds_config={ds}", *more) for n, (ds, *more) in layouts.items()]
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps(runs))
    finished = run([Path(__file__).with_name("straggler_driver.py"), listed], 2, cwd=tmp_path)
    assert finished.codes == [0, 0], finished.output
    assert finished.output.count(f"warning: rank 1 on {socket.gethostname()} takes") == 3
    for name in layouts:
        measured = [record for record in records(tmp_path / name) if not record["warmup"]]
        assert len(measured) == 10
        assert [record["slowest_rank"] for record in measured] == [1] * 10
        assert all(record["slowest_seconds"] > 1.2 * record["median_seconds"] > 0 for record in measured)
