"""Run folders as the training loop would leave them, without the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qatscale.config.recipe import load_run_config, recorded_yaml
from qatscale.schedule.timeline import Segment, Timeline, cooldown_of
from qatscale.tracking.new_run import create_run_folder
from qatscale.tracking.run_folder import RunFolder

MakeRun = Callable[..., RunFolder]
TOKENS_PER_STEP = 512


def make_run_in(
    output: Path,
    name: str = "run",
    *,
    scheme: str = "fp",
    bits: float = 2,
    steps: int = 100,
    switch: int | None = None,
    cooldown: int = 0,
    parent: tuple[RunFolder, int] | None = None,
    overrides: tuple[str, ...] = (),
    resolved: float | None = None,
) -> RunFolder:
    """A run's folder before its first event. `cooldown`: steps before the end (sequential: also before the switch).
    `resolved`: the fraction that the trainer found."""
    qat = () if scheme == "fp" else (f"qat.bits={bits}",)
    qat += (f"qat.fraction={(steps - (switch or 0)) / steps}",) if scheme in ("sequential", "fused") else ()
    config = load_run_config(
        "debug",
        [
            f"name={name}", f"qat.scheme={scheme}", f"output={output}", f"tokens={steps * TOKENS_PER_STEP}",
            "data.sequence_length=64", "batch.sequences=8", "batch.micro_batch=8", *qat, *overrides,
        ],
    )  # fmt: skip

    def segment(phase: str, start: int, end: int, quantized: bool) -> Segment:
        return Segment(phase, start, end, quantized, 1e-3, (0.9, 0.95), 0.1, cooldown_of(config.schedule))

    cuts: list[Segment] = []
    for start, end, quantized in (
        [(0, steps, scheme == "scratch")] if switch in (None, 0) else [(0, switch, False), (switch, steps, True)]
    ):
        cools = cooldown if scheme == "sequential" or end == steps else 0
        prefix = "qat_" if quantized else ""
        cuts.append(segment(f"{prefix}stable", start, end - cools, quantized))
        if cools:
            cuts.append(segment(f"{prefix}cooldown", end - cools, end, quantized))
    timeline = Timeline(tuple(cuts), TOKENS_PER_STEP, switch, 0.0)
    lineage = {"name": parent[0].name, "folder": parent[0].path, "step": parent[1]} if parent else None
    return create_run_folder(
        output / name,
        recipe=recorded_yaml(config),
        ds_config={"zero_optimization": {"stage": 1}},
        timeline=timeline,
        n_params=1_000_000,
        command=["qatscale", "train", "debug", f"name={name}"],
        parent=lineage,
        resolved={} if resolved is None else {"qat.fraction": resolved},
    )


def loss_at(step: int, steps: int, switch: int | None, cooldown: int, bits: float) -> float:
    """A loss of the usual form: a power law, a bump at the switch, and a gain in the cooldown."""
    loss = 2.1 + 4.5 * (1 + step / 4) ** -0.45
    if switch is not None and step > switch:
        loss += (0.9 * 2**-bits) + 3.2 * 2**-bits * math.exp(-(step - switch) / (0.04 * steps))
    if cooldown and step > steps - cooldown:
        loss -= 0.18 * math.sqrt((step - (steps - cooldown)) / cooldown)
    return loss


def log_metrics(folder: RunFolder, first: int, last: int, interval: int = 10, noise: float = 0.0) -> None:
    """The `metrics` events of the steps (first, last]."""
    recipe, timeline = folder.recipe, folder.timeline
    steps, switch, bits = timeline["steps"], timeline["switch_step"], recipe["qat"]["bits"]
    cooldown = sum(s["end"] - s["start"] for s in timeline["segments"] if s["phase"].endswith("cooldown"))
    random = np.random.default_rng(first)
    for step in range(first + interval, last + 1, interval):
        phase = next(s["phase"] for s in timeline["segments"] if s["start"] < step <= s["end"])
        folder.append(
            "metrics",
            step=step,
            tokens=step * TOKENS_PER_STEP,
            phase=phase,
            loss=loss_at(step, steps, switch, cooldown, bits) + noise * random.standard_normal(),
            learning_rate=1e-3,
            grad_norm=0.5 + 1 / step,
            tokens_per_second=5000.0 if phase.startswith("qat_") else 8000.0,
            tflops=0.031,
            mfu=None,
            memory_gib=1.25,
            data_seconds=0.002,
        )


def finish(folder: RunFolder, losses: dict[str, float]) -> dict[str, object]:
    """Validate in every view of `losses`, then end the run. Returns the final metrics."""
    recipe, timeline = folder.recipe, folder.timeline
    scheme, steps, switch = recipe["qat"]["scheme"], timeline["steps"], timeline["switch_step"]
    for view, loss in losses.items():
        folder.append(
            "validation", step=steps, tokens=steps * TOKENS_PER_STEP, view=view, loss=loss, perplexity=math.exp(loss)
        )
    final: dict[str, object] = {
        "final/val_loss": losses["fp" if scheme == "fp" else "quantized"],
        "final/val_loss_fp_view": losses["fp"],
        **{f"final/val_loss_{view}": loss for view, loss in losses.items() if view.startswith("ptq")},
        "n_params": 1_000_000,
        "bits": 16 if scheme == "fp" else recipe["qat"]["bits"],
        "scheme": scheme,
        "tokens_total": steps * TOKENS_PER_STEP,
        "tokens_per_second_fp": 8000.0,
        "tokens_per_second_qat": None if switch is None else 5000.0,
        "switch_step": switch,
    }
    folder.finish(steps, final)
    return final
