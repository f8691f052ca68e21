"""The adapter folder: PEFT's layout, a `grit.json` manifest and a model card.

`adapter_config.json` and `adapter_model.safetensors` are what plain PEFT reads. They name the base
model where it was loaded from, and the class of transformers that loads it, so that `AutoPeftModel`
needs nothing else. Apart from a base model's own folder, nothing in the folder depends on the time,
on a path of this machine or on the order of a set, so equal runs give equal bytes.
"""

import hashlib
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from grit_core.adapter_card import CARD
from grit_core.adapter_manifest import MANIFEST
from grit_core.adapter_settings import auto_mapping
from grit_core.compaction import Compaction
from grit_core.durable_files import canonical_json, replace_folder, sync_folder, write_durably
from grit_core.errors import AdapterInvalid
from grit_core.loss import keeps_chosen_logits
from grit_core.models.lora_folder import load_errors_as_invalid, load_with_peft
from grit_core.models.pretrained import load_base_model
from grit_core.models.vlm_adapter import ADAPTER, layer_pattern, spared_modules

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"

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


def write_adapter(
    folder: Path,
    model: PeftModel,
    *,
    base_model_name: str,
    revision: str | None = None,
    compaction: Compaction | None = None,
) -> str:
    """Write the files that PEFT reads.

    Args:
        folder: Made anew; must not exist.
        model: Its `default` adapter is written.
        base_model_name: Where the base model is loaded from: a hub id, or a folder.
        revision: The commit of a hub model.
        compaction: What was cut from this very model; only what is left is written.

    Returns:
        The SHA-256 of `adapter_model.safetensors`.
    """
    folder.mkdir(parents=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = model.peft_config[ADAPTER].to_dict()
    if compaction is not None:
        state = _kept_tensors(state, compaction)
        config |= _kept_config(model, compaction)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    weights = tensors_to_bytes(tensors, metadata={"format": "pt"})
    config = _sorted_sets(config)
    config |= {
        "base_model_name_or_path": base_model_name,
        "revision": revision,
        "inference_mode": True,
        **auto_mapping(type(model.get_base_model()).__name__),
    }
    write_durably(folder / WEIGHTS, weights)
    write_durably(folder / CONFIG, canonical_json(config))
    return hashlib.sha256(weights).hexdigest()


def _kept_tensors(state: Mapping[str, Tensor], compaction: Compaction) -> dict[str, Tensor]:
    """The rows of A and columns of B that are left; nothing of a layer of which nothing is."""
    tensors = {}
    for layer, kept in compaction.kept.items():
        if kept:
            name = f"base_model.model.{layer}"
            tensors[f"{name}.lora_A.weight"] = state[f"{name}.lora_A.weight"][list(kept)]
            tensors[f"{name}.lora_B.weight"] = state[f"{name}.lora_B.weight"][:, list(kept)]
    return tensors


def _kept_config(model: PeftModel, compaction: Compaction) -> dict[str, Any]:
    """PEFT's settings of a compacted adapter: ranks of their own, and everywhere the scale 1.

    `r` is the largest rank and alpha equals the rank, so that readers that know one scale for all
    layers (`lora_alpha / r`) are right as well.
    """
    ranks = {name: rank for name, rank in compaction.ranks.items() if rank}
    largest = max(ranks.values())
    pattern = layer_pattern(ranks, common=largest)
    modules = [name for name, _ in model.get_base_model().named_modules()]
    spared = "|".join(re.escape(name) for name in sorted(spared_modules(list(ranks), modules)))
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "exclude_modules": spared or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "init_lora_weights": True,
    }


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
    with load_errors_as_invalid():
        model = load_with_peft(base, folder)
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


@contextmanager
def unfinished_adapter(work_dir: Path) -> Iterator[Path]:
    """Give a folder for `write_adapter` to make; an error in the block leaves nothing of it.

    Args:
        work_dir: Where the adapter is to lie at the end. What an attempt that was killed has left
            there is removed.
    """
    folder = work_dir / ".adapter.new"
    remove_folder(folder)
    try:
        yield folder
    except BaseException:
        remove_folder(folder)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there."""
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


def _sorted_sets(value: Any) -> Any:
    """Give sets an order and enums their values, throughout."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "value", key)): _sorted_sets(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_sorted_sets(item) for item in value]
    return getattr(value, "value", value)
