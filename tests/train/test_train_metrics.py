"""What the loop says of a device, and which process reads the data's checksums."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qatscale.data.open import open_stream
from qatscale.engine.runtime import Runtime
from qatscale.errors import UserError
from qatscale.schedule.timeline import StepSettings
from qatscale.train.metrics import Meter, total_peak
from tests.train.driving import config, spec
from tests.train.fixed_tokens import write_fixed_tokens


def test_the_peak_is_that_of_all_devices_and_known_for_bf16_alone() -> None:
    assert total_peak("NVIDIA H100 80GB HBM3", 8, "bf16") == 8 * 989e12
    assert total_peak("NVIDIA H100 80GB HBM3", 8, "fp32") is None
    assert total_peak("cpu", 2, "bf16") is None
    assert total_peak("NVIDIA H100 of another kind", 1, "bf16") is None


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """Fixed tokens of which one byte was changed since they were written."""
    folder = write_fixed_tokens(tmp_path / "data")
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)
    return folder


def test_the_first_process_reads_the_checksums(altered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(spec("run", tmp_path, altered))
    for rank in (None, "0"):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=r"train\.bin.*checksum"):
            open_stream(run, "train")
    monkeypatch.setenv("RANK", "1")
    open_stream(run, "train")


def test_every_process_looks_at_the_sizes(altered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    shutil.copy(altered / "train.bin", altered / "longer")
    (altered / "train.bin").write_bytes((altered / "longer").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.(bin|idx)"):
        open_stream(config(spec("run", tmp_path, altered)), "train")


class _Engine:
    @staticmethod
    def get_global_grad_norm() -> float:
        return 1.0


@pytest.fixture
def meter(tmp_path: Path) -> Meter:
    return Meter(config(spec("run", tmp_path, tmp_path)), Runtime(0, 1, torch.device("cpu")), "fp32")


def steps(meter: Meter, count: int) -> dict[str, Any]:
    """The record of an interval of so many steps."""
    for _ in range(count):
        meter.add_loss(torch.tensor(2.0))
        meter.end_step()
    return meter.read(count, StepSettings("stable", False, 1e-3, (0.9, 0.95), 0.1), _Engine())


def test_the_first_ten_steps_and_those_after_the_switch_are_marked_as_warm_up(meter: Meter) -> None:
    assert [steps(meter, 4)["warmup"] for _ in range(5)] == [True, True, True, False, False]
    meter.restart()
    assert [steps(meter, 10)["warmup"] for _ in range(3)] == [True, False, False]


def test_a_pause_does_not_count(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 seconds of which 8 are a checkpoint: 2 steps of 512 tokens in 2 seconds."""
    clock = iter([0.0, 1.0, 9.0, 10.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter._start_interval()
    with meter.pause():
        pass
    assert steps(meter, 2)["tokens_per_second"] == 512.0
