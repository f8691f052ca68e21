"""Compare the tensors of a model's files with its architecture, without reading their data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grit_core.errors import ModelUnavailable
from grit_core.library_errors import reason
from grit_core.models.pretrained import is_folder

SINGLE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

MAX_INDEX_BYTES: Final = 64 * 1024**2
NAMED_TENSORS: Final = 3
"""How many tensors a message names."""


def compare_weights(source: str | Path, model: nn.Module) -> list[str]:
    """Compare the headers of a folder's weights with a model; return notes for people.

    Names and shapes go through the same conversion as when the weights are loaded, on the meta
    device, so that files with older names or with one tensor for each expert count as complete.

    Args:
        source: A local folder. Of a hub id only the configuration is fetched at registration, so
            its weights are not compared, and a note says so.
        model: Built on the meta device; it is not changed.

    Raises:
        ModelUnavailable: A file is missing or damaged, or tensors are missing or have other shapes.
    """
    if not is_folder(source):
        note = (
            "The weights of a hub model are fetched by its first job and were not compared with"
            " the architecture."
        )
        return [note]
    headers = read_headers(Path(source).expanduser())
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        return [_quantized(quantization)]
    report = _load_report(headers, model)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelUnavailable(
            f"The weights of {source} lack {_counted(missing)} of its architecture"
            f" {type(model).__name__}; they would be random. Save the model again with all of its"
            " weights, or correct config.json."
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ModelUnavailable(
            f"The weights of {source} do not fit its config.json in {len(mismatched)} tensors:"
            f" {name} is stored as {list(stored)}, and {type(model).__name__} expects"
            f" {list(expected)}."
        )
    errors = list(report.get("conversion_errors") or {}) + list(report.get("error_msgs") or [])
    if errors:
        raise ModelUnavailable(
            f"The weights of {source} cannot be converted for {type(model).__name__}:"
            f" {_counted([str(error) for error in errors])}."
        )
    unused = sorted(report["unexpected_keys"])
    return [f"The files hold {_counted(unused)} that the model does not use."] if unused else []


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's weight files by name, on the meta device.

    Raises:
        ModelUnavailable: A file is missing, or is no whole safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise ModelUnavailable(
                f"The model folder {folder} lacks {name}, which its index names."
            )
        try:
            # Opening a file compares its length with its header.
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    shape = file.get_slice(key).get_shape()
                    tensors[key] = torch.empty(shape, device="meta")
        except (SafetensorError, OSError) as error:
            raise ModelUnavailable(
                f"{path} is damaged or incomplete ({error}); copy it again."
            ) from error
    return tensors


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights, as transformers chooses them.

    Raises:
        ModelUnavailable: There are none, or their index cannot be read.
    """
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    index = folder / INDEX
    if not index.is_file():
        raise ModelUnavailable(
            f"The model folder {folder} has neither {SINGLE_FILE} nor {INDEX}; save the model"
            " again with `save_pretrained`."
        )
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ModelUnavailable(
            f"{index} has {index.stat().st_size} bytes; at most {MAX_INDEX_BYTES} are read."
        )
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{index} has no usable weight_map: {reason(error)}.") from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd or not names:
        shown = repr(odd[0])[:100] if odd else "no file at all"
        raise ModelUnavailable(f"{index} names {shown}; it must name files beside it.")
    return sorted(names)


def _load_report(headers: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Load tensors without data into a second model without data; return what did not fit."""
    architecture: Any = type(model)
    _, report = architecture.from_pretrained(
        None,
        config=model.config,
        state_dict=dict(headers),
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    found: dict[str, Any] = report
    return found


def _quantized(settings: Any) -> str:
    method = (
        settings.get("quant_method")
        if isinstance(settings, Mapping)
        else getattr(settings, "quant_method", None)
    )
    return (
        f"The weights are quantized ({getattr(method, 'value', method)}), so they were not compared"
        " with the architecture."
    )


def _counted(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:NAMED_TENSORS])
    return f"{len(listed)} tensors, such as {shown}"
