"""A model split over processes equals the full model: losses, every gradient, and quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatscale.model.tensor_parallel import UNSPLIT, TensorParallel
from tests.processes import run


@pytest.mark.dist
@pytest.mark.parametrize("processes", [2])
def test_split_and_whole_models_agree(processes: int) -> None:
    finished = run([Path(__file__).with_name("tensor_parallel_driver.py")], processes)
    assert finished.codes == [0] * processes, finished.output
    assert finished.output.count("ok") == processes


@pytest.mark.parametrize("full", [1, 6, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_cover_a_dimension_once_and_pad_the_end(full: int, size: int, dim: int) -> None:
    whole = torch.arange(1, 3 * full + 1).view((full, 3) if dim == 0 else (3, full))
    parts = [TensorParallel(rank, size).shard(dim, full) for rank in range(size)]
    assert {part.local for part in parts} == {-(-full // size)}
    taken = torch.cat([part.take(whole) for part in parts], dim)
    assert torch.equal(taken.narrow(dim, 0, full), whole)
    assert taken.narrow(dim, full, taken.shape[dim] - full).eq(0).all()
    assert all(part.full_shape(part.take(whole).shape) == whole.shape for part in parts)


def test_alone_there_is_nothing_to_exchange() -> None:
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert UNSPLIT.enter(x) is x
    assert UNSPLIT.leave(x) is x
    assert UNSPLIT.shared(x) is x
