"""The folder for vLLM: one rank, one scale, and the same function."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from grit_core.adapter_folder import read_adapter_folder
from grit_core.artifacts import write_adapter
from grit_core.errors import AdapterInvalid
from grit_core.models.pretrained import load_base_model
from grit_core.vllm_layout import RANKS, write_vllm_layout
from tests.tiny_models import tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXT = r"model\.text_model\..*\.(q_proj|v_proj|down_proj)"
LAST = "model.text_model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_vlm_folder(tmp_path_factory.mktemp("models")))


def adapter(base, folder, *, target=TEXT, dtype="float32", **options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 12, "target_modules": target}
    model = get_peft_model(load_base_model(base, dtype=dtype), LoraConfig(**{**config, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape).to(getattr(torch, dtype))
    write_adapter(folder, model, base_model_name="tiny")
    return read_adapter_folder(folder, max_rank=1024, max_bytes=1 << 24)


def language_layers(base):
    return {
        name for name, _ in load_base_model(base).named_modules() if name.startswith("model.text")
    }


def logits(base, folder):
    model = PeftModel.from_pretrained(load_base_model(base), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 60)[None]).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {LAST: 11}, "alpha_pattern": {LAST: 3}},
        {"use_rslora": True},
        {"lora_alpha": 4},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_plain_peft_gives_the_same_logits_from_it(base, tmp_path, options, dtype):
    header = adapter(base, tmp_path / "adapter", dtype=dtype, **options)
    layers = language_layers(base)
    rank = write_vllm_layout(
        tmp_path / "adapter", tmp_path / "vllm", header=header, language_layers=layers
    )
    expected = logits(base, tmp_path / "adapter")
    found = logits(base, tmp_path / "vllm")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert rank == (16 if "rank_pattern" in options else 8)


def test_what_vllm_reads_is_one_scale_and_one_rank_of_those_it_takes(base, tmp_path):
    """`PEFTHelper` needs r, lora_alpha and target_modules, and takes alpha / r for all layers."""
    header = adapter(base, tmp_path / "adapter", rank_pattern={LAST: 11})
    rank = write_vllm_layout(
        tmp_path / "adapter",
        tmp_path / "vllm",
        header=header,
        language_layers=language_layers(base),
    )
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert rank in RANKS
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert all("*" not in name and "|" not in name for name in config["target_modules"])
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(header.layers)
    for name, tensor in tensors.items():
        # As `parse_fine_tuned_lora_name` takes names apart.
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-2] in {"lora_A", "lora_B"}
        assert parts[-1] == "weight"
        assert tensor.shape[0 if parts[-2] == "lora_A" else 1] == rank
    read_adapter_folder(tmp_path / "vllm", max_rank=512, max_bytes=1 << 24)


def test_layers_that_vllm_does_not_serve_are_left_out_only_on_request(base, tmp_path):
    header = adapter(base, tmp_path / "adapter", target=["q_proj", "proj"])
    options = {"header": header, "language_layers": language_layers(base)}
    with pytest.raises(AdapterInvalid, match="outside of the language model"):
        write_vllm_layout(tmp_path / "adapter", tmp_path / "vllm", **options)
    assert not (tmp_path / "vllm").exists()
    write_vllm_layout(tmp_path / "adapter", tmp_path / "vllm", **options, language_only=True)
    tensors = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    assert tensors
    assert all("text_model" in name for name in tensors)
    write_vllm_layout(tmp_path / "adapter", tmp_path / "all", **options, tower_connector=True)
    tensors = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(header.layers)
    assert any("vision_model" in name for name in tensors)


def test_an_adapter_of_the_vision_tower_alone_or_of_a_rank_too_large_is_refused(base, tmp_path):
    header = adapter(base, tmp_path / "vision", target=["out_proj"])
    layers = language_layers(base)
    with pytest.raises(AdapterInvalid, match="no layer of the language model"):
        write_vllm_layout(
            tmp_path / "vision",
            tmp_path / "one",
            header=header,
            language_layers=layers,
            language_only=True,
        )
    header = adapter(base, tmp_path / "large", r=600)
    with pytest.raises(AdapterInvalid, match="rank 600; vLLM serves at most 512"):
        write_vllm_layout(
            tmp_path / "large", tmp_path / "two", header=header, language_layers=layers
        )


def test_a_file_that_padding_would_make_too_large_is_refused_before_it_is_written(base, tmp_path):
    header = adapter(base, tmp_path / "adapter", r=1, rank_pattern={LAST: 300})
    options = {"header": header, "language_layers": language_layers(base)}
    small = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    with pytest.raises(AdapterInvalid, match=r"rank 320 .* at most"):
        write_vllm_layout(tmp_path / "adapter", tmp_path / "vllm", **options, max_bytes=3 * small)
    assert not (tmp_path / "vllm").exists()
