"""The `README.md` of an adapter folder: what the adapter is, and Python that loads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

CARD: Final = "README.md"


def training_card(manifest: Mapping[str, Any]) -> str:
    """Write the card of a trained adapter from its manifest."""
    metrics, compaction = manifest["metrics"], manifest.get("compaction")
    train_loss, eval_loss = metrics["train_loss"], metrics["eval_loss"]
    cut = "" if compaction is None else _rows_of_compaction(compaction)
    # In float16 every step of a short job may have been dropped.
    trained = "no step was applied" if train_loss is None else f"{train_loss:.4f}"
    evaluated = "not evaluated" if eval_loss is None else f"{eval_loss:.4f}"
    optimizer = manifest["training"]["optimizer"]
    return f"""{_front_matter(manifest)}
A LoRA adapter of `{manifest["model"]}`, trained with the {optimizer} optimizer.

| | |
|---|---|
| adapted layers | {len(manifest["plan"]["layers"])} |
| trainable parameters | {manifest["trainable_parameters"]:,} |
{cut}| optimizer steps | {metrics["steps"]} |
| last training loss | {trained} |
| evaluation loss | {evaluated} |

{_how_to_load(manifest["base_model"])}

`grit.json` holds the plan, the configuration and the hashes that reproduce it.
"""


def compression_card(manifest: Mapping[str, Any]) -> str:
    """Write the card of an adapter that was cut from another one."""
    compaction = manifest["compaction"]
    losses = [compaction["eval_loss_before"], compaction["eval_loss_after"]]
    before, after = ("not evaluated" if loss is None else f"{loss:.4f}" for loss in losses)
    return f"""{_front_matter(manifest)}
A LoRA adapter of `{manifest["model"]}`, cut from the adapter whose weights have the SHA-256
`{manifest["parent_adapter_sha256"]}`.

| | |
|---|---|
| parameters | {manifest["trainable_parameters"]:,} |
{_rows_of_compaction(compaction)}| evaluation loss before | {before} |
| evaluation loss after | {after} |

{_how_to_load(manifest["base_model"])}

`grit.json` holds the ranks and the hashes that reproduce it.
"""


def _front_matter(manifest: Mapping[str, Any]) -> str:
    """Return what the hub reads; it refuses a `base_model` that is none of its own ids."""
    source = manifest["base_model"]["source"]
    base = "" if Path(source).is_absolute() else f"base_model: {source}\n"
    return f"---\n{base}library_name: peft\ntags: [lora, grit]\n---\n"


def _how_to_load(base: Mapping[str, Any]) -> str:
    auto, source = base["auto_class"], repr(base["source"])
    where = source if base["revision"] is None else f'{source}, revision="{base["revision"]}"'
    elsewhere = (
        "\nThe base model is read from its folder on the machine where this adapter was trained. If"
        " it lies elsewhere on yours, write that folder here and in `adapter_config.json`.\n"
        if Path(base["source"]).is_absolute()
        else ""
    )
    return f"""In this folder, with PEFT:

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({where})
model = PeftModel.from_pretrained(base, ".")
```

or, with the base model that `adapter_config.json` names:

```python
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained(".")
```
{elsewhere}"""


def _rows_of_compaction(compaction: Mapping[str, Any]) -> str:
    left = sum(1 for rank in compaction["ranks"].values() if rank)
    return f"""| layers with a direction left | {left} |
| parameters before compaction | {compaction["parameters_before"]:,} |
| divergence from the whole adapter | {compaction["measured_kl"]:.2e} nats for a label token |
"""
