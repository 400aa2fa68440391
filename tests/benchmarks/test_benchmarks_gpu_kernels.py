"""The GPU's kernel script runs from end to end, on toy sizes with the plain arithmetic, and notices a wrong kernel."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qatscale.quant import reference

GPU = Path(__file__).parents[2] / "analysis" / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_kernels", GPU / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_runs_and_is_recorded(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["failed"] == 0
    names = [check["check"] for check in found["checks"]]
    assert {name.split(":")[0] for name in names} == {"correct", "bandwidth", "layer"}
    assert len([name for name in names if name.startswith("correct")]) == 2 * 8 + 1 + 2
    shares = [check["numbers"] for check in found["checks"] if "share" in check["check"]]
    assert all(numbers["forward"] > 0 and numbers["backward"] > 0 for numbers in shares)
    assert "kernels" in (tmp_path / "kernels.md").read_text()


def test_a_kernel_that_rounds_ties_otherwise_fails(script: ModuleType) -> None:
    def biased(quantizer, w, alpha):  # type: ignore[no-untyped-def]
        x, a = reference.rows_of(w, alpha)
        codes = torch.floor((x / a).clamp(quantizer.low, quantizer.high) + 0.5).clamp_max_(quantizer.qp)
        return reference.decode_rows_(quantizer, codes, a).to(w.dtype).reshape(w.shape)

    bench = script.Bench("cpu")
    bench.kernels = SimpleNamespace(quantize=biased, gradients=reference.gradients)
    with pytest.raises(AssertionError, match="values"):
        bench.correct(script.QUANTIZERS[4], torch.float32)
