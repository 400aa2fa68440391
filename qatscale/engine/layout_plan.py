"""The layout that a run asks for. One that cannot work is refused, with what would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from qatlaw.text import plural
from qatscale.config.problems import together
from qatscale.config.schema import RunConfig
from qatscale.engine.layout import Layout, stages_of
from qatscale.errors import UserError
from qatscale.model.stages import stage_parameters


def plan_layout(config: RunConfig, ds_config: Mapping[str, Any], processes: int) -> Layout:
    """The layout of a run on so many processes. UserError with everything that cannot work, and what would."""
    problems = list(_problems(config, ds_config, processes))
    if problems:
        raise together(problems)
    engine = config.engine
    share = engine.tensor_parallel * engine.pipeline_stages
    return Layout(processes // share, engine.tensor_parallel, engine.pipeline_stages)


def bubble(micro_batches: int, stages: int) -> float:
    """The share of a step in which a stage waits: (p - 1) / (m + p - 1) for m micro-batches through p stages.

    arXiv 2104.04473, section 2.2.1, as a share of the ideal time; here of the entire step.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def layout_notices(config: RunConfig, layout: Layout, gpus: int = 0) -> tuple[str, ...]:
    """What a person should know of a layout before it runs. gpus: those that this host shows."""
    notices = []
    if layout.processes == 1 < gpus:
        notices.append(f"one of this host's {gpus} GPUs is used; `deepspeed --module qatscale train …` uses all")
    vocabulary = config.model.vocab_size
    if padding := -vocabulary % layout.tensor:
        notices.append(
            f"the vocabulary of {vocabulary:,} is padded by {padding} to a multiple of {layout.tensor} processes; the "
            "padding takes part in nothing and is not saved"
        )
    if layout.pipeline > 1:
        blocks = [len(stage.blocks) for stage in stages_of(config)]
        sizes = stage_parameters(config.model, blocks)
        shown = ", ".join(f"{count} ({size / 1e6:,.1f}M)" for count, size in zip(blocks, sizes, strict=True))
        micro_batches = config.batch.micro_batches(layout.data)
        share = bubble(micro_batches, layout.pipeline)
        notices.append(
            f"pipeline: {shown} blocks a stage (parameters); {plural(micro_batches, 'micro-batch')} a step "
            f"leave each stage waiting {share:.0%} of the time"
            + ("; more, smaller ones would wait less" if share > 0.2 else "")
        )
    return tuple(notices)


def _problems(config: RunConfig, ds: Mapping[str, Any], processes: int) -> Iterator[UserError]:
    model, engine = config.model, config.engine
    tensor, pipeline = engine.tensor_parallel, engine.pipeline_stages
    if processes % (tensor * pipeline):
        each = f"engine.tensor_parallel x engine.pipeline_stages = {tensor} x {pipeline}"
        start = f"Start {_multiples(processes, tensor * pipeline)}."
        yield UserError("processes", processes, f"must be a multiple of {each}.", start)
    yield from _tensor_problems(config, tensor)
    if pipeline > 1024:  # every stage is planned by itself
        yield UserError("engine.pipeline_stages", pipeline, "at most 1,024 are supported.")
    if pipeline > model.layers:
        yield UserError(
            "engine.pipeline_stages", pipeline, f"is more than model.layers = {model.layers}; every stage needs one."
        )
    zero = ds["zero_optimization"]
    if pipeline > 1 and zero["stage"] > 1:
        yield UserError(
            "engine.pipeline_stages", pipeline,
            f"works with ZeRO-1 alone, and the ds_config has stage {zero['stage']}: gradients and parameters cannot be "
            "divided between the micro-batches of a pipeline.", "Take a ZeRO-1 ds_config, or one stage.",
        )  # fmt: skip
    if pipeline > 1 and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        yield UserError(
            "zero_optimization.offload_optimizer", None,
            "is wrong with pipeline stages: DeepSpeed 0.19.8 silently loses a part of the gradient in bf16 (measured: "
            "a norm of 0.52 for 0.65).", "Leave it out, or use it with tensor parallelism.",
        )  # fmt: skip
    if "pipeline" in ds and pipeline == 1:
        yield UserError("pipeline", None, "would have no effect with one stage.", "Set engine.pipeline_stages.")
    if engine.sequence_parallel and pipeline > 1 and any(ds.get("pipeline", {}).values()):
        yield UserError(
            "pipeline", dict(ds["pipeline"]),
            "with engine.sequence_parallel the stream between stages is split already, along the sequence.",
            "Remove the section.",
        )  # fmt: skip


def _multiples(size: int, of: int) -> str:
    below = size // of * of
    return f"{below} or {below + of}" if below else str(of)


def _tensor_problems(config: RunConfig, tensor: int) -> Iterator[UserError]:
    model, engine = config.model, config.engine
    if tensor == 1:
        if engine.sequence_parallel:
            do = "Set engine.tensor_parallel, or leave it out."
            yield UserError("engine.sequence_parallel", True, "has no effect without tensor parallelism.", do)
        return
    kv_heads = model.kv_heads or model.heads
    sizes = {"model.heads": model.heads, "model.intermediate_size": model.intermediate_size}
    if kv_heads != model.heads:
        sizes["model.kv_heads"] = kv_heads
    uneven = {key: size for key, size in sizes.items() if size % tensor}
    if uneven:
        shown = ", ".join(f"{key} = {size}" for key, size in uneven.items())
        common = math.gcd(*sizes.values())
        fitting = [n for n in range(1, min(common, 1024) + 1) if common % n == 0]
        yield UserError(
            "engine.tensor_parallel", tensor, f"does not divide {shown}.",
            f"For this model: {', '.join(map(str, fitting))}. For {plural(tensor, 'process')}: "
            + ", ".join(f"{key}={_multiples(size, tensor)}" for key, size in uneven.items()) + ".",
        )  # fmt: skip
    if model.vocab_size <= (tensor - 1) * -(-model.vocab_size // tensor):
        yield UserError("engine.tensor_parallel", tensor, f"leaves a process none of {model.vocab_size} tokens.")
    if engine.sequence_parallel and config.data.sequence_length % tensor:
        length = config.data.sequence_length
        yield UserError(
            "data.sequence_length", length, f"must be a multiple of engine.tensor_parallel = {tensor} under "
            "engine.sequence_parallel.", f"Nearest: {_multiples(length, tensor)}.",
        )  # fmt: skip
    group = config.qat.group_size
    if group and config.qat.scheme != "fp" and not uneven:
        for key, size in model.input_widths.items():
            if size // tensor % group:
                yield UserError(
                    "qat.group_size", group,
                    f"does not divide {key} / engine.tensor_parallel = {size // tensor}; a "
                    "group would lie on two processes.", "Choose smaller groups or fewer processes.",
                )  # fmt: skip
