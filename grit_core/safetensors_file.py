"""Write the safetensors format from numpy arrays, a tensor at a time. Loads no torch.

The bytes are those of the safetensors library: wide types first, then by name, so that equal
tensors give equal files.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ORDER: Final = ("F32", "BF16", "F16")


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> str:
    """Write a file.

    Args:
        path: The file; what was there is replaced.
        tensors: By name: the type in safetensors' words (F32, BF16 or F16), and the numbers;
            bfloat16 as its bits.

    Returns:
        The file's SHA-256, in hexadecimal.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1][0]), item[0]))
    end = 0
    for name, (dtype, values) in ordered:
        start, end = end, end + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for _, (_, values) in ordered:
            raw = np.ascontiguousarray(values).tobytes()
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()
