"""The programs that load exports. The verification asks each for its weights and logits.

A client is imported only when it is used. Exporting needs none of them.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Weights = Iterator[tuple[str, Tensor]]
FP32_LOGITS = 1e-4
"""Two fp32 forward passes that sum in different orders are some 1e-6 apart. Another convention of rotation, another
theta or epsilon, or a permuted head differs by far more than this."""


class Client(ABC):
    """An export, loaded."""

    name: ClassVar[str]
    packages: ClassVar[dict[str, str]]
    """What has to be installed: name for pip -> name for import."""
    logit_bound: ClassVar[float] = FP32_LOGITS
    """Largest difference of its logits from ours on the same weights, relative to the largest logit."""
    loss_bound: ClassVar[float] = FP32_LOGITS
    """In nats."""

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """path: what `Format.path` returns: a folder, or its one file of weights."""

    @abstractmethod
    def weights(self) -> Weights:
        """(Hugging Face's name, the weights it computes with) of every parameter; empty if the client shows none."""

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [t] -> fp32 [t, vocabulary]."""

    @classmethod
    def missing(cls) -> list[str]:
        """Packages, as pip knows them, that are not installed."""
        return [package for package, module in cls.packages.items() if find_spec(module) is None]

    @classmethod
    def version(cls) -> str:
        names = [package.partition("[")[0] for package in cls.packages]
        return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def install_line(packages: Iterable[str]) -> str:
    return "pip install " + " ".join(f"'{name}'" if "[" in name else name for name in packages)


class Transformers(Client):
    """AutoModelForCausalLM; the weights as it loads them, the logits in fp32."""

    name = "transformers"
    packages: ClassVar[dict[str, str]] = {"transformers": "transformers"}
    dtype: ClassVar[Any] = "auto"
    """The type in which the verification loads the weights."""

    def __init__(self, path: Path) -> None:
        self._model = self.load(path, self.dtype)

    @classmethod
    def location(cls, path: Path) -> dict[str, Any]:
        """Arguments of `from_pretrained` that say where the model is."""
        return {"pretrained_model_name_or_path": path}

    @classmethod
    def load(cls, path: Path, dtype: Any) -> Any:
        """Load an export. No code from its folder is executed, and no pickle is read."""
        from transformers import AutoModelForCausalLM

        with _silence():
            model, report = AutoModelForCausalLM.from_pretrained(
                **cls.location(path),
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            if missing := sorted(report["missing_keys"]):  # transformers would draw them at random
                raise ValueError(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
            model(torch.tensor([[0]]))  # packed weights are unpacked at the first forward pass
        return model

    @classmethod
    def load_tokenizer(cls, path: Path) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if (path / "tokenizer.json").is_file():  # beside a Qwen2, AutoTokenizer makes Qwen2's own of any tokenizer
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(**cls.location(path), trust_remote_code=False)

    def weights(self) -> Weights:
        for name, parameter in self._model.named_parameters():
            if name.endswith((".weight", ".bias")):  # compressed-tensors leaves scales and shapes beside
                yield name, parameter.detach()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        nn.Module.float(self._model)  # transformers' method refuses models that were packed
        return self._model(tokens.unsqueeze(0)).logits[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the progress bars and warnings of loading, not its errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
