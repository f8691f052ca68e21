"""Quantised checkpoints: recognised by their config, and refused in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grit_core.errors import ModelUnavailable


def refuse_quantized(config: Any, source: str | Path) -> None:
    """Refuse a model whose weights are stored in fewer bits than a job computes in.

    Their kernels need libraries and devices that a job cannot count on, and an adapter trained on
    weights that were dequantised otherwise is an adapter of another model.

    Args:
        config: As transformers reads it.
        source: Names the model in the error.

    Raises:
        ModelUnavailable: The config, or that of one of its parts, has a `quantization_config`.
    """
    for part in (config, getattr(config, "text_config", None)):
        settings = getattr(part, "quantization_config", None)
        if settings:
            raise ModelUnavailable(
                f"The model {source} is quantised ({_method(settings)}, by quantization_config in"
                " its config.json) and only unquantised weights are trained here; load it with"
                " transformers in bfloat16 (dequantize=True where the method has it), save it with"
                " save_pretrained, and register that folder."
            )


def _method(settings: Any) -> str:
    values = settings if isinstance(settings, Mapping) else vars(settings)
    method = values.get("quant_method") or values.get("quant_type") or "no quant_method is given"
    return str(getattr(method, "value", method))
