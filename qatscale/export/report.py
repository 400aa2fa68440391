"""export.json and the model card: contents, sizes and losses of an export."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter
from typing_extensions import TypedDict

import qatscale
from qatlaw.bit_widths import bits_label
from qatscale import untrusted
from qatscale.config.amounts import format_amount
from qatscale.config.recipe import resolved_yaml
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import NAME as MANIFEST
from qatscale.data.manifest import Manifest
from qatscale.errors import UserError
from qatscale.export.clients import install_line
from qatscale.export.encoding import ExportLayout
from qatscale.export.formats.base import Format
from qatscale.export.plugin_source import PluginFolder
from qatscale.export.source import ExportSource
from qatscale.export.verify import Verification
from qatscale.files import read_checked, sha256_of
from qatscale.model.hugging_face import model_type
from qatscale.tracking.compare import validation_losses
from qatscale.tracking.run_folder import RunFolder

FILE = "export.json"
FORMAT = 1
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Provenance(NamedTuple):
    """The run that a checkpoint comes from, as far as its folder records it."""

    run: dict[str, str | None]
    """The run's name, id, MLflow id and git commit."""
    losses: dict[str, float] | None
    """Final validation losses by view, in nats; None for a checkpoint before the run's end."""
    base_model: str | None
    """Name of the Hugging Face model that it began with: on the Hub if its folder says so, else the folder's."""
    datasets: list[str]
    """Names of the sources of its data, as far as the prepared folder is present."""


def provenance(source: ExportSource) -> Provenance:
    """UserError where the records of the run are damaged."""
    if isinstance(source.reader, PluginFolder):
        return Provenance(
            {"name": source.config.name, "id": None, "mlflow_id": None, "git_commit": None}, None, None, []
        )
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
    folders = [folder for folder in source.config.data.sources.values() if (folder / MANIFEST).is_file()]
    sources = [text for folder in folders for text in Manifest.load(folder).sources]
    datasets = list(dict.fromkeys(Path(name).name if Path(name).exists() else name for name in sources))
    return Provenance(names | {"git_commit": run.get("git_commit")}, losses, _base_model(folder), datasets)


def _base_model(folder: RunFolder | None) -> str | None:
    """The Hugging Face model at the root of a run's branches."""
    while folder is not None and folder.run_file.is_file():
        if folder.imported:
            path = Path(folder.imported)
            config = path / "config.json"
            named = untrusted.read_object(config, "model").get("_name_or_path") if config.is_file() else None
            return named if isinstance(named, str) and _HUB_NAME.fullmatch(named) else path.name
        folder = folder.parent
    return None


def _tensors(layout: ExportLayout) -> list[dict[str, Any]]:
    """A row for each parameter, in the model's order; bits None = not quantized."""
    return [
        {
            "name": entry.parameter.name, "shape": list(entry.parameter.shape),
            "bits": entry.parameter.quantizer.bits if entry.parameter.quantizer else None,
            "stored_as": entry.encoding.name, "bytes": entry.size,
            "ideal_bytes": layout.ideal_size(entry.parameter), "fallback": entry.fallback,
            "scale_rounding": layout.rounding.get(entry.parameter.name),
        }
        for entry in layout.entries
    ]  # fmt: skip


def _weights(tensors: list[dict[str, Any]]) -> int:
    return sum(math.prod(row["shape"]) for row in tensors)


def _shares(tensors: list[dict[str, Any]]) -> dict[str, float]:
    """Bits, ascending -> share of all parameters that is quantized to them."""
    widths = sorted({row["bits"] for row in tensors if row["bits"]})
    by_width = {f"{bits:g}": [row for row in tensors if row["bits"] == bits] for bits in widths}
    return {bits: _weights(rows) / _weights(tensors) for bits, rows in by_width.items()}


