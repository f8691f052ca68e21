"""The simulated device as a backend of torch, once for a process."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.accelerator import autocast
from tests.accelerator.device import accelerator
from tests.accelerator.tensor import DeviceTensor, copy, dispatch

NAME: Final = "sim"
_MEMORY_BYTES: Final = 2**40
"""Of a card without a `capacity_bytes`."""

_MADE_ON_HOST: Final = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "range.step"),
    *("randperm", "tril_indices", "triu_indices"),
)
"""Operations without inputs whose kernels give an empty tensor its shape."""

_libraries: Final[list[torch.library.Library]] = []


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return accelerator.enabled

    def has_primary_context(self, _index: int) -> bool:
        return accelerator.enabled

    def is_built(self) -> bool:
        return True


class _Module:
    """`torch.sim`, with what `torch.cuda` has."""

    device = staticmethod(lambda _index: nullcontext())

    @staticmethod
    def is_available() -> bool:
        return accelerator.enabled

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        accelerator.generator.manual_seed(seed)

    manual_seed = manual_seed_all

    @staticmethod
    def get_rng_state(_device: Any = None) -> Tensor:
        return accelerator.generator.get_state()

    @staticmethod
    def set_rng_state(state: Tensor, _device: Any = None) -> None:
        accelerator.generator.set_state(state)

    @staticmethod
    def synchronize(_device: Any = None) -> None:
        accelerator.note_wait("item")

    @staticmethod
    def empty_cache() -> None:
        accelerator.caches_emptied += 1

    @staticmethod
    def set_per_process_memory_fraction(fraction: float) -> None:
        accelerator.capacity_bytes = int(fraction * (accelerator.capacity_bytes or _MEMORY_BYTES))

    @staticmethod
    def memory_allocated(_device: Any = None) -> int:
        return accelerator.allocated_bytes

    @staticmethod
    def mem_get_info(_device: Any = None) -> tuple[int, int]:
        total = accelerator.capacity_bytes or _MEMORY_BYTES
        return max(0, total - accelerator.allocated_bytes), total


def install() -> None:
    """Register the device with torch; the second call does nothing.

    It stays for the life of the process. torch finds it only while
    `accelerator.enabled` is set, so that other tests see a machine without one.
    """
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module, hook=_Hooks())
    operations, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((operations, others))
    operations.impl("empty.memory_format", _empty, "PrivateUse1")
    operations.impl("empty_strided", _empty_strided, "PrivateUse1")
    operations.impl("_copy_from", _copy_from, "PrivateUse1")
    operations.impl("_local_scalar_dense", _item, "PrivateUse1")
    for name in _MADE_ON_HOST:
        operations.impl(name, _made_on_host(name), "PrivateUse1")
    others.fallback(_fallback, "PrivateUse1")
    autocast.register(operations, others)
    run_backward = torch.autograd._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        result = run_backward(*args, **kwargs)
        accelerator.raise_kept()
        return result

    torch.autograd._engine_run_backward = run


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_options: Any) -> Tensor:
    accelerator.check()
    kwargs = {} if memory_format is None else {"memory_format": memory_format}
    return DeviceTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype(), **kwargs))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_options: Any) -> Tensor:
    accelerator.check()
    host = torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype())
    return DeviceTensor(host)


def _made_on_host(name: str) -> Callable[..., Tensor]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **options: Any) -> Tensor:
        return dispatch(operation, args, {**options, "device": torch.device(NAME)})

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return copy(target, source, non_blocking)


def _item(tensor: Tensor) -> Any:
    return dispatch(torch.ops.aten._local_scalar_dense.default, (tensor,), {})


def _fallback(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return dispatch(operation, args, kwargs)
