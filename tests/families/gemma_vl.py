"""Gemma 3, 3n and 4: sliding windows, images attended to in both directions."""

import json
from pathlib import Path

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import NORMALIZATION, language_model, vision_tower
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.weights import save_random

GEMMA3_TEMPLATE = (
    "{% macro write(content) %}{% if content is string %}{{ content | trim }}{% else %}"
    "{% for part in content %}{% if part.type == 'image' %}<start_of_image>"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set first = write(messages[0].content) + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns of user and assistant must alternate.') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ write(message.content) }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4_TEMPLATE = (
    "{% macro write(content) %}{% if content is string %}{{ content | trim }}{% else %}"
    "{% for part in content %}{% if part.type == 'image' %}\n\n<|image|>\n\n"
    "{% else %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{{ bos_token }}{% for message in messages %}"
    "<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ write(message.content) }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def _end_with(folder: Path, *ends: int) -> None:
    """Declare the ends of an answer as the family does: in `generation_config.json`."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(ends)}))


def build_gemma3(folder: Path) -> None:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    main = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = byte_tokenizer(
        (*main, *named.values()),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        named=named,
    )
    text = language_model(
        "gemma3_text",
        tokenizer,
        layers=3,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision_tower("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        **token_ids(tokenizer),
    )
    save_random(Gemma3ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    _end_with(folder, tokenizer.eos_token_id, end)
    write_processor(
        folder,
        processor_class="Gemma3Processor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 16, "width": 16},
            **NORMALIZATION,
        },
        chat_template=GEMMA3_TEMPLATE,
        settings={"image_seq_length": 4},
    )


def build_gemma3n(folder: Path) -> None:
    """The config suffices: its vision tower is timm's, whose absence is what is tried."""
    (folder / "config.json").write_text(
        json.dumps({
            "model_type": "gemma3n",
            "architectures": ["Gemma3nForConditionalGeneration"],
            "text_config": {"model_type": "gemma3n_text", "num_hidden_layers": 5},
            "vision_config": {
                "model_type": "gemma3n_vision",
                "architecture": "mobilenetv5_300m_enc",
                "num_classes": 2,
            },
            "audio_config": {"model_type": "gemma3n_audio"},
        })
    )


def build_gemma4(folder: Path) -> None:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    main = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|video|>")
    tokenizer = byte_tokenizer(
        (*main, *named.values()),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        named=named,
    )
    text = language_model(
        "gemma4_text",
        tokenizer,
        layers=4,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size_per_layer_input=8,
        use_bidirectional_attention="vision",
        tie_word_embeddings=True,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pooling_kernel_size": 2,
        "patch_size": 4,
        "position_embedding_size": 64,
    }
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("boi", "eoi")},
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        **token_ids(tokenizer),
    )
    save_random(Gemma4ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _end_with(folder, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn|>"))
    patches = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    write_processor(
        folder,
        processor_class="Gemma4Processor",
        tokenizer=tokenizer,
        image_processor={"image_processor_type": "Gemma4ImageProcessor", **patches},
        chat_template=GEMMA4_TEMPLATE,
        settings={"image_seq_length": 70},
        video_processor={"video_processor_type": "Gemma4VideoProcessor", **patches},
    )
    path = folder / "processor_config.json"
    audio = {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "sampling_rate": 16000}
    path.write_text(json.dumps({**json.loads(path.read_text()), "feature_extractor": audio}))


CASES = (
    FamilyCase(
        model_type="gemma3",
        reads_images=True,
        build=build_gemma3,
        end="<end_of_turn>",
        traits=frozenset({"sliding_window", "image_attention_both_ways"}),
    ),
    FamilyCase(
        model_type="gemma3n",
        reads_images=True,
        build=build_gemma3n,
        refused=r"needs the Python package timm, which is not installed here: pip install timm",
        needs="Its vision tower is one of timm's, a package that the service does not install.",
    ),
    FamilyCase(
        model_type="gemma4",
        reads_images=True,
        build=build_gemma4,
        end="<turn|>",
        traits=frozenset({"sliding_window", "image_attention_both_ways", "shared_keys"}),
    ),
)
