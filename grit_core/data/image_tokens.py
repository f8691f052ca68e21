"""How many tokens a row has with its images, by the sizes of the images.

What a processor puts in the place of an image depends on the image's size and on how many images
the row has, not on the pixels. Most processors of transformers can say the number for a size;
what they say is compared with rows that were encoded in full, because some leave out the tokens
around an image. For a processor that cannot, or whose numbers do not fit, the sizes that were
encoded once are known from then on.
"""

from collections.abc import Sequence
from typing import Any, Final

Size = tuple[int, int]
"""Width and height."""

Sizes = tuple[Size, ...]
"""Of all images of a row, in their order."""

SLACK_TOKENS: Final = 8
"""For each image: how far an estimate may be off, because the text around an image may be divided
into other tokens than without it."""

NUM_COMPARED: Final = 3
"""Rows of different image sizes that are encoded in full before the processor is believed, for
each number of images."""

MAX_KNOWN_SIZES: Final = 100_000


class ImageTokens:
    """Learns from rows that were encoded in full what images add to the tokens of a text."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor as `load_processor` returns it."""
        self._formula = getattr(processor, "_get_num_multimodal_tokens", None)
        self._surplus: dict[object, int] = {}
        self._compared: dict[object, set[Sizes]] = {}

    def bounds(self, num_plain: int, sizes: Sizes) -> tuple[int, int] | None:
        """Return the least and the most tokens that a row can have; `None` while that is unknown.

        Args:
            num_plain: Tokens of its text, each image being what the template writes for it.
            sizes: Of its images.
        """
        said, key = self._said(sizes)
        compared = self._compared.get(key, set())
        if key not in self._surplus or (len(compared) < NUM_COMPARED and sizes not in compared):
            return None
        slack = SLACK_TOKENS * len(sizes)
        expected = num_plain + said + self._surplus[key]
        return expected - slack, expected + slack

    def learn(self, num_plain: int, sizes: Sizes, *, num_tokens: int) -> None:
        """Take in a row that was encoded in full and has `num_tokens` tokens."""
        said, key = self._said(sizes)
        surplus = num_tokens - num_plain - said
        known = self._surplus.get(key, surplus)
        if abs(surplus - known) > SLACK_TOKENS * len(sizes):
            # The processor's own numbers differ from what it does.
            self._formula = None
            self._surplus.clear()
            self._compared.clear()
            said, key = self._said(sizes)
            known = num_tokens - num_plain - said
        if len(self._surplus) < MAX_KNOWN_SIZES:
            self._surplus[key] = known
            compared = self._compared.setdefault(key, set())
            if len(compared) < NUM_COMPARED:
                compared.add(sizes)

    def _said(self, sizes: Sizes) -> tuple[int, object]:
        """What the processor says of the images, and under which key the rest is known."""
        if self._formula is not None and sizes:
            try:
                found = self._formula(image_sizes=[[height, width] for width, height in sizes])
                return sum(_numbers(found["num_image_tokens"])), len(sizes)
            except Exception:  # noqa: BLE001 - not part of its interface: whatever it raises, do without
                self._formula = None
                self._surplus.clear()
                self._compared.clear()
        return 0, sizes


def _numbers(values: Sequence[Any]) -> list[int]:
    return [int(value) for value in values]
