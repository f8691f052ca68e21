"""The process that probes one base model: `python -m worker.model_probe_process -- SOURCE`.

It writes one JSON object to the file descriptor it was given, `{"inventory": ...}` or
`{"failure": <text>}`, and dies with the worker that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import traceback
from typing import Any, Final

from grit_core.errors import ModelUnavailable
from grit_core.library_errors import ran_out_of_memory, reason
from worker.attempt import die_with_parent

MAX_FAILURE_CHARACTERS: Final = 4_000
NICENESS: Final = 5
"""Behind chats and training, and on a full machine still a third of a processor's share."""


def main(argv: list[str] | None = None) -> int:
    """Probe, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--result-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("source")
    options = parser.parse_args(argv)
    die_with_parent(options.parent_pid)
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_bytes, options.memory_bytes))
    answer = _probe(options.source, memory_bytes=options.memory_bytes)
    with os.fdopen(options.result_fd, "wb") as out:
        out.write(_storable(answer))
    return 0


def _storable(answer: dict[str, Any]) -> bytes:
    """Return JSON that every database takes: without NUL and without halves of surrogate pairs."""
    text = json.dumps(answer, ensure_ascii=False).replace("\\u0000", "\N{REPLACEMENT CHARACTER}")
    return text.encode("utf-8", "replace")


def _probe(source: str, *, memory_bytes: int) -> dict[str, Any]:
    from transformers.utils import logging

    from grit_core.models.probe import probe_model  # noqa: PLC0415 - as above

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return {"inventory": probe_model(source).to_json()}
    except ModelUnavailable as error:
        return {"failure": str(error)[:MAX_FAILURE_CHARACTERS]}
    except BaseException as error:  # noqa: BLE001 - a tokenizer's panic is no Exception
        traceback.print_exc()
        if ran_out_of_memory(error):
            bound = f"{memory_bytes / 1024**3:g} GiB"
            return {"failure": f"Probing the model {source} needed more memory than {bound}."}
        return {"failure": f"The model {source} cannot be probed: {reason(error)}"}


if __name__ == "__main__":
    sys.exit(main())
