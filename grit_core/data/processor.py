"""How a processor is called with a text and its images; what differs between families."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor


class ProcessorInputs:
    """Calls one model's processor (or tokenizer, for text alone) on a rendered chat."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor (or tokenizer) as `load_processor` returns it."""
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self.reads_images = self._tokenizer is not processor

    def __call__(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the model's arguments for a rendered chat, as a batch of one."""
        # The text begins with BOS where the tokenizer wants one: `grit_core.data.bos`.
        options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
        if not self.reads_images:
            return dict(self._tokenizer(text, **options))
        shown = [list(images)] if images else None
        return dict(self._processor(text=[text], images=shown, **options))
