"""A small RunConfig for the timeline tests: steps of 1,000 tokens, 1,464 parameters."""

from typing import Any

from qatscale.config.schema import RunConfig

TOKENS_PER_STEP = 1000
PARAMETERS = 100 * 8 + (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
"""By hand: tied embedding + one block (q, k, v, o; gate, up, down; two norms) + the last norm."""


def make_config(steps: int = 100, **sections: Any) -> RunConfig:
    """A config of `steps` steps; a dict for a section replaces its defaults."""
    return RunConfig.model_validate(
        {
            "name": "test",
            "tokens": steps * TOKENS_PER_STEP,
            "model": {"vocab_size": 100, "hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 16},
            "data": {"sequence_length": 100},
            "batch": {"sequences": 10, "micro_batch": 5},
            "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        }
        | sections
    )
