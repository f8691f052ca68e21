"""Memory that runs out: the error says so, and the next request is answered as before."""

import json
import shutil
from typing import Final

from grit_core.errors import GritError, InvalidDataset
from grit_core.training import train
from tests.check_device.check import Bench, Fault, Figures, check, require
from tests.check_device.devices import memory_limit
from tests.check_device.serving import build_request, engine_on
from tests.check_device.training import job_on, method_config
from tests.tiny_models import tiny_causal_folder

LONG_TOKENS: Final = 12_000
"""A prompt whose tensors are above a megabyte each."""
POSITIONS: Final = 32_768


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


def _refusal(ask: object) -> str:
    """Return how a request was refused.

    Raises:
        Fault: It was answered, or for another reason or in words that do not help.
    """
    try:
        ask()  # type: ignore[operator]
    except InvalidDataset as error:
        raise Fault(f"It is called a fault of the chat: {error}") from error
    except GritError as error:
        require("memory" in str(error), f"The error does not speak of memory: {error}")
        return type(error).__name__
    except Exception as error:
        raise Fault(f"It is no error of the service's: {type(error).__name__}: {error}") from error
    raise Fault("A prompt above the bound was answered: the bound is not one.")


@check("a training step that does not fit into memory names the rows of the step")
def training_out_of_memory(bench: Bench) -> Figures:
    job = job_on(bench, "large", config=method_config(), batch_size=8, num_rows=80, max_steps=2)
    events = train(job)
    next(events)
    with memory_limit(bench.device) as limit:
        try:
            list(events)
        except Exception as error:  # noqa: BLE001 - which it is, is what is checked
            require("micro-batches of" in str(error), f"{type(error).__name__}: {error}")
            return {"bound in bytes": limit, "error": type(error).__name__}
    raise Fault("A step above the bound was taken: the bound is not one.")
