"""The manifest of a checkpoint: what it holds, with the checksums of its files and of itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Required, cast

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from qatscale.engine.spikes import SpikeState
from qatscale.files import Count

FORMAT = 4
READABLE = (1, 2, 3, 4)
"""Format 1 has no slices of columns, 2 no checksum of the manifest itself, and 3 no table of slices."""
SLICES = "slices.npz"

_STRICT = ConfigDict(extra="forbid", strict=True)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class ParameterRecord:
    shape: Annotated[list[Count], Field(max_length=8)]
    adam_steps: Count
    """Adam's own count for this parameter: bias correction depends on it."""


class FileRecord(TypedDict):
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PluginState(TypedDict, total=False):
    """As `QatPlugin.state` gives it."""

    switched_at: Required[Count | None]
    group_size: Annotated[int, Field(gt=0)] | None
    bits: dict[str, float]
    scales_at_switch: dict[str, str]


def _plugin_state(state: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], _PLUGIN.validate_python(state, strict=True))


_PLUGIN = TypeAdapter(PluginState)


@pydantic.dataclasses.dataclass(frozen=True, config=_STRICT)
class Manifest:
    step: Count
    """Optimizer steps done."""
    tokens: Count
    reason: str
    """interval, boundary (also those of `checkpoint.keep_at`), signal, end or imported."""
    kept: bool
    """Stays when interval checkpoints rotate."""
    recipe_hash: str
    """`config.recipe_hash` of the recipe beside it; 16 digits of another hash in checkpoints of version 0.1."""
    data: str
    """Fingerprint of the tokens it was trained on."""
    plugin: Annotated[dict[str, Any], AfterValidator(_plugin_state)]
    """A `PluginState`."""
    parameters: dict[str, ParameterRecord]
    layout: dict[str, int]
    """The layout it was saved under, for information: processes, zero_stage, data, tensor, pipeline."""
    files: dict[Annotated[str, Field(pattern=r"^[^/\\]+$")], FileRecord] = field(default_factory=dict)
    spikes: SpikeState = field(default_factory=SpikeState)
    tokenizer: str | None = None
    """Fingerprint of the tokenizer of these tokens; None where it is not known."""
    slices: FileRecord | None = None
    """The table of slices, SLICES; None where there is one file, whose header says it."""
    format: int = FORMAT
    checksum: str = ""
    """sha256 of all else in the manifest."""

    @property
    def switched_at(self) -> int | None:
        """Optimizer steps before the switch to QAT; None = it has not happened."""
        return self.plugin["switched_at"]

    def digest(self) -> str:
        """What `checksum` has to be."""
        content = asdict(replace(self, checksum=""))
        if self.format < 4:
            del content["slices"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Format(TypedDict):
    format: int


MANIFEST_JSON, FORMAT_JSON = TypeAdapter(Manifest), TypeAdapter(_Format)
