"""The numbers a finished run is known by. Their names are stable: tracking shows them, qatlaw reads them."""

from __future__ import annotations

from typing import Any

import qatlaw
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest
from qatscale.data.reader import EvaluationReader
from qatscale.model.sizes import count_parameters
from qatscale.schedule import Timeline
from qatscale.tracking.compare import median_speeds
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import ptq_view

FULL_PRECISION_BITS = 16


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
        "final/val_loss": losses["fp" if scheme == "fp" else "quantized"],
        "final/val_loss_fp_view": losses["fp"],
        **{f"final/val_loss_{view}": loss for view, loss in losses.items() if view.startswith("ptq")},
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
