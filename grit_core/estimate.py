"""What a run will cost: steps exactly, bytes about. Also what `auto` stands for."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from grit_core.config.devices import kind_of, training_precision
from grit_core.config.model_configs import Modality
from grit_core.config.training import TrainingConfig, steps_per_epoch, total_steps, validate
from grit_core.errors import Fault, InvalidConfig
from grit_core.inventory import ModelInventory
from grit_core.planned import AdaptationPlan

AUTO_BATCH_SIZE: dict[str, int] = {"cuda": 8, "mps": 4, "cpu": 4}
"""Rows in one forward pass, by kind of device."""

AUTO_INTERVALS_PER_RUN = 10
MIN_AUTO_INTERVAL_STEPS = 10
MAX_AUTO_INTERVAL_STEPS = 500

BYTES_OF: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

_BYTES_PER_UNIT: dict[str, int] = {"float32": 84, "bfloat16": 64, "float16": 64}
"""Bytes of activations that one block keeps for one position and one hidden unit, by precision,
attention scores left out: counted for blocks of transformers with gated MLPs and adapted attention,
whose norms compute in float32 and whose adapters read a float32 copy of their inputs. Without these
it would be 34 in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, equation 2)."""

_BYTES_PER_LOGIT = 12
"""In float32 whatever the precision: the logarithm of the softmax, the gradient of the loss in it,
and that in the logits."""


_CHECKPOINTED = ", of which all but the blocks' inputs are computed again in the backward pass"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost."""

    total_steps: int
    """Exactly what the trainer will do, unless it stops early or leaves rows out."""
    steps_per_epoch: int
    memory_bytes: int
    """The sum of the parts: an estimate, for rows of `tokens_per_row` tokens."""
    parts: Mapping[str, int]
    """Bytes by name: `base_weights`, `adapter`, `gradients`, `optimizer`, `factors`,
    `activations`, `logits`."""
    tokens_per_row: int
    basis: str
    """What the estimate rests on, in words."""


def resolve_training(
    training: TrainingConfig, *, num_rows: int, device: str, native_bfloat16: bool = True
) -> TrainingConfig:
    """Replace every `auto` by what it stands for.

    `batch_size`: 8 on CUDA, 4 elsewhere, and not more than there are rows. `precision`: bfloat16 on
    CUDA (float16 on cards that only emulate it), float32 elsewhere. The two intervals: a tenth of
    the run, from 10 to 500 steps.

    Args:
        training: As the user gave it.
        num_rows: Rows to train on, the evaluation split taken out.
        device: The chosen device.
        native_bfloat16: Whether it has bfloat16 units. Where that is not known, the machine of the
            device decides about `precision` in the end.

    Raises:
        InvalidConfig: A field is out of its bounds, or there is no row; every fault is in it.
    """
    faults = validate(training)
    if num_rows < 1:
        detail = "There is no row to train on; the dataset needs at least one beside its evaluation"
        faults.append(Fault(pointer="/dataset", code="no_rows", detail=f"{detail} rows."))
    if faults:
        raise InvalidConfig(faults)
    batch_size = training.batch_size
    if batch_size == "auto":
        batch_size = min(AUTO_BATCH_SIZE[kind_of(device)], num_rows)
    resolved = dataclasses.replace(training, batch_size=batch_size)
    interval = _auto_interval(total_steps(resolved, num_rows=num_rows))
    automatic = resolved.precision == "auto"
    checkpoint, evaluation = resolved.checkpoint_every_steps, resolved.eval_every_steps
    precision = training_precision(device, native_bfloat16=native_bfloat16)
    return dataclasses.replace(
        resolved,
        precision=precision if automatic else resolved.precision,
        checkpoint_every_steps=interval if checkpoint == "auto" else checkpoint,
        eval_every_steps=interval if evaluation == "auto" else evaluation,
    )


