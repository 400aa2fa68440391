"""What an export holds and how large it is, as numbers for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import qatscale
from qatlaw.bit_widths import UNQUANTIZED_BITS
from qatscale import untrusted
from qatscale.errors import UserError
from qatscale.export.encoding import ExportLayout, StoredParameter
from qatscale.export.formats.base import Format
from qatscale.export.source import ExportSource
from qatscale.export.verify import Verification
from qatscale.files import sha256_of
from qatscale.tracking.compare import validation_losses
from qatscale.tracking.run_folder import RunFolder

FILE = "export.json"
FORMAT = 1


class Provenance(NamedTuple):
    """The run that a checkpoint comes from, as far as its folder says."""

    run: dict[str, str | None]
    """Its name, id, MLflow id and git commit."""
    losses: dict[str, float] | None
    """Final validation losses by view, in nats; None for a checkpoint before the run's end."""


def provenance(source: ExportSource) -> Provenance:
    """UserError where the records of the run are damaged."""
    folder = RunFolder(source.folder.resolve().parent.parent)
    run, tracking = (
        untrusted.read_object(file, "checkpoint") if file.is_file() else {}
        for file in (folder.run_file, folder.tracking_file)
    )
    names = {"name": folder.name, "id": run.get("id"), "mlflow_id": tracking.get("run_id")}
    try:
        is_end = folder.is_done and source.manifest.step == source.steps
        losses = validation_losses(folder) if is_end else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError("checkpoint", str(folder.path), f"the records of its run are damaged: {error}.") from None
    return Provenance(names | {"git_commit": run.get("git_commit")}, losses)


def storage_rows(layout: ExportLayout) -> list[dict[str, Any]]:
    """Parameters that are stored alike, by bit width (None = not quantized) and encoding, in the model's order."""
    alike: dict[tuple[float | None, str, str | None], list[StoredParameter]] = {}
    for entry in layout.entries:
        quantizer = entry.parameter.quantizer
        key = (quantizer.bits if quantizer else None, entry.encoding.name, entry.fallback)
        alike.setdefault(key, []).append(entry)
    return [
        {
            "names": list(dict.fromkeys(_role(entry.parameter.name) for entry in entries)),
            "bits": bits,
            "stored_as": stored_as,
            "fallback": fallback,
            "tensors": len(entries),
            "weights": sum(entry.parameter.numel for entry in entries),
            "bytes": sum(entry.size for entry in entries),
            "ideal_bytes": sum(layout.ideal_size(entry.parameter) for entry in entries),
        }
        for (bits, stored_as, fallback), entries in alike.items()
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


def contents(
    layout: ExportLayout, format: Format, origin: Provenance, folder: Path, verification: Verification | None
) -> dict[str, Any]:
    """export.json. folder: the written files."""
    source = layout.source
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
        "run": origin.run,
        "checkpoint": {
            "step": step, "steps": source.steps, "finished": not source.is_unfinished,
            "imported": source.is_imported, "data": source.manifest.data,
        },
        "tokens": {"fp": per_step * (step - qat_steps), "qat": per_step * qat_steps, "total": per_step * step},
        "view": source.view,
        "bits": _bits(source),
        "scheme": source.config.qat.scheme,
        "run_losses": origin.losses,
        "files": files,
        "size": {
            "parameters": weights,
            "bytes": weight_bytes,
            "ideal_bytes": sum(layout.ideal_size(entry.parameter) for entry in layout.entries),
            "bits_per_weight": 8 * weight_bytes / weights,
            "bits_per_quantized_weight": _bits_per_quantized_weight(layout.entries),
            "fallback_bytes": sum(map(layout.fallback_cost, layout.entries)),
        },
        "storage": storage_rows(layout),
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


def check_files(folder: Path) -> None:
    """UserError for a file that is missing or differs from what was written, by the checksums in export.json.

    Folders without one, written by other programs, pass.
    """
    if not (folder / FILE).is_file():
        return
    described = untrusted.read_object(folder / FILE, "model")
    try:
        checksums = {folder / name: about["sha256"] for name, about in described["files"].items()}
    except (TypeError, KeyError, AttributeError):
        raise UserError("model", str(folder / FILE), "is damaged: it lists no checksums.", "Export again.") from None
    for path, checksum in checksums.items():
        try:
            is_intact = sha256_of(path) == checksum
        except OSError as error:
            raise UserError("model", str(path), f"cannot be read: {error.strerror}.", "Export again.") from None
        if not is_intact:
            fix = f"Export again; if you changed it on purpose, remove its entry from {FILE}."
            raise UserError("model", str(path), "was altered: its checksum differs from the export's.", fix)
