"""Arithmetic on a model's shape: parameters, floating-point operations per token, and the best a device could do."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatlaw.effective_bits import StoredWeights, attention_shape, llama_weights
from qatscale.config.schema import ModelConfig, QatConfig
from qatscale.errors import UserError

Precision = Literal["fp32", "bf16"]


def count_parameters(model: ModelConfig) -> int:
    """All parameters of a model, a tied embedding once, without quantizer scales: the N of the scaling laws here."""
    return stored_weights(model, QatConfig()).params


def stored_weights(model: ModelConfig, qat: QatConfig, precision: Precision = "bf16") -> StoredWeights:
    """The weights as a recipe says they are quantized, with their bits and scales.

    precision: the type of scales and of what is not quantized: that of the forward pass.
    """
    full_precision = qat.scheme == "fp"
    attention = attention_shape(
        model.hidden_size, model.heads, model.kv_heads, model.channels, model.attention_bias, model.qk_norm
    )
    return llama_weights(
        hidden_size=model.hidden_size,
        layers=model.layers,
        intermediate_size=model.intermediate_size,
        vocabulary=model.vocab_size,
        **attention,
        tied=model.tied_embedding,
        bits=UNQUANTIZED_BITS if full_precision else qat.bits,
        embedding_bits=None if full_precision or qat.embedding_bits == "auto" else qat.embedding_bits,
        group_size=qat.group_size,
        plain_bits=32 if precision == "fp32" else UNQUANTIZED_BITS,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward per trained token.

    6 x matmul parameters (2 forward, 4 backward) + 12 x layers x width x sequence_length for the attention scores, not
    halved for the causal mask: the convention of PaLM (arXiv 2204.02311, appendix B), so that MFU compares with what
    others report. Neither recomputation nor fake quantization counts: they are overhead, not model.
    """
    attended, head = model.channels * model.heads, model.vocab_size * model.hidden_size
    matmul = stored_weights(model, QatConfig()).matrices.weights + head
    return 6 * matmul + 12 * model.layers * attended * sequence_length


FLOPS_CONVENTION = "6 x matmul parameters + 12 x layers x width x sequence, per token (PaLM, appendix B)"
"""For the line that reports TFLOP/s and MFU."""


class _Device(NamedTuple):
    names: tuple[str, ...]
    teraflops: float
    gigabytes: int


# From the vendors' data sheets: dense bf16 tensor-core peaks, half the figure where a sheet gives only the one with 2:4
# sparsity; and memory. The names are those of torch.cuda.get_device_name, matched entirely: a variant with other
# clocks or units (A100-SXM-64GB, H20, A10G) must not pass for its sibling, and a MIG slice is not a device.
_DEVICES = (
    _Device(("A100-SXM4-40GB", "A100-PCIE-40GB"), 312.0, 40),  # NVIDIA A100 data sheet: 312
    _Device(("A100-SXM4-80GB", "A100 80GB PCIe"), 312.0, 80),
    _Device(("A800-SXM4-80GB", "A800 80GB PCIe"), 312.0, 80),  # A800 data sheet: 312 (only NVLink is slower)
    _Device(("A30",), 165.0, 24),  # A30 data sheet: 165
    _Device(("A40",), 149.7, 48),  # A40 data sheet: 149.7
    _Device(("A10",), 125.0, 24),  # A10 data sheet: 125
    _Device(("H100 80GB HBM3",), 989.0, 80),  # H100 data sheet, SXM: 1,979 with sparsity
    _Device(("H100 PCIe",), 756.0, 80),  # H100 data sheet, PCIe: 1,513 with sparsity
    _Device(("H100 NVL",), 835.0, 94),  # H100 data sheet, NVL: 1,671 with sparsity
    _Device(("H200",), 989.0, 141),  # H200 data sheet, SXM: 1,979 with sparsity
    _Device(("H200 NVL",), 835.0, 141),  # H200 data sheet, NVL: 1,671 with sparsity
    _Device(("GH200 120GB", "GH200 480GB"), 989.0, 96),  # GH200 data sheet: 1,979 with sparsity (names: the CPU's GB)
    _Device(("GH200 144G HBM3e",), 989.0, 144),
    _Device(("L4",), 121.0, 24),  # L4 data sheet: 242 with sparsity
    _Device(("L40",), 181.0, 48),  # L40 data sheet: 181.05
    _Device(("L40S",), 362.0, 48),  # L40S data sheet: 362.05
    _Device(("B200",), 2250.0, 180),  # HGX B200 data sheet: 4.5 PFLOP/s a GPU with sparsity, 1.44 TB of eight
    _Device(("MI300X",), 1307.0, 192),  # AMD Instinct MI300X data sheet: 1,307.4
    _Device(("MI325X",), 1307.0, 256),  # AMD Instinct MI325X data sheet: 1,307.4
)


def device_names() -> list[str]:
    """Devices whose peak and memory are known."""
    return sorted(name for device in _DEVICES for name in device.names)


def _device(name: str) -> _Device | None:
    short = re.sub(r"^(NVIDIA|AMD Instinct)\s+", "", name.strip())
    return next((device for device in _DEVICES if short in device.names), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None for a device that is not in the table, never a guess.

    device_name: as torch.cuda.get_device_name gives it, e.g. 'NVIDIA H100 80GB HBM3'. An MFU against it means
    something for bf16 runs alone.
    """
    device = _device(device_name)
    return device.teraflops * 1e12 if device else None


def known_peak(gpu: str, fix: str = "") -> float:
    """As `peak_flops`. UserError, about --gpu, for a device that is not in the table."""
    if (peak := peak_flops(gpu)) is None:
        known = f"Known: {', '.join(device_names())}. {fix}"
        raise UserError("--gpu", gpu, "its peak FLOP/s is unknown.", known.strip())
    return peak


def device_memory(device_name: str) -> int | None:
    """Bytes of a device's memory as its data sheet gives it, with 10^9 a gigabyte; None for an unknown device.

    A driver reports some 5 % more, about what the CUDA context, NCCL and gaps between allocations take.
    """
    device = _device(device_name)
    return device.gigabytes * 10**9 if device else None
