"""What the loop says of a device, and which process reads the data's checksums."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from driving import config, spec
from fixed_tokens import write_fixed_tokens

from qatscale.errors import UserError
from qatscale.train.evaluate import open_stream
from qatscale.train.meter import total_peak


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
