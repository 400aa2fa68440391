"""Under ZeRO-3 the weights and scales that autograd keeps are gathered again for backward, also when recomputing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant.quant_zero_worker import STEPS, batches, optimizer_of, switched_model, views


@pytest.mark.dist
def test_two_zero3_processes_train_as_one_plain_one(tmp_path: Path) -> None:
    model, groups = switched_model()
    optimizer = optimizer_of(groups)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(model(*batch) for batch in batches(step)) / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = {"losses": losses, "views": views(model, model)}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker, result = Path(__file__).with_name("quant_zero_worker.py"), tmp_path / "found.json"
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(worker), str(result)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    found = json.loads(result.read_text())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["views"] == pytest.approx(expected["views"], rel=1e-5)
