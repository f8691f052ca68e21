"""What a user may configure: which layers adapt and how, how training runs, and on which device."""

from grit_core.config.devices import (
    DeviceChoice,
    DeviceStrategy,
    available_devices,
    choose_device,
    get_device_config,
)
from grit_core.config.model_configs import (
    GRITLoRAConfig,
    LayerSelectionStrategy,
    Modality,
    ModalityConfig,
    ModelGRITConfig,
    config_from_dict,
    config_to_dict,
    validate,
)
from grit_core.config.presets import (
    describe_preset,
    get_model_config,
    preset_names,
    resolve_config,
)
from grit_core.config.training import TrainingConfig

__all__ = [
    "DeviceChoice",
    "DeviceStrategy",
    "GRITLoRAConfig",
    "LayerSelectionStrategy",
    "Modality",
    "ModalityConfig",
    "ModelGRITConfig",
    "TrainingConfig",
    "available_devices",
    "choose_device",
    "config_from_dict",
    "config_to_dict",
    "describe_preset",
    "get_device_config",
    "get_model_config",
    "preset_names",
    "resolve_config",
    "validate",
]
