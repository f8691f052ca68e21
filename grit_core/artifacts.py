"""The adapter folder: PEFT's layout, a `grit.json` manifest and a model card.

`adapter_config.json` and `adapter_model.safetensors` are what plain PEFT reads. Nothing in the
folder depends on the time, on a path of this machine or on the order of a set, so equal runs give
equal bytes.
"""

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from grit_core.checkpoints import canonical_json, replace_folder, sync_folder, write_durably
from grit_core.errors import AdapterInvalid
from grit_core.loss import keeps_chosen_logits
from grit_core.models.pretrained import known_warnings_ignored, load_base_model

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
MANIFEST: Final = "grit.json"
CARD: Final = "README.md"

LOGIT_TOLERANCE: Final = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest difference of the logits, relative to the largest logit (at least 1), by precision."""


PROBED_POSITIONS: Final = 32
"""Positions whose logits are compared, from the end; a whole chat times a vocabulary is large."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the trained model answered, to be answered again by the saved adapter."""

    inputs: Mapping[str, Tensor]
    """One batch, as the model's arguments."""

    logits: Tensor
    """Of the trained model in evaluation mode, on the CPU in float32."""


@torch.no_grad()
def probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    """Record a model's logits for the end of some inputs; leaves the model in evaluation mode."""
    model.eval()
    options = {"logits_to_keep": PROBED_POSITIONS} if keeps_chosen_logits(model) else {}
    logits = model(**inputs, use_cache=False, **options).logits[:, -PROBED_POSITIONS:]
    return Probe(inputs=inputs, logits=logits.float().cpu())


def write_adapter(folder: Path, model: PeftModel, *, base_model_name: str) -> str:
    """Write the files that PEFT reads.

    Args:
        folder: Made anew; must not exist.
        model: Its `default` adapter is written.
        base_model_name: Recorded as `base_model_name_or_path`.

    Returns:
        The SHA-256 of `adapter_model.safetensors`.
    """
    folder.mkdir(parents=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    weights = tensors_to_bytes(tensors, metadata={"format": "pt"})
    config = _sorted_sets(model.peft_config["default"].to_dict())
    config |= {"base_model_name_or_path": base_model_name, "inference_mode": True}
    write_durably(folder / WEIGHTS, weights)
    write_durably(folder / CONFIG, canonical_json(config))
    return hashlib.sha256(weights).hexdigest()


def verify_adapter(
    folder: Path, *, source: str, device: torch.device, precision: str, expected: Probe
) -> float:
    """Load the adapter with plain PEFT on a fresh base model and compare its logits.

    Args:
        folder: As `write_adapter` left it.
        source: The base model.
        device: Where to run it.
        precision: Of the base model's weights, as in training.
        expected: What the trained model answered.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        AdapterInvalid: The folder cannot be loaded, or a logit differs by more than
            `LOGIT_TOLERANCE`.
    """
    base = load_base_model(source, device=device, dtype=precision)
    try:
        with known_warnings_ignored():
            model = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterInvalid(f"PEFT cannot load the adapter: {error}") from error
    found = probe(model, expected.inputs)
    difference = float((found.logits - expected.logits).abs().max())
    allowed = LOGIT_TOLERANCE[precision] * max(1.0, float(expected.logits.abs().max()))
    if not difference <= allowed:
        raise AdapterInvalid(
            f"The saved adapter's logits differ from the trained model's by {difference:.3g};"
            f" at most {allowed:.3g} is allowed in {precision}."
        )
    return difference


def finish_adapter(
    unfinished: Path, final: Path, *, manifest: Mapping[str, Any], card: str
) -> None:
    """Add manifest and card to a verified folder and give it its final name."""
    write_durably(unfinished / CARD, card.encode())
    write_durably(unfinished / MANIFEST, canonical_json(manifest))
    sync_folder(unfinished)
    replace_folder(unfinished, final)


def remove_folder(folder: Path) -> None:
    """Delete what an earlier attempt may have left."""
    if folder.exists():
        shutil.rmtree(folder)


def versions() -> dict[str, str]:
    """The versions on which equal bytes depend."""
    found = {"python": platform.python_version()}
    for name in ("grit-service", "torch", "transformers", "peft", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def model_card(manifest: Mapping[str, Any]) -> str:
    """Write a short card from a manifest: what this is, and how to load it."""
    base, metrics = manifest["base_model"]["name"], manifest["metrics"]
    eval_loss = metrics["eval_loss"]
    evaluated = "not evaluated" if eval_loss is None else f"{eval_loss:.4f}"
    auto = manifest["base_model"]["auto_class"]
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, grit]
---

A LoRA adapter of `{base}`, trained with the {manifest["training"]["optimizer"]} optimizer.

| | |
|---|---|
| adapted layers | {len(manifest["plan"]["layers"])} |
| trainable parameters | {manifest["trainable_parameters"]:,} |
| optimizer steps | {metrics["steps"]} |
| last training loss | {metrics["train_loss"]:.4f} |
| evaluation loss | {evaluated} |

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```

`grit.json` holds the plan, the configuration and the hashes that reproduce it.
"""


def _sorted_sets(value: Any) -> Any:
    """Give sets an order and enums their values, throughout."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "value", key)): _sorted_sets(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_sorted_sets(item) for item in value]
    return getattr(value, "value", value)
