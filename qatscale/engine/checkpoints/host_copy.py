"""A copy of what this process holds in host memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """One buffer as large as all slices, made once and used for every checkpoint: 12 bytes per parameter, over all
    processes. Its pages are there from the start, so that the copy is no more than a copy, and a machine that lacks the
    memory says so before the first step.
    """

    def __init__(self, slices: Mapping[str, Tensor]) -> None:
        self._buffer = torch.empty(sum(s.numel() for s in slices.values())).zero_()
        self._copied: torch.cuda.Event | None = None
        self._pinned = any(s.is_cuda for s in slices.values())
        if self._pinned:
            # torch's own pinned memory comes in powers of two: up to twice as much.
            code = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0)
            if int(code):
                size = f"{self._buffer.nbytes / 2**30:.1f} GiB"
                raise MemoryError(f"{size} of host memory could not be pinned ({code}); see checkpoint.background")

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    @torch.no_grad()
    def take(self, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the slices, the same as ever, and return the copies under the same names.

        From a GPU the copies stand in its current stream: whatever is computed next waits for them, this thread does
        not, and the copies are there after `wait`.
        """
        assert sum(s.numel() for s in slices.values()) == self._buffer.numel()
        copies = dict(zip(slices, self._buffer.split([s.numel() for s in slices.values()]), strict=True))
        for name, values in slices.items():
            copies[name].copy_(values, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Until the last `take` is done. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Unpin. Nobody may be writing from it."""
        if self._pinned:
            self.wait()
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
            self._pinned = False
