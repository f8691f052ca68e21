"""The wire's mirrors of `ModelGRITConfig`, `ModalityConfig` and `TrainingConfig`."""

from api.schemas.mirror import Mirror, mirror
from grit_core.config.model_configs import CONFIG_BOUNDS, MODALITY_BOUNDS
from grit_core.config.model_configs import ModalityConfig as CoreModalityConfig
from grit_core.config.model_configs import ModelGRITConfig as CoreModelGRITConfig
from grit_core.config.training import TRAINING_BOUNDS
from grit_core.config.training import TrainingConfig as CoreTrainingConfig


class ModalityConfig(mirror(CoreModalityConfig, bounds=MODALITY_BOUNDS)):  # type: ignore[misc] # a base made at run time
    __doc__ = CoreModalityConfig.__doc__


class ModelGRITConfig(
    mirror(  # type: ignore[misc] # a base made at run time
        CoreModelGRITConfig, bounds=CONFIG_BOUNDS, nested={CoreModalityConfig: ModalityConfig}
    )
):
    __doc__ = CoreModelGRITConfig.__doc__


class TrainingConfig(mirror(CoreTrainingConfig, bounds=TRAINING_BOUNDS)):  # type: ignore[misc] # a base made at run time
    __doc__ = CoreTrainingConfig.__doc__


MIRRORS: tuple[tuple[type, type[Mirror]], ...] = (
    (CoreModalityConfig, ModalityConfig),
    (CoreModelGRITConfig, ModelGRITConfig),
    (CoreTrainingConfig, TrainingConfig),
)
