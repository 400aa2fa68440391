"""Shrunken Llamas with weights so large that a wrong rotation, mask or head order shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qatscale.config.schema import ModelConfig
from qatscale.model.llama import Llama
from tests.model.model_shrunken import CONFIGS


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


@pytest.fixture
def build() -> Callable[..., Llama]:
    """A Llama with matrices of variance 1/inputs and norm gains around 1: activations of order one everywhere."""

    def build(config: ModelConfig, seed: int = 0, **options: bool) -> Llama:
        model = Llama(config, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5, generator=generator)
                else:
                    parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        return model

    return build


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) [sequences, length], labels one position on."""

    def batch(config: ModelConfig, sequences: int = 3, length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        drawn = torch.randint(config.vocab_size, (sequences, length + 1), generator=generator)
        return drawn[:, :-1], drawn[:, 1:]

    return batch
