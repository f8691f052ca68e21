"""Examples of request bodies for the OpenAPI document, by operation.

They name the model and the adapter of the demo, so that each works once the demo has run, with the
ids that it printed.
"""

from typing import Any, Final

DATASET: Final = "ds_0123456789abcdef01234567"
ADAPTER: Final = "adp_0123456789abcdef01234567"
MODEL: Final = "digits-vlm"
FOLDER: Final = "/models/digits-vlm"
_PICTURE_URL: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAFUlEQVR4nGNggAJGBob/EI"
    "oIgKkYAEuRAgPFMFmHAAAAAElFTkSuQmCC"
)
_ROW: Final = (
    '{"messages": [{"role": "user", "content": "Name a fruit"},'
    ' {"role": "assistant", "content": "Apple"}]}\n'
)
_JOB: Final[dict[str, Any]] = {"model": MODEL, "dataset": DATASET, "preset": "smolvlm_fast"}
_CONFIG_JOB: Final[dict[str, Any]] = {
    "model": MODEL,
    "dataset": DATASET,
    "config": {
        "text": {
            "layer_patterns": ["model.text_model.layers.*.self_attn.q_proj"],
            "strategy": "last_n",
            "n_layers": 2,
        },
        "global_rank": 8,
    },
    "training": {"epochs": 1, "learning_rate": 0.001},
    "device": "cpu",
    "name": "two last text blocks",
    "metadata": {"ticket": "1234"},
}
_JOBS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "preset": ("A preset of the model's family", _JOB),
    "layers": ("Layers of your choice", _CONFIG_JOB),
}
_PICTURE: Final = [
    {"type": "image_url", "image_url": {"url": _PICTURE_URL}},
    {"type": "text", "text": "Which digit is this?"},
]

_BODIES: Final[dict[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "POST /models": {
        "folder": ("A folder of this machine", {"id": MODEL, "source": FOLDER}),
        "hub": ("A model of the hub", {"id": "HuggingFaceTB/SmolVLM-256M-Instruct"}),
    },
    "POST /datasets": {
        "rows": ("One JSONL file", {"file": _ROW, "name": "fruit"}),
        "skip": ("Leave bad rows out", {"file": _ROW, "on_bad_rows": "skip"}),
    },
    "POST /jobs/plan": _JOBS,
    "POST /jobs": _JOBS,
    "POST /adapters": {
        "files": (
            "The two files that PEFT saved (as curl names them)",
            {
                "file": ["@adapter_config.json", "@adapter_model.safetensors"],
                "model": MODEL,
                "name": "invoices",
            },
        ),
    },
    "POST /adapters/{adapter_id}/compress": {
        "bound": (
            "Cut what changes answers least",
            {"max_kl": 0.01, "dataset": DATASET, "name": "smaller"},
        ),
    },
    "POST /infer": {
        "adapter": (
            "An adapter, asked about an image",
            {"adapter": ADAPTER, "prompt": "Which digit is this?", "images": [_PICTURE_URL]},
        ),
        "base": (
            "The base model, in a conversation",
            {"model": MODEL, "messages": [{"role": "user", "content": _PICTURE}]},
        ),
    },
    "POST /keys": {
        "service": (
            "A key of another team, for 90 days",
            {"name": "ci", "team": "ml", "scopes": ["read", "write"], "expires_in_days": 90},
        ),
    },
    "POST /keys/{key_id}/rotate": {
        "hour": ("The old key goes on for an hour", {"overlap_seconds": 3600}),
    },
    "PATCH /teams/{name}": {
        "limits": (
            "At most 50 open jobs and 500 GB",
            {"max_open_jobs": 50, "max_stored_bytes": 500_000_000_000},
        ),
    },
    "POST /v1/chat/completions": {
        "image": (
            "An adapter, asked about an image",
            {
                "model": ADAPTER,
                "messages": [{"role": "user", "content": _PICTURE}],
                "max_completion_tokens": 16,
            },
        ),
    },
    "POST /v1/files": {
        "rows": ("One JSONL file", {"file": _ROW, "purpose": "fine-tune"}),
    },
    "POST /v1/fine_tuning/jobs": {
        "own": (
            "The balanced preset of the model's family",
            {"model": MODEL, "training_file": DATASET, "suffix": "fruit"},
        ),
        "hyperparameters": (
            "Hyperparameters and a preset",
            {
                "model": MODEL,
                "training_file": DATASET,
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}},
                },
                "grit": {"preset": "smolvlm_fast"},
            },
        ),
    },
}


def body_examples(operation: str) -> dict[str, dict[str, Any]]:
    """Return the examples of a request body as OpenAPI writes them.

    Args:
        operation: Method and path, such as `POST /jobs`.

    Raises:
        LookupError: If the operation has a body and no example here.
    """
    found = _BODIES.get(operation)
    if found is None:
        raise LookupError(f"{operation} takes a body and has no example in api/examples.py")
    return {name: {"summary": text, "value": value} for name, (text, value) in found.items()}
