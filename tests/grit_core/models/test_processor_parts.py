"""Processors are put together without their video and audio parts, from folders old and new."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

from grit_core.errors import ModelUnavailable
from grit_core.models.pretrained import load_processor
from grit_core.models.processor_parts import UnusedPart
from tests.families.folders import write_processor
from tests.families.gemma_vl import build_gemma4
from tests.families.internvl import build_internvl
from tests.families.qwen_vl import build_qwen2_vl
from tests.families.smolvlm import build_smolvlm
from tests.families.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    build_qwen2_vl(folder)
    return folder


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(qwen, tmp_path / "model")


def number_of_image_tokens(processor: object) -> int:
    image = Image.new("RGB", (32, 32))
    assert callable(processor)
    ids = processor(text=["<|image_pad|>"], images=[[image]])["input_ids"][0]
    return list(ids).count(processor.image_token_id)


def test_every_part_is_the_family_s_own_but_the_one_for_videos(qwen: Path) -> None:
    processor = load_processor(qwen)
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert isinstance(processor.video_processor, UnusedPart)
    assert processor.image_processor.size["longest_edge"] == 1024
    assert number_of_image_tokens(processor) == 16


def test_settings_that_a_processor_copies_from_an_unused_part_are_none() -> None:
    part = UnusedPart()
    assert part.slice_mode is None
    assert json.dumps(part) == "{}"
    assert copy.deepcopy(part) == part


def test_a_part_for_sounds_is_not_needed_either(tmp_path: Path) -> None:
    build_gemma4(tmp_path)
    path = tmp_path / "processor_config.json"
    declared = json.loads(path.read_text())
    del declared["feature_extractor"]
    path.write_text(json.dumps(declared))
    processor = load_processor(tmp_path)
    assert isinstance(processor.feature_extractor, UnusedPart)
    ids = processor(text=["<|image|>"], images=[[Image.new("RGB", (32, 32))]])["input_ids"][0]
    assert list(ids).count(processor.image_token_id) > 1


def test_the_class_is_found_in_folders_without_a_processor_config(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    assert number_of_image_tokens(load_processor(folder)) == 16


def test_the_class_follows_from_the_model_where_no_file_names_it(folder: Path) -> None:
    (folder / "processor_config.json").unlink()
    path = folder / "preprocessor_config.json"
    declared = json.loads(path.read_text())
    del declared["processor_class"]
    path.write_text(json.dumps(declared))
    assert number_of_image_tokens(load_processor(folder)) == 16


def test_a_class_that_transformers_does_not_have_gives_way_to_the_model_s(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        declared = json.loads(path.read_text())
        path.write_text(json.dumps({**declared, "processor_class": "NoSuchProcessor"}))
    assert number_of_image_tokens(load_processor(folder)) == 16


def test_an_older_folder_s_template_and_tokenizer_are_read(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    path = folder / "tokenizer_config.json"
    declared = json.loads(path.read_text())
    for name in ("backend", "model_specific_special_tokens", "extra_special_tokens"):
        del declared[name]
    tokens = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    older = {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": tokens}
    path.write_text(json.dumps({**declared, **older}))
    processor = load_processor(folder)
    assert processor.chat_template == template
    assert number_of_image_tokens(processor) == 16


def test_a_folder_without_an_image_processor_is_refused_with_the_file_it_lacks(
    folder: Path,
) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"preprocessor_config\.json"):
        load_processor(folder)


def test_pixtral_s_processor_needs_no_torchvision(folder: Path) -> None:
    marks = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = byte_tokenizer(("<pad>", "<s>", "</s>", *marks), bos="<s>", eos="</s>", pad="<pad>")
    write_processor(
        folder,
        processor_class="PixtralProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 16},
            "patch_size": {"height": 4, "width": 4},
        },
        chat_template="{{ messages }}",
        settings={"patch_size": 4, "spatial_merge_size": 2},
    )
    processor = load_processor(folder)
    assert type(processor).__name__ == "PixtralProcessor"
    assert type(processor.image_processor).__name__ == "PixtralImageProcessorPil"
    ids = processor(text=["[IMG]"], images=[[Image.new("RGB", (16, 8))]])["input_ids"][0]
    marked = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG]", "[IMG_END]"])
    assert [int(token) for token in ids] == marked
    withheld = sys.modules.get("transformers.models.pixtral.image_processing_pixtral")
    assert withheld is None or hasattr(withheld, "PixtralImageProcessor")


def test_a_file_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"processor_config\.json is no JSON"):
        load_processor(folder)


def test_a_tokenizer_without_the_tokens_that_a_processor_reads_is_refused_in_words(
    tmp_path: Path,
) -> None:
    build_internvl(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    declared = json.loads(path.read_text())
    declared.pop("model_specific_special_tokens")
    path.write_text(json.dumps({k: v for k, v in declared.items() if "_image_token" not in k}))
    with pytest.raises(ModelUnavailable, match="start_image_token"):
        load_processor(tmp_path)


def test_smolvlm2_s_images_need_no_package_that_spells_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    build_smolvlm(tmp_path)
    processor = load_processor(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(text=[text], images=[[Image.new("RGB", (16, 16))]])["input_ids"][0]
    assert list(ids).count(processor.image_token_id) == 20
