"""Which device and number format to use, and why.

`choose_device` is pure: it is told what is available. Only `available_devices` and what calls it
load torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from grit_core.config.bounds import did_you_mean, shown
from grit_core.errors import DeviceUnavailable, Fault, InvalidConfig

MEMORY_SHARE: Final = 0.8
"""Of a GPU's free memory that `memory_efficient` lets the weights take."""


class DeviceStrategy(StrEnum):
    """What a caller cares about, when it names no device."""

    STABLE_TRAINING = "stable_training"
    AUTO_INFERENCE = "auto_inference"
    AUTO_PERFORMANCE = "auto_performance"
    MEMORY_EFFICIENT = "memory_efficient"


DEFAULT_STRATEGY: Final = DeviceStrategy.AUTO_PERFORMANCE

PRIORITY: dict[DeviceStrategy, tuple[str, ...]] = {
    DeviceStrategy.STABLE_TRAINING: ("cpu", "cuda", "mps"),
    DeviceStrategy.AUTO_INFERENCE: ("cuda", "mps", "cpu"),
    DeviceStrategy.AUTO_PERFORMANCE: ("cuda", "mps", "cpu"),
    DeviceStrategy.MEMORY_EFFICIENT: ("cuda", "cpu"),
}
"""The devices of each strategy, the best first."""

KINDS: Final = ("cuda", "mps", "cpu")

_AIMS: dict[DeviceStrategy, str] = {
    DeviceStrategy.STABLE_TRAINING: "the steadiest gradients",
    DeviceStrategy.AUTO_INFERENCE: "the fastest answers",
    DeviceStrategy.AUTO_PERFORMANCE: "the best speed overall",
    DeviceStrategy.MEMORY_EFFICIENT: "the least memory",
}

_DTYPES: dict[str, str] = {"cuda": "bfloat16", "mps": "float16", "cpu": "float32"}

_TRAINING_PRECISION: dict[str, str] = {"cuda": "bfloat16", "mps": "float32", "cpu": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceChoice:
    """A device, the number format of its weights, and the reason for both."""

    device: str
    """`cuda`, `cuda:1`, `mps` or `cpu`."""
    dtype: str
    """`bfloat16`, `float16` or `float32`."""
    reason: str


def choose_device(
    strategy_or_device: str = DEFAULT_STRATEGY, available: Sequence[str] = ("cpu",)
) -> DeviceChoice:
    """Choose among the devices that are there.

    Args:
        strategy_or_device: A `DeviceStrategy`, or `cuda`, `cuda:0`, `mps` or `cpu`; `gpu` is
            another word for `cuda`.
        available: What is there, such as `("cuda", "cpu")`.

    A text that is neither a strategy nor a device raises `InvalidConfig`.

    Raises:
        DeviceUnavailable: Nothing suitable is there; the message says what is.
    """
    if isinstance(strategy_or_device, str):
        strategy_or_device = normalize_device(strategy_or_device)
    if strategy_or_device in tuple(DeviceStrategy):
        return _by_strategy(DeviceStrategy(strategy_or_device), available)
    kind = kind_of(strategy_or_device)
    if strategy_or_device not in available:
        raise DeviceUnavailable(
            f"The device {strategy_or_device} is not available; available:"
            f" {', '.join(available) or 'none'}."
        )
    return DeviceChoice(
        device=strategy_or_device,
        dtype=_DTYPES[kind],
        reason=f"{strategy_or_device} was asked for; {_dtype_reason(_DTYPES[kind], kind)}",
    )


def normalize_device(device: str) -> str:
    """Return a device as this library writes it: `cuda:1` for `GPU:1`; other texts stay."""
    kind, separator, index = device.strip().partition(":")
    known = {"gpu": "cuda", **{name: name for name in (*KINDS, *DeviceStrategy)}}
    found = known.get(kind.lower())
    return device if found is None else f"{found}{separator}{index}"


def kind_of(device: str) -> str:
    """`cuda` for `cuda:1` and for `gpu`, and so on.

    Raises:
        InvalidConfig: The text names no device.
    """
    kind, separator, index = (
        normalize_device(device).partition(":") if isinstance(device, str) else ("", "", "")
    )
    numbered = index.isascii() and index.isdecimal() and len(index) <= 3
    if kind in KINDS and (not separator or (kind == "cuda" and numbered)):
        return kind
    known = (*DeviceStrategy, *KINDS)
    raise InvalidConfig([
        Fault(
            pointer="/device",
            code="unknown_value",
            detail=f"device is {shown(device)}; give one of {', '.join(known)}, or cuda:N;"
            " `gpu` means cuda." + did_you_mean(device, known),
        )
    ])


def training_precision(device: str) -> str:
    """The number format of frozen weights and autocast that training takes by itself.

    Float32 on MPS, where float16 gradients underflow and bfloat16 is emulated.
    """
    return _TRAINING_PRECISION[kind_of(device)]


def available_devices() -> tuple[str, ...]:
    """The devices of this machine, the fastest first; `cuda` and each `cuda:N`. Loads torch."""
    import torch

    found: list[str] = []
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return (*found, "cpu")


def get_device_config(strategy: str = DEFAULT_STRATEGY) -> dict[str, Any]:
    """The keyword arguments that put a model on this machine's best device for a strategy.

    For `SomeModel.from_pretrained(name, **get_device_config("auto_inference"))`. Loads torch.

    Args:
        strategy: A `DeviceStrategy`, or a device.

    Returns:
        `device_map` and `dtype`; for `memory_efficient` on CUDA also `max_memory`.
    """
    choice = choose_device(strategy, available_devices())
    kwargs: dict[str, Any] = {"device_map": choice.device, "dtype": choice.dtype}
    if strategy == DeviceStrategy.MEMORY_EFFICIENT and choice.device.startswith("cuda"):
        kwargs |= {"device_map": "auto", "max_memory": _memory_limits()}
    return kwargs


def _by_strategy(strategy: DeviceStrategy, available: Sequence[str]) -> DeviceChoice:
    order = PRIORITY[strategy]
    device = next((kind for kind in order if kind in available), None)
    if device is None:
        raise DeviceUnavailable(
            f"{strategy} takes {', then '.join(order)}, and none of them is available; available:"
            f" {', '.join(available) or 'none'}."
        )
    missing = order[: order.index(device)]
    lacking = f"no {' and no '.join(missing)} here, " if missing else ""
    dtype = "bfloat16" if strategy == DeviceStrategy.MEMORY_EFFICIENT else _DTYPES[device]
    if strategy == DeviceStrategy.STABLE_TRAINING:
        dtype = _TRAINING_PRECISION[device]
    return DeviceChoice(
        device=device,
        dtype=dtype,
        reason=f"{strategy} wants {_AIMS[strategy]} ({', then '.join(order)}); {lacking}"
        f"{device} is the first that is available; {_dtype_reason(dtype, device)}",
    )


def _dtype_reason(dtype: str, device: str) -> str:
    if dtype == "float32":
        return "float32 is exact enough for every gradient there"
    if device == "cpu":
        return f"{dtype} halves the memory of float32"
    return f"{dtype} halves the memory of float32 and is faster there"


def _memory_limits() -> dict[int | str, int]:
    """Bytes for each GPU and for the CPU, which takes what does not fit."""
    from accelerate.utils import get_max_memory  # noqa: PLC0415 - as above

    free: dict[int | str, int] = get_max_memory()
    return {
        place: int(size * MEMORY_SHARE) if isinstance(place, int) else size
        for place, size in free.items()
    }
