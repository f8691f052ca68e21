"""Bytes made worse at random; a seed says how."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

_EDGES: Final = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, -1, 0, 1.5, 1e308, 2**63, 2**70, "", "x", "\x00", "../x", "a" * 300, [], {}),
    *([[]], {"": {}}, ["x", None], "data:,", "data:image/png;base64,AAAA", "F64", "I8", [0, 0]),
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return some bytes with one to eight faults."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        chance.choice(_FAULTS)(made, chance)
    return bytes(made)


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _edge(data: bytearray, chance: random.Random) -> None:
    """Overwrite a number, wherever it stands, with one at the edge of its type."""
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(max(1, len(data) - size))
    value = chance.choice(_EDGES) & (256**size - 1)
    data[at : at + size] = value.to_bytes(size, chance.choice(("little", "big")))


def _cut(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    del data[at : at + chance.choice((1, 2, 7, 64, 10**6))]


def _repeat(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = data[at : at + chance.choice((1, 8, 100))] * chance.choice((1, 2, 50))


def _noise(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    data[at : at + chance.choice((0, 4, 16))] = chance.randbytes(chance.choice((1, 4, 16)))


_FAULTS: Final[tuple[Callable[[bytearray, random.Random], None], ...]] = (
    *(_flip, _flip, _edge, _edge, _cut, _repeat, _noise),
)


def mutated_json(value: Any, chance: random.Random) -> Any:
    """Return a JSON value of which some parts are others, missing, or too many."""
    if chance.random() < 0.08:
        return chance.choice(_VALUES)
    if isinstance(value, dict):
        made = {
            chance.choice(("", "x", "type", key)) if chance.random() < 0.03 else key: mutated_json(
                each, chance
            )
            for key, each in value.items()
            if chance.random() > 0.03
        }
        return made | ({"extra": chance.choice(_VALUES)} if chance.random() < 0.05 else {})
    if isinstance(value, list):
        made_list = [mutated_json(each, chance) for each in value]
        return made_list * chance.choice((2, 40)) if chance.random() < 0.03 else made_list
    if isinstance(value, int) and chance.random() < 0.1:
        return chance.choice((-1, 0, value + 1, 2**31, 2**63, 10**30, float(value)))
    return value


def mutated_safetensors(data: bytes, chance: random.Random) -> bytes:
    """Return a file whose header lies, but mostly still has the length that it says."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(mutated_json(header, chance)).encode()
    if chance.random() < 0.3:
        text = mutated(text, chance)
    rest = data[8 + length :]
    if chance.random() < 0.3:
        rest = mutated(rest, chance)
    return len(text).to_bytes(8, "little") + text + rest


def mutated_png(data: bytes, chance: random.Random) -> bytes:
    """Return a PNG whose chunks are wrong but have the checksums that belong to them."""
    made, at = bytearray(data[:8]), 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if chance.random() < 0.4:
            body = mutated(body, chance)
        if chance.random() < 0.05:
            kind = chance.choice((b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"PLTE", b"IDAT"))
        made += struct.pack(">I4s", len(body), kind) + body
        made += struct.pack(">I", zlib.crc32(kind + body))
        at += 12 + length
    return bytes(made)
