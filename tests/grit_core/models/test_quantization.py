import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_core.errors import ModelUnavailable
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model
from tests.tiny_models import tiny_causal_folder

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ({"quant_method": "bitnet"}, "bitnet"),
    ({"bits": 4}, "no quant_method is given"),
]


@pytest.mark.parametrize("load", [build_inventory, load_base_model])
@pytest.mark.parametrize(("settings", "method"), SETTINGS)
def test_a_quantised_checkpoint_is_refused_by_its_method(
    tmp_path: Path, load: Callable[[Path], Any], settings: dict[str, Any], method: str
) -> None:
    folder = tiny_causal_folder(tmp_path)
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"quantization_config": settings}), encoding="utf-8")
    with pytest.raises(ModelUnavailable, match=f"quantised \\({method}.*save_pretrained"):
        load(folder)


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    folder = tiny_causal_folder(tmp_path)
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"quantization_config": None}), encoding="utf-8")
    assert build_inventory(folder).layers


def test_a_quantised_text_part_is_refused(tmp_path: Path) -> None:
    text = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    config = {"model_type": "llava", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelUnavailable, match="quantised \\(fp8"):
        build_inventory(tmp_path)
