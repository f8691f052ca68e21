"""Rows that share steps give what each gives alone, whatever their adapters adapt."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from grit_core.adapter_folder import read_adapter_folder
from grit_core.data.encoder import ChatEncoder
from grit_core.data.image_decoding import decode_image
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_prompt
from grit_core.serving.adapter_weights import load_adapter_weights
from grit_core.serving.resident_model import Prompt, ResidentModel
from grit_core.serving.row_cache import RowCache
from tests.grit_core.serving.adapters import EVERYWHERE, TEXT, adapter_source
from tests.tiny_models import png_data_url, tiny_causal_folder, tiny_vlm_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_vlm_folder(tmp_path_factory.mktemp("models"), text_layers=3))


@pytest.fixture(scope="module")
def sources(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        adapter_source(base, folder, seed=1, rank=4, target=TEXT),
        adapter_source(base, folder, seed=2, rank=8, target=EVERYWHERE, size=0.5),
        adapter_source(base, folder, seed=3, rank=2, target=["v_proj", "proj"]),
        None,
    ]


def resident_of(base, **options):
    bounds = {"num_slots": 4, "max_adapter_bytes": 1 << 24}
    caches = {"image_cache_bytes": 1 << 20, "prefix_cache_bytes": 0}
    return ResidentModel.load(
        base, device=torch.device("cpu"), dtype="float32", **{**bounds, **caches, **options}
    )


def weights_of(resident, source):
    header = read_adapter_folder(source.folder, max_rank=64, max_bytes=1 << 24)
    return load_adapter_weights(
        source.folder,
        header,
        adapter_id=source.id,
        dtype=resident.dtype,
        linear_layers=resident.linear_layers,
    )


def prompt_of(resident, text, image):
    content = [
        {"type": "image_url", "image_url": {"url": png_data_url(image)}},
        {"type": "text", "text": text},
    ]
    chat = parse_prompt([{"role": "user", "content": content}])
    images = [decode_image(data, index=i) for i, data in enumerate(chat.images)]
    inputs = resident.encoder.encode_prompt(chat.messages, images)
    return Prompt(inputs=inputs, images=(f"image {image}",), image_tokens=4)


def likeliest(resident, logits):
    """The likeliest token that is no image's, which the plain model would look for pixels for."""
    masked = logits.clone()
    masked[resident.encoder.image_token_ids] = -torch.inf
    return int(masked.argmax())


