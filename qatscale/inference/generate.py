"""Opens whatever holds a model: an exported folder, a run, or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from qatscale.inference.exported import find_export
from qatscale.inference.mlx_model import MlxModel
from qatscale.inference.sampling import TextGenerator
from qatscale.inference.transformers_model import open_transformers


def open_text_generator(what: str, view: str | None = None) -> TextGenerator:
    """The model of an exported folder, or of a run, RUN@STEP or a checkpoint folder, on the GPU where there is one.

    view: of a checkpoint's weights, `fp` or `quantized`; None: quantized once it has switched.
    """
    export = find_export(Path(what))
    if export is not None and export.format == "mlx" and view is None:
        return MlxModel(export)
    return open_transformers(what, view)
