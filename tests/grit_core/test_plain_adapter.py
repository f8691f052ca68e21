"""Adapters of strangers, written anew for plain PEFT."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from grit_core.adapter_folder import check_against, read_adapter_folder
from grit_core.generation import AdapterSource, GenerationEngine, GenerationRequest
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model
from grit_core.plain_adapter import write_plain_adapter
from grit_core.records import parse_prompt
from tests.tiny_models import tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")


class Toy(nn.Module):
    """Two layers whose names end alike."""

    __module__ = "transformers.toy"  # PEFT writes down where a model comes from

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.tower = nn.ModuleDict({"proj": nn.Linear(6, 6), "out": nn.Linear(6, 4)})

    def forward(self, x):
        return self.tower["out"](self.tower["proj"](self.proj(x)))


MODULES = ["proj", "tower.proj", "tower.out"]


def base():
    torch.manual_seed(0)
    return Toy()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["proj", "out"]},
        {"target_modules": r"proj|tower\.out"},
        {"target_modules": r"(?:t\w+\.)?proj", "use_rslora": True},
        {
            "target_modules": ["proj", "out"],
            "rank_pattern": {"out": 1, "^proj": 2},
            "alpha_pattern": {"tower.proj": 9},
        },
    ],
)
def test_the_function_is_the_same_and_so_are_the_weights(tmp_path, options):
    trained = get_peft_model(base(), LoraConfig(r=3, lora_alpha=7, lora_dropout=0.3, **options))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained.eval()
    trained.save_pretrained(tmp_path / "sent")
    header = read_adapter_folder(tmp_path / "sent", max_rank=8, max_bytes=1 << 20)
    sha256 = write_plain_adapter(
        tmp_path / "sent",
        tmp_path / "own",
        header=header,
        base_model_name="tiny",
        architecture="LlamaForCausalLM",
        modules=MODULES,
    )
    weights = (tmp_path / "own" / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "sent" / "adapter_model.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(weights).hexdigest()
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "own")).eval()
    x = torch.randn(5, 6)
    assert not torch.allclose(trained(x), base()(x), atol=0.1)
    assert torch.equal(loaded(x), trained(x))
    again = read_adapter_folder(tmp_path / "own", max_rank=8, max_bytes=1 << 20)
    assert dict(again.layers) == dict(header.layers)


def test_nothing_that_was_sent_is_kept_but_numbers(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=3, target_modules=["out"]))
    model.save_pretrained(tmp_path / "sent")
    path = tmp_path / "sent" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"revision": "evil", "target_modules": "(a+)+$"}
    path.write_text(json.dumps(config))
    header = read_adapter_folder(tmp_path / "sent", max_rank=8, max_bytes=1 << 20)
    write_plain_adapter(
        tmp_path / "sent",
        tmp_path / "own",
        header=header,
        base_model_name="tiny",
        architecture="LlamaForCausalLM",
        modules=MODULES,
    )
    own = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert own["target_modules"] == ["tower.out"]
    assert own["base_model_name_or_path"] == "tiny"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    assert own["auto_mapping"] == mapping
    assert not {"revision", "peft_version"} & set(own)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_answers_with_it_as_with_what_was_sent(tmp_path):
    """Layers by a regex, own ranks and rsLoRA: what serving makes of the names and scales."""
    model = str(tiny_vlm_folder(tmp_path / "models"))
    torch.manual_seed(0)
    options = {"target_modules": r".*\.(q_proj|fc1|proj)", "rank_pattern": {"fc1": 2}}
    trained = get_peft_model(
        load_base_model(model), LoraConfig(r=4, lora_alpha=6, use_rslora=True, **options)
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trained.save_pretrained(tmp_path / "sent")
    header = read_adapter_folder(tmp_path / "sent", max_rank=8, max_bytes=1 << 24)
    inventory = build_inventory(model)
    check_against(header, inventory)
    write_plain_adapter(
        tmp_path / "sent",
        tmp_path / "own",
        header=header,
        base_model_name="tiny",
        architecture="LlamaForCausalLM",
        modules=[layer.name for layer in inventory.layers],
    )
    chat = parse_prompt([{"role": "user", "content": "hello there"}])
    request = GenerationRequest(chat=chat, max_new_tokens=12)
    engine = GenerationEngine()
    try:
        plain = engine.generate(model, request).text
        sent, own = (
            engine.generate(
                model, request, adapter=AdapterSource(id=name, folder=tmp_path / name)
            ).text
            for name in ("sent", "own")
        )
    finally:
        engine.close()
    assert own == sent != plain
