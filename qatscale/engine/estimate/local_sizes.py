"""The parameters that one process holds under a layout: matrices, norms and quantizer scales, by arithmetic alone.

`qatscale.model.llama`, `qatscale.quant.selection` and `QatPlugin.optimizer_groups` create these tensors; a test
compares the two.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qatscale.config.schema import RunConfig
from qatscale.engine.layout import Layout
from qatscale.model.stages import Stage
from qatscale.quant.bit_widths import embedding_rule


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns], or this process's part of it."""

    rows: int
    columns: int
    bits: float | None
    """None: it stays in full precision and has no scales."""
    scales: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class LocalSizes:
    """What each process of one pipeline stage holds; of its tensor-parallel processes the first, with least padding.

    Any number of equal blocks costs the same arithmetic.
    """

    def __init__(self, config: RunConfig, layout: Layout, stage: Stage) -> None:
        self.config, self.layout, self.stage = config, layout, stage
        model, qat, tensor = config.model, config.qat, layout.tensor
        self.hidden_size = width = model.hidden_size
        inner, attended = model.intermediate_size // tensor, model.channels * model.heads // tensor
        key_values = model.channels * (model.kv_heads or model.heads) // tensor
        rule = embedding_rule(qat.embedding_bits, model.tied_embedding)
        bits = None if rule is None else rule.at(qat.bits)

        def matrix(rows: int, columns: int, bits: float | None = qat.bits) -> Matrix:
            groups = columns // qat.group_size if qat.group_size else 1
            return Matrix(rows, columns, bits, rows * groups if bits is not None else 0)

        query, key = matrix(attended, width), matrix(key_values, width)
        gate, down = matrix(inner, width), matrix(width, inner)
        self.block = (query, key, key, matrix(width, attended), gate, gate, down)
        """q, k, v, o, gate, up, down of one block."""
        table = matrix(-(-model.vocab_size // tensor), width, bits)
        self.embed = table if stage.is_first else None
        """None on every stage but the first."""
        head = table if model.tied_embedding and stage.is_first else matrix(table.rows, width, bits)
        self.head = head if stage.is_last else None
        """None on every stage but the last. The same object as `embed` where they are one tensor."""
        biases = (attended, key_values, key_values) if model.attention_bias else ()
        self.vectors = (*biases, *((model.channels,) * 2 if model.qk_norm else ()))
        """Elements of the biases and norms of heads of one block."""

    @property
    def blocks(self) -> int:
        return self.stage.blocks.stop - self.stage.blocks.start

    @property
    def tied_here(self) -> bool:
        return self.head is not None and self.head is self.embed

    @property
    def matrices(self) -> list[tuple[Matrix, int]]:
        """Each matrix with the number of its kind."""
        ends = [self.embed, None if self.tied_here else self.head]
        return [(m, self.blocks) for m in self.block] + [(m, 1) for m in ends if m is not None]

    @property
    def groups(self) -> dict[str, Counter[int]]:
        """Optimizer group → elements of a parameter → number of such parameters."""
        found = {"matrices": Counter[int](), "norms": Counter({self.hidden_size: 2 * self.blocks + self.stage.is_last})}
        for elements in self.vectors:
            found["norms"][elements] += self.blocks
        for matrix, count in self.matrices:
            found["matrices"][matrix.numel] += count
            if matrix.bits is not None:
                found.setdefault(f"scales_{matrix.bits:g}bit", Counter())[matrix.scales] += count
        return found

    @property
    def weights(self) -> int:
        """Elements of all parameters but the scales."""
        return sum(matrix.numel * count for matrix, count in self.matrices) + self.norms

    @property
    def norms(self) -> int:
        return self.hidden_size * (2 * self.blocks + self.stage.is_last) + self.blocks * sum(self.vectors)

    @property
    def scales(self) -> int:
        return sum(matrix.scales * count for matrix, count in self.matrices)

    @property
    def largest(self) -> int:
        return max(matrix.numel for matrix, _ in self.matrices)
