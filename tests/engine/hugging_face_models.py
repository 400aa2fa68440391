"""Small models of random weights as transformers saves them, and their import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from qatscale.engine.checkpoints.training_state import TrainingState
from qatscale.tracking.convert import convert
from tests.train.driving import BASE
from tests.train.trained_runs import LEARNING_RATE


def save_model(folder: Path, tied: bool, dtype: torch.dtype = torch.float32) -> None:
    """A Qwen2 if it is tied, else a Qwen3 with heads of a size of their own and Llama 3.1's rotary scaling."""
    torch.manual_seed(tied)
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
    }  # fmt: skip
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    kind = Qwen2Config(**shape) if tied else Qwen3Config(**shape, head_dim=24, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(kind)
    for name, parameter in model.named_parameters():  # not zero and one, as transformers initialises them
        if name.endswith("bias") or "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size="60kB" if dtype == torch.float32 else "30kB")


def overrides(folder: Path) -> list[str]:
    return [*BASE, LEARNING_RATE, f"data.path={folder}/data", f"output={folder}/runs", "optimizer.weight_decay=0.3"]


def import_model(source: Path, out: Path, *more: str, **options: Any) -> TrainingState:
    said = [o for o in overrides(source.parent) if not o.startswith(("qat.", "output="))]
    return convert(str(source), "checkpoint", out, "debug", [*said, *more], **options)
