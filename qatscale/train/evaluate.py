"""Losses of a checkpoint in all views; the final metrics of a finished run, which qatlaw reads."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import qatlaw
from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatlaw.effective_bits import StoredWeights
from qatscale.config.schema import RunConfig
from qatscale.data.open import open_validation
from qatscale.engine.checkpoints.reader import only_data, open_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.engine.runtime import uses_gpu
from qatscale.quant.bit_widths import get_quantizer
from qatscale.schedule.timeline import Timeline
from qatscale.supervise.signals import StopRequest
from qatscale.tracking.compare import final_losses, median_speeds, own_view
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import RunSetup, TrainingComponents
from qatscale.train.run_log import RunLog
from qatscale.train.validation import open_view, ptq_view, summed_loss, validation_losses


def evaluate_checkpoint(
    what: str,
    ptq_bits: Iterable[float] = (),
    data: Path | None = None,
    tokens: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Path, int, dict[str, float]]:
    """Evaluate a checkpoint, named as `find_checkpoint` takes it, on the held-out data of its run or on `data`.

    Returns the checkpoint's folder, the number of predicted tokens, and view → loss: `fp`, `quantized` where it has
    switched, and `ptqB` for each of `ptq_bits`. progress: called with what is being done.
    """
    for bits in ptq_bits:
        get_quantizer(bits)  # refuses an unknown bit width before anything is loaded
    overrides = only_data(data)
    overrides += [f"evaluation.tokens={tokens}"] if tokens is not None else []
    config, checkpoint = open_checkpoint(what, overrides)
    reader = open_validation(config, checkpoint.manifest.tokenizer)
    device = torch.device("cuda" if uses_gpu() else "cpu")
    model, plugin = load_checkpointed_model(checkpoint, config, device)
    model.document_end = reader.stream.manifest.document_end(config.data.document_mask)
    views = ["fp", *(["quantized"] if plugin.switched_at is not None else []), *map(ptq_view, ptq_bits)]
    losses, counted = {}, 0
    for name in views:
        before_batch = _counted(progress, f"{name} view: batch {{}} of {reader.batches_per_rank(1)}")
        with open_view(model, name):
            total, counted = summed_loss(model, reader, device, 0, 1, before_batch)
        losses[name] = total / counted
    return checkpoint.folder, counted, losses


def _counted(progress: Callable[[str], None], text: str) -> Callable[[], None]:
    """A function that reports `text` with the number of its calls."""
    calls = itertools.count(1)
    return lambda: progress(text.format(next(calls)))


def evaluate_final(setup: RunSetup, components: TrainingComponents, log: RunLog, stop: StopRequest) -> dict[str, Any]:
    """Evaluate a run after its last step, mark it done, and return its final metrics. Collective.

    FloatingPointError where the run's own loss is not finite. Raises `Stopped` after a signal.
    """
    config, timeline, plugin = setup.config, setup.timeline, components.plugin
    if plugin.switched_at is not None:
        plugin.check_moving(components.masters)
    views = ["fp", *([] if config.qat.scheme == "fp" else ["quantized"]), *map(ptq_view, config.evaluation.ptq_bits)]
    held_out, losses = setup.validation, dict[str, float]()
    if held_out:
        losses = validation_losses(components.engine, views, held_out, components.topology, stop.check)
        if not math.isfinite(loss := losses[own_view(config.qat.scheme)]):
            raise FloatingPointError(f"the final loss is {loss}. Lower optimizer.learning_rate.")
    log.validation(timeline.steps, losses)
    final = final_metrics(config, timeline, losses, log.folder, setup.weights)
    # the data by content: losses on other held-out text do not compare
    final["data_fingerprint"] = setup.batches.manifest.fingerprint
    if held_out:
        final["validation_fingerprint"] = held_out.stream.manifest.fingerprint_of("validation")
        final["validation_tokens"] = held_out.tokens
    final |= setup.tokens_by_source(timeline.steps, components.guard.state)
    if log.runtime.is_main:
        if log.linger:
            _draw(log)
        log.folder.finish(timeline.steps, final)
    return final


def _draw(log: RunLog) -> None:
    """timeline.png and loss.png in the run's figures. A figure that fails must not cost the run its end."""
    from qatscale.schedule.figure import draw
    from qatscale.tracking.curves import draw_loss_curves

    try:
        draw(log.timeline, log.config, log.folder.figures / "timeline.png")
        draw_loss_curves([log.folder], log.folder.figures / "loss.png")
    except Exception as error:  # a broken font cache, a missing backend: whatever a drawing library raises
        logging.getLogger("qatscale").exception("figures")
        log.notice(f"note: the figures were not drawn ({error}); see {log.folder.logs}")


def final_metrics(
    config: RunConfig, timeline: Timeline, losses: dict[str, float], folder: RunFolder, weights: StoredWeights
) -> dict[str, Any]:
    """`final/val_loss` is that of the weights as they would be used: quantized, or full precision for scheme fp.

    `final/scales_floored` is the share of scales at or under their floor after the last step; None for scheme fp.
    `bits` and `tokens_per_parameter_byte` are nominal. Beside them stand the effective ones, of all that is stored, and
    the share of the parameters that is quantized: `quantized_share`, `quantized_share/4bit` ...
    """
    n_params, scheme = weights.params, config.qat.scheme
    bits = UNQUANTIZED_BITS if scheme == "fp" else config.qat.bits
    tokens_qat = timeline.qat_steps * timeline.tokens_per_step
    metrics = folder.records("metrics")
    return {
        **final_losses(losses, scheme),
        "final/scales_floored": metrics[-1].get("scales_floored") if metrics else None,
        "n_params": n_params,
        "bits": bits,
        "scheme": scheme,
        "tokens_total": timeline.tokens,
        "tokens_fp": timeline.tokens - tokens_qat,
        "tokens_qat": tokens_qat,
        "qat_fraction": timeline.qat_fraction,
        "switch_step": timeline.switch_step,
        "effective_bits": weights.effective_bits,
        "stored_bytes": weights.bytes,
        "tokens_per_stored_byte": timeline.tokens / weights.bytes,
        "quantized_share": sum(weights.shares.values()),
        **{f"quantized_share/{bits:g}bit": share for bits, share in weights.shares.items()},
        "tokens_per_parameter_byte": qatlaw.tokens_per_parameter_byte(n_params, timeline.tokens, bits),
        **median_speeds(metrics),
    }
