"""The final evaluation of a run, and the numbers that a finished run is known by: qatlaw reads them."""

from __future__ import annotations

from typing import Any

import qatlaw
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters
from qatscale.data.manifest import Manifest
from qatscale.data.reader import EvaluationReader
from qatscale.schedule.timeline import Timeline
from qatscale.tracking.compare import final_losses, median_speeds
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.components import RunSetup, TrainingComponents
from qatscale.train.run_log import RunLog
from qatscale.train.validation import ptq_view, validation_losses

FULL_PRECISION_BITS = 16


def evaluate_final(setup: RunSetup, components: TrainingComponents, log: RunLog) -> dict[str, Any]:
    """Evaluate a run after its last step, mark it done, and return its final metrics. Collective."""
    config, timeline, plugin = setup.config, setup.timeline, components.plugin
    if plugin.switched_at is not None and setup.resume.step < timeline.steps:
        plugin.check_moving(components.masters)
    losses = validation_losses(components.engine, final_views(config), setup.validation, components.topology)
    log.validation(timeline.steps, losses)
    final = final_metrics(config, timeline, losses, log.folder)
    final |= data_metrics(setup.batches.stream.manifest, setup.validation)
    log.finished(timeline.steps, final)
    return final


def final_views(config: RunConfig) -> list[str]:
    """The views in which a finished run is evaluated."""
    quantized = [] if config.qat.scheme == "fp" else ["quantized"]
    return ["fp", *quantized, *map(ptq_view, config.evaluation.ptq_bits)]


def final_metrics(config: RunConfig, timeline: Timeline, losses: dict[str, float], folder: RunFolder) -> dict[str, Any]:
    """`final/val_loss` is that of the weights as they would be used: quantized, or full precision for scheme fp.

    `final/scales_floored` is the share of scales at or under their floor after the last step; None for scheme fp.
    """
    n_params = count_parameters(config.model).total
    scheme = config.qat.scheme
    bits = FULL_PRECISION_BITS if scheme == "fp" else config.qat.bits
    tokens_qat = timeline.qat_steps * timeline.tokens_per_step
    metrics = folder.records("metrics")
    return {
        **final_losses(losses, "fp" if scheme == "fp" else "quantized"),
        "final/scales_floored": metrics[-1].get("scales_floored") if metrics else None,
        "n_params": n_params,
        "bits": bits,
        "scheme": scheme,
        "tokens_total": timeline.tokens,
        "tokens_fp": timeline.tokens - tokens_qat,
        "tokens_qat": tokens_qat,
        "qat_fraction": timeline.qat_fraction,
        "switch_step": timeline.switch_step,
        "tokens_per_parameter_byte": qatlaw.tokens_per_parameter_byte(n_params, timeline.tokens, bits),
        **median_speeds(metrics),
    }


def data_metrics(data: Manifest, validation: EvaluationReader) -> dict[str, Any]:
    """The data of a run by content, and the held-out text of its losses: losses on other text do not compare."""
    return {
        "data_fingerprint": data.fingerprint,
        "validation_fingerprint": validation.stream.manifest.fingerprint_of("validation"),
        "validation_tokens": validation.tokens,
    }
