"""Rows for a token chooser, without a model."""

from dataclasses import dataclass, field

from grit_core.serving.constraint import Constraint
from grit_core.serving.sampling import TokenSampler


@dataclass
class Row:
    """What a request asks for; its tokens are added by the test."""

    sampler: TokenSampler
    constraint: Constraint | None = None
    prompt_ids: list[int] = field(default_factory=lambda: [0])
    ids: list[int] = field(default_factory=list)


def sampler(**options):
    """Return a sampler of the whole distribution unless told otherwise."""
    return TokenSampler(**{"temperature": 1.0, "top_p": 1.0, "seed": 3, **options})
