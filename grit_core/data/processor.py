"""How a processor is called with a text and its images; what differs between families."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from grit_core.errors import InvalidDataset

CONFIG_IMAGE_IDS: Final = "grit_image_ids"
"""Attribute of a loaded processor: the tokens that its model's config puts image features at."""


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
        inputs = self._processor(text=[text], images=shown, **options)
        # Llama 4's processor makes bfloat16, whatever the model is.
        return {
            name: values.float() if values.is_floating_point() else values
            for name, values in inputs.items()
        }

    def mark_answers(
        self,
        features: dict[str, Tensor],
        answers: Tensor,  # noqa: ARG002 - for families whose models must know
    ) -> dict[str, Tensor]:
        """Return a row's features with its answers marked, where the model must know them.

        Args:
            features: Of the row.
            answers: Booleans `(tokens,)`, true where the assistant writes.
        """
        return features


class PaliGemmaInputs(ProcessorInputs):
    """Calls the parts of a PaliGemma processor.

    As a whole it writes the prompt itself, with BOS after the images and a line feed at the end,
    and would add both to a text that has them. Everything before the answer attends in both
    directions, and the answer to what came before; `token_type_ids` tell the two apart.
    """

    def __call__(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the model's arguments for a text of `paligemma.TEMPLATE`, as a batch of one.

        Raises:
            InvalidDataset: There is no image.
        """
        if not images:
            raise InvalidDataset("PaliGemma needs at least one image in a chat, and this has none")
        processor, placeholder = self._processor, self._processor.image_token
        expanded = text.replace(placeholder, placeholder * processor.image_seq_length)
        inputs = dict(self._tokenizer(expanded, add_special_tokens=False, return_tensors="pt"))
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs | dict(processor.image_processor(list(images), return_tensors="pt"))

    def mark_answers(self, features: dict[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        """Return the features with token types 1 from the answer's first token on."""
        return {**features, "token_type_ids": (answers.cumsum(0) > 0)[None].long()}


def choose_inputs(processor: Any) -> ProcessorInputs:
    """Return how a processor is called."""
    if type(processor).__name__ == "PaliGemmaProcessor":
        return PaliGemmaInputs(processor)
    return ProcessorInputs(processor)


def find_image_token_ids(processor: Any) -> Tensor:
    """Return the ids at which a model puts image features, `(ids,)`, sorted.

    The model's config knows them; the processor's placeholder is another token in some families
    (Llama 4, Ovis2), or none of the vocabulary (Aya Vision).

    Args:
        processor: As `load_processor` returns it, or a tokenizer.
    """
    found = set(getattr(processor, CONFIG_IMAGE_IDS, ()))
    placeholder = getattr(processor, "image_token", None)
    if not found and isinstance(placeholder, str):
        found = {processor.tokenizer.convert_tokens_to_ids(placeholder)}
    return torch.tensor(sorted(found), dtype=torch.long)


def follows_tokens(values: Tensor, num_tokens: int) -> bool:
    """Tell whether a feature of a row has a value for each token, as `(1, tokens, ...)`."""
    return values.ndim > 1 and values.shape[:2] == (1, num_tokens)
