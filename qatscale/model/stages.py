"""The blocks of a model that each pipeline stage holds. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.config.sizes import stored_weights


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


def divide(model: ModelConfig, count: int) -> tuple[Stage, ...]:
    """The stages of a pipeline, each with at least one block, such that the largest has the fewest parameters.

    A tied embedding counts twice, because both end stages hold it. Blocks are equal, so it is optimal to give each one
    to the stage that is the smallest so far (the first of equals).
    """
    assert 1 <= count <= model.layers
    parameters, block = stage_parameters(model, [1] * count), _block(model)
    spare = model.layers - count

    def below(size: int) -> list[int]:
        """Blocks that each stage gets while it is smaller than `size`."""
        return [max(0, -(-(size - own) // block)) for own in parameters]

    low, high = min(parameters), max(parameters) + block * spare + 1
    while high - low > 1:  # the largest size that the spare blocks fill every stage up to
        middle = (low + high) // 2
        low, high = (middle, high) if sum(below(middle)) <= spare else (low, middle)
    blocks = [1 + more for more in below(low)]
    left = model.layers - sum(blocks)
    for i in range(count):  # stages of just this size, the earliest first
        if left and parameters[i] + block * (blocks[i] - 1) == low:
            blocks[i], left = blocks[i] + 1, left - 1
    stages, first = [], 0
    for index, length in enumerate(blocks):
        stages.append(Stage(index, count, range(first, first + length)))
        first += length
    return tuple(stages)


def stage_parameters(model: ModelConfig, blocks: list[int]) -> list[int]:
    """The parameters of each stage, without quantizer scales. blocks: the number of blocks per stage."""
    table = model.vocab_size * model.hidden_size
    parameters = [length * _block(model) for length in blocks]
    parameters[0] += table
    if len(blocks) > 1 or not model.tied_embedding:
        parameters[-1] += table
    parameters[-1] += model.hidden_size
    return parameters


def _block(model: ModelConfig) -> int:
    weights = stored_weights(model, QatConfig())
    return (weights.params - weights.embedding.weights - model.hidden_size) // model.layers
