"""Image features that were computed before, kept by what they were computed from.

The features of an image depend on its bytes, on how many share a prompt, and on the adapter only
where that adapts the vision tower or the connector: adapters of the text layers share them.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

METHOD: Final = "get_image_features"
"""Under this name the models of transformers compute what they put in the places of images."""


class ImageFeatures:
    """Remembers what a model's `get_image_features` returned. One thread uses it."""

    def __init__(self, model: nn.Module, *, max_bytes: int) -> None:
        """Watch the module whose `forward` asks for image features.

        Args:
            model: Left as it is when it computes them under another name.
            max_bytes: Bound on what is kept; the least recently used goes first.
        """
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._key: Hashable | None = None
        self.hits = self.misses = self.num_bytes = 0
        owner = self._owner(model)
        if owner is not None:
            owner.__dict__[METHOD] = self._remembering(owner)

    @contextmanager
    def of(self, key: Hashable | None) -> Iterator[None]:
        """What is computed in this block belongs to `key`; none computes it anew."""
        self._key = key
        try:
            yield
        finally:
            self._key = None

    def clear(self) -> None:
        """Keep nothing of what was computed so far."""
        self._kept.clear()
        self.num_bytes = 0

    @staticmethod
    def _owner(model: nn.Module) -> nn.Module | None:
        # The head's method of the same name calls the inner model's, and `forward` asks that one.
        inner = getattr(model, "model", None)
        for module in (inner, model):
            if isinstance(module, nn.Module) and hasattr(type(module), METHOD):
                return module
        return None

    def _remembering(self, owner: nn.Module) -> Callable[..., Any]:
        # The module holds this function: with the module in it, or a method that is bound to it,
        # the two would be a cycle, and the memory of a model that is dropped would wait for the
        # garbage collector.
        method, module = getattr(type(owner), METHOD), ref(owner)

        def image_features(*args: Any, **options: Any) -> Any:
            key = self._key
            if key is None:
                return method(module(), *args, **options)
            found = self._kept.get(key)
            if found is not None:
                self.hits += 1
                self._kept.move_to_end(key)
                return found[0]
            self.misses += 1
            features = _without_hidden_states(method(module(), *args, **options))
            self._keep(key, features)
            return features

        functools.update_wrapper(image_features, method)
        # `generate` reads from the signature which of a prompt's inputs it may pass.
        image_features.__signature__ = inspect.signature(getattr(owner, METHOD))  # type: ignore[attr-defined]
        return image_features

    def _keep(self, key: Hashable, features: Any) -> None:
        num_bytes = _num_bytes(features)
        if num_bytes > self._max_bytes:
            return
        self._kept[key] = features, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.num_bytes -= freed


def _without_hidden_states(features: Any) -> Any:
    """Drop the tower's own states, many times larger than the features made of them."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        for name in ("last_hidden_state", "hidden_states", "attentions"):
            if getattr(features, name, None) is not None:
                features[name] = None
    return features


def _storage_key(tensor: Tensor) -> int:
    """What the views of one storage have in common."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)  # type: ignore[no-untyped-call]


def _num_bytes(features: Any) -> int:
    if isinstance(features, Tensor):
        # A view keeps all of its storage alive.
        return features.untyped_storage().nbytes()
    if isinstance(features, dict):
        return sum(_num_bytes(part) for part in features.values())
    if isinstance(features, (list, tuple)):
        storages = {
            _storage_key(part): part.untyped_storage().nbytes()
            for part in features
            if isinstance(part, Tensor)
        }
        return sum(storages.values()) + sum(
            _num_bytes(part) for part in features if not isinstance(part, torch.Tensor)
        )
    return 0
