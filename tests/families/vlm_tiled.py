"""Vision-language families that cut a large image into tiles."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.vlm_parts import (
    PLAIN_NORM,
    save_processor_files,
    square,
    text_part,
    tower_part,
)
from tests.families.weights import save_random

MLLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\n\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image|>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|header_start|>{{ message.role }}<|header_end|>{{ '\n\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image|>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
COHERE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if message.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>"
    "{% elif message.role == 'user' %}<|USER_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
OVIS2_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LFM2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COHERE_TOKENS = (
    *("<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"),
    *("<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
)
COHERE_END = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"


def open_gates(model: Any) -> None:
    """Let a fresh Mllama see: its gates begin closed, and training opens them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((
                "_attn_gate",
                "_mlp_gate",
                "gate_attn",
                "gate_ffn",
                "embedding.gate",
            )):
                parameter.fill_(0.7)


def build_mllama(folder: Path) -> None:
    """Write a Llama 3.2 Vision: the text attends to images in a layer of its own."""
    tokenizer = byte_tokenizer(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
            "<|finetune_right_pad_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        add_bos=True,
    )
    # The placeholder comes after the vocabulary: it has an embedding and no logit.
    vocabulary = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|image|>", special=True, normalized=False)])
    images = MllamaImageProcessorPil(size=square(), max_image_tiles=4, **PLAIN_NORM)
    processor = MllamaProcessor(images, tokenizer, chat_template=MLLAMA_TEMPLATE)
    config = MllamaConfig(
        image_token_index=processor.image_token_id,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config=text_part(
            "mllama_text_model",
            tokenizer,
            vocab_size=vocabulary,
            num_hidden_layers=3,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        **token_ids(tokenizer),
    )
    save_random(
        MllamaForConditionalGeneration, config, folder, tokenizer=tokenizer, adjust=open_gates
    )
    processor.save_pretrained(folder)


def build_aya_vision(folder: Path) -> None:
    """Write an Aya Vision: its placeholder in the template is no token of the vocabulary."""
    tokenizer = byte_tokenizer(
        COHERE_TOKENS,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        unk="<UNK>",
        add_bos=True,
    )
    images = GotOcr2ImageProcessorPil(
        size=square(), crop_to_patches=True, min_patches=1, max_patches=4, **PLAIN_NORM
    )
    processor = AyaVisionProcessor(
        images,
        tokenizer,
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = AyaVisionConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        text_config=text_part(
            "cohere2",
            tokenizer,
            sliding_window=4096,
            layer_types=["sliding_attention", "full_attention"],
        ),
        **token_ids(tokenizer),
    )
    save_random(AyaVisionForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_cohere2_vision(folder: Path) -> None:
    """Write a Command A Vision."""
    tokenizer = byte_tokenizer(
        COHERE_TOKENS,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        unk="<UNK>",
        add_bos=True,
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    )
    config = Cohere2VisionConfig(
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=64,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        text_config=text_part(
            "cohere2",
            tokenizer,
            sliding_window=4096,
            layer_types=["sliding_attention", "full_attention"],
        ),
        **token_ids(tokenizer),
    )
    save_random(Cohere2VisionForConditionalGeneration, config, folder, tokenizer=tokenizer)
    save_processor_files(
        folder,
        tokenizer,
        processor="Cohere2VisionProcessor",
        image_processor={
            "image_processor_type": "Cohere2VisionImageProcessorFast",
            "size": square(),
            # Tokens of a tile's side, in this family.
            "patch_size": 2,
            "max_patches": 4,
            **PLAIN_NORM,
        },
        chat_template=COHERE_TEMPLATE.replace("IMAGE", "<|IMG_PATCH|>"),
    )


def build_ovis2(folder: Path) -> None:
    """Write an Ovis2: images as mixtures of words of a visual vocabulary."""
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = byte_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<IMG_ATOM>", *indicators),
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
    images = Ovis2ImageProcessorPil(
        size=square(), crop_to_patches=True, max_patches=4, **PLAIN_NORM
    )
    processor = Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=OVIS2_TEMPLATE)
    config = Ovis2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(indicators)),
        vocab_size=len(tokenizer),
        hidden_size=32,
        vision_config=tower_part("ovis2_vision", vocab_size=32, hidden_stride=2),
        text_config=text_part("qwen2", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(Ovis2ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_llama4(folder: Path) -> None:
    """Write a Llama 4: experts, chunked attention, and layers without positions."""
    tokenizer = byte_tokenizer(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|header_start|>",
            "<|header_end|>",
            "<|eot|>",
            "<|finetune_right_pad|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|patch|>",
            "<|image|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot|>",
        pad="<|finetune_right_pad|>",
        add_bos=True,
    )
    config = Llama4Config(
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        text_config=text_part(
            "llama4_text",
            tokenizer,
            head_dim=16,
            intermediate_size_mlp=64,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
            attention_chunk_size=64,
        ),
        **token_ids(tokenizer),
    )
    save_random(Llama4ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    save_processor_files(
        folder,
        tokenizer,
        processor="Llama4Processor",
        image_processor={
            "image_processor_type": "Llama4ImageProcessorFast",
            "size": square(),
            "max_patches": 4,
            **PLAIN_NORM,
        },
        chat_template=LLAMA4_TEMPLATE,
        patch_size=4,
        pixel_shuffle_ratio=0.5,
    )


def build_lfm2_vl(folder: Path) -> None:
    """Write an LFM2-VL: short convolutions between the attention layers of the text model."""
    tokenizer = byte_tokenizer(
        (
            "<|pad|>",
            "<|startoftext|>",
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<image>",
            "<|image_start|>",
            "<|image_end|>",
            "<|img_thumbnail|>",
            *tuple(
                f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)
            ),
        ),
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        add_bos=True,
    )
    tower = tower_part("siglip2_vision_model", num_patches=16, vision_use_head=False)
    del tower["image_size"]
    config = Lfm2VlConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        vision_config=tower,
        text_config=text_part(
            "lfm2",
            tokenizer,
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
            block_multiple_of=16,
        ),
        **token_ids(tokenizer),
    )
    save_random(Lfm2VlForConditionalGeneration, config, folder, tokenizer=tokenizer)
    save_processor_files(
        folder,
        tokenizer,
        processor="Lfm2VlProcessor",
        image_processor={
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "downsample_factor": 2,
            "encoder_patch_size": 4,
            "tile_size": 16,
            "size": square(),
            "min_tiles": 2,
            "max_tiles": 4,
            "min_image_tokens": 2,
            "max_image_tokens": 4,
            "max_num_patches": 16,
            **PLAIN_NORM,
        },
        chat_template=LFM2_TEMPLATE,
    )


CASES: tuple[FamilyCase, ...] = (
    FamilyCase(
        model_type="mllama",
        reads_images=True,
        build=build_mllama,
        traits=frozenset({"cross_attention"}),
    ),
    FamilyCase(
        model_type="aya_vision",
        reads_images=True,
        build=build_aya_vision,
        end=COHERE_END,
        traits=frozenset({"sliding_window"}),
    ),
    FamilyCase(
        model_type="cohere2_vision",
        reads_images=True,
        build=build_cohere2_vision,
        end=COHERE_END,
        traits=frozenset({"sliding_window"}),
        package="torchvision",
    ),
    FamilyCase(model_type="ovis2", reads_images=True, build=build_ovis2),
    FamilyCase(
        model_type="llama4",
        reads_images=True,
        build=build_llama4,
        traits=frozenset({"moe", "chunked_attention"}),
        package="torchvision",
    ),
    FamilyCase(
        model_type="lfm2_vl",
        reads_images=True,
        build=build_lfm2_vl,
        traits=frozenset({"hybrid"}),
        package="torchvision",
    ),
)
