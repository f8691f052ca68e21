"""Images as bytes and as `data:` URLs."""

import base64

import pytest

from grit_core.images import data_url, decode_data_url, describe_format, is_data_url, media_type
from tests.image_encodings import data_url_spellings

IMAGES = [
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 3 + bytes([0xFB, 0xEF, 0xBE, 0xFF, 0]),
    b"\xff\xd8\xff" + bytes(range(255, -1, -1)) * 2,
]
"""Their base64 has both characters that the URL-safe alphabet replaces, and padding."""


@pytest.mark.parametrize("image", IMAGES, ids=["PNG", "JPEG"])
def test_every_spelling_of_a_data_url_gives_the_bytes(image: bytes) -> None:
    plain = base64.b64encode(image).decode()
    assert {"+", "/", "="} <= set(plain)
    spellings = dict(data_url_spellings(image, str(media_type(image))))
    assert len(set(spellings.values())) == len(spellings) > 15
    for name, url in spellings.items():
        assert is_data_url(url), name
        assert decode_data_url(url) == image, name


def test_the_first_bytes_decide_whatever_a_url_says() -> None:
    url = data_url(IMAGES[0]).replace("image/png", "image/jpeg")
    assert data_url(decode_data_url(url)) == data_url(IMAGES[0])


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,iVBOR?",
        "data:image/png;base64,iVBORw=iVBORw=",
        "data:image/png;base64,A",
        "data:image/png;base64,\u00e4\u00f6\u00fc\u00df",
        "data:image/png;base64,%E4%F6",
    ],
)
def test_broken_base64_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base64 of the data URL is broken"):
        decode_data_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,%89PNG",
        "data:image/png;base64",
        "data:",
        "image/png;base64,AAAA",
        "data:image/png;" + "x" * 2000 + ";base64,AAAA",
    ],
)
def test_a_url_that_is_no_base64_data_url_is_refused_with_the_form_to_use(url: str) -> None:
    with pytest.raises(ValueError, match="data:image/png;base64,"):
        decode_data_url(url)


@pytest.mark.parametrize(
    "text", ["https://a.example/data:image/png", "data/a.png", "", "dat", "metadata:x", "a.png"]
)
def test_what_is_no_data_url_is_known_as_such(text: str) -> None:
    assert not is_data_url(text)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"GIF89a", "a GIF"),
        (b"BM\x36\x00\x01\x00\x00\x00\x00\x00", "a BMP"),
        (b"II*\0", "a TIFF"),
        (b"MM\0*", "a TIFF"),
        (b"\0\0\0\x1cftypavif", "an AVIF"),
        (b"\0\0\0\x18ftypheic", "a HEIC"),
        (b"\0\0\0\x18ftypmif1", "a HEIC"),
        (b"\xff\x0a", "a JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        (b"%PDF-1.7", "a PDF"),
        (b'<?xml version="1.0"?><svg/>', "an SVG"),
        (b"  <svg xmlns=", "an SVG"),
    ],
)
def test_a_format_that_is_not_read_is_named_with_what_to_do(head: bytes, name: str) -> None:
    data = head + bytes(32)
    assert media_type(data) is None
    sentence = f"The image is {name} file by its first bytes; convert it to PNG, JPEG or WebP."
    assert describe_format(data) == sentence


@pytest.mark.parametrize("data", [b"", b"BMW is a maker of cars.", b"\0" * 40, b"hello"])
def test_bytes_of_no_known_format_are_called_no_image(data: bytes) -> None:
    expected = "The image is not a PNG, JPEG or WebP by its first bytes."
    assert describe_format(data) == expected


def test_a_plus_that_a_form_has_made_a_space_is_refused_and_not_left_out() -> None:
    """Without it the base64 may still be that of a JPEG, which shows another picture."""
    image = b"\xff\xd8\xff" + bytes(range(240, 256)) * 40 + b"\xfb\xef\xbe" * 60
    text = base64.b64encode(image).decode()
    assert "+" in text
    for lost in (text.replace("+", " "), text.replace("+", " ", 1)):
        with pytest.raises(ValueError, match="%2B"):
            decode_data_url(f"data:image/jpeg;base64,{lost}")


def test_lines_that_were_folded_with_spaces_are_read() -> None:
    image = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    text = base64.b64encode(image).decode()
    folded = " ".join(text[at : at + 76] for at in range(0, len(text), 76))
    assert decode_data_url(f"data:image/png;base64,{folded}") == image
