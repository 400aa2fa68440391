"""Integers, scales, packing and blocks against float64, bit arithmetic and the clients' own unpacking."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qatscale.export.folder import pack
from qatscale.export.formats import gguf_blocks
from qatscale.export.formats.base import get_format
from qatscale.export.formats.gguf import permutation
from qatscale.export.formats.gguf_blocks import to_blocks
from qatscale.export.formats.mlx import AffineEncoding
from qatscale.export.integers import integer_range, integer_step, packed_words, signed_bits
from qatscale.export.quantized_matrix import QuantizedMatrix
from qatscale.export.source import SourceParameter
from qatscale.model.llama import ModelConfig
from qatscale.quant.bit_widths import QUANTIZERS, SCALE_FLOOR, Quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.reference import encode

ALL = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=lambda q: q.bits_text)


def codes_of(quantizer: Quantizer) -> list[int]:
    return [-1, 1] if quantizer.name == "binary" else list(range(-quantizer.qn, quantizer.qp + 1))


def a_matrix(
    quantizer: Quantizer, rows: int = 6, channels: int = 512, groups: int = 1
) -> tuple[QuantizedMatrix, torch.Tensor]:
    """With every code in every row, one scale below the floor; and the weights that forward makes of them."""
    codes = torch.tensor(codes_of(quantizer), dtype=torch.int8)
    draw = torch.Generator().manual_seed(0)
    picked = codes[torch.randint(len(codes), (rows, channels), generator=draw)]
    picked[:, : len(codes)] = codes
    alpha = torch.rand(rows, groups, generator=draw) / 16 + 1e-3
    alpha[0, 0] = SCALE_FLOOR / 3
    levels = (picked.view(rows, groups, -1) + quantizer.shift) / quantizer.steps
    weights = (levels * alpha.clamp_min(SCALE_FLOOR).unsqueeze(-1)).view(rows, channels)
    alpha = alpha[:, 0] if groups == 1 else alpha
    assert torch.equal(encode(quantizer, weights, alpha), picked)
    return QuantizedMatrix.from_codes(quantizer, picked, alpha), fake_quantize(quantizer, weights, alpha)


@ALL
@pytest.mark.parametrize("groups", [1, 4])
def test_integers_times_scale_are_the_quantizers_weights_to_the_bit(quantizer: Quantizer, groups: int) -> None:
    matrix, decoded = a_matrix(quantizer, groups=groups)
    assert torch.equal(matrix.values(), decoded)
    assert torch.equal(matrix.values(torch.bfloat16), decoded.bfloat16())
    turned = torch.arange(6).flip(0)
    assert torch.equal(matrix.permuted(turned).values(), decoded.flip(0))


@ALL
def test_ranges_and_unsigned_codes(quantizer: Quantizer) -> None:
    matrix, _ = a_matrix(quantizer)
    bits = signed_bits(quantizer)
    integers = matrix.integers.int()
    assert -(2 ** (bits - 1)) <= integers.min()
    assert integers.max() <= 2 ** (bits - 1) - 1
    assert bits == 2 or integers.unique().numel() > 2 ** (bits - 1) or quantizer.name == "seq", "no bit for nothing"
    unsigned = matrix.unsigned.view(torch.uint8).int()
    assert sorted(unsigned.unique().tolist()) == list(range(len(codes_of(quantizer))))
    assert unsigned.max() < 2**quantizer.storage_bits
    assert torch.equal(integer_step(quantizer) * unsigned + integer_range(quantizer)[0], integers)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 67])
def test_packing_is_one_stream_of_bits(bits: int, count: int) -> None:
    values = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(bits))
    packed = pack(values, bits)
    assert packed.shape == (3, packed_words(count, bits))
    for row, found in zip(values.tolist(), packed.tolist(), strict=True):
        stream = sum(value << (bits * place) for place, value in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(found)) == stream


def test_packing_in_parts_is_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(8, (37, 50))
    whole = pack(values, 3)
    monkeypatch.setattr("qatscale.export.folder._CHUNK", 120)
    assert torch.equal(pack(values, 3), whole)


@ALL
def test_compressed_tensors_unpacks_the_integers(quantizer: Quantizer) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    matrix, _ = a_matrix(quantizer, channels=300)
    bits = signed_bits(quantizer)
    packed = pack(matrix.integers.to(torch.int16) + 2 ** (bits - 1), bits)
    assert torch.equal(packed, helpers.pack_to_int32(matrix.integers, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, torch.Size((6, 300))), matrix.integers)


@ALL
def test_mlx_computes_the_weights_of_every_width(quantizer: Quantizer) -> None:
    mx = pytest.importorskip("mlx.core")
    matrix, decoded = a_matrix(quantizer)
    encoding = (
        get_format("mlx").stored(SourceParameter("blocks.0.mlp.up.weight", (6, 512), quantizer), torch.float32).encoding
    )
    assert isinstance(encoding, AffineEncoding)
    words = pack(matrix.unsigned, encoding.bits).view(torch.uint32)
    packed, scales, biases = (mx.array(part.numpy()) for part in (words, *encoding.scales(matrix)))
    found = torch.from_numpy(np.array(mx.dequantize(packed, scales, biases, encoding.group_size, encoding.bits)))
    assert torch.allclose(found, decoded, rtol=0, atol=encoding.tolerance * float(decoded.abs().max()))


KINDS = {kind.name: kind for kind in gguf_blocks.TYPES}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_blocks_hold_every_integer_of_their_type(kind: gguf_blocks.BlockType) -> None:
    """By gguf's own dequantization, in fp32, to the bit; groups of one and of several blocks."""
    step = 2 if kind.name == "Q2_K" else 1
    allowed = np.arange(kind.low, kind.high + 1, step, dtype=np.int8)
    draw = np.random.default_rng(0)
    integers = draw.choice(allowed, (4, 1024))
    integers[:, : len(allowed)] = allowed
    for groups in (1, 2):
        d = draw.uniform(1e-3, 1e-1, (4, groups)).astype(np.float16)
        found = gguf.dequantize(to_blocks(kind, integers, d), gguf.GGMLQuantizationType[kind.name])
        expected = integers.astype(np.float32) * np.repeat(d.astype(np.float32), 1024 // groups, axis=1)
        assert np.array_equal(found, expected)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert (block, size) == (kind.weights, kind.bytes)


def test_blocks_of_one_bit() -> None:
    """As llama.cpp's dequantize_row_q1_0 reads them: d where the bit is set, else -d; gguf 0.19 cannot."""
    draw = np.random.default_rng(0)
    integers, d = draw.choice(np.array([-1, 1], np.int8), (3, 256)), draw.uniform(0.01, 1, (3, 1)).astype(np.float16)
    found = to_blocks(gguf_blocks.Q1_0, integers, d).reshape(3, 2, 18)
    assert np.array_equal(found[..., :2].copy().view(np.float16)[..., 0], np.repeat(d, 2, axis=1))
    for row, block, place in np.ndindex(3, 2, 128):
        bit = found[row, block, 2 + place // 8] >> (place % 8) & 1
        assert bit == (integers[row, 128 * block + place] > 0)


@ALL
def test_every_choice_of_gguf_has_room_for_the_integers(quantizer: Quantizer) -> None:
    integers = a_matrix(quantizer)[0].integers
    for kind in gguf_blocks.block_types(quantizer):
        assert kind.low <= int(integers.min())
        assert int(integers.max()) <= kind.high


@pytest.mark.parametrize(("name", "rows", "kv_heads"), [("q", 32, None), ("k", 16, 2)])
def test_rows_of_queries_and_keys_are_permuted_as_llama_cpp_reads_them(
    name: str, rows: int, kv_heads: int | None
) -> None:
    """Rotating neighbours after the permutation is rotating halves before it."""
    config = ModelConfig(vocab_size=8, hidden_size=32, layers=1, heads=4, kv_heads=kv_heads, intermediate_size=8)
    order = permutation(SourceParameter(f"blocks.0.attention.{name}.weight", (rows, 32), None), config)
    assert order is not None
    x = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angle = torch.tensor([0.1, 0.5, 0.9, 1.3], dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.view(-1, 2, 4).unbind(1)
    halves = torch.cat((first * cos - second * sin, second * cos + first * sin), 1).flatten()
    even, odd = x[order].view(-1, 4, 2).unbind(2)
    neighbours = torch.stack((even * cos - odd * sin, odd * cos + even * sin), 2).flatten()
    assert torch.equal(neighbours, halves[order])
    assert permutation(SourceParameter("blocks.0.attention.v.weight", (rows, 32), None), config) is None
