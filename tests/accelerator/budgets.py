"""How often this service's own code may wait for an accelerator, counted with `Waits.count`.

The counts are for `grit_core` only; transformers waits besides. They hold for any number of layers,
ranks and shapes: what a step needs goes in one copy for all of them, up to the size of
`grit_core.transfer.MAX_BUFFER_BYTES`.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Of one step."""

    waits: int
    """Numbers and tensors that the host waits for."""
    blocking_uploads: int
    """Copies to the device that the host waits for, where copies are asynchronous as on CUDA."""
    mps_uploads: int
    """The same where every copy blocks, as on MPS; the step's rows not counted."""


ORDINARY_STEP: Final = Budget(waits=1, blocking_uploads=0, mps_uploads=0)
"""Loss and gradient norm."""

OBSERVED_STEP: Final = Budget(waits=2, blocking_uploads=0, mps_uploads=2)
"""Also the sums of all layers; the bases go up, and which directions are active."""

REPROJECTED_STEP: Final = Budget(waits=2, blocking_uploads=0, mps_uploads=3)
"""Also the matrices and moments of the layers; they, bases and active directions go up."""

OBSERVED_AND_REPROJECTED_STEP: Final = Budget(waits=3, blocking_uploads=0, mps_uploads=5)

FLOAT16: Final = 2
"""Waits of a gradient scaler in each step: whether a gradient overflowed, and in an observed one
the scale."""

GRADIENT_START: Final = 2
"""Waits before the first step of a job that starts from the gradient."""

EVALUATION: Final = 1
"""Waits of an evaluation, whatever the number of its batches."""

CHECKPOINT: Final = 4
"""Waits of a checkpoint: the adapter and the optimizer's state, each once for a type, and the
loss scale."""

WAITS_OF_A_STEP: Final = 1
"""A decoding step of any rows; uploads are counted where every copy blocks, as on MPS."""
UPLOADS_OF_A_STEP: Final = 1
UPLOADS_OF_RULES: Final = 1
"""Of a step in which a row is held to a grammar, or the model has a repetition penalty."""
UPLOADS_OF_NEW_ROWS: Final = 2
"""Of the first step after rows have come or gone: their adapters, and how they are sampled."""
WAITS_OF_A_PROMPT: Final = 1
"""Ours; transformers looks once whether the prompt is padded."""
UPLOADS_OF_A_PROMPT: Final = 4
"""The two inputs of a text model, how the first token is sampled, and its mask."""
WAITS_OF_A_LONE_TOKEN: Final = 2
"""Ours, and transformers' own to see whether it is the last."""
