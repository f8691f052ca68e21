"""Memory that runs out: the error says so, and the next request is answered as before."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from typing import Final

from grit_core.errors import InvalidDataset
from grit_core.events import TrainingStarted
from grit_core.training import train
from tests.check_device.check import Bench, Fault, Figures, check, require
from tests.check_device.devices import memory_limit
from tests.check_device.serving import build_request, engine_on
from tests.check_device.training import job_on, method_config
from tests.grit_core.serving.adapters import adapter_source
from tests.tiny_models import tiny_causal_folder

LONG_TOKENS: Final = 12_000
"""A prompt whose tensors are above a megabyte each."""
POSITIONS: Final = 32_768
ROWS: Final = 256
"""Of a step whose activations are above a megabyte each."""
MANY_SLOTS: Final = 1024
"""Adapters for which the tables of a layer have room: with a large rank 4 MiB each."""


def long_context_folder(bench: Bench) -> str:
    """Return the tiny text model with room for long prompts."""
    folder = bench.folder / "long"
    shutil.copytree(tiny_causal_folder(bench.shared), folder)
    for name, setting in {
        "config.json": "max_position_embeddings",
        "tokenizer_config.json": "model_max_length",
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {setting: POSITIONS}))
    return str(folder)


@check("a prompt that does not fit into memory says so, and the next request is answered as before")
def prompt_out_of_memory(bench: Bench) -> Figures:
    base = long_context_folder(bench)
    short, long = build_request("Why?"), build_request("why " * (LONG_TOKENS // 4))
    with engine_on(bench.device) as engine:
        expected = engine.generate(base, short).text
        with memory_limit(bench.device) as limit:
            said = _refusal(lambda: engine.generate(base, long))
            found = engine.generate(base, short).text
        after = engine.generate(base, short).text
    require(found == after == expected, f"{found!r} and {after!r} for {expected!r} afterwards.")
    return {"bound in bytes": limit, "error": said}


@check("an adapter that does not fit into memory says so, and the next one is not mixed with it")
def adapter_out_of_memory(bench: Bench) -> Figures:
    base = str(tiny_causal_folder(bench.shared))
    request = build_request("Why?")
    build = partial(adapter_source, base, bench.folder)
    few, other = (build(seed=seed, rank=1, target=["q_proj"]) for seed in (1, 2))
    large = build(seed=3, rank=32, target=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    with engine_on(bench.device) as engine:
        expected = [engine.generate(base, request, adapter=each).text for each in (other, few)]
    with engine_on(bench.device, max_adapters=MANY_SLOTS) as engine:
        engine.generate(base, request, adapter=few)
        with memory_limit(bench.device) as limit:
            said = _refusal(lambda: engine.generate(base, request, adapter=large))
            found = [engine.generate(base, request, adapter=each).text for each in (other, few)]
    require(found == expected, f"{found} for {expected} afterwards.")
    return {"bound in bytes": limit, "error": said}


def _refusal(ask: Callable[[], object]) -> str:
    """Return the type of a request's error.

    Raises:
        Fault: It was answered, or refused for another reason or in words that do not help.
    """
    try:
        ask()
    except InvalidDataset as error:
        raise Fault(f"It is called a fault of the chat: {error}") from error
    except Exception as error:
        if "is not enough for" not in str(error):
            raise Fault(f"The allocator's own error: {type(error).__name__}: {error}") from error
        return type(error).__name__
    raise Fault("A request above the bound was answered: the bound is not one.")


@check("a training step that does not fit into memory names the rows of the step")
def training_out_of_memory(bench: Bench) -> Figures:
    config = method_config()
    job = job_on(bench, "large", config=config, batch_size=ROWS, num_rows=ROWS, max_steps=2)
    events = train(job)
    while not isinstance(next(events), TrainingStarted):
        pass
    with memory_limit(bench.device) as limit:
        try:
            list(events)
        except Exception as error:  # noqa: BLE001 - which it is, is what is checked
            require("micro-batches of" in str(error), f"{type(error).__name__}: {error}")
            return {"bound in bytes": limit, "error": type(error).__name__}
    raise Fault("A step above the bound was taken: the bound is not one.")
