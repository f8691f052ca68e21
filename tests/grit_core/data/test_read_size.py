"""Sizes read from headers are those of the decoded, turned image."""

import io
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from grit_core.data.image_decoding import read_size
from grit_core.errors import InvalidDataset


def encoded(kind: str, *, size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_the_size_is_that_of_the_image_as_a_person_sees_it(
    kind: str, orientation: int | None
) -> None:
    data = encoded(kind, **({} if orientation is None else {"exif": turned(orientation)}))
    with Image.open(io.BytesIO(data)) as image:
        seen = ImageOps.exif_transpose(image).size
    assert read_size(data, index=0) == seen
    assert (seen == (20, 30)) == (orientation in {5, 6, 7, 8})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_pixel_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(kind)

    def decode(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    monkeypatch.setattr(Image.Image, "load", decode)
    assert read_size(data, index=0) == (30, 20)


def test_bytes_that_are_no_image_are_named_by_their_place() -> None:
    with pytest.raises(InvalidDataset, match="image 3 cannot be decoded: not a PNG"):
        read_size(b"\x89PNG\r\n\x1a\nnothing", index=3)
