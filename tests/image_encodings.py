"""One picture in every encoding that people have: each shows a viewer the same."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Samples = NDArray[np.uint8]

STORED_AS = {
    1: lambda samples: samples,
    2: lambda samples: samples[:, ::-1],
    3: lambda samples: samples[::-1, ::-1],
    4: lambda samples: samples[::-1],
    5: lambda samples: samples.swapaxes(0, 1),
    6: lambda samples: np.rot90(samples, 1),
    7: lambda samples: np.rot90(samples, 2).swapaxes(0, 1),
    8: lambda samples: np.rot90(samples, -1),
}
"""How the rows of a picture are stored under each EXIF orientation."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples a pixel, by the colour type of PNG."""


def raw_png(
    samples: NDArray[np.integer],
    *,
    colour: int,
    bits: int = 8,
    before: tuple[tuple[bytes, bytes], ...] = (),
    behind: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """Write a PNG of any colour type and depth, with chunks before and behind its pixels."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, width * _CHANNELS[colour])
    if bits == 16:
        rows = flat.astype(">u2").view(np.uint8)
    elif bits == 8:
        rows = flat.astype(np.uint8)
    else:
        planes = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        rows = np.packbits(planes.reshape(height, -1), axis=-1)
    filtered = np.hstack([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)])
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(filtered.tobytes()))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, *behind, (b"IEND", b"")]
    )


def orientation_exif(value: int) -> bytes:
    """Write EXIF that holds an orientation and nothing else, without the prefix of JPEG."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes().removeprefix(b"Exif\0\0")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def lossless_encodings(grey: Samples) -> Iterator[tuple[str, bytes]]:
    """Yield every encoding of a grey picture `(height, width)` that keeps each sample."""
    colour = grey[..., None].repeat(3, axis=-1)
    black, ink = np.zeros_like(grey), 255 - grey  # black ink over white is the picture too
    wide = grey.astype(np.uint16) * 257
    wide_ink = 65535 - wide
    ramp = bytes(range(256)).hex()
    palette = bytes.fromhex("".join(ramp[2 * i : 2 * i + 2] * 3 for i in range(256)))
    yield "grey PNG", raw_png(grey, colour=0)
    yield "RGB PNG", raw_png(colour, colour=2)
    yield "RGBA PNG, opaque", raw_png(np.dstack([colour, black + 255]), colour=6)
    yield "RGBA PNG, black ink", raw_png(np.dstack([black, black, black, ink]), colour=6)
    yield "LA PNG, black ink", raw_png(np.dstack([black, ink]), colour=4)
    yield "16-bit grey PNG", raw_png(wide, colour=0, bits=16)
    yield "16-bit RGB PNG", raw_png(colour.astype(np.uint16) * 257, colour=2, bits=16)
    yield "16-bit LA PNG", raw_png(np.dstack([wide * 0, wide_ink]), colour=4, bits=16)
    yield (
        "16-bit RGBA PNG",
        raw_png(np.dstack([*[wide * 0] * 3, wide_ink]), colour=6, bits=16),
    )
    yield "palette PNG", raw_png(grey, colour=3, before=((b"PLTE", palette),))
    yield (
        "palette PNG, black ink by tRNS",
        raw_png(ink, colour=3, before=((b"PLTE", bytes(768)), (b"tRNS", bytes(range(256))))),
    )
    yield from _colour_keys(grey, palette)
    yield "PNG with gamma", raw_png(grey, colour=0, before=((b"gAMA", struct.pack(">I", 45455)),))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "PNG with profile", saved(Image.fromarray(colour), "PNG", icc_profile=profile)
    yield "lossless WebP", saved(Image.fromarray(colour), "WEBP", lossless=True)
    clear = Image.fromarray(np.dstack([black, black, black, ink]))
    yield "lossless WebP, black ink", saved(clear, "WEBP", lossless=True, exact=True)
    for value, store in STORED_AS.items():
        stored, exif = np.ascontiguousarray(store(colour)), orientation_exif(value)
        yield f"PNG, eXIf {value}", raw_png(stored, colour=2, before=((b"eXIf", exif),))
        yield f"PNG, eXIf {value} behind", raw_png(stored, colour=2, behind=((b"eXIf", exif),))
        yield (
            f"lossless WebP, EXIF {value}",
            saved(Image.fromarray(stored), "WEBP", lossless=True, exif=b"Exif\0\0" + exif),
        )


def _colour_keys(grey: Samples, palette: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the picture with its white pixels in a colour that is declared to be transparent."""
    white, free = grey == 255, next(level for level in range(255) if level not in grey)
    keyed = np.where(white, np.uint8(free), grey)
    colour = grey[..., None].repeat(3, axis=-1)
    magenta = np.where(white[..., None], np.array([255, 0, 255], np.uint8), colour)
    wide = keyed.astype(np.uint16) * 257
    alphas = bytes(0 if level == free else 255 for level in range(free + 1))

    def key(*levels: int) -> tuple[bytes, bytes]:
        return b"tRNS", struct.pack(f">{len(levels)}H", *levels)

    yield "grey PNG, colour key", raw_png(keyed, colour=0, before=(key(free),))
    yield "RGB PNG, colour key", raw_png(magenta, colour=2, before=(key(255, 0, 255),))
    yield "16-bit grey PNG, key", raw_png(wide, colour=0, bits=16, before=(key(free * 257),))
    yield (
        "16-bit RGB PNG, key",
        raw_png(magenta.astype(np.uint16) * 257, colour=2, bits=16, before=(key(65535, 0, 65535),)),
    )
    yield (
        "palette PNG, one transparent colour",
        raw_png(keyed, colour=3, before=((b"PLTE", palette), (b"tRNS", alphas))),
    )


def lossy_encodings(grey: Samples) -> Iterator[tuple[str, bytes]]:
    """Yield every encoding of a grey picture that changes its samples a little."""
    image = Image.fromarray(grey)
    colour = image.convert("RGB")
    yield "4-bit grey PNG", raw_png(((grey.astype(int) + 8) // 17), colour=0, bits=4)
    yield "grey JPEG", saved(image, "JPEG", quality=90)
    yield "RGB JPEG", saved(colour, "JPEG", quality=90)
    yield "progressive JPEG", saved(colour, "JPEG", quality=90, progressive=True)
    yield "CMYK JPEG", cmyk_jpeg(grey)
    yield "YCCK JPEG", ycck_jpeg(grey)
    yield (
        "JPEG of several pictures",
        saved(colour, "MPO", quality=90, save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    )
    yield "WebP", saved(colour, "WEBP", quality=90)
    clear = np.dstack([np.zeros_like(grey)] * 3 + [255 - grey])
    yield "WebP, black ink", saved(Image.fromarray(clear), "WEBP", quality=90)
    samples = np.asarray(colour)
    for value, store in STORED_AS.items():
        stored = Image.fromarray(np.ascontiguousarray(store(samples)))
        exif = b"Exif\0\0" + orientation_exif(value)
        yield f"JPEG, EXIF {value}", saved(stored, "JPEG", quality=90, exif=exif)


def cmyk_jpeg(grey: Samples) -> bytes:
    """Write a JPEG of four inks as printers want it, inverted as Adobe does, in black ink only."""
    inks = np.dstack([np.zeros_like(grey)] * 3 + [255 - grey])
    return saved(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=95)


def ycck_jpeg(grey: Samples) -> bytes:
    """Write a JPEG of four inks in the colour space of Photoshop's, in black ink only.

    Pillow writes no YCCK. So the samples are given as luma 0 and neutral chroma, which is no ink in
    Adobe's inverted reckoning, and the marker is set to say that this is what they are.
    """
    black = np.zeros_like(grey)
    samples = np.dstack([black + 255, black + 127, black + 127, 255 - grey])
    data = saved(Image.fromarray(samples, mode="CMYK"), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\x02" + data[transform + 1 :]


def data_url_spellings(data: bytes, media_type: str) -> Iterator[tuple[str, str]]:
    """Yield the `data:` URLs that tools write for an image."""
    body = base64.b64encode(data).decode("ascii")
    lines = "\r\n".join(body[at : at + 76] for at in range(0, len(body), 76))
    yield "as documented", f"data:{media_type};base64,{body}"
    yield "scheme in capitals", f"DATA:{media_type};base64,{body}"
    yield "all in capitals", f"Data:{media_type.upper()};BASE64,{body}"
    yield "image/jpg", f"data:image/jpg;base64,{body}"
    yield "image/pjpeg", f"data:image/pjpeg;base64,{body}"
    yield "image/x-png", f"data:image/x-png;base64,{body}"
    yield "another image's type", f"data:image/gif;base64,{body}"
    yield "octet-stream", f"data:application/octet-stream;base64,{body}"
    yield "no type", f"data:;base64,{body}"
    yield "a charset", f"data:{media_type};charset=utf-8;base64,{body}"
    yield "a name", f'data:{media_type};name="a, b.png";base64,{body}'
    yield "a space", f"data:{media_type}; base64, {body}"
    yield "leading space", f" \ndata:{media_type};base64,{body}"
    yield "line breaks", f"data:{media_type};base64,{lines}\n"
    yield "URL-safe alphabet", f"data:{media_type};base64,{body.translate(_URL_SAFE)}"
    yield "no padding", f"data:{media_type};base64,{body.rstrip('=')}"
    yield "percent-encoded", f"data:{media_type};base64,{quote(body, safe='')}"
    yield "percent-encoded lines", f"data:{media_type};base64,{quote(lines, safe='')}"


_URL_SAFE = str.maketrans("+/", "-_")
