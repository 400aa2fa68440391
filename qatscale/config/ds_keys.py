"""What a ds_config may hold: DeepSpeed 0.19.8's keys, sorted into those that work here and those that do not, and why.

DeepSpeed ignores a top-level key it does not know, and ignores one whose feature our loop does not use; both would be
silent. So this list is complete for `deepspeed/runtime/config.py` and `runtime/zero/config.py`; a test holds it against
the installed DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Whole:
    """A whole number; 5e8 counts as one, as it does for DeepSpeed."""

    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Number:
    """Any number from `least` up."""

    least: float = 0


@dataclass(frozen=True)
class Choice:
    """One of these texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A key of DeepSpeed's that has no place in a ds_config here."""

    why: str
    do: str = ""


FLAG = Choice(("true", "false"))
"""A truth value: JSON's true or false, not the texts."""
FREE: dict[str, Any] = {}
"""A section that DeepSpeed checks by itself."""


def _recipe(key: str) -> Refused:
    return Refused("belongs to the recipe, not to a ds_config.", f"Set {key} there.")


def _removed(feature: str) -> Refused:
    return Refused(f"DeepSpeed 0.19 has removed {feature}.", "Remove the key.")


def _idle(why: str, do: str = "Remove the key.") -> Refused:
    return Refused(f"would have no effect: {why}.", do)


_REDUCED = Choice(("fp32", "bf16"))
_OWN_CHECKPOINTS = "qatscale writes its own checkpoints, free of the layout they were saved under"
_CPU_ONLY = "NVMe offload is not supported: the switch to QAT must reach the fp32 masters"
_NO_LOSSY = "would round weights or gradients on their way, a quantization that no recipe knows of"

OFFLOAD = {
    "device": Choice(("none", "cpu")),
    "pin_memory": FLAG,
    "nvme_path": Refused(f"{_CPU_ONLY}."),
    "buffer_count": Refused(f"{_CPU_ONLY}."),
}

ZERO: dict[str, Any] = {
    "stage": Whole(1, 3),
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": Whole(1),
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": Whole(),
    "overlap_comm": FLAG,
    "round_robin_gradients": FLAG,
    "sub_group_size": Whole(),
    "offload_optimizer": {
        **OFFLOAD,
        "ratio": Refused(
            "offloads a part of the optimizer state, which is not tested here.", "Offload all or nothing."
        ),
        "pipeline_read": Refused(f"{_CPU_ONLY}."),
        "pipeline_write": Refused(f"{_CPU_ONLY}."),
        "fast_init": Refused(f"{_CPU_ONLY}."),
        "super_offload": Refused("needs DeepSpeed's own Adam; the optimizer here is torch's AdamW."),
        "cpuadam_cores_perc": Refused("is of super_offload, which needs DeepSpeed's own Adam."),
    },
    "offload_param": {
        **OFFLOAD,
        "buffer_size": Refused(f"{_CPU_ONLY}."),
        "max_in_cpu": Refused(f"{_CPU_ONLY}."),
    },
    "stage3_prefetch_bucket_size": Whole(),
    "stage3_param_persistence_threshold": Whole(),
    "stage3_model_persistence_threshold": Whole(),
    "stage3_max_live_parameters": Whole(),
    "stage3_max_reuse_distance": Whole(),
    "stage3_module_granularity_threshold": Whole(),
    "stage3_use_all_reduce_for_fetch_params": FLAG,
    "stage3_allgather_sequential": FLAG,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "cpu_offload": Refused("is deprecated in DeepSpeed.", 'Write "offload_optimizer": {"device": "cpu"}.'),
    "cpu_offload_param": Refused("is deprecated in DeepSpeed.", 'Write "offload_param": {"device": "cpu"}.'),
    "cpu_offload_use_pin_memory": Refused("is deprecated in DeepSpeed.", "Write offload_optimizer.pin_memory."),
    "compute_grad_norm": Refused(
        "the gradient norm is on every metrics line and clipping needs it.", "Remove the key."
    ),
    "ignore_unused_parameters": Refused("scales have no gradient before the switch, so this stays true."),
    "legacy_stage1": Refused("is a former ZeRO-1, not tested here."),
    "parameter_alignment": Refused("pads the flat buffers, which is not tested here."),
    "load_from_fp32_weights": _idle(_OWN_CHECKPOINTS),
    "elastic_checkpoint": _idle(_OWN_CHECKPOINTS),
    "pipeline_loading_checkpoint": _idle(_OWN_CHECKPOINTS),
    "stage3_gather_16bit_weights_on_model_save": _idle(_OWN_CHECKPOINTS, "`qatscale export` gathers the weights."),
    "stage3_gather_fp16_weights_on_model_save": _idle(_OWN_CHECKPOINTS, "`qatscale export` gathers the weights."),
    "zero_hpz_partition_size": Refused("keeps a second copy of the weights, which the switch to QAT does not reach."),
    "zero_quantized_weights": Refused(f"{_NO_LOSSY}."),
    "zero_quantized_nontrainable_weights": Refused(f"{_NO_LOSSY}."),
    "zero_quantized_gradients": Refused(f"{_NO_LOSSY}."),
    "zenflow": Refused("updates part of the weights late, so no step has one set of weights to switch or save."),
    "memory_efficient_linear": FLAG,
    "override_module_apply": Refused("is for models built inside zero.Init, which this one is not.", "Remove the key."),
    "save_muon_momentum_buffer_in_memory": Refused("is of Muon; the optimizer here is AdamW."),
    "leaf_module": Refused("is for mixtures of experts; this model is dense."),
    "mics_shard_size": _removed("MiCS"),
    "mics_hierarchical_params_gather": _removed("MiCS"),
    "zeropp_loco_param": _removed("LoCo"),
}

