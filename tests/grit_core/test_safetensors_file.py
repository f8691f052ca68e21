"""Safetensors files written without the library, byte for byte as it writes them."""

import hashlib

import pytest
import torch
from safetensors.torch import save

from grit_core.safetensors_file import Tensor, write_safetensors

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.bfloat16, torch.float32, torch.float16]]
)
def test_the_file_is_the_one_that_the_library_writes(tmp_path, dtypes):
    torch.manual_seed(0)
    tensors = {
        f"base.{name}.{number}": torch.randn(3, 5).to(dtype)
        for number, dtype in enumerate(dtypes)
        for name in ("b", "a", "c")
    }
    given = {
        name: Tensor(
            dtype=TYPES[tensor.dtype],
            shape=tuple(tensor.shape),
            read=(tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy,
        )
        for name, tensor in tensors.items()
    }
    sha256 = write_safetensors(tmp_path / "file", given)
    expected = save(tensors, metadata={"format": "pt"})
    assert (tmp_path / "file").read_bytes() == expected
    assert sha256 == hashlib.sha256(expected).hexdigest()


def test_numbers_that_do_not_fill_their_place_are_an_error(tmp_path):
    tensor = Tensor(dtype="F32", shape=(3, 5), read=torch.zeros(3, 4).numpy)
    with pytest.raises(ValueError, match="48 bytes, not 60"):
        write_safetensors(tmp_path / "file", {"a": tensor})
