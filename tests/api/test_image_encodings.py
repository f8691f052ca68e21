"""However an image comes in, its bytes reach the one decoder unchanged."""

import ast
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from api.intake.conversation import Conversation, names_urls
from api.intake.images import fault_of
from api.intake.remote_images import RemoteImages
from api.openai.schemas.chat import ChatCompletionRequest
from api.schemas.infer import InferRequest
from api.services import Services
from grit_client.images import data_url as client_data_url
from grit_core.data.image_decoding import decode_image
from grit_core.images import data_url, decode_data_url
from grit_core.records import parse_prompt, read_records
from tests.api.conftest import MODEL, Team, row
from tests.image_encodings import data_url_spellings, lossless_encodings, lossy_encodings

ROOT = Path(__file__).parents[2]
RAMP = (np.arange(40 * 24).reshape(24, 40) * 7 % 251).astype(np.uint8)
RAMP[3:9, 5:30] = 255
LOSSLESS = dict(lossless_encodings(RAMP))
ENCODINGS = LOSSLESS | dict(lossy_encodings(RAMP))
SPELLINGS = dict(data_url_spellings(LOSSLESS["grey PNG"], "image/png"))


def asked(messages: Any) -> InferRequest:
    return InferRequest.model_validate({"model": MODEL, "messages": messages})


def shown(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return [{"role": "user", "content": parts}]


def stored(services: Services, dataset: dict[str, Any], folder: Path) -> list[bytes]:
    """Return the images of a dataset as training reads them."""
    path = folder / "stored.jsonl"
    path.write_bytes(services.objects.get_bytes(f"datasets/{dataset['sha256']}.jsonl"))
    return [record.images[0] for record in read_records(path)]


def test_every_encoding_passes_the_check_of_an_upload() -> None:
    assert {name: fault_of(data) for name, data in ENCODINGS.items()} == dict.fromkeys(ENCODINGS)


def test_images_of_a_parquet_file_are_trained_on_as_they_look(
    team: Team, services: Services, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text"}]},
    ]
    messages[0]["content"][0]["text"] = None  # type: ignore[index] - one column for all parts
    messages[1]["content"][0]["text"] = "A ramp."  # type: ignore[index] - as above
    table = pa.table({
        "messages": [messages] * len(LOSSLESS),
        "images": [[{"bytes": data, "path": "a.png"}] for data in LOSSLESS.values()],
    })
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    answer = team.upload(buffer.getvalue(), filename="rows.parquet")
    assert answer.status_code == 201, answer.text
    images = stored(services, answer.json(), tmp_path)
    assert len(images) == len(LOSSLESS)
    for name, image in zip(LOSSLESS, images, strict=True):
        pixels = np.asarray(decode_image(image, index=0))
        assert np.array_equal(pixels, RAMP[..., None].repeat(3, axis=-1)), name


def test_a_dataset_takes_every_spelling_of_a_data_url(
    team: Team, services: Services, tmp_path: Path
) -> None:
    lines = [json.dumps(row(image=url)).encode() + b"\n" for url in SPELLINGS.values()]
    answer = team.upload(b"".join(lines))
    assert answer.status_code == 201, answer.text
    assert answer.json()["num_rows"] == len(SPELLINGS)
    assert set(stored(services, answer.json(), tmp_path)) == {LOSSLESS["grey PNG"]}


@pytest.mark.parametrize("url", SPELLINGS.values(), ids=SPELLINGS)
def test_a_request_takes_every_spelling_of_a_data_url(url: str) -> None:
    for body in (
        asked(shown(url)),
        InferRequest.model_validate({"model": MODEL, "prompt": "?", "images": [url]}),
    ):
        assert not names_urls(body)
        messages = Conversation(body, remote=RemoteImages([], seconds=1)).messages()
        [part] = [each for each in messages[0]["content"] if each["type"] == "image_url"]
        assert part["image_url"]["url"] == data_url(LOSSLESS["grey PNG"])


@pytest.mark.parametrize("url", SPELLINGS.values(), ids=SPELLINGS)
def test_an_openai_request_takes_every_spelling_of_a_data_url(url: str) -> None:
    body = ChatCompletionRequest.model_validate({"model": MODEL, "messages": shown(url)})
    [part] = [each for each in body.messages[0].content or [] if each.type == "image_url"]
    assert part.image_url is not None
    assert decode_data_url(part.image_url.url) == LOSSLESS["grey PNG"]


@pytest.mark.parametrize("data", LOSSLESS.values(), ids=LOSSLESS)
def test_a_request_is_answered_from_the_pixels_that_are_trained_on(data: bytes) -> None:
    body = asked(shown(client_data_url(data)))
    messages = Conversation(body, remote=RemoteImages([], seconds=1)).messages()
    [image] = parse_prompt(messages).images  # what the worker makes of it
    assert image == data
    pixels = np.asarray(decode_image(image, index=0))
    assert np.array_equal(pixels, RAMP[..., None].repeat(3, axis=-1))


@pytest.mark.parametrize("control", ["\0", "\x07", "\x1b", "\x7f", "\x9f"])
def test_a_url_holds_no_other_control_characters(team: Team, control: str) -> None:
    url = f"data:image/png;base64,{control}AAAA"
    answer = team.post("/infer", json={"model": MODEL, "messages": shown(url)})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/messages/0/content/0/image_url/url"


def test_a_picture_of_another_format_is_refused_with_what_to_do(team: Team) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    url = data_url(buffer.getvalue())
    for answer in (
        team.post("/infer", json={"model": MODEL, "messages": shown(url)}),
        team.upload(json.dumps(row(image=url)).encode()),
    ):
        [fault] = answer.json()["errors"]
        assert fault["code"] == "image_format_not_allowed"
        assert "a GIF file by its first bytes; convert it to PNG" in fault["detail"]


def openers(tree: ast.AST) -> set[str]:
    """Return the calls of a module that could read an image's file."""
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return calls & {"Image.open", "PIL.Image.open", "load_image", "ImageFile.Parser"}


def test_one_module_reads_pixels() -> None:
    found = {
        str(path.relative_to(ROOT)): openers(ast.parse(path.read_text(encoding="utf-8")))
        for package in ("api", "grit_client", "grit_core", "store", "worker")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path for path, calls in found.items() if calls} == {
        "api/intake/images.py",  # the header only; its pixels are read by the decoder
        "grit_core/data/image_decoding.py",
    }
