"""Updates that a spike would spoil: seen by their gradient norm and withheld before they reach weights and moments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
from pydantic import Field

from qatscale.engine.zero_masters import ZeroMasters

WINDOW = 100
"""Updates that the running mean of the gradient norm looks back, about."""
WARMUP = 50
"""Updates after the start and after the switch before norms are compared with their mean."""

Index = Annotated[int, Field(ge=0)]


@pydantic.dataclasses.dataclass
class SpikeState:
    """What a checkpoint keeps, so that a resumed run judges as the run before it. The guard's own changes in place."""

    count: Index = 0
    """Spikes so far."""
    left_out: tuple[Index, ...] = ()
    """Global batches that the run passes over, rising; as steps of a run that leaves none out."""
    mean: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Running mean of the gradient norm."""
    updates: Index = 0
    """Updates in the mean since the start or the switch."""

    def batch_of(self, step: int) -> int:
        """The batch that a 0-based step reads."""
        for index in self.left_out:
            step += index <= step
        return step


@dataclass(frozen=True)
class Spike:
    """An update that was withheld."""

    norm: float
    mean: float

    def __str__(self) -> str:
        if not math.isfinite(self.norm):
            return "the gradient is not finite"
        return f"the gradient norm is {self.norm:.4g}, {self.norm / self.mean:.3g} times its running mean"


class SpikeGuard:
    """Withholds an update whose gradient norm, over all parameters, is not finite or above `factor` times its mean.

    factor: None = only what is not finite. Every process sees the same norm and decides alike.
    """

    def __init__(self, masters: ZeroMasters, factor: float | None) -> None:
        self._zero, self._factor, self.state = masters.zero, factor, SpikeState()
        self._spike: Spike | None = None
        self._judged = False
        update = masters.adam.step

        def step(*arguments: Any, **keywords: Any) -> Any:  # once per optimizer group
            return update(*arguments, **keywords) if self._allows() else None

        masters.adam.step = step  # type: ignore[method-assign]

    def _allows(self) -> bool:
        if not self._judged:
            self._judged = True
            norm, state = float(self._zero._global_grad_norm or 0.0), self.state
            judges = self._factor is not None and state.updates >= WARMUP
            if not math.isfinite(norm) or (judges and norm > (self._factor or 0.0) * state.mean):
                self._spike = Spike(norm, state.mean)
            else:
                state.updates += 1
                state.mean += (norm - state.mean) / min(state.updates, WINDOW)
        return self._spike is None

    def after_step(self) -> Spike | None:
        """The spike of the step just taken, whose update was withheld."""
        # DeepSpeed itself withholds gradients that are not finite
        spike = Spike(math.inf, self.state.mean) if self._zero.overflow else self._spike
        self._spike, self._judged = None, False
        return spike

    def count(self) -> int:
        """Count a spike that the run passes over; returns how many there were."""
        self.state.count += 1
        return self.state.count

    def roll_back(self, before: SpikeState, step: int) -> None:
        """After a checkpoint was loaded: keep the count of `before`, and leave out the batch that its `step` read."""
        self.state.count = before.count
        self.state.left_out = tuple(sorted({*before.left_out, before.batch_of(step)}))

    def restart(self) -> None:
        """Forget the mean: after the switch the gradients are those of another loss."""
        self.state.mean, self.state.updates = 0.0, 0
