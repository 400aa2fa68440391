"""States whose tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from qatscale.tensor_files import Shape

State = Mapping[str, Tensor]
"""Parameter name → value, as from `named_parameters()` or `state_dict()`."""


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read each time they are asked for; their shapes are known."""

    def __init__(self, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> None:
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(state: State) -> dict[str, Shape]:
    """Without reading any tensor."""
    return state.shapes if isinstance(state, LazyState) else {name: tuple(t.shape) for name, t in state.items()}


def renamed(state: State, names: Mapping[str, str]) -> State:
    """New name → the tensor of the old name; the very same tensors, or as lazy as `state` is."""
    if isinstance(state, LazyState):
        return LazyState({new: state.shapes[old] for new, old in names.items()}, lambda new: state[names[new]])
    return {new: state[old] for new, old in names.items()}
