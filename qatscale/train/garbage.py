"""Python's garbage collector at moments of the loop's choosing.

By itself it runs whenever enough objects have come together, in the middle of a step and on every process at another
one, and the others wait for it in their next collective. What holds tensors here is freed by reference counts; the
collector is for cycles, which exceptions and closures leave.
"""

from __future__ import annotations

import gc
from typing import Self

EVERY = 100
"""Steps between two collections: on all processes the same ones."""


class Garbage:
    """A context in which `step` alone collects garbage. What is there when it begins is left out for good."""

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def step(self, done: int, pauses: bool) -> None:
        """Call it after every step. pauses: whether the step ends in a checkpoint or a validation anyway."""
        if pauses or done % EVERY == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
