"""Decoded pixels are those that a viewer shows, whatever the encoding."""

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from grit_core.data.image_decoding import decode_image, read_size
from grit_core.errors import InvalidDataset
from tests.image_encodings import (
    STORED_AS,
    cmyk_jpeg,
    lossless_encodings,
    lossy_encodings,
    orientation_exif,
    raw_png,
    saved,
    ycck_jpeg,
)

RAMP = (np.arange(40 * 24).reshape(24, 40) * 7 % 251).astype(np.uint8)
"""Every row differs, and so does its mirror image; level 253 is in no pixel."""
RAMP[3:9, 5:30] = 255
SMOOTH = np.add.outer(np.arange(24) * 3, np.arange(40) * 4).astype(np.uint8)
LOSSLESS = dict(lossless_encodings(RAMP))
LOSSY = dict(lossy_encodings(SMOOTH))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, index=0))


@pytest.mark.parametrize("data", LOSSLESS.values(), ids=LOSSLESS)
def test_a_lossless_encoding_gives_the_pixels_that_a_viewer_shows(data: bytes) -> None:
    assert np.array_equal(pixels(data), RAMP[..., None].repeat(3, axis=-1))


@pytest.mark.parametrize("data", LOSSY.values(), ids=LOSSY)
def test_a_lossy_encoding_stays_close_to_what_a_viewer_shows(data: bytes) -> None:
    found = pixels(data).astype(int)
    assert found.shape == (24, 40, 3)
    assert abs(found - SMOOTH[..., None]).max() <= 24
    assert abs(found - SMOOTH[..., None]).mean() < 5


@pytest.mark.parametrize("data", (LOSSLESS | LOSSY).values(), ids=LOSSLESS | LOSSY)
def test_the_size_is_known_before_the_pixels_are(data: bytes) -> None:
    assert read_size(data, index=0) == (40, 24)


@pytest.mark.parametrize("value", STORED_AS)
def test_a_processor_that_applies_the_orientation_itself_finds_none_left(value: int) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[value](colour)))
    exif = b"Exif\0\0" + orientation_exif(value)
    data = saved(stored, "WEBP", lossless=True, exif=exif)
    shown = decode_image(data, index=0)
    assert np.array_equal(np.asarray(shown), colour)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(shown)), colour)


def test_transparency_is_composited_as_transformers_does_it() -> None:
    """Over every level and every alpha, bit by bit."""
    level, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    samples = np.dstack([level, 255 - level, level // 2, alpha])
    expected = convert_to_rgb(Image.fromarray(samples), return_numpy=True)
    found = decode_image(raw_png(samples, colour=6), index=0)
    assert np.array_equal(np.asarray(found), expected)
    assert np.array_equal(convert_to_rgb(found, return_numpy=True), expected)


def test_what_lies_under_full_transparency_is_not_seen() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (7, 8, 4), dtype=np.uint8)
    noise[..., 3] = 0
    assert (pixels(raw_png(noise, colour=6)) == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_keeps_its_transparent_level(bits: int) -> None:
    most = (1 << bits) - 1
    levels = np.arange(most + 1, dtype=np.uint8)[None]
    shown = levels[0].astype(int) * 255 // most
    assert pixels(raw_png(levels, colour=0, bits=bits))[0, :, 0].tolist() == shown.tolist()
    key = (b"tRNS", (0).to_bytes(2, "big"))
    clear = pixels(raw_png(levels, colour=0, bits=bits, before=(key,)))[0, :, 0]
    assert clear.tolist() == [255, *shown[1:]]


def test_16_bit_grey_is_rounded_over_its_whole_range() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257).astype(np.uint8)
    assert np.array_equal(pixels(raw_png(levels, colour=0, bits=16))[..., 0], expected)


def test_a_colour_key_of_a_16_bit_picture_is_transparent() -> None:
    levels = np.array([[[65535, 0, 4660], [65535, 0, 0]]], dtype=np.uint16)
    key = (b"tRNS", b"\xff\xff\0\0\x12\x34")
    data = raw_png(levels, colour=2, bits=16, before=(key,))
    assert pixels(data).tolist() == [[[255, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize("encode", [cmyk_jpeg, ycck_jpeg])
def test_paper_is_white_and_black_ink_is_black(encode: Callable[[np.ndarray], bytes]) -> None:
    found = pixels(encode(np.repeat(np.array([[255, 0]], np.uint8), 16, axis=1).repeat(16, axis=0)))
    assert found[8, 4].min() > 250
    assert found[8, 28].max() < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused(kind: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    with pytest.raises(InvalidDataset, match="image 3 cannot be decoded"):
        decode_image(data[: len(data) // 2], index=3)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_a_format_that_intake_refuses_is_refused_by_the_decoder_too(kind: str) -> None:
    data = saved(Image.new("RGB", (16, 16)), kind)
    with pytest.raises(InvalidDataset, match="not a PNG, JPEG or WebP"):
        decode_image(data, index=0)


BROKEN_EXIF = {
    "nothing": b"",
    "no TIFF": b"hello",
    "cut off": orientation_exif(6)[:12],
    "an offset beyond the end": b"MM\0*\xff\xff\xff\xff",
    "a directory too long": b"MM\0*\0\0\0\x08\xff\xff",
    "an orientation that is none": orientation_exif(99),
    "an orientation in words": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0x\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_metadata_leaves_a_picture_as_it_is_stored(exif: bytes) -> None:
    picture = Image.fromarray(RAMP).convert("RGB")
    for data in (
        raw_png(RAMP, colour=0, before=((b"eXIf", exif),)),
        raw_png(RAMP, colour=0, behind=((b"eXIf", exif),)),
        saved(picture, "WEBP", lossless=True, exif=b"Exif\0\0" + exif),
    ):
        assert np.array_equal(pixels(data)[..., 0], RAMP)
        assert read_size(data, index=0) == (40, 24)


def test_the_pictures_that_were_damaged_once_are_shown_as_they_look() -> None:
    """Made as a camera, a scanner and a drawing program make them."""
    turned = np.zeros((30, 20, 3), np.uint8)
    turned[:10] = 255  # a white band at the top of an upright picture
    photo = saved(
        Image.fromarray(np.ascontiguousarray(STORED_AS[6](turned))),
        "JPEG",
        exif=b"Exif\0\0" + orientation_exif(6),
    )
    assert pixels(photo)[5].min() > 240
    assert pixels(photo)[25].max() < 15
    scan = raw_png(np.full((4, 4), 32768, np.uint16), colour=0, bits=16)
    assert (pixels(scan) == 128).all()
    drawing = io.BytesIO(raw_png(np.zeros((4, 4, 4), np.uint8), colour=6))
    assert (pixels(drawing.getvalue()) == 255).all()


def test_a_minimal_picture_from_a_chat_tool_is_read() -> None:
    """One pixel, as written by a tool other than Pillow."""
    body = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5"
        "ErkJggg=="
    )
    assert decode_image(base64.b64decode(body), index=0).size == (1, 1)
