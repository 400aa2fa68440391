"""Opens whatever holds a model: an export, a run, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qatscale.errors import UserError
from qatscale.export.clients import Client, Transformers, install_line
from qatscale.export.formats.lookup import Exported, find_export
from qatscale.export.formats.mlx import MlxLm
from qatscale.inference.mlx_model import MlxModel
from qatscale.inference.sampling import TextGenerator
from qatscale.inference.transformers_model import TransformersModel, from_checkpoint, from_export

Model = TypeVar("Model")
_OPENERS: dict[type[Client], Callable[[Exported], TextGenerator]] = {Transformers: from_export, MlxLm: MlxModel}


def open_text_generator(what: str, view: str | None = None) -> TextGenerator:
    """The model of an export, or of a run, RUN@STEP or a checkpoint folder, on the GPU where there is one.

    view: of a checkpoint's weights, `fp` or `quantized`; None: quantized once it has switched. UserError where
    nothing is found, the export is damaged, or its client is not installed or refuses it.
    """
    export = _find_export(what, view)
    if export is None:
        return from_checkpoint(what, view)
    client = export.format.clients[0]
    opener = next((opener for kind, opener in _OPENERS.items() if issubclass(client, kind)), None)
    if opener is None:
        raise UserError("model", what, f"{client.name} runs it, which generate does not use.", "See its model card.")
    return _opened(export, opener)


def open_transformers(what: str) -> TransformersModel:
    """As `open_text_generator`, for models that transformers runs."""
    export = _find_export(what, None)
    if export is None:
        return from_checkpoint(what)
    client = export.format.clients[0]
    if not issubclass(client, Transformers):
        raise UserError("model", what, f"is for {client.name}; transformers cannot load it.", "Give another export.")
    return _opened(export, from_export)


def _find_export(what: str, view: str | None) -> Exported | None:
    export = find_export(Path(what))
    if export is not None and view is not None:
        raise UserError("--view", view, f"{what} is an export, which has one view of its weights.", "Leave it out.")
    return export


def _opened(export: Exported, opener: Callable[[Exported], Model]) -> Model:
    client = export.format.clients[0]
    if missing := client.missing():
        problem = f"{client.name} needs {' and '.join(missing)} to load it, which is not installed."
        raise UserError("model", str(export.path), problem, install_line(missing))
    try:
        return opener(export)
    except Exception as error:  # each library raises errors of its own for a folder that it cannot load
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError("model", str(export.path), f"{client.name} cannot load it: {reason}") from None
