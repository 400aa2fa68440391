"""The programs that exports are made for, as the verification asks them: what weights, which logits.

Each is imported only when it is asked, and none is needed to export.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qatscale.export import gguf

Weights = Iterator[tuple[str, Tensor]]


class Client(Protocol):
    """An export, loaded."""

    def weights(self) -> Weights:
        """(Hugging Face's name, the weights it computes with) of every parameter; nothing where it does not tell."""

    def logits(self, tokens: Tensor) -> Tensor:
        """fp32 [t, V] of tokens [t]."""


FP32_LOGITS = 1e-4
"""Two fp32 forward passes that sum in different orders are some 1e-6 apart; another convention of rotation, another
theta or epsilon, or a permuted head is off by far more than this."""
MODULES = {
    "compressed-tensors": "compressed_tensors",
    "mlx-lm": "mlx_lm",
    "mlx[cpu]": "mlx",
    "llama-cpp-python": "llama_cpp",
}


class Transformers:
    """AutoModelForCausalLM; the weights as it loads them, the logits in fp32."""

    packages: tuple[str, ...] = ("transformers",)
    name = "transformers"
    logit_bound, loss_bound = FP32_LOGITS, FP32_LOGITS
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with _silence():
            self._model = AutoModelForCausalLM.from_pretrained(folder, **self.options)
            self._model(torch.tensor([[0]]))  # compressed-tensors unpacks at the first forward pass

    def weights(self) -> Weights:
        for name, parameter in self._model.named_parameters():
            if name.endswith(".weight"):  # compressed-tensors leaves scales and shapes beside
                yield name, parameter.detach()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        nn.Module.float(self._model)  # transformers' own refuses once weights were packed, and they no longer are
        return self._model(tokens.unsqueeze(0)).logits[0]


class CompressedTensors(Transformers):
    packages = ("transformers", "compressed-tensors")


class GgufInTransformers(Transformers):
    packages = ("transformers", "gguf", "accelerate")
    options = {"gguf_file": gguf.FILE, "dtype": torch.float32}  # noqa: RUF012


class LlamaCpp:
    """llama.cpp. It multiplies with activations rounded to 8 bits, so its logits are near and not equal."""

    packages: tuple[str, ...] = ("llama-cpp-python",)
    name = "llama.cpp"
    logit_bound, loss_bound = 0.05, 0.01

    def __init__(self, folder: Path) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._model = Llama(
            str(folder / gguf.FILE), n_ctx=0, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
        )

    def weights(self) -> Weights:
        yield from ()

    def logits(self, tokens: Tensor) -> Tensor:
        self._model.reset()
        self._model.eval(tokens.tolist())
        return torch.from_numpy(self._model.scores[: len(tokens)].copy())


class MlxLm:
    packages: tuple[str, ...] = ("mlx[cpu]", "mlx-lm")
    name = "mlx-lm"
    logit_bound, loss_bound = FP32_LOGITS, FP32_LOGITS

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder)

    def weights(self) -> Weights:
        import mlx.core as mx
        import numpy as np

        for name, module in self._model.named_modules():
            if "weight" not in module:
                continue
            weight = module.weight
            if "scales" in module:
                settings = {"group_size": module.group_size, "bits": module.bits}
                weight = mx.dequantize(weight, module.scales, module.biases, **settings)
            yield f"{name}.weight", torch.from_numpy(np.array(weight.astype(mx.float32)))

    def logits(self, tokens: Tensor) -> Tensor:
        import mlx.core as mx
        import numpy as np

        found = self._model(mx.array(tokens.numpy())[None])[0].astype(mx.float32)
        return torch.from_numpy(np.array(found))


Kind = type[Transformers] | type[LlamaCpp] | type[MlxLm]
"""A client, not loaded. `packages`: what has to be installed, as pip knows it. `logit_bound`: the largest difference of
its logits from ours on the same weights, relative to the largest logit. `loss_bound`: in nats."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the bars and warnings that loading prints; errors still come."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        logging.set_verbosity(before)


def missing(kind: Kind) -> list[str]:
    """The packages of a client that are not installed."""
    return [package for package in kind.packages if find_spec(MODULES.get(package, package)) is None]


def version(kind: Kind) -> str:
    """The client's name with the versions that were asked."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in (p.removesuffix("[cpu]") for p in kind.packages))
