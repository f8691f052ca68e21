"""Vision-language families whose images are a fixed number of tokens each."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.vlm_parts import PLAIN_NORM, SIDE_PIXELS, square, text_part, tower_part
from tests.families.weights import save_random

IDEFICS2_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ ('' if loop.previtem is defined else ' ') + part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
VIPLLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content[0].text + ' ' }}{% else %}"
    "{{ 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ ' ' if message.role == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DEEPSEEK_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content[0].text + '\n\n' }}{% else %}"
    "{{ 'User: ' if message.role == 'user' else 'Assistant: ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image_placeholder>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\n\n' if message.role == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
JANUS_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content[0].text + '\n\n' }}{% else %}"
    "{{ '<|User|>: ' if message.role == 'user' else '<|Assistant|>: ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image_placeholder>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\n\n' if message.role == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
ARIA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<fim_prefix><|img|><fim_suffix>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

DEEPSEEK_BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEEPSEEK_PAD = "<\uff5c\u2581pad\u2581\uff5c>"


def write_paligemma_prompt(question: str, num_images: int) -> str:
    """The text that PaliGemma's processor is given; it adds BOS and a line feed itself."""
    return "<image>" * num_images + question


def build_paligemma(folder: Path) -> None:
    """Write a PaliGemma 1, which has no chat template: its processor builds the prompt itself."""
    tokenizer = byte_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        named={"image_token": "<image>"},
    )
    images = SiglipImageProcessorPil(size=square(), image_seq_length=16, **PLAIN_NORM)
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        projection_dim=32,
        hidden_size=32,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        text_config=text_part("gemma", tokenizer, head_dim=16),
        **token_ids(tokenizer),
    )
    save_random(PaliGemmaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_paligemma2(folder: Path) -> None:
    """Write a PaliGemma 2: Gemma 2's windows and capped logits under the same processor."""
    tokenizer = byte_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        named={"image_token": "<image>"},
    )
    images = SiglipImageProcessorPil(size=square(), image_seq_length=16, **PLAIN_NORM)
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        projection_dim=32,
        hidden_size=32,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        text_config=text_part(
            "gemma2", tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=4096
        ),
        **token_ids(tokenizer),
    )
    save_random(PaliGemmaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def strengthen_resampler(model: Any) -> None:
    """Let a fresh Idefics2's latents hear the image: they begin larger than what they attend to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.connector.") and name.endswith("_proj.weight"):
                parameter.mul_(20)


def build_idefics2(folder: Path) -> None:
    """Write an Idefics2: images of any shape, resampled to a fixed number of tokens."""
    tokenizer = byte_tokenizer(
        ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        bos="<s>",
        eos="</s>",
        pad="<unk>",
        unk="<unk>",
        add_bos=True,
    )
    images = Idefics2ImageProcessorPil(
        size={"shortest_edge": 8, "longest_edge": SIDE_PIXELS}, **PLAIN_NORM
    )
    processor = Idefics2Processor(
        images, tokenizer, image_seq_len=4, chat_template=IDEFICS2_TEMPLATE
    )
    config = Idefics2Config(
        image_token_id=processor.image_token_id,
        vision_config=tower_part("idefics2_vision"),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config=text_part("mistral", tokenizer, sliding_window=4096),
        **token_ids(tokenizer),
    )
    save_random(
        Idefics2ForConditionalGeneration,
        config,
        folder,
        tokenizer=tokenizer,
        adjust=strengthen_resampler,
    )
    processor.save_pretrained(folder)


def build_vipllava(folder: Path) -> None:
    """Write a VipLLaVA: features of several layers of a CLIP tower."""
    tokenizer = byte_tokenizer(
        ("<unk>", "<s>", "</s>", "<image>", "<pad>"),
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE_PIXELS}, crop_size=square(), **PLAIN_NORM
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VIPLLAVA_TEMPLATE,
    )
    config = VipLlavaConfig(
        image_token_index=processor.image_token_id,
        image_seq_length=16,
        vision_feature_layer=[-2, -1],
        vision_config=tower_part("clip_vision_model", projection_dim=32),
        text_config=text_part("llama", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(VipLlavaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def _deepseek_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        (DEEPSEEK_BEGIN, DEEPSEEK_END, DEEPSEEK_PAD, "<image_placeholder>", *more),
        bos=DEEPSEEK_BEGIN,
        eos=DEEPSEEK_END,
        pad=DEEPSEEK_PAD,
        add_bos=True,
        named={"image_token": "<image_placeholder>"},
    )


def build_deepseek_vl(folder: Path) -> None:
    """Write a DeepSeek-VL 1.3B in small: one SigLIP tower."""
    tokenizer = _deepseek_tokenizer()
    images = DeepseekVLImageProcessorPil(size=square(), min_size=4, **PLAIN_NORM)
    processor = DeepseekVLProcessor(
        images, tokenizer, num_image_tokens=16, chat_template=DEEPSEEK_TEMPLATE
    )
    config = DeepseekVLConfig(
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        text_config=text_part("llama", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(DeepseekVLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_deepseek_vl_hybrid(folder: Path) -> None:
    """Write a DeepSeek-VL 7B in small: a SigLIP and a SAM tower side by side."""
    tokenizer = _deepseek_tokenizer()
    images = DeepseekVLHybridImageProcessorPil(
        size=square(), high_res_size=square(64), min_size=4, **PLAIN_NORM
    )
    processor = DeepseekVLHybridProcessor(
        images, tokenizer, num_image_tokens=16, chat_template=DEEPSEEK_TEMPLATE
    )
    config = DeepseekVLHybridConfig(
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        vision_config=tower_part("siglip_vision_model", vision_use_head=False),
        high_res_vision_config=tower_part(
            "sam_vision_model",
            image_size=64,
            patch_size=4,
            output_channels=8,
            global_attn_indexes=[0, 1],
            window_size=4,
            num_pos_feats=8,
            initializer_range=0.02,
        ),
        text_config=text_part("llama", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(DeepseekVLHybridForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_janus(folder: Path) -> None:
    """Write a Janus, which also holds the parts that draw images; these stay as they are."""
    tokenizer = byte_tokenizer(
        (
            *(DEEPSEEK_BEGIN, DEEPSEEK_END, DEEPSEEK_PAD, "<image_placeholder>"),
            *("<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"),
        ),
        bos=DEEPSEEK_BEGIN,
        eos=DEEPSEEK_END,
        pad=DEEPSEEK_PAD,
        add_bos=True,
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    images = JanusImageProcessorPil(size=square(), min_size=4, **PLAIN_NORM)
    processor = JanusProcessor(images, tokenizer, num_image_tokens=16, chat_template=JANUS_TEMPLATE)
    config = JanusConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
        vision_config=tower_part("janus_vision_model", projection_dim=32, num_image_tokens=16),
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        text_config=text_part("llama", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(JanusForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_aria(folder: Path) -> None:
    """Write an Aria: experts in the text model, and every image 980 pixels wide and high."""
    tokenizer = byte_tokenizer(
        (
            "<unk>",
            "<s>",
            "</s>",
            "<|img|>",
            "<fim_prefix>",
            "<fim_suffix>",
            "<|im_start|>",
            "<|im_end|>",
            "<pad>",
        ),
        bos="<s>",
        eos="<|im_end|>",
        pad="<pad>",
        unk="<unk>",
        named={"image_token": "<|img|>"},
    )
    images = AriaImageProcessorPil(max_image_size=980, min_image_size=336)
    processor = AriaProcessor(
        images, tokenizer, size_conversion={980: 4}, chat_template=ARIA_TEMPLATE
    )
    config = AriaConfig(
        image_token_index=processor.image_token_id,
        projector_patch_to_query_dict={49: 4},
        vision_config=tower_part("idefics3_vision", image_size=980, patch_size=140),
        text_config=text_part(
            "aria_text", tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
        ),
        **token_ids(tokenizer),
    )
    save_random(AriaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


CASES: tuple[FamilyCase, ...] = (
    FamilyCase(
        model_type="paligemma",
        reads_images=True,
        build=build_paligemma,
        needs_images=True,
        takes_system=False,
        one_turn=True,
        write_prompt=write_paligemma_prompt,
    ),
    FamilyCase(
        model_type="paligemma",
        variant="2",
        reads_images=True,
        build=build_paligemma2,
        needs_images=True,
        takes_system=False,
        one_turn=True,
        write_prompt=write_paligemma_prompt,
        traits=frozenset({"sliding_window"}),
    ),
    FamilyCase(
        model_type="idefics2", reads_images=True, build=build_idefics2, end="<end_of_utterance>"
    ),
    FamilyCase(model_type="vipllava", reads_images=True, build=build_vipllava),
    FamilyCase(model_type="deepseek_vl", reads_images=True, build=build_deepseek_vl),
    FamilyCase(model_type="deepseek_vl_hybrid", reads_images=True, build=build_deepseek_vl_hybrid),
    FamilyCase(model_type="janus", reads_images=True, build=build_janus),
    FamilyCase(model_type="aria", reads_images=True, build=build_aria, traits=frozenset({"moe"})),
)
