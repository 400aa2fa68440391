"""The main job on text that is already here: corpus, tokenizer, shards, one trunk, three branches, a table.

Every run has the same total tokens D. The trunk is trained once, at the stable rate; from it branch

    fp           full precision with cooldown, and after it post-training quantization
    sequential   a cooldown in full precision, then QAT with a warm-up and a cooldown of its own
    fused        QAT from the stable rate on, with the one cooldown inside

so that three runs cost about half of what they would alone. A second start reuses what is there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console

from qatscale.cli.terminal import console
from qatscale.config import load_run_config
from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig
from qatscale.schedule import build_timeline

SCHEMES = ("fp", "sequential", "fused")
CORPUS = "self:12M"
VALIDATION_FRACTION = 0.05


def run_quickstart(out: Path) -> None:
    """Everything goes into `out`. Raises whatever the rooms raise; what is finished by then is reused next time."""
    # On a model this small two threads are 1.3 times as fast as one, and a tenth as fast once something else runs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out_console = console()
    started = time.perf_counter()
    _headline(out_console, "Text: this machine's Python packages → tokenizer → token shards")
    data = prepare_corpus(out / "data", out_console)

    branches = [branch_config(scheme, out, data) for scheme in SCHEMES]
    trunk = trunk_config(branches)
    _headline(out_console, f"Trunk: full precision at the stable rate, {format_amount(trunk.tokens)} tokens")
    train_or_reuse(trunk)
    for config in branches:
        timeline = build_timeline(config)
        _headline(out_console, f"Branch {config.name}: to {format_amount(timeline.tokens)} tokens in all")
        train_or_reuse(config, f"{trunk.folder}@{branch_step(config)}")

    _headline(out_console, f"Result ({(time.perf_counter() - started) / 60:.1f} minutes)")
    _show(out_console, out, branches)


def branch_config(scheme: str, out: Path, data: Path, *overrides: str) -> RunConfig:
    """One branch: the recipe `quickstart` under this scheme, named after it unless `overrides` say else."""
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


def prepare_corpus(folder: Path, progress: Console | None = None) -> Path:
    """The embedded corpus as token shards, made now or found."""
    from qatscale.data.prepare import prepare

    vocabulary = load_run_config("quickstart").model.vocab_size
    prepare(
        [CORPUS], folder, vocab_size=vocabulary, validation_fraction=VALIDATION_FRACTION, workers=2, console=progress
    )
    return folder


def train_or_reuse(config: RunConfig, branch_from: str | None = None) -> None:
    """Train a run to its end; one that is done costs nothing. SystemExit 75 where a signal stops it."""
    from qatscale.errors import EXIT_REQUEUE
    from qatscale.train.loop import train

    if train(config, branch_from).status == "stopped":
        raise SystemExit(EXIT_REQUEUE)


def _show(out_console: Console, out: Path, branches: list[RunConfig]) -> None:
    from qatscale.tracking.compare import compare, comparison_table
    from qatscale.tracking.curves import draw_loss_curves
    from qatscale.tracking.run_folder import RunFolder
    from qatscale.tracking.store import ui_command

    runs = [RunFolder(config.folder) for config in branches]
    rows = compare(runs)
    out_console.print(comparison_table(rows))
    figure = out / "comparison.png"
    draw_loss_curves(runs, figure)

    bits = branches[0].qat.bits
    losses = {row.name: row.losses for row in rows}
    best = min(("sequential", "fused"), key=lambda name: losses[name]["quantized"])
    below_ptq = losses["fp"][f"ptq{bits:g}"] - losses[best]["quantized"]
    above_fp = losses[best]["quantized"] - losses["fp"]["fp"]
    out_console.print(
        f"At {bits:g} bits, {best} QAT ends {below_ptq:.3f} nats below post-training quantization of the "
        f"full-precision run, and {above_fp:.3f} above full precision.",
        soft_wrap=True,
    )
    out_console.print(f"figure: {figure}", soft_wrap=True)
    assert branches[0].tracking.uri is not None
    out_console.print(f"all runs in MLflow's UI: {ui_command(branches[0].tracking.uri)}", soft_wrap=True)


def _headline(out_console: Console, text: str) -> None:
    out_console.rule(f"[bold]{text}", align="left")
