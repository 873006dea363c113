"""The config keys: what each accepts, what it belongs to, and what may be done with it."""

MACHINE_KEYS = ("data_path", "checkpoint_dir", "device")  # of the machine, not of the model
# What a resumed run may change without being another run.
FREE_KEYS = {
    *MACHINE_KEYS, "epochs", "stopping_step", "show_progress", "state", "worker", "eval_batch_size", "gpu_id",
    "use_gpu", "checkpoint_steps", "checkpoint_keep", "cuda_graphs", "measure_latency", "log_wandb",
    "wandb_project", "local_rank", "metric_decimal_place", "loss_decimal_place", "base_model", "base_model_download",
    "retriever_checkpoint", "prompt_batch_tokens", "rerank",
}  # fmt: skip
