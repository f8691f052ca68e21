"""The wire's mirrors of `ModelGRITConfig`, `ModalityConfig` and `TrainingConfig`."""

from typing import TYPE_CHECKING

from api.schemas.mirror import Mirror, mirror
from grit_core.config.model_configs import MODALITY_CHECKS, MODEL_CHECKS
from grit_core.config.model_configs import ModalityConfig as CoreModalityConfig
from grit_core.config.model_configs import ModelGRITConfig as CoreModelGRITConfig
from grit_core.config.training import TRAINING_CHECKS
from grit_core.config.training import TrainingConfig as CoreTrainingConfig

_Modality = mirror(CoreModalityConfig, checks=MODALITY_CHECKS)
_Model = mirror(CoreModelGRITConfig, checks=MODEL_CHECKS, nested={CoreModalityConfig: _Modality})
_Training = mirror(CoreTrainingConfig, checks=TRAINING_CHECKS)


if TYPE_CHECKING:
    # Types made at run time; their fields are read through `model_dump` alone.
    ModalityConfig = Mirror
    ModelGRITConfig = Mirror
    TrainingConfig = Mirror
else:
    ModalityConfig = _Modality
    ModelGRITConfig = _Model
    TrainingConfig = _Training

MIRRORS: tuple[tuple[type, type[Mirror]], ...] = (
    (CoreModalityConfig, _Modality),
    (CoreModelGRITConfig, _Model),
    (CoreTrainingConfig, _Training),
)
