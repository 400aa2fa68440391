"""What one process holds of a model under a layout, by arithmetic alone: its matrices, norms and quantizer scales.

`qatscale.model.llama`, `qatscale.quant.selection` and `qatscale.engine.initialize.optimizer_groups` make these tensors;
a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qatscale.config.schema import QatConfig, RunConfig
from qatscale.engine.layout import Layout
from qatscale.model.stages import Stage

EMBEDDING_LEAST_BITS = 4
"""As in `qatscale.quant.selection`, which imports torch."""
NOT_QUANTIZED = 16


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or this process's part of one."""

    name: str
    rows: int
    columns: int
    bits: float | None
    """None: it stays in full precision and has no scales."""
    scales: int
    scales_shared: bool = False
    """Whether its scales lie on every tensor-parallel process, which sum their gradients: rows split by columns."""

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Share:
    """What the processes of one pipeline stage each hold."""

    stage: Stage
    width: int
    block: tuple[Matrix, ...]
    """q, k, v, o, gate, up, down of one block; the blocks are equal."""
    embed: Matrix | None
    head: Matrix | None
    """None on every stage but the last. The same object as `embed` where they are one tensor."""

    @property
    def blocks(self) -> int:
        return len(self.stage.blocks)

    @property
    def tied_here(self) -> bool:
        return self.head is not None and self.head is self.embed

    def matrices(self) -> Iterator[Matrix]:
        """Every one once, in the model's order."""
        if self.embed:
            yield self.embed
        for _ in range(self.blocks):
            yield from self.block
        if self.head and not self.tied_here:
            yield self.head

    @property
    def norms(self) -> int:
        """How many; each has `width` gains."""
        return 2 * self.blocks + (1 if self.stage.is_last else 0)

    @property
    def groups(self) -> dict[str, list[int]]:
        """Optimizer group → elements of its parameters, in the order that ZeRO flattens them."""
        scales: dict[float, list[int]] = {}
        for matrix in self.matrices():
            if matrix.bits is not None:
                scales.setdefault(matrix.bits, []).append(matrix.scales)
        return {
            "matrices": [matrix.numel for matrix in self.matrices()],
            "norms": [self.width] * self.norms,
            **{f"scales_{bits:g}bit": numels for bits, numels in sorted(scales.items())},
        }

    @property
    def weights(self) -> int:
        """Parameters but the scales."""
        return sum(matrix.numel for matrix in self.matrices()) + self.norms * self.width

    @property
    def scales(self) -> int:
        return sum(matrix.scales for matrix in self.matrices())


def share_of(config: RunConfig, layout: Layout, stage: Stage) -> Share:
    """The share of a process of `stage`: of several on it, the first, which has no padding to spare."""
    model, qat, tensor = config.model, config.qat, layout.tensor
    width, inner = model.hidden_size, model.intermediate_size
    attended = width // tensor
    key_values = width // model.heads * (model.kv_heads or model.heads) // tensor
    bits = table_bits(qat, model.tied_embedding)

    def matrix(name: str, rows: int, columns: int, bits: float | None, by_columns: bool = False) -> Matrix:
        groups = columns // qat.group_size if qat.group_size else 1
        shared = by_columns and tensor > 1 and not qat.group_size
        return Matrix(name, rows, columns, bits, rows * groups if bits is not None else 0, shared)

    table = matrix("table", -(-model.vocab_size // tensor), width, bits)
    block = (
        matrix("q", attended, width, qat.bits),
        matrix("k", key_values, width, qat.bits),
        matrix("v", key_values, width, qat.bits),
        matrix("o", width, attended, qat.bits, by_columns=True),
        matrix("gate", inner // tensor, width, qat.bits),
        matrix("up", inner // tensor, width, qat.bits),
        matrix("down", width, inner // tensor, qat.bits, by_columns=True),
    )
    other = table if model.tied_embedding and stage.is_first else matrix("table", table.rows, width, bits)
    return Share(stage, width, block, table if stage.is_first else None, other if stage.is_last else None)


def table_bits(qat: QatConfig, tied: bool) -> float | None:
    """Bits of embedding and head; None: full precision."""
    if qat.embedding_bits == "auto":
        return max(EMBEDDING_LEAST_BITS, qat.bits) if tied else None
    return None if qat.embedding_bits == NOT_QUANTIZED else qat.embedding_bits
