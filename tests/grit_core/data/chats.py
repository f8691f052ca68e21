"""Rows in the API's format, put together by turns."""

from typing import Any

from grit_core.records import ChatRecord, no_images, parse_record
from tests.tiny_models import png_data_url


def record_of(*turns: tuple[str, Any]) -> ChatRecord:
    messages = [{"role": role, "content": content} for role, content in turns]
    return parse_record({"messages": messages}, line=1, resolve_image=no_images)


def image_part(index: int = 0) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_data_url(index)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
