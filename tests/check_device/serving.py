"""Answers on the device: the CPU's, in any batch; and one base's memory at a time."""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from grit_core.config.devices import available_devices, choose_device
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.records import parse_prompt
from tests.check_device.check import Bench, Figure, Figures, check, require
from tests.check_device.devices import allocated_bytes
from tests.grit_core.serving.adapters import adapter_source
from tests.tiny_models import png_data_url, tiny_vlm_folder

TOKENS: Final = 24
FIRST_CHARACTERS: Final = 8
"""Of an answer that must be the CPU's. Rounding may turn a tie at any later token."""

MODEL_CLASS: Final = "Idefics3ForConditionalGeneration"

Row = tuple[GenerationRequest, AdapterSource | None]


@contextmanager
def engine_on(device: str, **options: Any) -> Iterator[GenerationEngine]:
    """An engine without caches that could hide a prompt's computation."""
    caches = {"image_cache_bytes": 0, "prefix_cache_bytes": 0}
    engine = GenerationEngine(device=device, **(caches | options))
    try:
        yield engine
    finally:
        engine.close()


def build_request(text: str, *, image: int | None = None, **options: Any) -> GenerationRequest:
    """Return a request of a fixed number of tokens."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": png_data_url(image)}})
    chat = parse_prompt([{"role": "user", "content": content}])
    return GenerationRequest(chat=chat, **{"max_new_tokens": TOKENS, **options})


def build_rows(bench: Bench, base: str) -> list[Row]:
    """Return eight rows: with and without images, adapters and sampling."""
    first, second = (
        adapter_source(base, bench.folder, seed=seed, rank=rank) for seed, rank in ((1, 4), (2, 6))
    )
    sampled = {"temperature": 1.0, "top_p": 0.9}
    return [
        (build_request("Which digit is this?", image=1), None),
        (build_request("Say something of the sea."), None),
        (build_request("Which digit is this?", image=2), first),
        (build_request("A longer question about nothing in particular, isn't it?"), second),
        (build_request("Which digit?", image=3, seed=5, **sampled), second),
        (build_request("Say something of the sea.", seed=6, **sampled), first),
        (build_request("Why?", seed=7, temperature=1.5), None),
        (build_request("Which digit is this?", image=4, seed=8, **sampled), None),
    ]


def base_folder(bench: Bench, name: str = "", **generation: Any) -> str:
    """Return the tiny VLM's folder, or a copy with other settings of its generation."""
    folder = tiny_vlm_folder(bench.shared)
    if not generation:
        return str(folder)
    copy = bench.folder / name
    shutil.copytree(folder, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | generation))
    return str(copy)


def answer_each(engine: GenerationEngine, base: str, rows: Sequence[Row]) -> list[str]:
    """Answer rows one after the other."""
    return [engine.generate(base, request, adapter=adapter).text for request, adapter in rows]


def answer_together(engine: GenerationEngine, base: str, rows: Sequence[Row]) -> list[str]:
    """Answer rows at the same time."""
    with ThreadPoolExecutor(len(rows)) as pool:
        found = [pool.submit(engine.generate, base, row[0], adapter=row[1]) for row in rows]
        return [each.result().text for each in found]


def _differing(found: Sequence[str], expected: Sequence[str]) -> str:
    rows = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    return ", ".join(f"row {n}: {found[n]!r} for {expected[n]!r}" for n in rows)


@check("greedy answers in float32 begin as the CPU's", in_short=True)
def answers(bench: Bench) -> Figures:
    base = base_folder(bench)
    rows = [row for row in build_rows(bench, base) if row[0].temperature == 0]
    # By default CUDA rounds what goes into the images' convolution to 10 bits.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with engine_on("cpu") as engine:
        expected = answer_each(engine, base, rows)
    with engine_on(bench.device) as engine:
        found = answer_each(engine, base, rows)
    begun, wanted = ([text[:FIRST_CHARACTERS] for text in texts] for texts in (found, expected))
    require(begun == wanted, f"Not the CPU's: {_differing(begun, wanted)}.")
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    return {"rows": len(rows), "equal to their end": equal}