def _storage(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in tensors:
        alike.setdefault((row["bits"], row["stored_as"], row["fallback"]), []).append(row)
    return [
        {
            "names": list(dict.fromkeys(_role(row["name"]) for row in rows)),
            "bits": bits, "stored_as": stored_as, "fallback": fallback,
            "tensors": len(rows), "weights": _weights(rows),
            "bytes": sum(row["bytes"] for row in rows), "ideal_bytes": sum(row["ideal_bytes"] for row in rows),
        }
        for (bits, stored_as, fallback), rows in alike.items()
    ]  # fmt: skip


def _role(name: str) -> str:
    """blocks.3.mlp.up.weight -> up; blocks.3.attention_norm.weight -> norm."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return "norm" if last.endswith("norm") else last


def contents(
    layout: ExportLayout, format: Format, origin: Provenance, folder: Path, verification: Verification | None
) -> dict[str, Any]:
    """export.json. folder: the written files."""
    source = layout.source
    per_step = source.config.tokens_per_step
    step, switched_at = source.manifest.step, source.manifest.switched_at
    qat_steps = 0 if switched_at is None else step - switched_at
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    tensors = _tensors(layout)
    quantized = [row for row in tensors if row["bits"]]
    per_weight = 8 * sum(row["bytes"] for row in quantized) / _weights(quantized) if quantized else None
    weight_bytes = sum(path.stat().st_size for path in folder.glob(f"*{format.suffix}"))
    return {
        "format": FORMAT,
        "qatscale": qatscale.__version__,
        "exported_as": format.name,
        "run": origin.run,
        "base_model": origin.base_model,
        "datasets": origin.datasets,
        "checkpoint": {
            "step": step, "steps": source.steps, "finished": not source.is_unfinished,
            "imported": source.is_imported, "data": source.manifest.data,
            "trained_elsewhere": isinstance(source.reader, PluginFolder),
        },
        "tokens": {"fp": per_step * (step - qat_steps), "qat": per_step * qat_steps, "total": per_step * step},
        "view": source.view,
        "bits": source.bits,
        "scheme": source.config.qat.scheme,
        "run_losses": origin.losses,
        "files": files,
        "size": {
            "parameters": _weights(tensors),
            "bytes": weight_bytes,
            "ideal_bytes": sum(row["ideal_bytes"] for row in tensors),
            "bits_per_weight": 8 * weight_bytes / _weights(tensors),
            "shares": _shares(tensors),
            "bits_per_quantized_weight": per_weight,
            "fallback_bytes": sum(map(layout.fallback_cost, layout.entries)),
        },
        "storage": _storage(tensors),
        "tensors": tensors,
        "verification": verification.to_dict() if verification else None,
    }  # fmt: skip


class _File(TypedDict):
    sha256: str


class _Described(TypedDict):
    files: dict[str, _File]


def check_files(folder: Path) -> None:
    """UserError for a file that is missing or differs from what was written, by the checksums in export.json.

    Folders without one, written by other programs, pass.
    """
    if not (folder / FILE).is_file():
        return
    described = read_checked(folder / FILE, TypeAdapter(_Described), "model", "Export again.")
    for path, about in ((folder / name, about) for name, about in described["files"].items()):
        try:
            is_intact = sha256_of(path) == about["sha256"]
        except OSError as error:
            raise UserError("model", str(path), f"cannot be read: {error.strerror}.", "Export again.") from None
        if not is_intact:
            fix = f"Export again; if you changed it on purpose, remove {FILE}."
            raise UserError("model", str(path), "was altered: its checksum differs from the export's.", fix)


TEMPLATE = "card.md.jinja"


def card(
    described: dict[str, Any], format: Format, config: RunConfig, has_tokenizer: bool, license: str | None = None
) -> str:
    """The model card. described: the content of export.json. license: an identifier of the Hub; None = unknown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"amount": format_amount, "install": install_line, "count": "{:,.0f}".format}
    return environment.get_template(TEMPLATE).render(
        described,
        title=_title(described),
        front_matter=_front_matter(described, format, license),
        model_type={"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type(config.model)],
        usages=format.usages(has_tokenizer, next(name for name in described["files"] if name.endswith(format.suffix))),
        has_tokenizer=has_tokenizer,
        recipe=_recipe(config, described["checkpoint"]["trained_elsewhere"]),
    )


def _front_matter(described: dict[str, Any], format: Format, license: str | None) -> str:
    """The card's metadata as the Hub reads them, with the losses of the exported weights as evaluation results."""
    view, losses = described["view"], described["run_losses"] or {}
    name = f"{described['run']['name']} ({described['exported_as']})"
    content: dict[str, Any] = {
        "license": license or "unknown",
        "library_name": format.library,
        "pipeline_tag": "text-generation",
        "tags": ["qatscale", "quantization-aware-training"],
    }
    if described["base_model"]:
        content |= {"base_model": described["base_model"], "base_model_relation": "quantized"}
    if described["datasets"]:
        content["datasets"] = described["datasets"]
    verified = described["verification"]
    loss = losses.get(view) or (verified["stored_loss"] if verified else None)
    if loss is not None:
        metrics = [
            {"type": "loss", "name": "nats per token", "value": round(loss, 4)},
            {"type": "perplexity", "value": round(math.exp(loss), 4)},
        ]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": "held-out", "name": "held-out text of the training data"},
            "metrics": metrics,
        }
        content |= {"metrics": ["perplexity"], "model-index": [{"name": name, "results": [result]}]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _title(described: dict[str, Any]) -> str:
    if described["view"] == "fp":
        return "full precision"
    trained = "quantized after training" if described["view"].startswith("ptq") else "quantization-aware trained"
    bits = described["bits"]
    return f"{bits_label(bits)}, {trained}"


def _recipe(config: RunConfig, trained_elsewhere: bool) -> str:
    """The resolved recipe without paths of the machine that trained it."""
    content = yaml.safe_load(resolved_yaml(config))
    if trained_elsewhere:
        return yaml.safe_dump({"model": content["model"], "qat": content["qat"]}, sort_keys=False)
    del content["output"], content["data"]["path"], content["tracking"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
