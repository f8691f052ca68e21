"""Autocast on the simulated device: the main entries of CUDA's lists."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_KEY: Final = "AutocastPrivateUse1"
_LOWER: Final = (
    *("linear", "matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "addbmm", "addmv"),
    *("conv1d", "conv2d", "conv3d", "convolution", "prelu"),
    "scaled_dot_product_attention",
)
_FLOAT32: Final = (
    *("softmax.int", "log_softmax.int", "layer_norm", "group_norm", "cross_entropy_loss"),
    *("nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"),
    *("exp", "log", "log2", "log10", "log1p", "expm1", "rsqrt", "reciprocal", "softplus"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "sum", "sum.dim_IntList", "prod"),
    *("cumsum", "cumprod", "norm.Scalar", "cosine_similarity", "cdist", "kl_div"),
)
_PROMOTED: Final = ("cat", "stack", "addcmul", "addcdiv", "index_put", "scatter_add", "dot")


def register(library: torch.library.Library, fallback: torch.library.Library) -> None:
    """Teach torch's autocast what to do on the device."""
    fallback.fallback(torch.library.fallthrough_kernel, _KEY)
    for names, choose in ((_LOWER, _lower), (_FLOAT32, _float32), (_PROMOTED, _widest)):
        for name in names:
            library.impl(name, _kernel(name, choose), _KEY)


def _kernel(name: str, choose: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        floats = [
            leaf
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.device.type == "sim"
        ]
        with torch._C._ExcludeDispatchKeyGuard(without):
            if not floats:
                return operation(*args, **kwargs)
            dtype = choose(floats)
            args, kwargs = tree_map_only(
                Tensor,
                lambda t: t.to(dtype) if t.is_floating_point() and t.device.type == "sim" else t,
                (args, kwargs),
            )
            return operation(*args, **kwargs)

    return run


def _lower(_floats: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("sim")


def _float32(_floats: list[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(floats: list[Tensor]) -> torch.dtype:
    dtype = floats[0].dtype
    for tensor in floats[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