@check("answers in the precision chosen for inference, alone and with others")
def answers_in_half(bench: Bench) -> Figures:
    available = tuple({*available_devices(), bench.device})
    dtype = choose_device(bench.device, available).dtype
    base = base_folder(bench)
    rows = build_rows(bench, base)
    with engine_on(bench.device, dtype=dtype) as engine:
        alone, shared = answer_each(engine, base, rows), answer_together(engine, base, rows)
    require(all(alone) and all(shared), f"Empty answers: {alone}, {shared}.")
    same = sum(a == b for a, b in zip(alone, shared, strict=True))
    return {"precision": dtype, "rows": len(rows), "equal alone and shared": same}


@check("eight mixed rows answer in float32 what each answers alone", in_short=True)
def mixed_rows(bench: Bench) -> Figures:
    base = base_folder(bench)
    rows = build_rows(bench, base)
    with engine_on(bench.device) as engine:
        alone, shared = answer_each(engine, base, rows), answer_together(engine, base, rows)
    require(shared == alone, f"Shared steps give others: {_differing(shared, alone)}.")
    return {"rows": len(rows), "different answers": len(set(alone))}


@check("rows under a repetition penalty answer what each answers alone")
def penalized_rows(bench: Bench) -> Figures:
    base = base_folder(bench, "penalty", repetition_penalty=1.3)
    rows = build_rows(bench, base)
    with engine_on(bench.device) as engine:
        alone, shared = answer_each(engine, base, rows), answer_together(engine, base, rows)
        plain = answer_each(engine, base_folder(bench), rows)
    require(shared == alone, f"Shared steps give others: {_differing(shared, alone)}.")
    require(plain != alone, "The penalty changes no answer.")
    return {"rows": len(rows)}


@check("shared steps and transformers' own `generate` give the same greedy answers")
def lone_answers(bench: Bench) -> Figures:
    base = base_folder(bench)
    rows = [row for row in build_rows(bench, base) if row[0].temperature == 0]
    # A rule of the model's own sends it to `generate`; the token is in no answer anyway.
    vocabulary = json.loads((Path(base) / "tokenizer.json").read_text())["model"]["vocab"]
    alone_base = base_folder(bench, "lone", suppress_tokens=[vocabulary["<row_6_col_6>"]])
    with engine_on(bench.device) as engine:
        shared = answer_each(engine, base, rows)
        alone = answer_each(engine, alone_base, rows)
    require(alone == shared, f"`generate` gives others: {_differing(alone, shared)}.")
    return {"rows": len(rows)}


@check("with room for one base model, the next one takes its memory", in_short=True)
def one_base(bench: Bench) -> Figures:
    bases = [str(tiny_vlm_folder(bench.shared, seed=seed)) for seed in (0, 1)]
    first, second = (adapter_source(base, bench.folder, seed=3 + n) for n, base in enumerate(bases))
    rows = ((bases[0], first), (bases[1], second), (bases[0], first), (bases[1], second))
    models, used = [], []
    gc.collect()
    before = allocated_bytes(bench.device) or 0
    with engine_on(bench.device, max_bases=1) as engine:
        for base, adapter in rows:
            engine.generate(base, build_request("Which digit?", image=1), adapter=adapter)
            models.append(_count_models())
            used.append((allocated_bytes(bench.device) or 0) - before)
    figures: dict[str, Figure] = {"models held": ", ".join(map(str, models))}
    if allocated_bytes(bench.device) is not None:
        figures["bytes held"] = ", ".join(f"{each:,}" for each in used)
    require(
        max(models) <= 1 and max(used[1:]) <= 1.5 * max(1, used[0]),
        f"After each load the device holds {models} models and {used} bytes.",
    )
    return figures


def _count_models() -> int:
    """Count base models that are in memory, garbage included."""
    return sum(type(each).__name__ == MODEL_CLASS for each in gc.get_objects())
