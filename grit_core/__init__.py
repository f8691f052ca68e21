"""GRIT for vision-language models: LoRA adapters trained with curvature in rank space.

The names promised to users are here; each is loaded when it is first asked for, so that importing
this package, or its torch-free half, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_core.config.devices import get_device_config
    from grit_core.config.model_configs import (
        GRITLoRAConfig,
        LayerSelectionStrategy,
        ModalityConfig,
        ModelGRITConfig,
    )
    from grit_core.config.presets import get_model_config
    from grit_core.models.vlm_adapter import VLMGRITAdapter

_HOMES = {
    "GRITLoRAConfig": "grit_core.config.model_configs",
    "LayerSelectionStrategy": "grit_core.config.model_configs",
    "ModalityConfig": "grit_core.config.model_configs",
    "ModelGRITConfig": "grit_core.config.model_configs",
    "VLMGRITAdapter": "grit_core.models.vlm_adapter",
    "get_device_config": "grit_core.config.devices",
    "get_model_config": "grit_core.config.presets",
}

__all__ = [
    "GRITLoRAConfig",
    "LayerSelectionStrategy",
    "ModalityConfig",
    "ModelGRITConfig",
    "VLMGRITAdapter",
    "get_device_config",
    "get_model_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
