from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grit_core.data.encoder import IGNORED, ChatEncoder
from grit_core.data.image_decoding import decode_image
from grit_core.errors import InvalidDataset
from grit_core.models.pretrained import load_processor
from grit_core.records import ChatRecord, parse_prompt, parse_record
from tests.families.chats import answer, image_part, user_turn
from tests.families.vlm_fixed import build_paligemma

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("paligemma")
    build_paligemma(folder)
    return load_processor(Path(folder))


def record(*messages: dict[str, Any]) -> ChatRecord:
    def no_file(name: str) -> bytes:
        raise LookupError(name)

    return parse_record({"messages": list(messages)}, line=1, resolve_image=no_file)


def images(chat: ChatRecord) -> list[Image.Image]:
    return [decode_image(data, index=index) for index, data in enumerate(chat.images)]


@pytest.mark.parametrize("pictures", [(0,), (0, 1)])
def test_a_row_is_what_the_processor_makes_of_prefix_and_suffix(
    processor: Any, pictures: tuple[int, ...]
) -> None:
    chat = record(user_turn("answer en What is it?", *pictures), answer("noise, grey"))
    [row] = ChatEncoder(processor).encode(chat)
    whole = processor(
        text=["<image>" * len(pictures) + "answer en What is it?"],
        images=[images(chat)],
        suffix=["noise, grey"],
        return_tensors="pt",
    )
    assert row.input_ids.tolist() == whole["input_ids"][0].tolist()
    assert row.labels.tolist() == whole["labels"][0].tolist()
    assert torch.equal(row.features["token_type_ids"], whole["token_type_ids"])
    assert torch.equal(row.features["pixel_values"], whole["pixel_values"])
    assert row.features.keys() == {"token_type_ids", "pixel_values"}


def test_a_prompt_is_what_the_processor_makes_of_a_question(processor: Any) -> None:
    messages = [user_turn("caption en", 3)]
    chat = parse_prompt(messages)
    inputs = ChatEncoder(processor).encode_prompt(chat.messages, images(chat))
    whole = processor(text=["<image>caption en"], images=[images(chat)], return_tensors="pt")
    del whole["labels"]
    assert inputs.keys() == whole.keys()
    for name, values in whole.items():
        assert torch.equal(inputs[name], values), name


def test_the_answer_alone_is_labelled_and_may_hold_places_in_the_image(processor: Any) -> None:
    chat = record(user_turn("detect cat", 1), answer("<loc0010><loc0020> cat"))
    [row] = ChatEncoder(processor).encode(chat)
    labels = row.labels[row.labels != IGNORED]
    assert processor.tokenizer.decode(labels) == "<loc0010><loc0020> cat<eos>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user_turn("Hello"), answer("Hi")], "at least one image"),
        (
            [{"role": "system", "content": "Be brief."}, user_turn("Hello", 0), answer("Hi")],
            "no place for a system message",
        ),
        (
            [user_turn("One?", 0), answer("1"), user_turn("Two?"), answer("2")],
            "one question and one answer, and the chat has 4 messages",
        ),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "Look:"}, image_part(0)]},
                answer("Hi"),
            ],
            "images before the text",
        ),
    ],
)
def test_a_chat_that_it_cannot_express_is_refused_with_the_reason(
    processor: Any, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(InvalidDataset, match=reason):
        ChatEncoder(processor).encode(record(*messages))
