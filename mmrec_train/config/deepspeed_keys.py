"""The keys of a DeepSpeed 0.19.8 file, by what this trainer makes of them.

Kept here because importing DeepSpeed takes seconds; a test compares them with its source. Deprecated keys are
left out.
"""

from mmrec_train.config.marked_yaml import KeyPath

# fmt: off
SUPPORTED = frozenset({
    "aio", "checkpoint", "comms_logger", "communication_data_type", "datastates_ckpt",
    "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "steps_per_print", "timers", "wall_clock_breakdown", "zero_optimization",
})
UNUSED = frozenset({
    "autotuning", "compile", "expert_parallel", "hybrid_engine", "pipeline",
    "seq_parallel_communication_data_type", "tensor_parallel", "use_data_before_expert_parallelism",
    "vocabulary_size", "weight_quantization",
})
SECTIONS: dict[KeyPath, frozenset[str]] = {
    ("zero_optimization",): frozenset({
        "allgather_bucket_size", "allgather_partitions", "allgather_sequential",
        "compute_grad_norm", "contiguous_gradients", "elastic_checkpoint", "enable_sanity_checks",
        "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "leaf_module",
        "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
        "max_live_parameters", "max_reuse_distance", "memory_efficient_linear",
        "model_persistence_threshold", "module_granularity_threshold", "offload_optimizer",
        "offload_param", "overlap_comm", "override_module_apply", "param_persistence_threshold",
        "parameter_alignment", "pipeline_loading_checkpoint", "prefetch_bucket_size",
        "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory", "stage", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold", "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
        "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow",
        "zero_hpz_partition_size", "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights", "zero_quantized_weights",
    }),
    ("zero_optimization", "offload_param"): frozenset({
        "buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory",
    }),
    ("zero_optimization", "offload_optimizer"): frozenset({
        "buffer_count", "cpuadam_cores_perc", "device", "fast_init", "nvme_path", "pin_memory",
        "pipeline_read", "pipeline_write", "ratio", "super_offload",
    }),
    ("aio",): frozenset({
        "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit",
        "use_gds",
    }),
}
# fmt: on
# Keys whose value comes from elsewhere, and from where; a file may say "auto" for them.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "the optimizer section",
    "gradient_clipping": "optimizer.clip",
    "scheduler": "the schedule section",
    "activation_checkpointing": "train.activation_checkpointing",
    "data_efficiency": "the data section",
    "dataloader_drop_last": "the data section",
    "tensorboard": "the logging section",
    "wandb": "the logging section",
    "csv_monitor": "the logging section",
    "comet": "the logging section",
    "gradient_allreduce_op": "the trainer",
    "managed_gradient_accumulation": "the trainer",
    "zero_allow_untested_optimizer": "the trainer",
    "zero_force_ds_cpu_optimizer": "the trainer",
}
