"""What the probe at registration finds, in words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from grit_core.errors import ModelUnavailable
from grit_core.inventory import ModelInventory
from grit_core.models import probe
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_processor
from grit_core.models.probe import probe_model
from tests.tiny_models import (
    CHATML_TEMPLATE,
    IMAGE_TOKENS,
    byte_tokenizer,
    tiny_causal_folder,
    tiny_vlm_folder,
)

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def vlm(models: Path, tmp_path: Path) -> Path:
    """A folder of an image model, to be changed."""
    return shutil.copytree(tiny_vlm_folder(models), tmp_path / "vlm")


@pytest.fixture
def causal(models: Path, tmp_path: Path) -> Path:
    """A folder of a text model, to be changed."""
    return shutil.copytree(tiny_causal_folder(models), tmp_path / "causal")


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal_of(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        probe_model(folder)
    return str(caught.value)


def test_an_image_model_takes_text_and_up_to_two_images(vlm: Path) -> None:
    inventory = probe_model(vlm)
    facts = inventory.probe
    assert facts is not None
    assert (facts.takes_text_only, facts.max_images) == (True, 2)
    assert facts.image_tokens == IMAGE_TOKENS
    assert facts.default_layers == 2 * 2 + 2 * 2 + 1
    assert facts.notes == ()


def test_a_text_model_takes_no_image(causal: Path) -> None:
    facts = probe_model(causal).probe
    assert facts is not None
    assert (facts.takes_text_only, facts.max_images, facts.image_tokens) == (True, 0, None)
    assert facts.default_layers == 4


def test_the_probe_is_no_part_of_the_hash_and_survives_storage(vlm: Path) -> None:
    probed = probe_model(vlm)
    assert probed.hash == build_inventory(vlm).hash
    stored = ModelInventory.from_json(json.loads(json.dumps(probed.to_json())))
    assert stored == probed
    older = {name: value for name, value in probed.to_json().items() if name != "probe"}
    assert ModelInventory.from_json(older).probe is None


def test_a_tensor_that_is_not_in_the_files_is_named(vlm: Path) -> None:
    name = "model.connector.modality_projection.proj.weight"
    edit_weights(vlm, lambda tensors: tensors.pop(name))
    message = refusal_of(vlm)
    assert name in message
    assert "lack 1 tensors" in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes(causal: Path) -> None:
    edit_json(causal / "config.json", lambda config: config.update(intermediate_size=48))
    message = refusal_of(causal)
    assert "config.json" in message
    assert "stored as [32, 64]" in message
    assert "expects [32, 48]" in message


def test_a_file_that_was_copied_in_part_is_named(causal: Path) -> None:
    whole = (causal / WEIGHTS).read_bytes()
    (causal / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    message = refusal_of(causal)
    assert WEIGHTS in message
    assert "incomplete" in message


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ({"a": "model-00002-of-00002.safetensors"}, "model-00002-of-00002.safetensors"),
        ({"a": "../model.safetensors"}, "beside it"),
        ({}, "no file at all"),
        (["a"], "no usable weight_map"),
    ],
)
def test_an_index_that_leads_to_no_file_is_refused(causal: Path, names: object, word: str) -> None:
    (causal / WEIGHTS).rename(causal / "model-00001-of-00002.safetensors")
    (causal / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert word in refusal_of(causal)


def test_weights_under_a_name_that_is_not_looked_for_are_refused(causal: Path) -> None:
    (causal / WEIGHTS).rename(causal / "consolidated.safetensors")
    assert "model.safetensors.index.json" in refusal_of(causal)


def test_tensors_that_the_model_does_not_use_are_a_note(causal: Path) -> None:
    edit_weights(causal, lambda tensors: tensors.update({"mtp.head.weight": torch.zeros(2, 2)}))
    facts = probe_model(causal).probe
    assert facts is not None
    assert "mtp.head.weight" in facts.notes[0]


def test_one_tensor_for_each_expert_is_complete_and_experts_in_one_tensor_are_no_layers(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    config.save_pretrained(tmp_path)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (len(tokenizer), 16),
        "lm_head.weight": (len(tokenizer), 16),
        "model.norm.weight": (16,),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.post_attention_layernorm.weight": (16,),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.block_sparse_moe.gate.weight": (2, 16),
    }
    for expert in range(2):
        start = f"{layer}.block_sparse_moe.experts.{expert}"
        shapes |= {f"{start}.w1.weight": (8, 16), f"{start}.w3.weight": (8, 16)}
        shapes |= {f"{start}.w2.weight": (16, 8)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS)
    facts = probe_model(tmp_path).probe
    assert facts is not None
    assert facts.default_layers == 2


def test_an_image_model_with_only_a_tokenizer_names_the_missing_files(vlm: Path) -> None:
    (vlm / "processor_config.json").unlink()
    message = refusal_of(vlm)
    assert "preprocessor_config.json" in message


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    causal: Path,
) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()

    edit_weights(causal, shrink)
    edit_json(causal / "config.json", lambda config: config.update(vocab_size=100))
    message = refusal_of(causal)
    assert "100 embeddings" in message


def test_an_image_token_that_the_processor_never_writes_is_refused(vlm: Path) -> None:
    edit_json(vlm / "config.json", lambda config: config.update(image_token_id=8))
    message = refusal_of(vlm)
    assert "image_token_id" in message
    assert "token 8" in message


def test_a_processor_that_packs_the_images_of_a_batch_is_refused(
    vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(vlm)

    class Packing(type(processor)):  # type: ignore[misc]  # of the library
        def __call__(self, *args: Any, **options: Any) -> Any:
            inputs = super().__call__(*args, **options)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = torch.cat(list(inputs["pixel_values"]), dim=-1)[None]
            return inputs

    processor.__class__ = Packing
    monkeypatch.setattr(probe, "load_processor", lambda _: processor)
    with pytest.raises(ModelUnavailable, match="joins pixel_values of two rows to"):
        probe.probe_model(vlm)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the division
def test_pixels_that_are_not_finite_are_refused(vlm: Path) -> None:
    def no_spread(config: dict[str, Any]) -> None:
        config["image_processor"]["image_std"] = [0.0, 0.0, 0.0]

    edit_json(vlm / "processor_config.json", no_spread)
    message = refusal_of(vlm)
    assert "image_std" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only one role') }}",
        "{{ messages[0]['content'] | unknown_filter }}",
        "{% for message in messages %}",
    ],
)
def test_a_template_that_fails_is_the_models_failure(causal: Path, template: str) -> None:
    (causal / "chat_template.jinja").write_text(template)
    assert "cannot encode a row of text" in refusal_of(causal)


def test_a_template_that_leaves_out_the_answer_is_the_models_failure(causal: Path) -> None:
    (causal / "chat_template.jinja").write_text("nothing of the chat")
    assert "chat template" in refusal_of(causal)


def test_a_torn_tokenizer_is_the_models_failure(causal: Path) -> None:
    (causal / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    assert "The processor of" in refusal_of(causal)


def test_a_tokenizer_that_is_only_a_sentencepiece_model_is_read(causal: Path) -> None:
    text = causal / "text.txt"
    words = ["what is shown here", "a small test picture", "user and assistant speak in turns"]
    text.write_text("\n".join(f"{word} {number}" for word in words for number in range(40)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(causal / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    (causal / "tokenizer.json").unlink()
    (causal / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (causal / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = json.loads((causal / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 320})).save_pretrained(causal)
    facts = probe_model(causal).probe
    assert facts is not None
    assert facts.default_layers == 4


def test_a_model_whose_only_linear_layer_is_its_output_is_refused(causal: Path) -> None:
    vocabulary = json.loads((causal / "config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=2, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(causal)
    assert "8 Conv1D; LoRA is put on nn.Linear layers only" in refusal_of(causal)


def test_a_model_type_without_default_layers_is_ready_and_says_so(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    config = RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    RwkvForCausalLM(config).save_pretrained(tmp_path)
    facts = probe_model(tmp_path).probe
    assert facts is not None
    assert facts.default_layers == 0
    assert "No default layers are known for the model type rwkv" in " ".join(facts.notes)
