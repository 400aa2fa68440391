"""Effective bits against sums over single matrices, and the ladder's smallest model counted by hand."""

import numpy as np
import pytest

from qatlaw.effective_bits import Part, StoredWeights, llama_weights

LADDER = {"hidden_size": 32, "layers": 4, "intermediate_size": 96, "vocabulary": 1024}
"""86,304 parameters: the smallest size of analysis/studies/ladder-1to1000."""


def test_the_ladders_one_bit_is_more_than_two() -> None:
    weights = llama_weights(**LADDER, bits=1)
    assert weights.params == 86_304
    assert weights.embedding == Part(32_768, 4, 1_024)
    codes = 53_248 * 1 + 32_768 * 4
    assert codes / 86_304 == pytest.approx(2.14, abs=0.005)  # as the ladder's README says, without scales and norms
    stored = codes + 16 * (4 * (5 * 32 + 2 * 96) + 1_024) + 16 * 9 * 32
    assert weights.bytes == stored / 8
    assert weights.effective_bits == pytest.approx(2.640, abs=0.0005) == stored / 86_304


def test_groups_add_their_scales() -> None:
    """fp16 scales at group 32 add half a bit to every quantized weight."""
    by_row, by_group = (llama_weights(**LADDER, bits=4, group_size=size) for size in (None, 32))
    assert by_group.matrices.stored_bits == by_group.matrices.weights * 4.5
    assert by_group.embedding == by_row.embedding  # rows of 32 channels are one group
    assert by_group.bytes > by_row.bytes


@pytest.mark.parametrize("bits", [1, 1.58, 4, 8, 16])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize(("tied", "embedding_bits"), [(True, None), (False, None), (True, 16), (False, 6)])
def test_a_sum_over_single_matrices(
    bits: float, group_size: int | None, tied: bool, embedding_bits: float | None
) -> None:
    h, kv, mlp, layers, vocabulary, plain = 64, 16, 176, 3, 500, 32

    def matrix(rows: int, columns: int, bits: float) -> float:
        scales = 0 if bits == 16 else rows * (columns // group_size if group_size else 1)
        return rows * columns * (plain if bits == 16 else {1.58: 2}.get(bits, bits)) + scales * plain

    table_bits = embedding_bits or (max(4, bits) if tied else 16)
    block = [(h, h), (kv, h), (kv, h), (h, h), (mlp, h), (mlp, h), (h, mlp)]
    expected = layers * sum(matrix(*shape, bits) for shape in block)
    expected += (1 if tied else 2) * matrix(vocabulary, h, table_bits) + plain * (2 * layers + 1) * h
    weights = llama_weights(
        hidden_size=h, layers=layers, intermediate_size=mlp, vocabulary=vocabulary, kv_width=kv, bits=bits, tied=tied,
        embedding_bits=embedding_bits, group_size=group_size, plain_bits=plain,
    )  # fmt: skip
    assert weights.bytes == pytest.approx(expected / 8, rel=1e-12)
    params = layers * sum(rows * columns for rows, columns in block) + (1 if tied else 2) * vocabulary * h
    assert weights.params == params + (2 * layers + 1) * h


def test_full_precision_is_its_own_type() -> None:
    for plain in (16, 32):
        assert llama_weights(**LADDER, bits=16, plain_bits=plain).effective_bits == plain


def test_arrays_are_many_models() -> None:
    shapes = {key: np.array([value, 2 * value]) for key, value in LADDER.items()}
    both = llama_weights(**shapes, bits=2)
    one = [llama_weights(**{key: int(value[i]) for key, value in shapes.items()}, bits=2) for i in (0, 1)]
    assert [w.effective_bits for w in one] == list(both.effective_bits)


def test_a_table_of_others_needs_no_shape() -> None:
    """Matrices and embedding by their counts alone."""
    weights = StoredWeights(Part(1_000, 3, 10), Part(200, 16), Part(0, 16))
    assert weights.effective_bits == (3_000 + 160 + 3_200) / 1_200
