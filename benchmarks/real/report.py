"""The table of `make real`, and what must hold of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

FIRST_STEP_TOLERANCE = 1e-3
"""Relative; before the first step all arms are the base model on the same rows."""
ADAMW_TOLERANCE = 0.03
"""Relative; the service's AdamW starts from another random A than the peer's."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training."""

    name: str
    losses: Sequence[float]
    """Of each step's rows."""
    held_out: float
    """On rows that nothing trained on, with the adapter in plain PEFT."""


def render_table(base: float, arms: Sequence[Arm], *, points: int = 4) -> str:
    """Write the losses as a Markdown table: mean training loss by quarter, then held-out rows."""
    spans = _spans(len(arms[0].losses), points)
    heads = [f"steps {start + 1}-{end}" for start, end in spans]
    lines = [
        f"| | first step | {' | '.join(heads)} | held-out rows |",
        "|---|" + "---|" * (len(spans) + 2),
        f"| base model |{' |' * (len(spans) + 1)} {base:.3f} |",
    ]
    for arm in arms:
        means = [sum(arm.losses[start:end]) / (end - start) for start, end in spans]
        cells = [f"{arm.losses[0]:.3f}", *(f"{mean:.3f}" for mean in means), f"{arm.held_out:.3f}"]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spans(length: int, points: int) -> list[tuple[int, int]]:
    edges = [length * index // points for index in range(points + 1)]
    return [(start, end) for start, end in pairwise(edges) if end > start]


def find_faults(base: float, arms: Mapping[str, Arm]) -> list[str]:
    """Return what does not hold: `peft` is the peer, `adamw` and `grit` are the service's."""
    peer = arms["peft"]
    faults = []
    for key in ("adamw", "grit"):
        arm = arms[key]
        if abs(arm.losses[0] / peer.losses[0] - 1) > FIRST_STEP_TOLERANCE:
            faults.append(
                f"{arm.name} begins at {arm.losses[0]:.4f}, plain PEFT at {peer.losses[0]:.4f}:"
                " they do not train on the same tokens"
            )
        if not arm.held_out < base:
            faults.append(f"{arm.name} has learned nothing: {arm.held_out:.3f} of {base:.3f}")
    ours = arms["adamw"]
    if abs(ours.held_out / peer.held_out - 1) > ADAMW_TOLERANCE:
        faults.append(
            f"{ours.name} ends at {ours.held_out:.3f} on held-out rows, plain PEFT at"
            f" {peer.held_out:.3f}"
        )
    return faults
