"""A folder that `QatPlugin.export` wrote, as the source of an export: its weights lie on their grid already."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qatscale.config.schema import QatConfig, RunConfig
from qatscale.engine.checkpoints.manifest import Manifest
from qatscale.engine.checkpoints.training_state import UNKNOWN_DATA
from qatscale.errors import UserError
from qatscale.model.hugging_face import hugging_face_names, open_hugging_face, trained_length
from qatscale.model.llama import Llama
from qatscale.quant.model_folder import SCALES, SETTINGS
from qatscale.untrusted import read_object

LENGTH = 2048
"""Length of sequences, where the model's configuration has none."""


class PluginFolder:
    """Parameters and scales under our names, read as a checkpoint is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self._state = open_hugging_face(folder)
        settings = read_object(folder / SETTINGS, "model")
        ours = {theirs: name for name, theirs in hugging_face_names(self.model).items()}
        try:
            self.qat = QatConfig.model_validate(settings["qat"])
            bits = {ours[f"{name}.weight"].removesuffix(".weight"): b for name, b in settings["bits"].items()
                    if f"{name}.weight" in ours}  # fmt: skip
            if self.model.tied_embedding and "embed" in bits:
                bits["head"] = bits["embed"]
            self._scales = {ours[name.removesuffix("_scale")] + "_scale": scale
                            for name, scale in load_file(folder / SCALES).items()}  # fmt: skip
            plugin = {"switched_at": int(settings["switched_at"]), "group_size": settings["group_size"], "bits": bits}
        except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError, ValidationError) as error:
            raise UserError("model", str(folder), f"{SETTINGS} or {SCALES} is damaged: {error}.") from None
        step = plugin["switched_at"]
        self.manifest = Manifest(step, 0, "imported", True, "", UNKNOWN_DATA, plugin, {}, {})

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._state["embed.weight"].dtype

    def parameter(self, name: str, kind: str = "weight") -> Tensor:
        assert kind == "weight"
        values: Any = self._scales if name.endswith("_scale") else self._state
        if name not in values:
            raise UserError("model", str(self.folder), f"{name} is missing.")
        return values[name]

    def plain_model(self) -> Llama:
        """fp32 arithmetic on these weights."""
        plain = Llama(self.model)
        plain.load_state_dict(dict(self._state))
        return plain.eval()

    def config(self, data: Path | None) -> RunConfig:
        """A recipe with the keys that an export needs. Others are placeholders: nothing says how it was trained."""
        length = trained_length(self.folder) or LENGTH
        return RunConfig.model_validate({
            "name": re.sub(r"^[^A-Za-z0-9]+|[^\w.=+-]", "", self.folder.resolve().name) or "model",
            "tokens": 100 * length,
            "model": self.model,
            "data": {"sequence_length": length, "path": data},
            "batch": {"sequences": 1, "micro_batch": 1},
            "optimizer": {"learning_rate": 1.0},
            "qat": {**self.qat.model_dump(), "scheme": "scratch", "fraction": "auto"},
        })  # fmt: skip
