"""A run folder around a model that was trained elsewhere, to branch from."""

from __future__ import annotations

import sys
from pathlib import Path

from qatscale.config import resolved_yaml
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.engine.checkpoints.training_state import TrainingState, write_state
from qatscale.errors import UserError
from qatscale.files import appearing
from qatscale.schedule.build import build_timeline
from qatscale.tracking.run_folder import RunFolder


def write_run(state: TrainingState, out: Path) -> None:
    """A run's folder that holds one checkpoint, to branch from; it says that it was imported."""
    config = _named(state.config, out)
    timeline = build_timeline(config)
    with appearing(out) as path:
        folder = RunFolder.create(
            path,
            recipe=resolved_yaml(config),
            ds_config={},  # no engine was at work here
            timeline=timeline,
            n_params=count_parameters(config.model).total,
            command=sys.argv,
            imported=str(Path(state.source).resolve()),
        )
        written = write_state(state, folder.checkpoints, config)
        shown = out / folder.checkpoints.name / written.name
        folder.append("checkpoint", step=state.step, path=str(shown), reason="imported", kept=True)
        folder.close()


def _named(config: RunConfig, out: Path) -> RunConfig:
    """A run is named by its folder."""
    try:
        return RunConfig.model_validate({**config.model_dump(mode="json"), "name": out.name, "output": out.parent})
    except ValueError:
        problem = "is the run's name too: letters, digits and . _ = + -, beginning with a letter or digit."
        raise UserError("--out", str(out), problem) from None
