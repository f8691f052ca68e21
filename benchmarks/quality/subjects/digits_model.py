"""The digits VLM of `examples/`, its rows and the layers that both of its subjects adapt."""

import base64
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from examples.digits_images import Picture, encode_png
from grit_core.config import ModalityConfig, ModelGRITConfig
from grit_core.data.encoder import ChatEncoder, EncodedRow
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_record

EXAMPLES = Path(__file__).parents[3] / "examples"
MODEL = EXAMPLES / "digits-vlm"
RANK = 8


@cache
def encoder() -> ChatEncoder:
    """The model's own processor and chat template."""
    return ChatEncoder(load_processor(str(MODEL)))


def fresh_model() -> Callable[[], nn.Module]:
    """Return what gives a new copy of the pretrained model."""
    base = load_base_model(str(MODEL), dtype="float32")
    return lambda: deepcopy(base)


def configuration() -> ModelGRITConfig:
    """Rank 8 on queries and values of both towers and on the connector."""

    def modality(*patterns: str) -> ModalityConfig:
        return ModalityConfig(
            layer_patterns=list(patterns),
            rank=RANK,
            alpha=2 * RANK,
            dropout=0.0,
            enable_projection=False,
            fisher_approximation="kfac",
        )

    return ModelGRITConfig(
        model_type="idefics3",
        vision=modality(
            "model.vision_model.encoder.layers.*.self_attn.q_proj",
            "model.vision_model.encoder.layers.*.self_attn.v_proj",
        ),
        text=modality(
            "model.text_model.layers.*.self_attn.q_proj",
            "model.text_model.layers.*.self_attn.v_proj",
        ),
        cross_modal=modality("model.connector.modality_projection.proj"),
    )


def encoded(records: Sequence[dict[str, Any]]) -> list[EncodedRow]:
    """Encode chats as training does."""
    return [
        sequence
        for line, record in enumerate(records, start=1)
        for sequence in encoder().encode(parse_record(record, line=line, resolve_image=_no_file))
    ]


def chat(picture: Picture, question: str, answer: str) -> dict[str, Any]:
    """One row: a picture, a question and the answer to learn."""
    url = "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode("ascii")
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
    }


def _no_file(path: str) -> bytes:
    raise FileNotFoundError(path)
