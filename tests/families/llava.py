"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision."""

from pathlib import Path

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import CHATML_TOKENS, NORMALIZATION, language_model, vision_tower
from tests.families.tokenizers import PreTrainedTokenizerFast, byte_tokenizer
from tests.families.weights import save_random

GRID_PIXELS = [[16, 32], [32, 16], [32, 32]]

VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message.role != 'system' %}"
    "{{ message.role | upper }}: {% endif %}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }} {% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}"
    "<<SYS>>\n{{ message.content[0].text }}\n<</SYS>>\n\n{% elif message.role == 'user' %}[INST] "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %} [/INST]"
    "{% else %} {% for part in message.content if part.type == 'text' %}{{ part.text }}"
    "{% endfor %}</s>{% endif %}{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}"
    "{{ ' ' if message.role == 'user' else '\n' }}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        ("<unk>", "<s>", "</s>", "<pad>", "<image>"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        named={"image_token": "<image>"},
    )


def build_llava(folder: Path) -> None:
    tokenizer = _llama_tokenizer()
    config = LlavaConfig(
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_config=vision_tower("clip_vision_model", num_hidden_layers=3, projection_dim=32),
        text_config=language_model("llama", tokenizer),
    )
    save_random(LlavaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="LlavaProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            **NORMALIZATION,
        },
        chat_template=VICUNA_TEMPLATE,
        settings={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    )


def build_llava_next(folder: Path) -> None:
    tokenizer = _llama_tokenizer()
    config = LlavaNextConfig(
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=GRID_PIXELS,
        vision_feature_layer=-2,
        vision_config=vision_tower("clip_vision_model", num_hidden_layers=3, projection_dim=32),
        text_config=language_model("mistral", tokenizer),
    )
    save_random(LlavaNextForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="LlavaNextProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_grid_pinpoints": GRID_PIXELS,
            **NORMALIZATION,
        },
        chat_template=MISTRAL_TEMPLATE,
        settings={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    )


def build_llava_next_video(folder: Path) -> None:
    tokenizer = byte_tokenizer(
        ("<unk>", "<s>", "</s>", "<pad>", "<video>", "<image>"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        named={"image_token": "<image>", "video_token": "<video>"},
    )
    config = LlavaNextVideoConfig(
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRID_PIXELS,
        vision_feature_layer=-2,
        vision_config=vision_tower("clip_vision_model", num_hidden_layers=3, projection_dim=32),
        text_config=language_model("llama", tokenizer),
    )
    save_random(LlavaNextVideoForConditionalGeneration, config, folder, tokenizer=tokenizer)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    write_processor(
        folder,
        processor_class="LlavaNextVideoProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": GRID_PIXELS,
            **size,
            **NORMALIZATION,
        },
        chat_template=VICUNA_TEMPLATE,
        settings={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        video_processor={"video_processor_type": "LlavaNextVideoVideoProcessor", **size},
    )


def build_llava_onevision(folder: Path) -> None:
    tokenizer = byte_tokenizer(
        (*CHATML_TOKENS, "<image>", "<video>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={"image_token": "<image>", "video_token": "<video>"},
    )
    config = LlavaOnevisionConfig(
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRID_PIXELS,
        vision_config=vision_tower("siglip_vision_model", vision_use_head=False),
        text_config=language_model("qwen2", tokenizer),
    )
    save_random(LlavaOnevisionForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="LlavaOnevisionProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 16, "width": 16},
            "image_grid_pinpoints": GRID_PIXELS,
            **NORMALIZATION,
        },
        chat_template=ONEVISION_TEMPLATE,
        settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        },
        video_processor={
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": 16, "width": 16},
        },
    )


CASES = (
    FamilyCase(model_type="llava", reads_images=True, build=build_llava, ends_every_turn=False),
    FamilyCase(model_type="llava_next", reads_images=True, build=build_llava_next),
    FamilyCase(
        model_type="llava_next_video",
        reads_images=True,
        build=build_llava_next_video,
        ends_every_turn=False,
        needs="No videos: rows hold images.",
    ),
    FamilyCase(model_type="llava_onevision", reads_images=True, build=build_llava_onevision),
)