@torch.inference_mode()
def test_mixed_batches_give_the_logits_of_merged_models(base, sources):
    """Vision, connector and text layers; three ranks and the base model; rows of any length."""
    resident = resident_of(base)
    assert resident.shares_steps
    adapters = [None if s is None else weights_of(resident, s) for s in sources]
    merged = [
        load_base_model(base)
        if source is None
        else PeftModel.from_pretrained(load_base_model(base), str(source.folder)).merge_and_unload()
        for source in sources
    ]
    order = [2, 0, 3, 1, 0]
    rows, tokens, slots, prompts = RowCache(max_rows=8), [], [], []
    for row, number in enumerate(order):
        prompt = prompt_of(resident, "What? " * (row + 1), row)
        adapter = adapters[number]
        slot = None if adapter is None else resident.slots.acquire(adapter)
        prefilled = resident.prefill(prompt, slot=slot, adapter=adapter)
        expected = merged[number](**prompt.inputs).logits[0, -1]
        assert (prefilled.logits_V - expected).abs().max() <= 1e-4
        rows.join(prefilled.cache)
        slots.append(slot)
        tokens.append([likeliest(resident, expected)])
        prompts.append(prompt)
    for _ in range(6):
        found = resident.step([t[-1] for t in tokens], rows, slots=slots, offsets=[0] * len(slots))
        for row, number in enumerate(order):
            inputs = dict(prompts[row].inputs)
            answer = torch.tensor([tokens[row]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            expected = merged[number](**inputs).logits[0, -1]
            assert (found[row] - expected).abs().max() <= 1e-4
            tokens[row].append(likeliest(resident, expected))


@torch.inference_mode()
def test_features_of_an_image_are_shared_by_adapters_that_leave_the_vision_side_alone(
    base, sources
):
    resident = resident_of(base)
    adapters = [None if s is None else weights_of(resident, s) for s in sources]
    cached = []
    for number in (0, 3, 1, 1, 2, 0):
        slot = None if adapters[number] is None else resident.slots.acquire(adapters[number])
        prompt = prompt_of(resident, "What?", 7)
        found = resident.prefill(prompt, slot=slot, adapter=adapters[number])
        cached.append(found.image_cached)
        fresh = resident_of(base, image_cache_bytes=0)
        own = None if adapters[number] is None else fresh.slots.acquire(adapters[number])
        expected = fresh.prefill(prompt, slot=own, adapter=adapters[number])
        assert not expected.image_cached
        assert torch.equal(found.logits_V, expected.logits_V)
    # 0 and the base adapt text alone and share; 1 and 2 have their own.
    assert cached == [False, True, False, True, False, True]
    assert resident.images.hits == 3
    assert resident.images.misses == 3


@torch.inference_mode()
def test_image_features_beyond_the_bound_make_room(base):
    resident = resident_of(base)
    resident.prefill(prompt_of(resident, "What?", 0), slot=None)
    size = resident.images.num_bytes
    assert size == 4 * 32 * 4  # four tokens of the text model's width: the tower's states are gone
    small = resident_of(base, image_cache_bytes=2 * size)
    for image in (0, 1, 0, 2, 0, 1):
        small.prefill(prompt_of(small, "What?", image), slot=None)
    assert small.images.num_bytes == 2 * size
    assert small.images.hits == 2  # both of image 0; 1 had made room for 2


@torch.inference_mode()
def test_a_prompt_that_goes_on_from_an_answered_one_computes_only_what_is_new(base, sources):
    resident = resident_of(base, prefix_cache_bytes=1 << 20)
    adapter = weights_of(resident, sources[0])
    slot = resident.slots.acquire(adapter)
    first = prompt_of(resident, "What is this, and why?", 1)
    rows = RowCache(max_rows=1)
    rows.join(resident.prefill(first, slot=slot, adapter=adapter).cache)
    ids = first.ids_T.tolist()
    resident.prefixes.keep(ids, rows.copy_row(0), scope=adapter.id, images=first.images)
    longer = prompt_of(resident, "What is this, and why? And where?", 1)
    found = resident.prefill(longer, slot=slot, adapter=adapter)
    expected = resident_of(base)
    own = expected.slots.acquire(adapter)
    plain = expected.prefill(longer, slot=own, adapter=adapter)
    assert plain.cached_tokens == 0
    assert found.cached_tokens > 20
    assert found.cached_tokens < len(longer.ids_T)
    assert (found.logits_V - plain.logits_V).abs().max() <= 1e-4
    other_image = prompt_of(resident, "What is this, and why? And where?", 2)
    assert resident.prefill(other_image, slot=slot, adapter=adapter).cached_tokens == 0
    assert resident.prefill(longer, slot=None).cached_tokens == 0  # another adapter's keys


def sliding_window_folder(tmp_path):
    """A Mistral that attends to the last 8 tokens alone."""
    plain = tiny_causal_folder(tmp_path)
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "sliding")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "sliding")
    return str(tmp_path / "sliding")


def test_models_whose_rows_cannot_share_steps_are_told_apart(tmp_path):
    assert resident_of(str(tiny_causal_folder(tmp_path))).shares_steps
    assert not resident_of(sliding_window_folder(tmp_path)).shares_steps


def qwen2_vl():
    """A small Qwen2-VL: an image takes fewer positions than tokens, in three dimensions."""
    config = AutoConfig.for_model("qwen2_vl")
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 10_000.0,
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(
        type(config)(
            text_config=text,
            vision_config=vision,
            image_token_id=395,
            video_token_id=396,
            vision_start_token_id=397,
            vision_end_token_id=398,
        )
    ).eval()


@torch.inference_mode()
def test_positions_in_several_dimensions_go_on_as_in_the_models_own_generate(tmp_path):
    # Its processor needs torchvision, so that the prompt is written by hand.
    encoder = ChatEncoder(load_processor(tiny_causal_folder(tmp_path)))
    bounds = {"num_slots": 1, "max_adapter_bytes": 1, "image_cache_bytes": 1 << 20}
    resident = ResidentModel(qwen2_vl(), encoder, **bounds, prefix_cache_bytes=0)
    assert resident.shares_steps
    ids = torch.tensor([[1, 20, 397, *[395] * 8, 398, 21, 22]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 395).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 4]]),
    }
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = qwen2_vl().generate(**inputs, **options)[0, ids.shape[1] :].tolist()
    prompt = Prompt(inputs=inputs, images=("an image",), image_tokens=8)
    rows, offsets, found = RowCache(max_rows=2), [], [[], []]
    for row, one in enumerate((
        prompt,
        Prompt(inputs={"input_ids": ids[:, :2]}, images=(), image_tokens=0),
    )):
        prefilled = resident.prefill(one, slot=None)
        rows.join(prefilled.cache)
        offsets.append(prefilled.offset)
        found[row].append(int(prefilled.logits_V.argmax()))
    assert offsets[0] < offsets[1] == 0
    while len(found[0]) < 8:
        logits = resident.step([t[-1] for t in found], rows, slots=[None] * 2, offsets=offsets)
        for row in range(2):
            found[row].append(int(logits[row].argmax()))
    assert found[0] == expected
