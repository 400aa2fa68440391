from __future__ import annotations

from pathlib import Path

import pytest

from qatscale.config.recipe import load_run_config
from qatscale.train.run import train


@pytest.fixture(scope="session")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that has switched to 2 bits, of a Qwen3."""
    output = tmp_path_factory.mktemp("inference")
    overrides = [
        "name=two", f"output={output}", f"data.path={prepared}", "tokens=48K", "qat.scheme=fused", "qat.bits=2",
        "qat.fraction=0.5", "evaluation.tokens=1K", "tracking.uri=none", "checkpoint.keep_at=[12K]",
        "model.qk_norm=true", "model.head_dim=48",
    ]  # fmt: skip
    train(load_run_config("debug", overrides))
    return output / "two"
