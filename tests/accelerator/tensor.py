"""Tensors of the simulated device, and what happens to an operation on them."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.accelerator.device import DeviceMix, accelerator

DEVICE: Final = "sim:0"

_aten: Final[Any] = torch.ops.aten

_ITEMS: Final = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_SHAPES: Final = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
}
_INDEXES: Final = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_EXEMPT: Final = ("/torch/amp/grad_scaler.py", "/torch/_tensor_str.py")
"""Files of torch that use float64; the first takes float32 on MPS."""
_COPIES: Final = {_aten.copy_.default}


class DeviceTensor(Tensor):
    """A tensor of the device; its numbers lie in `host`, a tensor of the CPU."""

    host: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> Self:
        """Stand for `host` on the device; a storage that is new there is allocated."""
        if host.dtype in {torch.float64, torch.complex128} and not _torch_does_it():
            raise TypeError("float64 on the device: MPS has none, and CUDA is slow with it.")
        storage = host.untyped_storage()
        block = accelerator.allocate(storage._cdata, storage.nbytes())
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(DEVICE),
        )
        made.host, made.block = host, block
        return made

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation."""
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Copy to the host, as torch does for a real device."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage behind, which has an address that views share."""
        return self.host.untyped_storage()

    def __format__(self, spec: str) -> str:
        """Format a number as torch does."""
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: what goes to another process or to a file is copied to the host first."""
        raise TypeError("A tensor of the device was pickled.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy on the device."""
        made = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = made
        return made


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU's arithmetic by the rules of the device."""
    accelerator.check()
    if func in _COPIES:
        return copy(args[0], args[1], bool(args[2]) if len(args) > 2 else _is_async(kwargs))
    if func is _aten._conj.default:  # a flag of torch's that a tensor made here cannot have
        return DeviceTensor(_host(args[0]).conj_physical())
    if torch.is_inference_mode_enabled():  # without autograd nothing else takes these apart
        outputs = func.decompose(*args, **kwargs)
        if outputs is not NotImplemented:
            return outputs
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _refuse_mix(func, args, inputs)
    _note_waits(func, args, inputs)
    to_host = _goes_to_host(kwargs)
    host_args, host_kwargs = tree_map_only(DeviceTensor, _host, (args, kwargs))
    if host_kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    if func is _aten._to_copy.default and inputs:
        host_kwargs["non_blocking"] = False
        if not to_host and not isinstance(inputs[0], DeviceTensor):
            _note_upload(inputs[0], non_blocking=_is_async(kwargs))
    outputs = _run(func, host_args, host_kwargs)
    _refuse_resize(func, inputs)
    if to_host:
        accelerator.note_wait("download", inputs[0].numel())
        return outputs
    # A view is an inference tensor if what it views is one, whatever the mode is now.
    with torch.inference_mode(
        torch.is_inference_mode_enabled() and not _views_normal(func, inputs)
    ):
        made = tree_map_only(Tensor, DeviceTensor, outputs)
    return return_and_correct_aliasing(func, args, kwargs, made)


def copy(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    """Copy numbers on the device, to it or from it."""
    accelerator.check()
    if not isinstance(target, DeviceTensor):
        accelerator.note_wait("download", source.numel())
    elif not isinstance(source, DeviceTensor):
        _note_upload(source, non_blocking=non_blocking)
    _host(target).copy_(_host(source))
    return target


def _note_upload(source: Tensor, *, non_blocking: bool) -> None:
    if non_blocking:
        accelerator.note_copy(source)
    else:
        accelerator.note_wait("upload", source.numel())


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run on the CPU; random numbers come from the device's own state.

    Raises:
        RuntimeError: A generator of the CPU was given.
    """
    if func is _aten.histc.default and not args[0].is_floating_point():  # CUDA's takes integers
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    if given:
        raise RuntimeError("Expected a 'sim' device type for generator but found 'cpu'")
    before = torch.get_rng_state()
    torch.set_rng_state(accelerator.generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        accelerator.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _refuse_mix(func: Any, args: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
    """Let numbers of the CPU pass, and indices where torch moves them itself.

    Raises:
        DeviceMix: Another tensor of the CPU is among the inputs.
    """
    passes = set()
    if func in _INDEXES:
        passes = {id(index) for index in args[1] if isinstance(index, Tensor)}
    if func is _aten._to_copy.default:
        return
    there = any(isinstance(tensor, DeviceTensor) for tensor in inputs)
    for tensor in inputs:
        if there and not isinstance(tensor, DeviceTensor) and id(tensor) not in passes:
            if tensor.dim() == 0 and not _is_matrix_product(func):
                continue
            raise DeviceMix(
                f"Expected all tensors to be on the same device: {func} was given one of {DEVICE}"
                f" and one of the CPU, of shape {tuple(tensor.shape)}."
            )


def _refuse_resize(func: Any, inputs: Sequence[Tensor]) -> None:
    """Notice what this device cannot do: give another shape to a tensor that is there.

    Raises:
        NotImplementedError: The operation did so; register it in `tests.accelerator.backend`.
    """
    for tensor in inputs:
        if isinstance(tensor, DeviceTensor) and tensor.host.shape != tensor.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor of the device.")


def _note_waits(func: Any, args: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
    if func in _ITEMS:
        accelerator.note_wait("item", 1)
    elif func in _SHAPES and not _has_size(func, args):
        accelerator.note_wait("shape")
    elif func in _INDEXES:
        for index in args[1]:
            if not isinstance(index, Tensor):
                continue
            if not isinstance(index, DeviceTensor) and isinstance(inputs[0], DeviceTensor):
                accelerator.note_wait("upload", index.numel())
            if index.dtype in {torch.bool, torch.uint8}:
                accelerator.note_wait("shape")


def _views_normal(func: Any, inputs: Sequence[Tensor]) -> bool:
    returned = func._schema.returns
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in returned)
    return views and bool(inputs) and not inputs[0].is_inference()


def _has_size(func: Any, args: tuple[Any, ...]) -> bool:
    return func is _aten.repeat_interleave.Tensor and len(args) > 1 and args[1] is not None


def _is_matrix_product(func: Any) -> bool:
    return func.overloadpacket in {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm}


def _goes_to_host(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _is_async(kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", False))


def _host(tensor: Tensor) -> Tensor:
    return tensor.host if isinstance(tensor, DeviceTensor) else tensor


def _torch_does_it() -> bool:
    """Whether torch asks by itself: its gradient scaler, or to print a tensor."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_EXEMPT):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
