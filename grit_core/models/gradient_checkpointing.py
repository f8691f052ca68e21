"""Gradient checkpointing: the activations of a block are computed again in the backward pass.

The mechanism is transformers'. Two things differ from switching it on there:

- transformers also makes the embeddings' outputs require a gradient. With a frozen base that sends
  the backward pass through every block below the first adapted one, for nothing; it is taken back.
- torch's re-entrant kind gives parameters a gradient only where an input of the block requires one,
  and sees positional inputs alone. Here a block with an adapter gets an empty input that does, in
  each tower; tensors passed by keyword are passed on by position; and blocks below the first
  adapted one are called as they are.

Random numbers are drawn again as in the first pass, so dropout drops the same entries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grit_core.errors import Fault, InvalidConfig

KINDS: Final = ("non_reentrant", "reentrant")
"""The ways to do it; the first is torch's own recommendation."""


def enable_gradient_checkpointing(base: nn.Module, *, kind: str) -> None:
    """Switch gradient checkpointing on; it is active while the model is in training mode.

    Args:
        base: A transformers model with its adapters injected.
        kind: `non_reentrant` or `reentrant`.

    Raises:
        InvalidConfig: The model does not support it.
        ValueError: There is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of checkpointing; use {' or '.join(KINDS)}.")
    model: Any = base
    try:
        _switch_on(model, {"use_reentrant": kind == "reentrant"})
    except (AttributeError, ValueError) as error:
        detail = (
            f"gradient_checkpointing is {kind!r} and {type(base).__name__} does not support it;"
            " set it to off, and lower batch_size (raising gradient_accumulation_steps) or"
            " max_length for memory."
        )
        fault = Fault(
            pointer="/training/gradient_checkpointing",
            code="not_supported",
            detail=detail,
            input=kind,
        )
        raise InvalidConfig([fault]) from error
    model.disable_input_require_grads()
    if kind == "reentrant":
        for block in model.modules():
            if getattr(block, "gradient_checkpointing", False):
                adapted = any(parameter.requires_grad for parameter in block.parameters())
                run = partial(_reentrant, adapted)
                block._gradient_checkpointing_func = run  # noqa: SLF001 - it has no public name


def _switch_on(model: Any, options: dict[str, Any]) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name in earlier releases of transformers 5
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _reentrant(adapted: bool, function: Callable[..., Any], *args: Any) -> Any:  # noqa: FBT001 - bound by partial, before what transformers passes
    """Run a block under torch's re-entrant checkpoint.

    Args:
        adapted: Whether the block has parameters that train.
        function: The block's forward, with keyword arguments bound.
        *args: Its positional arguments.
    """
    named: dict[str, Tensor] = {}
    if isinstance(function, partial):
        named = {name: value for name, value in function.keywords.items() if _needs_gradient(value)}
    if not (adapted or named or any(_needs_gradient(arg) for arg in args)):
        return function(*args)

    def call(_root: Tensor, *inputs: Any) -> Any:
        again = dict(zip(named, inputs[len(args) :], strict=True))
        return function(*inputs[: len(args)], **again)

    root = torch.empty(0, requires_grad=True)
    return checkpoint(call, root, *args, *named.values(), use_reentrant=True)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
