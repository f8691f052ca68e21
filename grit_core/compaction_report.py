"""What is told of a compaction: the event, what result and manifest repeat of it, and warnings."""

from collections.abc import Iterator
from typing import Any, Final

from grit_core.compaction import Compaction
from grit_core.events import Compacted, Warned, event_to_json

COSTLY: Final = 0.02
"""A relative rise of the evaluation loss above this is warned of."""

SHOWN_LAYERS: Final = 5


def compacted(
    compaction: Compaction,
    *,
    step: int,
    eval_loss_before: float | None,
    eval_loss_after: float | None,
) -> Compacted:
    """Put what was cut together with what it did to the evaluation loss."""
    return Compacted(
        step=step,
        ranks=compaction.ranks,
        parameters_before=compaction.parameters_before,
        parameters_after=compaction.parameters_after,
        predicted_kl=compaction.predicted_kl,
        max_kl=compaction.max_kl,
        eval_loss_before=eval_loss_before,
        eval_loss_after=eval_loss_after,
        measured_kl=compaction.measured_kl,
    )


def result_of(event: Compacted) -> dict[str, Any]:
    """The fields that a job's result and an adapter's manifest repeat: all but the step."""
    fields = event_to_json(event)
    return {name: value for name, value in fields.items() if name not in {"type", "step"}}


def warnings_of(compaction: Compaction, event: Compacted) -> Iterator[Warned]:
    """What a user should know of a compaction that is done."""
    if compaction.refused:
        more = len(compaction.refused) - SHOWN_LAYERS
        shown = ", ".join(compaction.refused[:SHOWN_LAYERS]) + (f", {more} more" * (more > 0))
        yield Warned(
            code="compaction_refused",
            message=f"{len(compaction.refused)} layers were kept whole, because the calibration"
            f" rows do not reach them or their factors are not sound: {shown}.",
        )
    if compaction.parameters_before and not compaction.moved:
        yield Warned(
            code="adapter_without_effect",
            message="Every layer's B (or A) is zero, so the adapter changes nothing; one direction"
            " was kept, because PEFT loads no adapter without any.",
        )
    before, after = event.eval_loss_before, event.eval_loss_after
    if before is not None and after is not None and not after <= before * (1 + COSTLY):
        yield Warned(
            code="compaction_cost",
            message=f"Compaction raised the evaluation loss from {before:.4f} to {after:.4f}, by"
            f" more than {COSTLY:.0%}; for a smaller cut lower the limit, which was"
            f" {event.max_kl:g} nats for a label token.",
        )