def estimate(
    plan: AdaptationPlan,
    inventory: ModelInventory,
    training: TrainingConfig,
    *,
    num_rows: int,
    tokens_per_row: int | None = None,
) -> Estimate:
    """Say how many steps a run has and about how much memory it takes.

    Args:
        plan: What adapts.
        inventory: The model's layers and sizes.
        training: Resolved.
        num_rows: Rows to train on, the evaluation split taken out.
        tokens_per_row: Of the longest rows; `None` takes `max_length`, the most there can be.
    """
    tokens = min(tokens_per_row or training.max_length, training.max_length)
    positions = tokens * int(training.batch_size)
    width = BYTES_OF.get(training.precision, 4)
    vocabulary = inventory.vocabulary_size or 0
    adapted = plan.trainable_parameters
    parts = {
        "base_weights": inventory.total_parameters * width,
        "adapter": adapted * 4,
        "gradients": adapted * 4,
        "optimizer": adapted * 8,
        "factors": _factor_bytes(plan, training),
        "activations": _activation_bytes(plan, inventory, training, positions=positions),
        "logits": positions * vocabulary * _BYTES_PER_LOGIT,
    }
    return Estimate(
        total_steps=total_steps(training, num_rows=num_rows),
        steps_per_epoch=steps_per_epoch(training, num_rows=num_rows),
        memory_bytes=sum(parts.values()),
        parts=parts,
        tokens_per_row=tokens,
        basis=f"{training.precision} base weights, float32 adapter, gradients and two moments;"
        f" activations of the blocks that gradients pass, for {training.batch_size} rows of"
        f" {tokens} tokens with one image each where the model sees"
        f"{_CHECKPOINTED if _checkpoints(training) else ''}; the libraries' own memory is not in"
        " it.",
    )


def checkpoint_bytes(plan: AdaptationPlan, training: TrainingConfig) -> int:
    """About how many bytes a checkpoint of a run takes: adapter, two moments, factors."""
    return plan.trainable_parameters * 12 + _factor_bytes(plan, training)


def _auto_interval(steps: int) -> int:
    share = math.ceil(steps / AUTO_INTERVALS_PER_RUN)
    return min(max(share, MIN_AUTO_INTERVAL_STEPS), MAX_AUTO_INTERVAL_STEPS)


def _factor_bytes(plan: AdaptationPlan, training: TrainingConfig) -> int:
    """Two factors and two eigenbases, float32, for each layer with the natural gradient on."""
    if training.optimizer != "grit":
        return 0
    return sum(16 * layer.rank**2 for layer in plan.layers if layer.natural_gradient)


def _activation_bytes(
    plan: AdaptationPlan, inventory: ModelInventory, training: TrainingConfig, *, positions: int
) -> int:
    """What the blocks from the first adapted one on keep for the backward pass."""
    width = BYTES_OF.get(training.precision, 4)
    whole = _BYTES_PER_UNIT.get(training.precision, 84)
    text_blocks = _blocks_with_gradient(plan, inventory.num_blocks, Modality.TEXT)
    if any(layer.modality != Modality.TEXT for layer in plan.layers):
        text_blocks = inventory.num_blocks or 0  # what comes before the text model needs them all
    vision_blocks = _blocks_with_gradient(plan, inventory.num_vision_blocks, Modality.VISION)
    patches = (inventory.patches_per_image or 0) * int(training.batch_size)
    units = [
        (positions * (inventory.hidden_size or 0), text_blocks),
        (patches * (inventory.vision_hidden_size or 0), vision_blocks),
    ]
    every_block = sum(size * blocks for size, blocks in units)
    if not _checkpoints(training):
        return whole * every_block
    # Beside the input of each block, which is kept, one block at a time has all its activations,
    # while it is done again.
    one_block = max(size * min(blocks, 1) for size, blocks in units)
    return width * every_block + whole * one_block


def _checkpoints(training: TrainingConfig) -> bool:
    return training.gradient_checkpointing != "off"


def _blocks_with_gradient(plan: AdaptationPlan, depth: int | None, modality: Modality) -> int:
    adapted = [layer.block or 0 for layer in plan.layers if layer.modality == modality]
    return max((depth or 0) - min(adapted), 0) if adapted else 0
