"""Write the safetensors format from numpy arrays, a tensor at a time. Loads no torch.

The bytes are those of the safetensors library: wide types first, then by name, so that equal
tensors give equal files.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ORDER: Final = ("F32", "BF16", "F16")


_WIDTHS: Final = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """What is written under one name."""

    dtype: str
    """In safetensors' words: F32, BF16 or F16."""
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]
    """Makes the numbers when it is their turn; bfloat16 as its bits."""

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file; the numbers of one tensor at a time are in memory.

    Args:
        path: The file; what was there is replaced.
        tensors: By name.

    Returns:
        The file's SHA-256, in hexadecimal.

    Raises:
        ValueError: A tensor makes other numbers than it says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name, tensor in ordered:
            raw = np.ascontiguousarray(tensor.read()).tobytes()
            if len(raw) != tensor.num_bytes:
                raise ValueError(f"{name} has {len(raw)} bytes, not {tensor.num_bytes}")
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()
