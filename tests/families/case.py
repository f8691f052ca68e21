"""One family's tiny model folder, and what is to be expected of it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A model type, how to build its folder, and what holds for it."""

    model_type: str
    """As in `config.json`."""
    reads_images: bool
    build: Callable[[Path], None]
    """Writes config, weights, tokenizer, processor and template into an existing, empty folder."""
    end: str | None = None
    """What the template writes after an assistant's words, white space at its ends left out.
    `None`: the tokenizer's EOS."""
    ends_every_turn: bool = True
    """The template writes `end` after every answer, and not only where a prompt would follow."""
    max_images: int | None = None
    """Most images of one chat; `None`: any number."""
    needs_images: bool = False
    """Rows without an image are refused."""
    takes_system: bool = True
    """The template has a place for a system message."""
    one_turn: bool = False
    """A chat is one question and one answer."""
    write_prompt: Callable[[str, int], str] | None = None
    """Where the folder has no chat template: what the family's documentation gives to the
    processor for a question about so many images."""
    traits: frozenset[str] = frozenset()
    """What is unusual about it: "moe", "sliding_window", "hybrid", "ssm", ..."""
    refused: str | None = None
    """Regular expression of the refusal at registration, for families that are refused."""
    preset: str | None = None
    """The preset that plans it; `None`: the defaults of its family."""
    package: str = ""
    """Without this package it is refused, in words that name it; with it everything is checked."""
    needs: str = ""
    """For the table: what a user must install or give beside the folder, or why it is refused."""
    variant: str = ""
    """Tells cases of one model type apart."""

    @property
    def name(self) -> str:
        """Of its tests and its folder."""
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type

    @property
    def refusal(self) -> str | None:
        """The refusal to expect on this machine."""
        if self.package and find_spec(self.package) is None:
            return rf"(?i)\b{self.package}\b"
        return self.refused

    def image_counts(self) -> tuple[int, ...]:
        """Images of one, two and no images, as far as the family takes them."""
        if not self.reads_images:
            return (0,)
        most = 2 if self.max_images is None else min(2, self.max_images)
        return (*range(1, most + 1), *(() if self.needs_images else (0,)))
