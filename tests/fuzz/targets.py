"""What strangers send, made worse, and the code that judges it: it takes or refuses."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save

from api.intake.adapter_files import AdapterOrder, judge_adapter
from api.intake.canonical import take_in
from api.intake.images import fault_of, measure
from api.intake.refusal import Refused
from grit_core.errors import AdapterInvalid
from grit_core.images import data_url
from grit_core.patterns import MAX_PATTERN_LENGTH, matching, pattern_fault
from tests.api.conftest import png, row, rows, tiny_inventory
from tests.api.world import LAYER
from tests.fuzz.mutations import mutated, mutated_json, mutated_png, mutated_safetensors

Make = Callable[[random.Random], Any]
Judge = Callable[[Any, Path], bool]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of thing that is sent."""

    make: Make
    judge: Judge
    """Tells whether it was taken; whatever it raises is a fault of ours."""


# --- datasets


def _take(data: bytes, folder: Path) -> bool:
    (folder / "upload").write_bytes(data)
    try:
        taken = take_in(folder / "upload", folder / "rows", scratch=folder)
    except Refused:
        return False
    return taken.num_rows > 0


_ROWS: Final = [
    row(),
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {
        "images": [data_url(png()), {"bytes": None, "path": "a.png"}],
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "t"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ],
    },
    {
        "image": {"bytes": None, "path": "a.png"},
        "id": 1,
        "tools": None,
        "messages": [
            {"role": "user", "content": "<image>x", "name": None},
            {"role": "assistant", "content": "y", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "z", "index": None}]},
            {"role": "assistant", "content": "y", "weight": 1},
        ],
    },
    {
        "images": [data_url(png())],
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}]},
            {"role": "assistant", "content": "y"},
        ],
    },
]


def _jsonl(chance: random.Random) -> bytes:
    lines = [json.dumps(mutated_json(each, chance)).encode() for each in _ROWS]
    if chance.random() < 0.4:
        lines = [mutated(each, chance) for each in lines]
    if chance.random() < 0.02:
        lines.append(chance.choice((b"[", b'{"a":', b'"', b"9")) * 100_000)
    return b"\n".join(lines)


_NAMES: Final = (
    *("rows.jsonl", "ROWS.JSONL", "a.png", "A.PNG", "b/a.png", "../a.png", "/etc/passwd", "a\\b"),
    *("C:x", "./a.png", "x.zip", "a.tar.gz", "", ".", "a/../a.png", "\u00e9.png", "a\n.png"),
    *("__MACOSX/a", "x" * 300, "two.jsonl", "a.png/"),
)


def _members(chance: random.Random) -> list[tuple[str, bytes]]:
    named = [json.dumps(row(image=name)).encode() for name in ("a.png", "b/a.png")]
    files = [("rows.jsonl", b"\n".join(named)), ("a.png", png()), ("b/a.png", png(5))]
    files += [
        (chance.choice(_NAMES), chance.choice((png(), b"", rows(1))))
        for _ in range(chance.choice((0, 0, 1, 3)))
    ]
    chance.shuffle(files)
    return files


def _zip(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in _members(chance):
            info = zipfile.ZipInfo(name or "x")
            info.compress_type = chance.choice((0, 8, 12, 14))
            if chance.random() < 0.05:
                info.external_attr = chance.randrange(2**32)
            if info.filename not in archive.namelist():  # the library warns of its own doing
                archive.writestr(info, data)
    return _worse(buffer.getvalue(), chance)


_KINDS: Final = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE),
    *(tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"Z"),
)


