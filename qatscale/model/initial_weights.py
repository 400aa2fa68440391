"""Initial weights: any slice of any parameter, drawn by itself, with the same numbers under every layout.

Norms and inert scales are 1, biases 0. Matrices are normal with mean 0 and standard deviation `init_std`. `o` and
`down`, which write into the residual stream, have `init_std` / √(2·layers), so that the stream's variance does not grow
with depth (GPT-2's rule). A draw depends on the seed, the parameter's name and the place in it, and on nothing else.

Version 2: elements 2j and 2j + 1 of a parameter, counted over its full shape, are the Box-Muller pair of the j-th
64-bit output of Philox4x64-10 (Salmon et al., SC 2011, as `numpy.random.Philox`) with the first 128 bits of
sha256("seed:name") as its key. The output's low half gives the radius, its high half the angle, in fp32.
Version 1, that of runs whose recipe has no `init`: torch's generator on CPU, seeded by the first 64 bits of the same
hash, draws the entire parameter.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qatscale.config.schema import ModelConfig
from qatscale.model.llama import Llama, canonical_name, is_norm
from qatscale.model.tensor_parallel import full_shape, shard_of

Version = Literal["auto", 1, 2]
"""`auto` = 2."""
_OUTPUTS = 1 << 14
"""64-bit outputs at a time: temporaries of 64 KiB stay in a core's cache. A multiple of 4, the outputs of a counter."""


@dataclass(frozen=True)
class InitialWeights:
    config: ModelConfig
    seed: int
    version: Version = "auto"

    def fill(self, parameter: Tensor, name: str, start: int = 0, end: int | None = None) -> None:
        """Write the initial values of at least elements [start, end) of `parameter`, a process's part of the full one.

        name: in the full model. `parameter` is contiguous, of any dtype and device; its padding is not written.
        """
        if (value := constant(name)) is not None:
            parameter.fill_(value)
            return
        columns, shard = parameter.shape[1], shard_of(parameter)
        full = full_shape(parameter)
        first_row, first_column = (0, 0) if shard is None else (shard.start, 0) if shard.dim == 0 else (0, shard.start)
        rows = parameter.shape[0] if shard is None or shard.dim == 1 else shard.size
        low, high = start // columns, min(rows, -(-(parameter.numel() if end is None else end) // columns))
        if high <= low:
            return
        if self.version == 1:
            drawn = self._first_version(name, full)
            own = drawn[first_row + low : first_row + high, first_column : first_column + columns]
            parameter[low:high].copy_(own)
        elif columns == full[1]:
            self._draw(parameter[low:high].view(-1), name, (first_row + low) * columns)
        else:
            for row in range(low, high):
                self._draw(parameter[row], name, row * full[1] + first_column)

    def _draw(self, out: Tensor, name: str, start: int) -> None:
        """Elements [start, start + len(out)) of the flattened parameter."""
        key = int.from_bytes(self._digest(name)[:16], "little")
        outputs = np.random.Philox(key=key, counter=start // 8)
        skipped = start % 8
        for low in range(-skipped, len(out), 2 * _OUTPUTS):
            high = min(low + 2 * _OUTPUTS, len(out))
            drawn = box_muller(outputs.random_raw((high - low + 1) // 2), self._std(name))
            out[max(low, 0) : high].copy_(torch.from_numpy(drawn[max(-low, 0) : high - low]))

    def _first_version(self, name: str, shape: torch.Size) -> Tensor:
        seed = int.from_bytes(self._digest(name)[:8], "big", signed=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.empty(shape, device="cpu").normal_(0.0, self._std(name), generator=generator)

    def _digest(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}:{name}".encode()).digest()

    def _std(self, name: str) -> float:
        residual = name.endswith((".o.weight", ".down.weight"))
        return self.config.init_std / math.sqrt(2 * self.config.layers) if residual else self.config.init_std


def constant(name: str) -> float | None:
    """The initial value of all elements of a parameter; None where they are drawn."""
    if is_norm(name) or name.endswith(".weight_scale"):
        return 1.0
    return 0.0 if name.endswith(".bias") else None


def box_muller(outputs: np.ndarray, std: float) -> np.ndarray:
    """2·n normal fp32 numbers from n 64-bit outputs: u = (low + 1/2) / 2^32, angle = 2π · high / 2^32 (high: signed).

    The largest is 6.8 std. NumPy's fp32 logarithm, sine and cosine give the same bits with AVX2 as with AVX-512.
    """
    radius = outputs.view(np.uint32)[0::2].astype(np.float32)
    angle = outputs.view(np.int32)[1::2].astype(np.float32)
    radius *= np.float32(2**-32)
    radius += np.float32(2**-33)
    np.log(radius, out=radius)
    radius *= np.float32(-2 * std**2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(2 * math.pi * 2**-32)
    pairs = np.empty((len(outputs), 2), np.float32)
    np.multiply(radius, np.cos(angle), out=pairs[:, 0])
    np.sin(angle, out=angle)
    np.multiply(radius, angle, out=pairs[:, 1])
    return pairs.reshape(-1)


@torch.no_grad()
def initialise(model: Llama, seed: int, version: Version = "auto") -> None:
    """Set every parameter of a model in memory, in its dtype."""
    weights = InitialWeights(model.config, seed, version)
    for name, parameter in model.named_parameters():
        weights.fill(parameter.zero_(), canonical_name(name, model.config))
