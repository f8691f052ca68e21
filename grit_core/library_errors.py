"""What an exception says of memory, of a device, or of what a library was given.

Transformers and PEFT check their input while they run and raise built-in exceptions: "image
features and image tokens do not match" is a `ValueError` like any other. Whose exception it is
follows from where it was raised: if the traceback's innermost frame outside of torch and the
standard library is a library's, the input was refused; otherwise the error is the program's own.
The text of an exception decides only whether memory or a device failed, because torch has no other
sign of some of these.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from grit_core.errors import GritError

_HOST_MEMORY: Final = re.compile(
    r"can.?t allocate memory|cannot allocate memory|not enough memory|out of memory"
)
# NOT_INITIALIZED is what a library says whose own handle found no memory. A communicator of NCCL
# repeats the text of CUDA.
_DEVICE_MEMORY: Final = re.compile(
    r"\b(cuda|hip|mps|xpu)\b.*\bout of memory"
    r"|(cublas|cublaslt|cudnn|cusolver|cusparse|cufft|curand|cutensor|miopen|rocblas|hipblas)"
    r"[a-z_]*_(alloc(ation)?_failed|not_initialized|insufficient_resources|memory_error)"
    r"|cuda failure 2\b|hiperroroutofmemory"
    r"|invalid buffer size: [\d.]+ ?[kmgt]i?b"  # MPS, of one allocation beyond what Metal takes
    r"|kiogpucommandbuffercallbackerroroutofmemory",
    re.DOTALL,
)
# Not "device-side assert": the last line of every error of CUDA speaks of "device-side assertions".
_ASSERTION: Final = re.compile(r"device-side assert triggered|cudaerrorassert\b|cuda failure 710\b")
# After these the process goes on with its next call: they are of one launch, or of the build. What
# MPS says of itself, memory apart, is that it cannot do something.
_NOT_STICKY: Final = re.compile(
    r"invalid (configuration )?argument|invalid resource handle|invalid device function"
    r"|no kernel image is available|too many resources requested for launch"
    r"|operation not supported|mps backend|_(invalid_value|not_supported|arch_mismatch|bad_param)\b"
)
_DEVICE: Final = re.compile(
    r"\b(cuda|hip|cusolver|cusparse|cufft|curand|miopen)[\w ]*(error|failure)"
    r"|cublas|cudnn|rocblas|hipblas|mps backend|device-side assert triggered"
    r"|fallen off the bus|\bxid\b"
)
_OUT_OF_RANGE: Final = re.compile(r"out of (range|bounds)")

_LIBRARIES: Final = frozenset({
    *("transformers", "peft", "tokenizers", "jinja2", "PIL"),
    *("accelerate", "huggingface_hub", "safetensors"),
})
_PLUMBING: Final = frozenset({"", "torch", "numpy"}) | sys.stdlib_module_names
"""What both sides call: the caller decides. Compiled chat templates have no module name."""

MAX_REASON_CHARACTERS: Final = 500


class DeviceFault(StrEnum):
    """What became of a device, and so whose fault it is."""

    OUT_OF_MEMORY = "out_of_memory"
    """An allocation was refused. The device works, and so does the process."""
    ASSERTION = "assertion"
    """A kernel refused what it was given, such as an index out of range: the fault of the job or
    the request, and repeatable. On CUDA the process cannot use the device any more."""
    LOST = "lost"
    """The device, its driver or a kernel failed, and the process cannot use it any more."""


_STICKY: Final = frozenset({DeviceFault.ASSERTION, DeviceFault.LOST})


def find_device_fault(error: BaseException) -> DeviceFault | None:
    """Return what an exception says of a device, by itself or by one that it was made from.

    An error that was raised while a lost device was handled is of that device too: the process
    cannot use it, whatever was tried next.
    """
    causes = list(_causes(error))
    for each in causes:
        fault = _find_own_fault(each)
        if fault is not None:
            return fault
    for each in _causes(error, handled=True):
        fault = _find_own_fault(each)
        if fault in _STICKY:
            return fault
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device or the machine had no memory left."""
    return ran_out_of_device_memory(error) or any(
        isinstance(each, MemoryError)
        or (isinstance(each, RuntimeError | OSError) and _HOST_MEMORY.search(str(each).lower()))
        for each in _causes(error)
    )


def ran_out_of_device_memory(error: BaseException) -> bool:
    """Tell whether a device had no memory left."""
    return find_device_fault(error) is DeviceFault.OUT_OF_MEMORY


def is_device_failure(error: BaseException) -> bool:
    """Tell whether the process cannot use its device any more: every further call fails."""
    return find_device_fault(error) in _STICKY


def is_library_error(error: Exception) -> bool:
    """Tell whether a library refused what it was given.

    Errors of ours, of memory, of a device and of the operating system are none.
    """
    if isinstance(error, GritError | OSError):
        return False
    if ran_out_of_memory(error) or _is_of_device(error):
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


def _find_own_fault(error: BaseException) -> DeviceFault | None:
    """Return what one exception says of a device, whatever it was made from."""
    torch = sys.modules.get("torch")  # some callers must be able to ask without loading it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return DeviceFault.OUT_OF_MEMORY
    if not _is_of_device(error):
        return None
    text = str(error).lower()
    if _ASSERTION.search(text):
        return DeviceFault.ASSERTION
    if _DEVICE_MEMORY.search(text):
        return DeviceFault.OUT_OF_MEMORY
    if _is_accelerator_error(error) and _OUT_OF_RANGE.search(text):
        return DeviceFault.ASSERTION  # kernels of MPS say which index it was
    return None if _NOT_STICKY.search(text) else DeviceFault.LOST


def _is_of_device(error: BaseException) -> bool:
    if _is_accelerator_error(error):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and bool(
        _DEVICE.search(text) or _DEVICE_MEMORY.search(text)
    )


def _is_accelerator_error(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def _causes(error: BaseException, *, handled: bool = False) -> Iterator[BaseException]:
    """Yield an exception and those that it was made from, the outermost first.

    Args:
        error: The exception.
        handled: With those, too, that were being handled when the next one was raised.
    """
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        before = each.__context__ if handled else None
        each = before if each.__cause__ is None else each.__cause__
