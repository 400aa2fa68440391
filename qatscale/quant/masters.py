"""The access to fp32 master weights and optimizer state that the switch needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class Masters(Protocol):
    """Access to fp32 masters. `full` and `assign` may be collective: every process calls them in the same order."""

    def full(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's fp32 master, in its full shape. Do not write to it."""
        ...

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets master and working copy to `value`, fp32, in the parameter's full shape."""
        ...

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Zeroes Adam's moments and step count. `parameters` are all those of one or more optimizer groups."""
        ...


class PlainMasters:
    """Masters for a plain PyTorch loop, where the parameters are their own masters: hold them in fp32."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def full(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().float()

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        if value.shape != parameter.shape:
            raise ValueError(f"a value of shape {list(value.shape)} for a parameter of shape {list(parameter.shape)}")
        parameter.copy_(value)

    def reset_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """ValueError for a parameter that the optimizer does not have, because it would never move."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for parameter in parameters:
            if id(parameter) not in known:
                raise ValueError(
                    f"a parameter of shape {list(parameter.shape)} is in no group of the optimizer; "
                    "build the optimizer after prepare(model)"
                )
            # Before its first step a parameter has no state; that step starts it at zero.
            state = self._optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0
