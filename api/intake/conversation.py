"""The conversation of an inference request in its canonical form, with every image judged.

Canonical is the shape of dataset rows: list content, images as data URLs of what they are by their
first bytes. Whatever is wrong is collected, so that one answer names all of it.
"""

from typing import Any, Final

from api.errors import InvalidRequest, Item
from api.intake.images import Fault, fault_of, measure
from api.intake.remote_images import ImageNotFetched, RemoteImages
from api.intake.tools import find_message_faults, write_tool_fields
from api.schemas.infer import MAX_IMAGES, InferRequest
from grit_core.images import MAX_IMAGE_BYTES, data_url, decode_data_url, is_data_url

MAX_REQUEST_PIXELS: Final = 50_000_000
"""Of all images together."""


def names_urls(body: InferRequest) -> bool:
    """Tell whether a request has an image that would have to be fetched."""
    parts = [part for message in body.messages or [] for part in message.content]
    urls = [part.image_url.url for part in parts if part.image_url is not None]
    return any(not is_data_url(url) for url in [*body.images, *urls])


class Conversation:
    """Writes one request's conversation."""

    def __init__(self, body: InferRequest, *, remote: RemoteImages) -> None:
        """Begin.

        Args:
            body: The request.
            remote: Fetches what is named by URL, where that is allowed.
        """
        self._body, self._remote = body, remote
        self._faults: list[Item] = []
        self._pixels = 0
        self.places: tuple[str, ...] = ("/prompt",)
        """Where in the body each of the messages was written, as a JSON pointer."""

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation.

        Raises:
            InvalidRequest: With every image that is wrong, or does not fit its part.
        """
        body = self._body
        num_images = len(body.images) + sum(
            part.type == "image_url" for message in body.messages or [] for part in message.content
        )
        if num_images > MAX_IMAGES:  # before any of them is decoded or fetched
            detail = f"The conversation shows {num_images} images; at most {MAX_IMAGES}."
            item = Item(code="request_too_large", detail=detail, pointer="/messages")
            raise InvalidRequest([item])
        images = [self._image(url, f"/images/{index}") for index, url in enumerate(body.images)]
        if body.prompt is not None:
            shown = [*map(_image_part, images), _text_part(body.prompt)]
            messages = [{"role": "user", "content": shown}]
        else:
            messages = self._turns(images)
        if self._pixels > MAX_REQUEST_PIXELS:
            detail = (
                f"The images have {self._pixels} pixels together; at most {MAX_REQUEST_PIXELS}."
            )
            self._fault("request_too_large", detail, "/messages" if body.messages else "/images")
        if self._faults:
            raise InvalidRequest(self._faults)
        return messages

    def _turns(self, waiting: list[str]) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        num_system = 0
        for turn, message in enumerate(self._body.messages or []):
            parts: list[dict[str, Any]] = []
            for index, part in enumerate(message.content):
                pointer = f"/messages/{turn}/content/{index}"
                if part.type == "text":
                    parts.append(_text_part(part.text or ""))
                elif part.type == "image_url" and part.image_url is not None:
                    parts.append(_image_part(self._image(part.image_url.url, pointer)))
                elif waiting:
                    parts.append(_image_part(waiting.pop(0)))
                else:
                    detail = "There are more `image` parts than `images`."
                    self._fault("image_count_mismatch", detail, pointer)
            if message.role == "system" and num_system < turn:
                detail = (
                    "A system message comes first: chat templates have one place for it. Move it"
                    " to the beginning, or send it as the user's."
                )
                self._fault("value_invalid", detail, f"/messages/{turn}/role")
            num_system += message.role == "system"
            messages.append({
                "role": message.role,
                "content": parts or [_text_part("")],
                **write_tool_fields(message),
            })
        if waiting:
            detail = f"{len(waiting)} of the `images` have no `image` part in `messages`."
            self._fault("image_count_mismatch", detail, "/images")
        self._faults += find_message_faults(self._body.messages or [])
        if messages[-1]["role"] not in {"user", "tool"}:
            where = f"/messages/{len(messages) - 1}/role"
            detail = "The last message is the user's, or the result of a tool."
            self._fault("value_invalid", detail, where)
        self.places = tuple(
            f"/messages/{turn}" for turn in range(max(0, num_system - 1), len(messages))
        )
        return [*_joined(messages[:num_system]), *messages[num_system:]]

    def _image(self, url: str, pointer: str) -> str:
        """Return an image's canonical data URL, or note what is wrong with it."""
        data = self._bytes_of(url, pointer)
        if data is None:
            return ""
        found = self._fault_of(data)
        if found is not None:
            self._fault(*found, pointer)
            return ""
        return data_url(data)

    def _fault_of(self, data: bytes) -> Fault | None:
        """Judge an image, and decode it as long as all images together are within their bound."""
        if len(data) > MAX_IMAGE_BYTES:
            detail = f"The image has {len(data)} bytes; at most {MAX_IMAGE_BYTES}."
            return "image_too_large", detail
        pixels, found = measure(data)
        self._pixels += pixels
        if found is None and self._pixels <= MAX_REQUEST_PIXELS:
            found = fault_of(data)
        return found

    def _bytes_of(self, url: str, pointer: str) -> bytes | None:
        try:
            if is_data_url(url):
                return decode_data_url(url)
            if self._remote.allowed:
                return self._remote.fetch(url)
        except ImageNotFetched as error:
            self._fault("image_url_not_allowed", str(error), pointer)
            return None
        except ValueError as error:
            self._fault("image_corrupt", str(error), pointer)
            return None
        detail = "Images come as data URLs (data:image/png;base64,...); nothing is fetched."
        self._fault("image_url_not_allowed", detail, pointer)
        return None

    def _fault(self, code: str, detail: str, pointer: str) -> None:
        self._faults.append(Item(code=code, detail=detail, pointer=pointer))


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return several system messages as one: a chat template has one place for them."""
    if len(messages) < 2:
        return messages
    parts: list[dict[str, Any]] = []
    for message in messages:
        written = [part for part in message["content"] if part.get("text") != ""]
        parts += [_text_part("\n\n")] if parts and written else []
        parts += written
    if all(part["type"] == "text" for part in parts):
        parts = [_text_part("".join(part["text"] for part in parts))]
    return [{"role": "system", "content": parts}]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
