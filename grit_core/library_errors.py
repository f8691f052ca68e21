"""Errors that a library raises about a row or a model, apart from those of memory and devices.

Transformers and PEFT check their input while they run and raise built-in exceptions: "image
features and image tokens do not match" is a `ValueError` like any other. Whose exception it is
follows from where it was raised: if the traceback's innermost frame outside of torch and the
standard library is a library's, the input was refused; otherwise the error is the program's own.
The text of an exception decides only whether memory or a device failed, because torch has no other
sign of some of these.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from grit_core.errors import GritError

_OUT_OF_MEMORY_MARKS: Final = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
)
_DEVICE_MARKS: Final = ("cuda error", "cublas", "cudnn", "mps backend", "device-side assert")

_LIBRARIES: Final = frozenset({
    *("transformers", "peft", "tokenizers", "jinja2", "PIL"),
    *("accelerate", "huggingface_hub", "safetensors"),
})
_PLUMBING: Final = frozenset({"", "torch", "numpy"}) | sys.stdlib_module_names
"""What both sides call: the caller decides. Compiled chat templates have no module name."""

MAX_REASON_CHARACTERS: Final = 500


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device or the machine had no memory left."""
    torch = sys.modules.get("torch")  # some callers must be able to ask without loading it
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    return isinstance(error, RuntimeError | OSError) and _holds(error, _OUT_OF_MEMORY_MARKS)


def is_device_failure(error: BaseException) -> bool:
    """Tell whether a device failed, for whatever reason."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and _holds(error, _DEVICE_MARKS)


def is_library_error(error: Exception) -> bool:
    """Tell whether a library refused what it was given.

    Errors of ours, of memory, of a device and of the operating system are none.
    """
    if isinstance(error, GritError | OSError):
        return False
    if ran_out_of_memory(error) or is_device_failure(error):
        return False
    return _innermost_package(error) in _LIBRARIES


def reason(error: BaseException) -> str:
    """Return an exception as one line of bounded length, its class included."""
    text = str(error).strip()
    first = text.splitlines()[0].strip() if text else "no message"
    return f"{type(error).__name__}: {first}"[:MAX_REASON_CHARACTERS]


@contextmanager
def library_errors_as(translate: Callable[[Exception], GritError]) -> Iterator[None]:
    """Raise what `translate` makes of a library's error; let every other error pass."""
    try:
        yield
    except Exception as error:
        if not is_library_error(error):
            raise
        raise translate(error) from error


def _innermost_package(error: BaseException) -> str | None:
    """Return the package of the innermost frame that is no plumbing."""
    packages = []
    trace = error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        packages.append(name.partition(".")[0])
        trace = trace.tb_next
    return next((p for p in reversed(packages) if p not in _PLUMBING), None)


def _holds(error: BaseException, marks: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(mark in text for mark in marks)
