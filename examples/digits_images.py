"""Real handwritten digits as pictures: the one place that reads, splits, turns and encodes them.

The images are scikit-learn's copy of the test part of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0): 1,797 grey images of
8 x 8 pixels with 17 levels. Here each pixel becomes a square of 4 x 4, so a picture has 32 x 32.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Picture = NDArray[np.uint8]

PIXEL_SIDE = 4
HELD_OUT = 297
SPLIT_SEED = 20_250


@dataclass(frozen=True)
class Digits:
    """Pictures `(n, 32, 32)` in 8-bit grey, light ink on black, with the digit that each shows."""

    pictures: Picture
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]


def load_split() -> tuple[Digits, Digits]:
    """The 1,500 images to train on and the 297 that no training ever sees, the same every time."""
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pictures = grey.repeat(PIXEL_SIDE, axis=1).repeat(PIXEL_SIDE, axis=2)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pictures))

    def part(indices: NDArray[np.int64]) -> Digits:
        return Digits(pictures[indices], bunch.target[indices], indices)

    return part(np.sort(order[HELD_OUT:])), part(np.sort(order[:HELD_OUT]))


def rotate_and_invert(picture: Picture) -> Picture:
    """A quarter turn clockwise, then dark ink on white: the task that the base model cannot do."""
    return np.ascontiguousarray(255 - np.rot90(picture, k=-1, axes=(-2, -1)))


def encode_png(picture: Picture) -> bytes:
    """A grey PNG whose bytes depend on the pixels alone.

    Image libraries differ in how they search for repetitions. Here the row filters are fixed and
    deflate may only use runs, which leaves it no choice: every zlib writes the same bytes.
    """
    height, width = picture.shape
    rows = []
    previous = np.zeros(width, dtype=np.uint8)
    for row in picture:
        if np.array_equal(row, previous):
            rows.append(b"\x02" + bytes(width))  # filter "up": the row above again
        else:
            rows.append(b"\x01" + np.diff(row, prepend=np.uint8(0)).tobytes())  # filter "sub"
        previous = row
    packer = zlib.compressobj(level=9, wbits=15, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = packer.compress(b"".join(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )
