"""Which device and number format to use, and why.

`choose_device` is pure: its caller says what is available. `available_devices`,
`has_native_bfloat16` and what calls them load torch, and are for the machine that computes.
"""

from collections.abc import Callable, Collection, Sequence
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

NATIVE_BFLOAT16_CAPABILITY: Final = (8, 0)
"""NVIDIA's first compute capability with bfloat16 units (Ampere). T4, V100 and RTX 20 are below."""

FLOAT16_OVERFLOWS: Final = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4", "plamo2"})
"""The `model_type` of models whose activations leave float16's range: their answers would be
infinities. They are computed in bfloat16, emulated or not. The list is vLLM's."""

_HALF: Final = "half"
"""Stands in the tables for bfloat16 where the device has it, and float16 where it does not."""

_DTYPES: Final[dict[str, str]] = {"cuda": _HALF, "mps": _HALF, "cpu": "float32"}

# Float32 on MPS: float16 gradients underflow there, and bfloat16 is emulated.
_TRAINING_PRECISION: Final[dict[str, str]] = {"cuda": _HALF, "mps": "float32", "cpu": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceChoice:
    """A device, the number format of its weights, and the reason for both."""

    device: str
    """`cuda`, `cuda:1`, `mps` or `cpu`."""
    dtype: str
    """`bfloat16`, `float16` or `float32`; of a card that is not known, what most cards take."""
    device_reason: str
    dtype_reason: str

    @property
    def reason(self) -> str:
        """Why this device and this number format."""
        return f"{self.device_reason}; {self.dtype_reason}"


def choose_device(
    strategy_or_device: str = DEFAULT_STRATEGY,
    available: Sequence[str] = ("cpu",),
    *,
    native_bfloat16: Callable[[str], bool] | None = None,
) -> DeviceChoice:
    """Choose among the devices that are there.

    Args:
        strategy_or_device: A `DeviceStrategy`, or `cuda`, `cuda:0`, `mps` or `cpu`; `gpu` is
            another word for `cuda`.
        available: What is there, such as `("cuda", "cpu")`.
        native_bfloat16: Asked whether the chosen device has bfloat16 units, such as
            `has_native_bfloat16` on the machine itself. `None` where the card is not known: the
            reason then says what cards without them take.

    A text that is neither a strategy nor a device raises `InvalidConfig`.

    Raises:
        DeviceUnavailable: Nothing suitable is there; the message says what is.
    """
    if isinstance(strategy_or_device, str):
        strategy_or_device = normalize_device(strategy_or_device)
    if strategy_or_device in tuple(DeviceStrategy):
        return _by_strategy(DeviceStrategy(strategy_or_device), available, native_bfloat16)
    kind = kind_of(strategy_or_device)
    if strategy_or_device not in available:
        raise DeviceUnavailable(
            f"The device {strategy_or_device} is not available; available:"
            f" {', '.join(available) or 'none'}."
        )
    return _choice(
        strategy_or_device,
        _DTYPES[kind],
        native_bfloat16,
        device_reason=f"{strategy_or_device} was asked for",
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
    raise InvalidConfig([unknown_device(device)])


def unknown_device(device: object, *, takes_cards: bool = True) -> Fault:
    """Return the fault of a text that names no device.

    Args:
        device: As it was given.
        takes_cards: Whether a card may be named by its number.
    """
    known = (*DeviceStrategy, *KINDS)
    cards = ", or cuda:N" if takes_cards else ""
    return Fault(
        pointer="/device",
        code="unknown_value",
        detail=f"device is {shown(device)}; give one of {', '.join(known)}{cards};"
        " `gpu` means cuda." + did_you_mean(device, known),
    )


def training_precision(
    device: str, *, native_bfloat16: bool = True, model_types: Collection[str] = ()
) -> str:
    """Return the number format of frozen weights and autocast that training takes by itself.

    Args:
        device: Where it trains.
        native_bfloat16: Whether the device has bfloat16 units, as `has_native_bfloat16` finds on
            the machine itself.
        model_types: Of the model and its parts, as in `config.json`.
    """
    entry = _TRAINING_PRECISION[kind_of(device)]
    return _precision(entry, native_bfloat16=native_bfloat16, model_types=model_types)


def inference_precision(device: str, *, model_types: Collection[str] = ()) -> str:
    """Return the number format of weights that inference takes on a device of this machine.

    Loads torch.

    Args:
        device: Where the model answers.
        model_types: Of the model and its parts, as in `config.json`.
    """
    entry = _DTYPES[kind_of(device)]
    native = has_native_bfloat16(device)
    return _precision(entry, native_bfloat16=native, model_types=model_types)


def available_devices() -> tuple[str, ...]:
    """The devices of this machine, the fastest first; `cuda` and each `cuda:N`. Loads torch."""
    import torch

    found: list[str] = []
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return (*found, "cpu")


def has_native_bfloat16(device: str) -> bool:
    """Tell whether a device of this machine has bfloat16 units. Loads torch.

    Elsewhere bfloat16 is emulated: right, and slower than float16. The question is put to the card
    that is named, not to the current one as `torch.cuda.is_bf16_supported` does. Of ROCm torch
    knows no card without them, and of MPS none with them.

    Args:
        device: `cuda` (the current card), `cuda:1`, `mps` or `cpu`; it has to be there.
    """
    import torch

    kind, _, index = normalize_device(device).partition(":")
    if kind != "cuda":
        return kind != "mps"
    if torch.version.hip:
        return True
    card = int(index) if index else None
    return torch.cuda.get_device_capability(card) >= NATIVE_BFLOAT16_CAPABILITY


def get_device_config(strategy: str = DEFAULT_STRATEGY) -> dict[str, Any]:
    """The keyword arguments that put a model on this machine's best device for a strategy.

    For `SomeModel.from_pretrained(name, **get_device_config("auto_inference"))`. Loads torch.

    Args:
        strategy: A `DeviceStrategy`, or a device.

    Returns:
        `device_map` and `dtype`; for `memory_efficient` on CUDA also `max_memory`, for which the
        free memory of every visible card is read: that opens a context of some hundred MB on each.
    """
    available = available_devices()
    spreads = (
        isinstance(strategy, str)  # anything else is refused below
        and normalize_device(strategy) == DeviceStrategy.MEMORY_EFFICIENT
        and "cuda" in available
    )
    cards = [device for device in available if device.startswith("cuda:")]
    choice = choose_device(
        strategy,
        available,
        # One number format for all cards that the model is spread over.
        native_bfloat16=(lambda _: all(map(has_native_bfloat16, cards)))
        if spreads
        else has_native_bfloat16,
    )
    kwargs: dict[str, Any] = {"device_map": choice.device, "dtype": choice.dtype}
    if spreads:
        kwargs |= {"device_map": "auto", "max_memory": _memory_limits()}
    return kwargs


def _by_strategy(
    strategy: DeviceStrategy,
    available: Sequence[str],
    native_bfloat16: Callable[[str], bool] | None,
) -> DeviceChoice:
    order = PRIORITY[strategy]
    device = next((kind for kind in order if kind in available), None)
    if device is None:
        raise DeviceUnavailable(
            f"{strategy} takes {', then '.join(order)}, and none of them is available; available:"
            f" {', '.join(available) or 'none'}."
        )
    missing = order[: order.index(device)]
    lacking = f"no {' and no '.join(missing)} here, " if missing else ""
    table = _TRAINING_PRECISION if strategy == DeviceStrategy.STABLE_TRAINING else _DTYPES
    dtype = _HALF if strategy == DeviceStrategy.MEMORY_EFFICIENT else table[device]
    shared = (
        "; on a Mac auto_inference takes as many bytes of the same memory and computes on the GPU"
        if strategy == DeviceStrategy.MEMORY_EFFICIENT and "mps" in available and device == "cpu"
        else ""
    )
    return _choice(
        device,
        dtype,
        native_bfloat16,
        device_reason=f"{strategy} wants {_AIMS[strategy]} ({', then '.join(order)}); {lacking}"
        f"{device} is the first that is available{shared}",
    )


def _choice(
    device: str,
    dtype: str,
    native_bfloat16: Callable[[str], bool] | None,
    *,
    device_reason: str,
) -> DeviceChoice:
    kind = kind_of(device)
    if kind == "cuda" and native_bfloat16 is not None:
        native = native_bfloat16(device)
    else:
        native = kind != "mps"
    found = _precision(dtype, native_bfloat16=native)
    if kind == "cuda" and native_bfloat16 is None:
        dtype_reason = (
            "bfloat16, or float16 on a card that only emulates it, halves the memory of float32 and"
            " is faster there"
        )
    elif found == "float32":
        dtype_reason = "float32 is exact enough for every gradient there"
    elif kind == "cpu":
        dtype_reason = f"{found} halves the memory of float32"
    else:
        emulated = ", where bfloat16 is only emulated" if found == "float16" else ""
        dtype_reason = f"{found} halves the memory of float32 and is faster there{emulated}"
    return DeviceChoice(
        device=device, dtype=found, device_reason=device_reason, dtype_reason=dtype_reason
    )


def _precision(entry: str, *, native_bfloat16: bool, model_types: Collection[str] = ()) -> str:
    """Return the number format that an entry of the tables stands for."""
    if entry != _HALF:
        return entry
    overflows = not FLOAT16_OVERFLOWS.isdisjoint(model_types)
    return "bfloat16" if native_bfloat16 or overflows else "float16"


def _memory_limits() -> dict[int | str, int]:
    """Bytes for each GPU and for the CPU, which takes what does not fit."""
    from accelerate.utils import get_max_memory  # noqa: PLC0415 - as above

    free: dict[int | str, int] = get_max_memory()
    return {
        place: int(size * MEMORY_SHARE) if isinstance(place, int) else size
        for place, size in free.items()
    }
