"""Run folders of finished runs whose losses follow a law, written by the project's own tracking code, untrained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from qatlaw.figures.evidence import Drawn
from qatlaw.laws import Law
from qatscale.cli import main
from qatscale.config.recipe import load_run_config, resolved_yaml
from qatscale.config.sizes import count_parameters, stored_weights
from qatscale.schedule.build import build_timeline
from qatscale.tracking.mlflow_sync import track_sync
from qatscale.tracking.new_run import create_run_folder
from qatscale.tracking.run_folder import RunFolder
from qatscale.tracking.store import quiet_mlflow
from qatscale.train.evaluate import final_metrics

PTQ_BITS = (2.0, 4.0)
PTQ_LOSS = 0.5
"""Nats that post-training quantization adds here, over the bits."""


def finished(output: Path, name: str, recipe: str, law: Law, *overrides: str, loss: float | None = None) -> RunFolder:
    """A run that ended with the law's loss, or with `loss`. All numbers but the loss are the trainer's own."""
    config = load_run_config(recipe, [f"name={name}", f"output={output}", "evaluation.ptq_bits=[2, 4]", *overrides])
    timeline = build_timeline(config)
    n_params = count_parameters(config.model)
    folder = create_run_folder(
        output / name, recipe=resolved_yaml(config), ds_config={}, timeline=timeline, n_params=n_params,
        command=["qatscale", "train", recipe],
    )  # fmt: skip
    folder.append("start", step=0)
    tokens_qat = timeline.qat_steps * timeline.tokens_per_step
    if loss is None:
        loss = float(law.loss(n_params, timeline.tokens - tokens_qat, tokens_qat, config.qat.bits))
    losses = {"fp": loss, "quantized": loss, **{f"ptq{bits:g}": loss + PTQ_LOSS / bits for bits in PTQ_BITS}}
    if math.isnan(loss):
        losses = dict.fromkeys(losses, loss)
    length = config.data.sequence_length
    data = {
        "data_fingerprint": "d" * 64,
        "validation_fingerprint": "e" * 64,
        "validation_tokens": config.evaluation.tokens // length * length,
    }
    folder.finish(
        timeline.steps, final_metrics(config, timeline, losses, folder, stored_weights(config.model, config.qat)) | data
    )
    folder.close()
    return folder


def finished_grid(
    output: Path,
    law: Law,
    sizes: Sequence[str],
    tokens_per_parameter: Sequence[float],
    bits: Sequence[float],
    fractions: Sequence[float],
) -> list[RunFolder]:
    """Sequential runs and full-precision ones over a grid."""
    folders = []
    for size in sizes:
        params = count_parameters(load_run_config(size).model)
        for ratio in tokens_per_parameter:
            tokens = f"tokens={round(params * ratio)}"
            name = f"{size}-{ratio:g}x"
            folders.append(finished(output, f"{name}-fp", size, law, tokens, "qat.scheme=fp"))
            for width in bits:
                for fraction in fractions:
                    own = ["qat.scheme=sequential", f"qat.bits={width:g}", f"qat.fraction={fraction}"]
                    folders.append(finished(output, f"{name}-{width:g}bit-f{fraction}", size, law, tokens, *own))
    return folders


def command(*arguments: str) -> int:
    """Run a command line; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def upload(folders: Sequence[RunFolder], uri: str) -> None:
    for folder in folders:
        track_sync(folder, uri)


def empty_store(folder: Path) -> str:
    """The URI of an MLflow store in SQLite without a run."""
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with quiet_mlflow():
        from mlflow.tracking import MlflowClient

        MlflowClient(uri).search_experiments()
    return uri


def labels_apart(one: Drawn) -> None:
    """Every text of a figure, drawn, has a place of its own, and all lie inside the figure."""
    if one.figure is None:
        return
    one.figure.canvas.draw()
    boxes = []
    for axes in one.figure.axes:
        texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]  # type: ignore[attr-defined]
        boxes += [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    more = [*one.figure.texts, *(text for legend in one.figure.legends for text in legend.get_texts())]
    boxes += [(t.get_text(), t.get_window_extent()) for t in more]
    width, height = one.figure.canvas.get_width_height()
    for i, (text, box) in enumerate(boxes):
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1, (one.name, text)
        for other, theirs in boxes[i + 1 :]:
            assert not overlap(box, theirs), (one.name, text, other)


def overlap(a, b) -> bool:  # type: ignore[no-untyped-def]
    """By more than a pixel."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