TOP: dict[str, Any] = {
    "zero_optimization": ZERO,
    "bf16": {
        "enabled": FLAG,
        "immediate_grad_update": FLAG,
        "check_grad_overflow": FLAG,
        "bf16_master_weights_and_grads": Refused("QAT needs fp32 masters: a scale's updates are lost in bf16."),
        "bf16_optimizer_states": Refused("needs bf16 masters, and QAT needs fp32 ones."),
    },
    "data_types": {
        "grad_accum_dtype": _REDUCED,
        "param_dtype": Refused("the precision follows from the bf16 section.", "Remove the key."),
        "buffer_dtype": Refused("the rotary tables stay in fp32.", "Remove the key."),
        "keep_in_fp32_modules": Refused("is for buffers of transformers' models.", "Remove the key."),
    },
    "communication_data_type": _REDUCED,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": Number(),
    "steps_per_print": Whole(1),
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_python_gc": FLAG,
    "log_level": Choice(("debug", "info", "warning", "error", "critical")),
    "comms_logger": FREE,
    "flops_profiler": FREE,
    "timers": FREE,
    "tensorboard": FREE,
    "wandb": FREE,
    "csv_monitor": FREE,
    "comet": FREE,
    "zero_force_ds_cpu_optimizer": Refused("the optimizer is torch's AdamW; with offload this is false by itself."),
    "zero_allow_untested_optimizer": _idle("the optimizer is torch's AdamW, which DeepSpeed has tested"),
    # the recipe's
    "train_batch_size": _recipe("batch.sequences"),
    "train_micro_batch_size_per_gpu": _recipe("batch.micro_batch"),
    "gradient_accumulation_steps": Refused(
        "follows from the recipe: batch.sequences / (batch.micro_batch x data-parallel processes).", "Remove the key."
    ),
    "optimizer": _recipe("optimizer.learning_rate, optimizer.betas, optimizer.eps and optimizer.weight_decay"),
    "scheduler": _recipe("schedule.shape, schedule.warmup_fraction and schedule.cooldown_fraction"),
    "gradient_clipping": _recipe("optimizer.gradient_clipping"),
    "activation_checkpointing": _recipe("engine.activation_checkpointing"),
    "checkpoint": Refused(f"would have no effect: {_OWN_CHECKPOINTS}.", "Set checkpoint.interval in the recipe."),
    "datastates_ckpt": Refused(f"would have no effect: {_OWN_CHECKPOINTS}.", "Remove the key."),
    "vocabulary_size": _recipe("model.vocab_size"),
    "data_efficiency": Refused("the order of the data is a pure function of the step.", "Set data.seed in the recipe."),
    "dataloader_drop_last": _idle("the batches come from qatscale's own reader"),
    # another precision
    "fp16": Refused(
        "is not supported: its loss scaling skips optimizer steps, and with them tokens and the planned switch; scales "
        "under 6e-5 lose bits in fp16.",
        'Write "bf16": {"enabled": true} instead.',
    ),
    "bfloat16": Refused("is the former name of bf16.", 'Write "bf16": {"enabled": true}.'),
    "torch_autocast": Refused("is not supported.", 'Write "bf16": {"enabled": true}, which keeps fp32 masters.'),
    # other ways to run a model
    "managed_gradient_accumulation": Refused("the train loop counts on DeepSpeed's accumulation.", "Remove the key."),
    "gradient_allreduce_op": Refused("the loss is the mean over the global batch, always.", "Remove the key."),
    "pipeline": {
        "pipe_partitioned": FLAG,
        "grad_partitioned": FLAG,
        "activation_checkpoint_interval": _recipe("engine.activation_checkpointing"),
        "use_reentrant": _recipe("engine.activation_checkpointing"),
        "stages": _recipe("engine.pipeline_stages"),
        "partition": Refused("the blocks are divided so that the largest stage is as small as can be.", "Remove it."),
        "seed_layers": Refused("every parameter is drawn from the seed and its own name.", "Remove the key."),
    },
    "tensor_parallel": Refused(
        "AutoTP replaces quantized linears by plain ones, without a word.", "Set engine.tensor_parallel in the recipe."
    ),
    "sequence_parallel_size": Refused(
        "is Ulysses, for sequences longer than a device holds.", "See engine.sequence_parallel in the recipe."
    ),
    "seq_parallel_communication_data_type": Refused("is of Ulysses, which is not supported."),
    "expert_parallel": Refused("the model is dense.", "Remove the key."),
    "use_data_before_expert_parallelism": Refused("the model is dense.", "Remove the key."),
    "hybrid_engine": Refused("is for generation during training.", "Remove the key."),
    "weight_quantization": Refused("is for inference.", "Set qat.bits in the recipe."),
    "compile": _idle("the engine's compile() is not called"),
    "autotuning": Refused("would change the batch size that the recipe sets.", "Remove the key."),
    "aio": Refused(f"{_CPU_ONLY}."),
    "disable_allgather": _idle("DeepSpeed reads it and uses it nowhere"),
    # gone since 0.19
    "nebula": _removed("Nebula"),
    "compression_training": Refused("DeepSpeed 0.19 has removed it.", "Set qat.scheme and qat.bits in the recipe."),
    "amp": _removed("Apex AMP"),
    "quantize_training": Refused("DeepSpeed 0.19 has removed it.", "Set qat.scheme and qat.bits in the recipe."),
    "sparse_gradients": _removed("sparse gradients"),
    "eigenvalue": _removed("mixture-of-quantization"),
    "sparse_attention": _removed("sparse attention"),
    "elasticity": _removed("elastic training"),
    "graph_harvesting": _removed("graph harvesting"),
    "curriculum_learning": _removed("the top-level curriculum"),
    "progressive_layer_drop": _removed("progressive layer dropping"),
}
