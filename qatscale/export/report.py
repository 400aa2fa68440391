"""What an export holds and how large it is, as numbers for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qatscale
from qatscale.export.encoding import ExportLayout, StoredParameter
from qatscale.export.formats.base import Format
from qatscale.export.source import ExportSource
from qatscale.export.verify import Verification
from qatscale.files import sha256_of
from qatscale.tracking.compare import validation_losses
from qatscale.tracking.records import read_json
from qatscale.tracking.run_folder import RunFolder

FILE = "export.json"
FORMAT = 1
UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Provenance:
    """Where the checkpoint comes from, as far as its run's folder says."""

    name: str
    id: str | None = None
    mlflow_id: str | None = None
    git_commit: str | None = None
    losses: dict[str, float] | None = None
    """Final validation losses by view, as training reported them; None for a checkpoint before the end."""


def provenance(source: ExportSource) -> Provenance:
    folder = RunFolder(source.folder.resolve().parent.parent)
    if not folder.run_file.is_file():
        return Provenance(folder.name)
    run = folder.run
    mlflow_id = read_json(folder.tracking_file).get("run_id") if folder.tracking_file.is_file() else None
    losses = validation_losses(folder) if folder.is_done and source.manifest.step == source.steps else None
    return Provenance(folder.name, run.get("id"), mlflow_id, run.get("git_commit"), losses)


@dataclass(frozen=True)
class StorageRow:
    """Parameters that are stored alike."""

    names: tuple[str, ...]
    bits: float | None
    """In training; None = not quantized."""
    stored_as: str
    fallback: str | None
    tensors: int
    weights: int
    bytes: int
    ideal_bytes: float


def storage_rows(layout: ExportLayout) -> list[StorageRow]:
    """By bit width and encoding, in the model's order."""
    alike: dict[tuple[float | None, str, str | None], list[StoredParameter]] = {}
    for entry in layout.entries:
        quantizer = entry.parameter.quantizer
        key = (quantizer.bits if quantizer else None, entry.encoding.name, entry.fallback)
        alike.setdefault(key, []).append(entry)
    return [
        StorageRow(
            tuple(dict.fromkeys(_role(entry.parameter.name) for entry in entries)),
            *key,
            tensors=len(entries),
            weights=sum(entry.parameter.numel for entry in entries),
            bytes=sum(entry.size for entry in entries),
            ideal_bytes=sum(layout.ideal_size(entry.parameter) for entry in entries),
        )
        for key, entries in alike.items()
    ]


def _role(name: str) -> str:
    """blocks.3.mlp.up.weight -> up; blocks.3.attention_norm.weight -> norm."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return "norm" if last.endswith("norm") else last


def _bits_per_quantized_weight(entries: Sequence[StoredParameter]) -> float | None:
    """Bits in the file, scales included; None where nothing is quantized."""
    chosen = [entry for entry in entries if entry.parameter.quantizer]
    if not chosen:
        return None
    return 8 * sum(entry.size for entry in chosen) / sum(entry.parameter.numel for entry in chosen)


def _bits(source: ExportSource) -> float:
    if source.ptq_bits is not None:
        return source.ptq_bits
    return UNQUANTIZED_BITS if source.switched_at is None else source.config.qat.bits


def contents(layout: ExportLayout, format: Format, folder: Path, verification: Verification | None) -> dict[str, Any]:
    """export.json. folder: the written files."""
    source = layout.source
    run = asdict(provenance(source))
    losses = run.pop("losses")
    per_step = source.config.tokens_per_step
    step, switched_at = source.manifest.step, source.switched_at
    qat_steps = 0 if switched_at is None else step - switched_at
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    weights = sum(entry.parameter.numel for entry in layout.entries)
    weight_bytes = sum(path.stat().st_size for path in folder.glob(f"*{format.suffix}"))
    return {
        "format": FORMAT,
        "qatscale": qatscale.__version__,
        "exported_as": format.name,
        "run": run,
        "checkpoint": {
            "step": step, "steps": source.steps, "finished": not source.is_unfinished,
            "imported": source.is_imported, "data": source.manifest.data,
        },
        "tokens": {"fp": per_step * (step - qat_steps), "qat": per_step * qat_steps, "total": per_step * step},
        "view": source.view,
        "bits": _bits(source),
        "scheme": source.config.qat.scheme,
        "run_losses": losses,
        "files": files,
        "size": {
            "parameters": weights,
            "bytes": weight_bytes,
            "ideal_bytes": sum(layout.ideal_size(entry.parameter) for entry in layout.entries),
            "bits_per_weight": 8 * weight_bytes / weights,
            "bits_per_quantized_weight": _bits_per_quantized_weight(layout.entries),
            "fallback_bytes": sum(map(layout.fallback_cost, layout.entries)),
        },
        "storage": [asdict(row) for row in storage_rows(layout)],
        "tensors": [
            {
                "name": entry.parameter.name, "shape": list(entry.parameter.shape),
                "bits": entry.parameter.quantizer.bits if entry.parameter.quantizer else None,
                "stored_as": entry.encoding.name, "bytes": entry.size,
                "ideal_bytes": layout.ideal_size(entry.parameter), "fallback": entry.fallback,
                "scale_rounding": layout.rounding.get(entry.parameter.name),
            }
            for entry in layout.entries
        ],
        "verification": verification.to_dict() if verification else None,
    }  # fmt: skip
