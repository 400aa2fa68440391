"""Opens whatever holds a model: an export, a run, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from qatscale.errors import UserError
from qatscale.export.clients import Client, Transformers, install_line
from qatscale.export.formats.base import Exported, find_export
from qatscale.export.formats.mlx import MlxLm
from qatscale.export.report import check_files
from qatscale.inference.mlx_model import MlxModel
from qatscale.inference.sampling import TextGenerator
from qatscale.inference.transformers_model import TransformersModel, from_checkpoint, from_export
from qatscale.untrusted import check_json_files, check_safetensors, first_line, readable

Model = TypeVar("Model")


def open_text_generator(what: str, view: str | None = None) -> TextGenerator:
    """The model of an export, or of a run, RUN@STEP or a checkpoint folder, on the GPU where there is one.

    view: of a checkpoint's weights, `fp` or `quantized`; None: quantized once it has switched. UserError where
    nothing is found, the export is damaged, or its client is not installed or refuses it.
    """
    openers: dict[type[Client], Callable[[Exported], TextGenerator]] = {Transformers: from_export, MlxLm: MlxModel}
    return _open(what, view, openers)


def open_transformers(what: str) -> TransformersModel:
    """As `open_text_generator`, for models that transformers runs."""
    return _open(what, None, {Transformers: from_export})


def _open(
    what: str, view: str | None, openers: Mapping[type[Client], Callable[[Exported], Model]]
) -> Model | TransformersModel:
    with readable("model", what):
        export = find_export(Path(what))
        if export is None:
            return from_checkpoint(what, view)
    if view is not None:
        raise UserError("--view", view, f"{what} is an export, which has one view of its weights.", "Leave it out.")
    client = export.format.clients[0]
    opener = next((opener for kind, opener in openers.items() if issubclass(client, kind)), None)
    if opener is None:
        names = " or ".join(kind.name for kind in openers)
        raise UserError("model", what, f"is for {client.name}, and {names} cannot load it.", "Give another export.")
    if missing := client.missing():
        problem = f"{client.name} needs {' and '.join(missing)}, not installed here, to load it."
        raise UserError("model", what, problem, install_line(missing))
    check_files(export.folder)
    if export.path.is_dir():
        check_json_files(export.path, "model")
        check_safetensors(export.path, "model")
    try:
        return opener(export)
    except Exception as error:  # each library raises other errors for a folder that it cannot load
        raise UserError("model", what, f"{client.name} cannot load it: {first_line(error)}") from None
