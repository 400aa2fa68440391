"""Which kind of export is in a folder, by the files that its clients look for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qatscale.errors import UserError

Format = Literal["hf", "compressed-tensors", "gguf", "mlx"]


@dataclass(frozen=True)
class Exported:
    folder: Path
    format: Format
    gguf: str | None = None
    """The name of the GGUF file."""


def find_export(path: Path) -> Exported | None:
    """The export in a folder, or the one GGUF file; None for what is no export. UserError for several GGUF files."""
    if path.suffix == ".gguf" and path.is_file():
        return Exported(path.parent, "gguf", path.name)
    if not path.is_dir():
        return None
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError("model", str(path), f"holds {len(files)} GGUF files: {', '.join(files)}.", "Name one of them.")
    if files:
        return Exported(path, "gguf", files[0])
    config = _config(path)
    if config is None:
        return None
    if "quantization" in config:  # mlx-lm's key; it may repeat it as quantization_config for transformers
        return Exported(path, "mlx")
    method = (config.get("quantization_config") or {}).get("quant_method")
    return Exported(path, "compressed-tensors" if method == "compressed-tensors" else "hf")


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError("model", str(folder), f"its config.json cannot be read: {error}.") from None
    return config if isinstance(config, dict) else None
