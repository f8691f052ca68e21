"""A process that checks rows for another one: a large dataset is checked by several.

Started as a program of its own, so that it needs nothing of the module that runs, and ended by the
end of its standard input, so that it does not outlive the process that started it. One line of
JSON says what to check rows for, each further one names rows; each is answered by a line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from grit_core.data.row_checker import Finding, RowChecker, RowFate
from grit_core.data.rows import RowEncoder
from grit_core.row_file import RowPlace, RowReader

# An interrupt from the terminal is for the process that started it to answer.
_PROGRAM = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    " sys.path[:] = json.loads(sys.argv[1]);"
    " from grit_core.check_process import main; main()"
)


class CheckProcess:
    """The other end of such a process."""

    def __init__(self, *, model: str, row_encoder: RowEncoder, files: Sequence[RowReader]) -> None:
        """Start it.

        Args:
            model: Where the base model's processor lies.
            row_encoder: What the rows are checked for.
            files: Those that requests name by their position.
        """
        self._process = subprocess.Popen(  # noqa: S603 - our own module, argv list
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._order = {
            "model": model,
            "max_length": row_encoder.max_length,
            "on_long_rows": row_encoder.on_long_rows,
            "files": [[str(each.path), each.name] for each in files],
        }

    def check(self, file: int, places: Sequence[RowPlace]) -> list[Finding] | None:
        """Return what becomes of some rows of a file; `None` when the process has ended."""
        stdin, stdout = (cast("IO[bytes]", each) for each in self._streams())
        try:
            if self._order:
                _write(stdin, self._order)
                self._order = {}
            _write(stdin, {"file": file, "places": places})
            answer = stdout.readline()
        except (OSError, ValueError):  # its end of the pipe is gone, or ours is closed already
            return None
        if not answer.endswith(b"\n"):
            return None
        return [Finding(line, RowFate(fate), words) for line, fate, words in json.loads(answer)]

    def kill(self) -> None:
        """End it now; a `check` of another thread then returns `None`."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of a process that was ended."""
        for stream in self._streams():
            try:
                cast("IO[bytes]", stream).close()
            except OSError:  # a request that was never read
                continue

    def _streams(self) -> tuple[IO[bytes] | None, IO[bytes] | None]:
        return self._process.stdin, self._process.stdout


def main() -> None:
    """Answer requests until there are no more."""
    import torch

    from grit_core.data.encoder import ChatEncoder  # noqa: PLC0415 - as above
    from grit_core.models.pretrained import load_processor  # noqa: PLC0415 - as above

    torch.set_num_threads(1)  # there are as many processes as cores
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        order = json.loads(sys.stdin.buffer.readline())
        encoder = ChatEncoder(load_processor(order["model"]))
        checker = RowChecker(
            RowEncoder(encoder, max_length=order["max_length"], on_long_rows=order["on_long_rows"])
        )
        readers = [RowReader(Path(path), name=name) for path, name in order["files"]]
        for request in sys.stdin.buffer:
            _write(answers, _answer(checker, readers, json.loads(request)))


def _answer(
    checker: RowChecker, readers: Sequence[RowReader], request: dict[str, Any]
) -> list[tuple[int, str, str]]:
    reader = readers[request["file"]]
    found = (checker.finding(reader, RowPlace(*place)) for place in request["places"])
    return [(each.line, each.fate.value, each.words) for each in found if each is not None]


def _write(stream: IO[bytes], value: object) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()
