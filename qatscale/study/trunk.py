"""One trunk and its branches on recipe `quickstart`: what the quickstart and comparisons of schemes train."""

from __future__ import annotations

from pathlib import Path

from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.errors import exit_code
from qatscale.schedule.build import build_timeline
from qatscale.train.run import train


def branch_config(scheme: str, out: Path, data: Path, *overrides: str) -> RunConfig:
    """One branch: the recipe `quickstart` under this scheme, named after it unless `overrides` name it."""
    own = [f"name={scheme}", f"qat.scheme={scheme}", *overrides]
    return load_run_config("quickstart", [*_shared(out, data), *own])


def branch_step(config: RunConfig) -> int:
    """Where a branch leaves the trunk: at its first cooldown or at its switch, whichever comes first."""
    return build_timeline(config).boundaries[0]


def trunk_config(branches: list[RunConfig], *overrides: str) -> RunConfig:
    """The trunk up to its last branch, with a checkpoint at every branch."""
    first = branches[0]
    points = sorted({branch_step(config) * first.tokens_per_step for config in branches})
    assert first.data.path is not None
    own = [
        "name=trunk",
        "qat.scheme=fp",
        "schedule.cooldown_fraction=0",
        f"tokens={points[-1]}",
        f"checkpoint.keep_at={points}",
        "evaluation.ptq_bits=[]",
        *overrides,
    ]
    return load_run_config("quickstart", [*_shared(first.output.parent, first.data.path), *own])


def _shared(out: Path, data: Path) -> list[str]:
    return [f"output={out / 'runs'}", f"data.path={data}", f"tracking.uri=sqlite:///{(out / 'mlflow.db').absolute()}"]


def train_or_reuse(config: RunConfig, branch_from: str | None = None) -> None:
    """Train a run to its end; a finished one is reused. SystemExit 75, or 130, if a signal stops it."""
    if (outcome := train(config, branch_from)).status == "stopped":
        raise SystemExit(exit_code(outcome.signal))
