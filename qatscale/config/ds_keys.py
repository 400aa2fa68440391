"""Which keys a ds_config may hold, for DeepSpeed 0.19.8.

DeepSpeed ignores a top-level key that it does not know, and one whose feature the training loop does not use. Here the
first is an error and the second a warning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from qatscale.config.section import Allowed


def _unquoted(value: Any) -> Any:
    if isinstance(value, str | bool):
        raise ValueError("a number has no quotes")
    return value


def _keys(section: str, rule: Any, names: str) -> dict[str, Any]:
    return {f"{section}.{name}".removeprefix("."): rule for name in names.split()}


Auto = Literal["auto"]
Flag = Annotated[bool, Strict(), Allowed("true or false, without quotes")]
On = Annotated[Literal[True], Allowed("true")]
Count = Annotated[int, BeforeValidator(_unquoted), Field(ge=0, lt=2**63)]
"""5e8 is a count, as for DeepSpeed."""
Whole = Annotated[Count, Allowed("a whole number, 0 or more, without quotes")]
WholeOrAuto = Annotated[Count | Auto, Allowed("a whole number, 0 or more, without quotes; or auto")]
Number = Annotated[float, BeforeValidator(_unquoted), Field(ge=0, allow_inf_nan=False)]
NumberOrAuto = Number | Auto
Dtype = Literal["fp32", "bf16", "bfp16"]
Free = Annotated[dict[str, Any], Allowed("a section")]
"""DeepSpeed checks its content."""

_ZERO, _OFFLOAD = "zero_optimization", ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")

ACCEPTED: dict[str, Any] = {
    f"{_ZERO}.stage": Annotated[
        # In bf16, DeepSpeed's stage 0 takes a hidden optimizer step before training, and it reports no gradient norm.
        Literal[1, 2, 3],
        Allowed("1 (optimizer state sharded), 2 (gradients too) or 3 (parameters too)"),
    ],
    **_keys(_ZERO, WholeOrAuto, "reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold"),
    **_keys(_ZERO, Whole, """allgather_bucket_size sub_group_size stage3_model_persistence_threshold
        stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold"""),
    **_keys(_ZERO, Flag, """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
        overlap_comm round_robin_gradients stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
        log_trace_cache_warnings enable_sanity_checks memory_efficient_linear"""),
    **_keys(_ZERO, On, "compute_grad_norm ignore_unused_parameters"),
    **{f"{section}.device": Literal["none", "cpu"] for section in _OFFLOAD},
    **{f"{section}.pin_memory": Flag for section in _OFFLOAD},
    **_keys("bf16", Flag, "enabled immediate_grad_update check_grad_overflow"),
    **_keys("pipeline", Flag, "pipe_partitioned grad_partitioned"),
    "data_types.grad_accum_dtype": Dtype,
    "communication_data_type": Dtype,
    "gradient_predivide_factor": Number,
    "steps_per_print": Whole,
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    **_keys("", Flag, "prescale_gradients wall_clock_breakdown memory_breakdown dump_state disable_python_gc"),
    **_keys("", Free, "comms_logger flops_profiler timers tensorboard wandb csv_monitor comet"),
}  # fmt: skip
"""Key → what it takes. These reach DeepSpeed."""

RECIPE_KEYS = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "pipeline.stages": "engine.pipeline_stages",
}
"""What the recipe says: a ds_config may repeat it or write "auto"."""

REPEATED: dict[str, Any] = {
    **dict.fromkeys(RECIPE_KEYS, NumberOrAuto),
    "optimizer.params.betas": tuple[Number, Number] | Auto,
    "gradient_accumulation_steps": WholeOrAuto,  # follows from the batch and the layout
    "optimizer.type": Literal["Adam", "AdamW", "adam", "adamw"],
    **_keys("optimizer.params", On, "adam_w_mode bias_correction"),
}
"""Key → what it takes. These are compared with the recipe and do not reach DeepSpeed."""

WITHOUT_EFFECT = {
    *_keys("", None, """activation_checkpointing aio checkpoint comms_config compile dataloader_drop_last
        datastates_ckpt disable_allgather monitor_config seq_parallel_communication_data_type
        use_data_before_expert_parallelism vocabulary_size zero_allow_untested_optimizer"""),
    *_keys(_ZERO, None, """elastic_checkpoint ignore_missing_optim_state load_from_fp32_weights override_module_apply
        pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save"""),
    *(key for section in _OFFLOAD for key in _keys(section, None, """nvme_path buffer_count buffer_size max_in_cpu
        pipeline pipeline_read pipeline_write fast_init""")),
    *_keys("bf16", None, "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale"),
    *_keys("optimizer", None, "legacy_fusion params.torch_adam params.fused"),
    *_keys("pipeline", None, "activation_checkpoint_interval partition seed_layers use_reentrant"),
}  # fmt: skip
"""The training loop brings its own optimizer, batches, checkpoints and recomputation."""

UNSUPPORTED = {
    *_keys("", None, """amp autotuning compression_training curriculum_learning data_efficiency eigenvalue elasticity
        expert_parallel fp16 graph_harvesting hybrid_engine nebula progressive_layer_drop quantize_training scheduler
        sequence_parallel_size sparse_attention sparse_gradients tensor_parallel torch_autocast weight_quantization
        zero_force_ds_cpu_optimizer"""),
    *_keys(_ZERO, None, """cpu_offload cpu_offload_param cpu_offload_params cpu_offload_use_pin_memory leaf_module
        legacy_stage1 mics_hierarchical_params_gather mics_shard_size parameter_alignment zenflow
        zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
        zeropp_loco_param"""),
    *_keys(_OFFLOAD[0], None, "cpuadam_cores_perc ratio super_offload"),
    *_keys("bf16", None, "bf16_master_weights_and_grads bf16_optimizer_states"),
    *_keys("data_types", None, "buffer_dtype keep_in_fp32_modules param_dtype"),
    *_keys("", None, "gradient_allreduce_op managed_gradient_accumulation"),
}  # fmt: skip
"""They would change the result or do not work with the switch to QAT. Each may be present if it is off."""

WHY_NOT = {
    f"{_ZERO}.zero_hpz_partition_size": "DeepSpeed renews its copies of the weights within a node after optimizer "
    "steps alone, so after a validation the switch to QAT computes with the weights from before it"
}
"""Key → why it is not supported, where a reader would expect it to be."""

INSTEAD = {
    "fp16": '"bf16": {"enabled": true}',
    "scheduler": "schedule.shape, schedule.warmup_fraction and schedule.cooldown_fraction in the recipe",
    "tensor_parallel": "engine.tensor_parallel in the recipe",
    "sequence_parallel_size": "engine.sequence_parallel in the recipe",
    "compression_training": "qat.scheme and qat.bits in the recipe",
    "activation_checkpointing": "engine.activation_checkpointing in the recipe",
    "checkpoint": "checkpoint.interval in the recipe",
    f"{_ZERO}.cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    f"{_ZERO}.stage3_gather_16bit_weights_on_model_save": "`qatscale export`",
}
"""Key → what does the same in qatscale."""

FORMER_NAMES = {"bfloat16": "bf16"} | {
    key.replace("stage3_", ""): key for key in (*ACCEPTED, *WITHOUT_EFFECT) if "stage3_" in key
}
"""DeepSpeed reads these as well."""
