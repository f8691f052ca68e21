"""Whose error it is: a library's about its input, ours, or one of memory or a device."""

import types
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grit_core.errors import InvalidConfig, InvalidDataset, ModelUnavailable
from grit_core.library_errors import (
    DeviceFault,
    find_device_fault,
    is_device_failure,
    is_library_error,
    library_errors_as,
    ran_out_of_device_memory,
    ran_out_of_memory,
    reason,
)


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def raised_in(module: str, error: Exception) -> Callable[[], None]:
    """A function of a module with this name that raises."""
    scope: dict[str, object] = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", scope)  # noqa: S102 - the name of a frame's module
    fail = scope["fail"]
    assert isinstance(fail, types.FunctionType)
    return fail


def error_of(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
        return error
    raise AssertionError("nothing was raised")


def test_what_a_model_raises_about_its_tokens_is_the_librarys() -> None:
    unknown_token = torch.tensor([[9]])
    error = error_of(lambda: model()(input_ids=unknown_token))
    assert isinstance(error, IndexError)
    assert is_library_error(error)


def test_what_our_hook_inside_a_model_raises_is_ours() -> None:
    observed = model()
    hook = raised_in("grit_core.curvature.capture", ValueError("our fault"))
    observed.lm_head.register_forward_hook(lambda *_: hook())
    error = error_of(lambda: observed(input_ids=torch.tensor([[1]])))
    assert not is_library_error(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(28, "No space left on device"),
    ],
)
def test_memory_devices_and_the_system_are_no_ones_input(error: Exception) -> None:
    assert not is_library_error(error_of(raised_in("transformers.models.llama", error)))


def test_the_text_of_another_error_makes_no_device_failure() -> None:
    assert not is_device_failure(ValueError("the row mentions cublas"))
    assert not ran_out_of_memory(ValueError("the row says: out of memory"))


def test_a_librarys_error_is_translated_and_every_other_passes() -> None:
    def translate(error: Exception) -> InvalidDataset:
        return InvalidDataset(reason(error))

    with (
        pytest.raises(InvalidDataset, match="ValueError: tokens do not match") as caught,
        library_errors_as(translate),
    ):
        raised_in("transformers.models.llava", ValueError("tokens do not match\nmore"))()
    assert isinstance(caught.value.__cause__, ValueError)
    for own in (InvalidConfig([]), ZeroDivisionError()):
        with pytest.raises(type(own)), library_errors_as(translate):
            raise own


# Every error of CUDA ends with these lines, and the last one speaks of assertions.
FOOTER = """
Search for `{name}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html\
 for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below\
 might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


def cuda(text: str, name: str = "cudaErrorUnknown") -> Exception:
    return torch.AcceleratorError(f"CUDA error: {text}{FOOTER.format(name=name)}")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    cuda("out of memory", "cudaErrorMemoryAllocation"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "GET was unable to find an engine to execute this computation; cuDNN error:"
        " CUDNN_STATUS_ALLOC_FAILED"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgetrf`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled cuda error (run with"
        " NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError:"
        " Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 33.48 GB, other allocations: 2.45 GB, max"
        " allowed: 36.27 GB). Tried to allocate 600.15 MB on private pool. Use"
        " PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may"
        " cause system failure)."
    ),
    RuntimeError("Invalid buffer size: 74.51 GiB"),
]
ASSERTIONS = [
    cuda("device-side assert triggered", "cudaErrorAssert"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuda runtime error (59) : device-side assert triggered at THCTensorCopy.cu:100"),
    torch.AcceleratorError("index 9 is out of bounds for dimension 0 with size 8"),
]
LOSSES = [
    cuda("an illegal memory access was encountered", "cudaErrorIllegalAddress"),
    cuda("unspecified launch failure", "cudaErrorLaunchFailure"),
    cuda("misaligned address", "cudaErrorMisalignedAddress"),
    cuda("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
    cuda("unknown error"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuda runtime error (39) : uncorrectable ECC error encountered at THC.cpp:265"),
    RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled cuda error, NCCL version 2.27.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 700 'an"
        " illegal memory access was encountered'"
    ),
    RuntimeError("Unable to determine the device handle for GPU0: GPU has fallen off the bus"),
    RuntimeError("HIP error: unspecified launch failure"),
]
NO_FAULTS = [
    cuda("invalid configuration argument", "cudaErrorInvalidConfiguration"),
    cuda("no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("The MPS backend is supported on MacOS 14.0+."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("NCCL error: remote process exited or there was a network error"),
    RuntimeError("The size of tensor a (4) must match the size of tensor b (0)"),
    ValueError("the row says: CUDA error: device-side assert triggered"),
    IndexError("index 9 is out of bounds for dimension 0 with size 8"),
]


@pytest.mark.parametrize(
    ("errors", "fault"),
    [
        (OUT_OF_MEMORY, DeviceFault.OUT_OF_MEMORY),
        (ASSERTIONS, DeviceFault.ASSERTION),
        (LOSSES, DeviceFault.LOST),
        (NO_FAULTS, None),
    ],
)
def test_what_torch_says_of_a_device_is_memory_an_assertion_a_loss_or_none(
    errors: list[Exception], fault: DeviceFault | None
) -> None:
    for error in errors:
        assert find_device_fault(error) == fault, error
        assert ran_out_of_device_memory(error) == (fault is DeviceFault.OUT_OF_MEMORY), error
        is_sticky = fault in {DeviceFault.ASSERTION, DeviceFault.LOST}
        assert is_device_failure(error) == is_sticky, error


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *ASSERTIONS, *LOSSES, *NO_FAULTS[:6]])
def test_no_fault_of_a_device_becomes_a_refused_input(error: Exception) -> None:
    with (
        pytest.raises(type(error)) as caught,
        library_errors_as(lambda found: InvalidDataset(reason(found))),
    ):
        raised_in("transformers.models.llama", error)()
    assert caught.value is error


def test_an_error_made_from_one_of_memory_is_still_one_of_memory() -> None:
    for memory in (*OUT_OF_MEMORY, MemoryError(), RuntimeError("can't allocate memory")):
        made = ModelUnavailable("the model cannot be loaded")
        made.__cause__ = memory
        assert ran_out_of_memory(made)
    again = InvalidDataset("another fault")
    again.__context__ = OUT_OF_MEMORY[0]  # handled, and something else failed then
    assert not ran_out_of_memory(again)


def test_whatever_fails_after_a_device_was_lost_is_of_the_device() -> None:
    for lost in (*ASSERTIONS, *LOSSES):
        after = ZeroDivisionError("while the rows were failed")
        after.__context__ = lost
        assert is_device_failure(after)
