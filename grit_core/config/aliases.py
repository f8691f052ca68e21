"""Names that other libraries and services have for fields of ours: a hint, never accepted."""

from typing import Final

ALIASES: Final[dict[str, tuple[str, ...]]] = {
    # training
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_schedule",),
    "lr_scheduler_type": ("lr_schedule",),
    "scheduler": ("lr_schedule",),
    "num_epochs": ("epochs",),
    "n_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "per_device_train_batch_size": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "warmup": ("warmup_ratio",),
    "warmup_steps": ("warmup_ratio",),
    "clip_grad": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "context_length": ("max_length",),
    "cutoff_len": ("max_length",),
    "dtype": ("precision",),
    "torch_dtype": ("precision",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "optim": ("optimizer",),
    "random_seed": ("seed",),
    "save_steps": ("checkpoint_every_steps",),
    "eval_steps": ("eval_every_steps",),
    "patience": ("early_stopping_patience",),
    # adapters
    "r": ("rank", "global_rank"),
    "lora_r": ("rank", "global_rank"),
    "lora_rank": ("rank", "global_rank"),
    "rank": ("global_rank",),
    "lora_alpha": ("alpha", "global_alpha"),
    "alpha": ("global_alpha",),
    "lora_dropout": ("dropout", "global_dropout"),
    "dropout": ("global_dropout",),
    "target_modules": ("layer_patterns",),
    "patterns": ("layer_patterns",),
    "layers": ("layer_patterns",),
    "layers_to_transform": ("specific_indices",),
    "language": ("text",),
    "llm": ("text",),
    "image": ("vision",),
    "images": ("vision",),
    "connector": ("cross_modal",),
    "projector": ("cross_modal",),
    # a request
    "base_model": ("model",),
    "model_id": ("model",),
    "model_name_or_path": ("model",),
    "training_file": ("dataset",),
    "train_dataset": ("dataset",),
    "dataset_id": ("dataset",),
    "data": ("dataset",),
    "validation_file": ("eval_dataset",),
    "validation_dataset": ("eval_dataset",),
    "hyperparameters": ("training",),
    "train": ("training",),
    "training_config": ("training",),
    "labels": ("metadata",),
    "tags": ("metadata",),
    "max_tokens": ("max_new_tokens",),
    "max_completion_tokens": ("max_new_tokens",),
    "question": ("prompt",),
    "image_urls": ("images",),
}
"""The fields that a name may mean, by that name in lower case; the first that exists counts."""


def find_alias(name: str, known: list[str]) -> str | None:
    """Return the known field that a name means elsewhere, if there is one."""
    written = name.lower().replace("-", "_").replace(" ", "_")
    if written in known:
        return written
    return next((field for field in ALIASES.get(written, ()) if field in known), None)
