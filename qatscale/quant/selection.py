"""The selection of a model's layers that are quantized, and their bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from qatlaw.text import plural
from qatscale.config.schema import QatConfig
from qatscale.errors import UserError
from qatscale.quant.bit_widths import BitsRule, embedding_rule
from qatscale.quant.layers import FAKE_QUANT, FakeQuant, FakeQuantLayer

BLOCK_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
"""Also with the suffix `_proj` of Hugging Face models."""
EMBEDDING_NAMES = ("embed", "embed_tokens", "head", "lm_head")


@dataclass(frozen=True)
class Target:
    """A layer to quantize, plain or converted already."""

    name: str
    module: nn.Linear | nn.Embedding
    rule: BitsRule


@dataclass(frozen=True)
class Selection:
    targets: tuple[Target, ...]
    left_out: dict[str, str]
    """Name of every other Linear and Embedding -> the reason."""


def fake_quant_modules(model: nn.Module) -> Iterator[tuple[str, FakeQuantLayer]]:
    """The converted layers of a model with their names, in its order."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLayer):
            yield name, module


def select(model: nn.Module, qat: QatConfig, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Selection:
    """The layers that `qat` quantizes. Only shapes and identities of parameters are read.

    include, exclude: patterns (`*.attention.qkv`, `head?`) of entire names or of their last parts: layers that are
    quantized beside those with names of a Llama, and layers that stay in full precision on purpose. `exclude` wins.

    UserError where no layer matches, a pattern matches none, a group size does not divide, or a layer cannot be
    quantized as it is. Also where a matrix would stay in full precision because of its name.
    """
    names = [name for name, _ in model.named_modules()]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in names):
                raise UserError(f"QatPlugin({option}=…)", pattern, f"matches no layer of {type(model).__name__}.")
    rule = embedding_rule(qat.embedding_bits, _is_tied(model))
    embeddings = {id(module.weight) for _, module in model.named_modules() if isinstance(module, nn.Embedding)}
    targets: list[Target] = []
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        chosen = _matches(name, include) and not _matches(name, exclude)
        if not isinstance(module, nn.Linear | nn.Embedding):
            if chosen and isinstance(getattr(module, "weight", None), nn.Parameter):
                targets.append(Target(name, module, BitsRule()))
            continue
        last = name.rsplit(".", 1)[-1]
        if _matches(name, exclude):
            left_out[name] = "kept in full precision"
        elif last in EMBEDDING_NAMES or (chosen and id(module.weight) in embeddings):
            if rule is None:
                reason = "untied" if qat.embedding_bits == "auto" else "embedding_bits = 16"
                left_out[name] = f"{reason}: stays in full precision"
            else:
                targets.append(Target(name, module, rule))
        elif chosen or last.removesuffix("_proj") in BLOCK_NAMES:
            targets.append(Target(name, module, BitsRule()))
    if not any(target.rule == BitsRule() for target in targets):
        others = ", ".join(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise UserError(
            "model", type(model).__name__, f"quantization needs Linear layers named {', '.join(BLOCK_NAMES)} or "
            f"q_proj, k_proj, ...; this model has {others or 'no Linear layer'}.",
            "Name its layers by patterns: QatPlugin(..., include=['*.qkv']).",
        )  # fmt: skip
    for target in targets:
        _check_kind(target)
    _check_names(model, targets, left_out, exclude)
    _check_group_size(targets, qat.group_size)
    _check_sharing(model, targets)
    return Selection(tuple(targets), left_out)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, name.rsplit(".", 1)[-1]))


def _is_tied(model: nn.Module) -> bool:
    """Whether embedding and head share a weight, or the model (perhaps one pipeline stage) declares that they do."""
    if getattr(model, "tied_embedding", False):
        return True
    modules = list(model.modules())
    embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    return any(id(module.weight) in embeddings for module in modules if isinstance(module, nn.Linear))


def _check_names(model: nn.Module, targets: list[Target], left_out: Collection[str], exclude: Sequence[str]) -> None:
    """UserError for matrices that are neither quantized nor left out on purpose, of whatever class their layer is."""
    quantized = {id(target.module.weight) for target in targets}
    unnamed = {}
    for name, parameter in model.named_parameters():
        layer, _, own = name.rpartition(".")
        known = own == "weight_scale" or layer in left_out or _matches(layer, exclude)
        if parameter.dim() > 1 and not known and id(parameter) not in quantized:
            unnamed[layer] = parameter.numel()
    if unnamed:
        share = sum(unnamed.values()) / sum(parameter.numel() for parameter in model.parameters())
        lasts = list(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in unnamed))
        raise UserError(
            f"model.{next(iter(unnamed))}", None,
            f"{plural(len(unnamed), 'layer')}, {share:.1%} of the parameters, would stay in full precision, for only "
            f"layers named {', '.join((*BLOCK_NAMES, *EMBEDDING_NAMES))} are quantized.",
            f"Quantize them, QatPlugin(..., include={lasts}), or leave them out on purpose, exclude={lasts}.",
        )  # fmt: skip


def _check_kind(target: Target) -> None:
    module = target.module
    if type(module) not in FAKE_QUANT and not isinstance(module, FakeQuant):
        raise UserError(
            f"model.{target.name}", type(module).__name__, "only a plain nn.Linear or nn.Embedding can be quantized;",
            "a subclass would lose what it adds. Prepare the model before other libraries wrap its layers.",
        )  # fmt: skip
    if hasattr(module.weight, "ds_id"):
        raise UserError(
            f"model.{target.name}", "a weight that DeepSpeed has partitioned", "scales need unpartitioned weights.",
            "Call prepare(model) before deepspeed.initialize and outside of deepspeed.zero.Init.",
        )  # fmt: skip
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise UserError(
            f"model.{target.name}", f"max_norm={module.max_norm}, sparse={module.sparse}",
            "a quantized embedding has neither.", "Set qat.embedding_bits=16 to leave it out.",
        )  # fmt: skip


def _check_group_size(targets: list[Target], group_size: int | None) -> None:
    if group_size is None:
        return
    channels = {target.name: target.module.weight.shape[1] for target in targets}
    for name, count in channels.items():
        if count % group_size:
            common = math.gcd(*channels.values())
            fitting = [str(size) for size in range(1, common + 1) if common % size == 0]
            raise UserError(
                "qat.group_size", group_size, f"does not divide the {count} input channels of {name}.",
                f"Sizes that divide every quantized layer here: {', '.join(fitting)}.",
            )  # fmt: skip


def _check_sharing(model: nn.Module, targets: list[Target]) -> None:
    """UserError for a weight of which one layer is quantized and another is not: it would act as two weights."""
    quantized = {id(target.module.weight): target.name for target in targets}
    chosen = {id(target.module) for target in targets}
    for name, module in model.named_modules():
        if id(module) in chosen:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in quantized:
                raise UserError(
                    f"model.{name}.{parameter_name}", None,
                    f"is the same parameter as {quantized[id(parameter)]}.weight, but its layer is not quantized.",
                    f"Name the layer as one of {', '.join(EMBEDDING_NAMES)}, or set qat.embedding_bits=16.",
                )  # fmt: skip
