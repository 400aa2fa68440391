"""Which blocks of a model a pipeline stage holds. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.schema import ModelConfig
from qatscale.config.sizes import count_parameters


@dataclass(frozen=True)
class Stage:
    """A run of consecutive blocks. The first stage also has the embedding, the last one the final norm and the head."""

    index: int
    count: int
    blocks: range

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def whole(model: ModelConfig) -> Stage:
    """All of a model on one stage."""
    return Stage(0, 1, range(model.layers))


def divide(model: ModelConfig, count: int) -> tuple[Stage, ...]:
    """The stages of a pipeline, the largest as small as can be in parameters, each with at least one block.

    A tied embedding counts twice: both end stages hold it. Blocks are equal, so giving each to the stage that is the
    smallest so far (the earliest of equals) is optimal.
    """
    assert 1 <= count <= model.layers
    parameters = stage_parameters(model, [1] * count)
    block = _block(model)
    blocks = [1] * count
    for _ in range(model.layers - count):
        smallest = min(range(count), key=lambda i: parameters[i])
        blocks[smallest] += 1
        parameters[smallest] += block
    stages, first = [], 0
    for index, length in enumerate(blocks):
        stages.append(Stage(index, count, range(first, first + length)))
        first += length
    return tuple(stages)


def stage_parameters(model: ModelConfig, blocks: list[int]) -> list[int]:
    """Parameters that each stage holds, given its number of blocks; quantizer scales left out."""
    table = model.vocab_size * model.hidden_size
    parameters = [length * _block(model) for length in blocks]
    parameters[0] += table
    if len(blocks) > 1 or not model.tied_embedding:
        parameters[-1] += table
    parameters[-1] += model.hidden_size
    return parameters


def _block(model: ModelConfig) -> int:
    return (count_parameters(model).non_embedding - model.hidden_size) // model.layers
