"""What an export holds and what it takes, as numbers for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qatscale
from qatscale.export.encoding import Entry, Plan, fallback_cost, ideal_size
from qatscale.export.source import Source
from qatscale.export.verify import Verification
from qatscale.files import sha256_of

FILE = "export.json"
FORMAT = 1
UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Run:
    """Where the checkpoint comes from; what a run's folder knows beyond it."""

    name: str
    id: str | None = None
    mlflow_id: str | None = None
    commit: str | None = None
    losses: dict[str, float] | None = None
    """Final ones, by view, as training reported them."""


@dataclass(frozen=True)
class Row:
    """Parameters that are stored alike."""

    names: tuple[str, ...]
    bits: str
    """In training; "-" for what is not quantized."""
    stored_as: str
    tensors: int
    weights: int
    bytes: int
    ideal_bytes: float
    fallback: str | None


def rows(plan: Plan) -> list[Row]:
    """By kind of parameter, width and encoding, in the model's order."""
    kinds: dict[tuple[str, str, str | None], list[Entry]] = {}
    for entry in plan.entries:
        quantizer = entry.parameter.quantizer
        key = (quantizer.bits_text if quantizer else "-", entry.encoding.name, entry.fallback)
        kinds.setdefault(key, []).append(entry)
    return [
        Row(
            names=tuple(dict.fromkeys(_kind(entry.parameter.name) for entry in entries)),
            bits=bits,
            stored_as=stored_as,
            tensors=len(entries),
            weights=sum(entry.parameter.numel for entry in entries),
            bytes=sum(entry.encoding.size(entry.parameter) for entry in entries),
            ideal_bytes=sum(ideal_size(entry.parameter, plan.source.dtype) for entry in entries),
            fallback=fallback,
        )
        for (bits, stored_as, fallback), entries in kinds.items()
    ]


def _kind(name: str) -> str:
    """blocks.3.mlp.up.weight -> up; blocks.3.attention_norm.weight -> norm."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return "norm" if last.endswith("norm") else last


def quantized_bits_per_weight(entries: Sequence[Entry]) -> float | None:
    """Bits in the file per quantized weight, scales included; None where nothing is quantized."""
    chosen = [entry for entry in entries if entry.parameter.quantizer]
    if not chosen:
        return None
    size = sum(entry.encoding.size(entry.parameter) for entry in chosen)
    return 8 * size / sum(entry.parameter.numel for entry in chosen)


def _bits(source: Source) -> float:
    if source.ptq_bits is not None:
        return source.ptq_bits
    return UNQUANTIZED_BITS if source.switched_at is None else source.config.qat.bits


def contents(plan: Plan, format: str, run: Run, folder: Path, verification: Verification | None) -> dict[str, Any]:
    """export.json."""
    source = plan.source
    per_step = source.config.tokens_per_step
    step, switched_at = source.manifest.step, source.switched_at
    qat_steps = 0 if switched_at is None else step - switched_at
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    weights = sum(entry.parameter.numel for entry in plan.entries)
    file_bytes = sum(path.stat().st_size for path in files)
    return {
        "format": FORMAT,
        "qatscale": qatscale.__version__,
        "exported_as": format,
        "run": {"name": run.name, "id": run.id, "mlflow_id": run.mlflow_id, "git_commit": run.commit},
        "checkpoint": {
            "step": step, "steps": source.steps, "finished": not source.is_unfinished,
            "imported": source.is_imported, "data": source.manifest.data,
        },
        "tokens": {"fp": per_step * (step - qat_steps), "qat": per_step * qat_steps, "total": per_step * step},
        "view": source.view,
        "bits": _bits(source),
        "scheme": source.config.qat.scheme,
        "run_losses": run.losses,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files},
        "size": {
            "parameters": weights,
            "bytes": file_bytes,
            "ideal_bytes": sum(ideal_size(entry.parameter, source.dtype) for entry in plan.entries),
            "bits_per_weight": 8 * file_bytes / weights,
            "bits_per_quantized_weight": quantized_bits_per_weight(plan.entries),
            "fallback_bytes": sum(fallback_cost(entry, source.dtype) for entry in plan.entries),
        },
        "tensors": [
            {
                "name": entry.parameter.name, "shape": list(entry.parameter.shape),
                "bits": entry.parameter.quantizer.bits if entry.parameter.quantizer else None,
                "stored_as": entry.encoding.name, "bytes": entry.encoding.size(entry.parameter),
                "ideal_bytes": ideal_size(entry.parameter, source.dtype), "fallback": entry.fallback,
                "scale_rounding": plan.rounding.get(entry.parameter.name),
            }
            for entry in plan.entries
        ],
        "verification": verification.to_dict() if verification else None,
    }  # fmt: skip