def _tar(chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    form = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in _members(chance):
            info = tarfile.TarInfo(name[:90] if form == tarfile.USTAR_FORMAT else name)
            info.size = len(data)
            if chance.random() < 0.05:
                info.type, info.linkname = chance.choice(_KINDS), chance.choice(_NAMES)[:90]
            archive.addfile(info, io.BytesIO(data))
    made = _worse(buffer.getvalue(), chance)
    pack = chance.choice((None, None, gzip.compress, bz2.compress, lzma.compress))
    return made if pack is None else _worse(pack(made), chance)


def _worse(data: bytes, chance: random.Random) -> bytes:
    return mutated(data, chance) if chance.random() < 0.7 else data


def _parquet_file() -> bytes:
    buffer = io.BytesIO()
    told = [{"messages": [{**each, "content": "x"} for each in row()["messages"]]}] * 3
    pq.write_table(pa.Table.from_pylist(told), buffer)
    return buffer.getvalue()


_PARQUET: Final = _parquet_file()


# --- images


def _image_files() -> list[bytes]:
    made = []
    for kind, options in (
        ("PNG", {}),
        ("PNG", {"pnginfo": None, "optimize": True}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00"}),
    ):
        picture = Image.new("RGB", (33, 21), (3, 90, 200))
        picture.putpixel((3, 4), (9, 9, 9))
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        made.append(buffer.getvalue())
    return made


_IMAGES: Final = _image_files()


def _image(chance: random.Random) -> bytes:
    data = chance.choice(_IMAGES)
    if data.startswith(b"\x89PNG") and chance.random() < 0.7:
        return mutated_png(data, chance)
    return mutated(data, chance)


def _look(data: bytes, _folder: Path) -> bool:
    measure(data)
    return fault_of(data) is None


# --- adapters


_WEIGHTS: Final = save({
    f"base_model.model.{LAYER}.lora_A.weight": np.ones((3, 128), np.float32),
    f"base_model.model.{LAYER}.lora_B.weight": np.ones((128, 3), np.float16),
})
_CONFIG: Final = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": [LAYER],
    "rank_pattern": {LAYER: 3},
    "alpha_pattern": {LAYER: 6},
    "use_rslora": True,
    "modules_to_save": None,
}
_INVENTORY: Final = tiny_inventory().to_json()


def _adapter(chance: random.Random) -> tuple[bytes, bytes]:
    weights = _WEIGHTS
    if chance.random() < 0.7:
        change = chance.choice((mutated, mutated_safetensors))
        weights = change(weights, chance)
    config = json.dumps(mutated_json(_CONFIG, chance)).encode()
    return weights, mutated(config, chance) if chance.random() < 0.2 else config


def _import(files: tuple[bytes, bytes], folder: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json")
    for number, data in enumerate(files):
        (folder / f"file-{number}").write_bytes(data)
    order = AdapterOrder(
        files=[(name, str(folder / f"file-{number}")) for number, name in enumerate(names)],
        own=str(folder / "own"),
        source="tests/tiny",
        inventory=_INVENTORY,
        max_rank=256,
        max_bytes=10**6,
    )
    try:
        judge_adapter(order, scratch=folder)
    except (Refused, AdapterInvalid):
        return False
    finally:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        shutil.rmtree(folder / "own", ignore_errors=True)
    return True


# --- patterns


def _patterns(chance: random.Random) -> tuple[list[object], list[str]]:
    letters = chance.choice(("a*", "a*.", "ab*.", "*", "a*.[]?\\(+)|^$", "\u00e9\x00* "))

    def text(size: int) -> str:
        return "".join(chance.choice(letters) for _ in range(size))

    patterns: list[object] = [text(chance.choice((0, 1, 5, 60, 256, 257))) for _ in range(64)]
    patterns.append(chance.choice((None, 3, "*a" * (MAX_PATTERN_LENGTH // 2), "*" * 200)))
    names = [text(chance.choice((1, 20, 500))).replace("*", "a") for _ in range(50)]
    return patterns, [*names, "a" * 2000 + "b"]


def _match(case: tuple[list[object], list[str]], _folder: Path) -> bool:
    patterns, names = case
    good = [each for each in patterns if pattern_fault(each, pointer="/x") is None]
    found = matching([each for each in good if isinstance(each, str)], names)
    return bool(found)


TARGETS: Final[dict[str, Target]] = {
    "patterns": Target(make=_patterns, judge=_match),
    "rows": Target(make=_jsonl, judge=_take),
    "zip": Target(make=_zip, judge=_take),
    "tar": Target(make=_tar, judge=_take),
    "parquet": Target(make=lambda chance: mutated(_PARQUET, chance), judge=_take),
    "images": Target(make=_image, judge=_look),
    "adapters": Target(make=_adapter, judge=_import),
}
