"""Images judged by their headers first, and then by their pixels."""

import io
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import pytest
from PIL import Image

from api.intake.images import fault_of, measure
from tests.api.conftest import png


def encoded(
    kind: str, size: tuple[int, int] = (31, 17), mode: str = "RGB", **options: Any
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 3).save(buffer, format=kind, **options)
    return buffer.getvalue()


WEBP = {
    "lossy": encoded("WEBP"),
    "lossless": encoded("WEBP", lossless=True),
    "with alpha": encoded("WEBP", mode="RGBA"),
    "extended": encoded("WEBP", exif=b"Exif\x00\x00MM"),
}


@pytest.mark.parametrize("data", WEBP.values(), ids=WEBP)
def test_every_kind_of_webp_is_measured_and_decoded(data: bytes) -> None:
    assert measure(data) == (31 * 17, None)
    assert fault_of(data) is None


def huge_png(side: int) -> bytes:
    """A header that promises more than comes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    crc = struct.pack(">I", zlib.crc32(chunk))
    return png()[:8] + struct.pack(">I", len(header)) + chunk + crc + png()[33:]


def huge_webp(kind: bytes, rest: bytes) -> bytes:
    return (
        b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", 50) + rest + bytes(60)
    )


HUGE = {
    "png": huge_png(6000),
    "png that Pillow warns of": huge_png(11_000),
    "png that Pillow calls a bomb": huge_png(40_000),
    "extended webp": huge_webp(b"VP8X", bytes(4) + b"\xff\x3f\x00" * 2),
    "lossless webp": huge_webp(b"VP8L", b"\x2f" + b"\xff\xff\xff\x0f"),
    "lossy webp": huge_webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + b"\xff\x3f" * 2),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE)
def test_a_header_of_too_many_pixels_is_enough_to_refuse_an_image(data: bytes) -> None:
    tracemalloc.start()
    found = measure(data)[1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert found[0] == "image_too_large"
    assert fault_of(data) == found
    assert peak_bytes < 20_000_000


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encoded("PNG", (8193, 100)), "image_too_large"),
        (encoded("PNG", (402, 2)), "image_too_large"),
        (
            encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (31, 17), 9)]),
            "image_too_large",
        ),
        (encoded("TIFF"), "image_format_not_allowed"),
        (encoded("GIF", mode="L"), "image_format_not_allowed"),
        (WEBP["lossy"][:40], "image_corrupt"),
    ],
    ids=["long", "thin", "moving", "TIFF", "GIF", "cut off"],
)
def test_what_is_too_thin_long_or_moving_or_of_another_kind_is_refused(
    data: bytes, code: str
) -> None:
    found = measure(data)[1] or fault_of(data)
    assert found is not None
    assert found[0] == code


def test_a_photo_with_a_preview_or_a_depth_map_is_one_picture() -> None:
    preview = Image.new("RGB", (8, 8))
    data = encoded("MPO", save_all=True, append_images=[preview, preview])
    with Image.open(io.BytesIO(data)) as photo:
        assert photo.n_frames == 3
    assert measure(data) == (31 * 17, None)
    assert fault_of(data) is None


def test_the_header_alone_is_measured() -> None:
    cut = encoded("PNG", (500, 500))[:-30]
    assert measure(cut) == (250_000, None)
    assert (fault_of(cut) or ("", ""))[0] == "image_corrupt"


def test_the_filters_of_warnings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They belong to all threads: changed for a while in two at once, they would stay changed."""
    monkeypatch.delattr(warnings, "catch_warnings")
    assert fault_of(png()) is None
