"""`qatscale quickstart`: corpus, tokenizer, shards, one trunk, three branches, a table.

Every run has the same total tokens D. The trunk is trained once, at the stable rate; from it branch

    fp           full precision with cooldown, and after it post-training quantization
    sequential   a cooldown in full precision, then QAT with a warm-up and a cooldown of its own
    fused        QAT from the stable rate on, with the one cooldown inside

so that three runs cost about half of what they would alone. A second start reuses what exists.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qatlaw.bit_widths import bits_label
from qatscale.cli.terminal import console, say

if TYPE_CHECKING:
    from qatscale.config.schema import RunConfig

SCHEMES = ("fp", "sequential", "fused")
CORPUS = "self:12M"
VALIDATION_FRACTION = 0.05


def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder that everything is written into.")] = Path("outputs/quickstart"),
) -> None:
    """Train a trunk and three branches on text that is already on this machine, in minutes on two cores."""
    # On a model this small two threads are 1.3 times as fast as one, and a tenth as fast once something else runs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from qatscale.config.amounts import format_amount
    from qatscale.schedule.build import build_timeline
    from qatscale.study.trunk import branch_config, branch_step, train_or_reuse, trunk_config

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


def prepare_corpus(folder: Path, progress: Console | None = None) -> Path:
    """The embedded corpus as token shards, made now or found."""
    from qatscale.config.recipe import load_run_config
    from qatscale.data.prepare import prepare

    vocabulary = load_run_config("quickstart").model.vocab_size
    prepare(
        [CORPUS], folder, vocab_size=vocabulary, validation_fraction=VALIDATION_FRACTION, workers=2, console=progress
    )
    return folder


def _show(out_console: Console, out: Path, branches: list[RunConfig]) -> None:
    from qatscale.tracking.compare import comparison_table, run_row
    from qatscale.tracking.curves import draw_loss_curves
    from qatscale.tracking.run_folder import RunFolder
    from qatscale.tracking.store import where_to_look

    runs = [RunFolder(config.folder) for config in branches]
    rows = [run_row(run) for run in runs]
    out_console.print(comparison_table(rows))
    figure = out / "comparison.png"
    draw_loss_curves(runs, figure)

    bits = branches[0].qat.bits
    losses = {row.name: row.losses for row in rows}
    best = min(("sequential", "fused"), key=lambda name: losses[name]["quantized"])
    below_ptq = losses["fp"][f"ptq{bits:g}"] - losses[best]["quantized"]
    above_fp = losses[best]["quantized"] - losses["fp"]["fp"]
    say(
        f"At {bits_label(bits)}, {best} QAT ends {below_ptq:.3f} nats below post-training quantization of the "
        f"full-precision run, and {above_fp:.3f} above full precision."
    )
    say(f"figure: {figure}")
    for line in where_to_look(runs):
        say(line)


def _headline(out_console: Console, text: str) -> None:
    out_console.rule(f"[bold]{text}", align="left")
