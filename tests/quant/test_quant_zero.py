"""Under ZeRO-3 the weights and scales that autograd keeps are gathered again for backward, also when recomputing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run
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

    result = tmp_path / "found.json"
    finished = run([Path(__file__).with_name("quant_zero_worker.py"), result], 2)
    assert finished.codes == [0, 0], finished.output
    found = json.loads(result.read_text())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["views"] == pytest.approx(expected["views"], rel=1e-5)
