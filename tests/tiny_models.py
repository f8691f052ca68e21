"""Tiny random models, written at test time, with real tokenizers, processors and templates."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

IMAGE_SIDE_PIXELS = 16
PATCH_SIDE_PIXELS = 4
SCALE_FACTOR = 2
IMAGE_TOKENS = (IMAGE_SIDE_PIXELS // PATCH_SIDE_PIXELS // SCALE_FACTOR) ** 2

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]

# SmolVLM's own template, word for word.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(*, eos_token: str, pad_token: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with SmolVLM's special tokens and no merges."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token=eos_token,
        pad_token=pad_token,
        unk_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_vlm_processor() -> Idefics3Processor:
    """SmolVLM's processor in small: 16-pixel images of four tokens each."""
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIDE_PIXELS},
        max_image_size={"longest_edge": IMAGE_SIDE_PIXELS},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    tokenizer = byte_tokenizer(eos_token="<end_of_utterance>", pad_token="<|im_end|>")
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=SMOLVLM_TEMPLATE
    )


def tiny_vlm_folder(tmp: Path, *, seed: int = 0, text_layers: int = 2) -> Path:
    """Write a random Idefics3 (hidden 32, 2 vision and 2 text layers) as a Hugging Face folder.

    Args:
        tmp: The folder in which `tiny-vlm-.../` is made; made once for equal arguments.
        seed: Of the weights.
        text_layers: Depth of the text model.
    """
    folder = tmp / f"tiny-vlm-{seed}-{text_layers}"
    if (folder / "model.safetensors").exists():
        return folder
    processor = tiny_vlm_processor()
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIDE_PIXELS,
            "patch_size": PATCH_SIDE_PIXELS,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
            **special,
        },
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    _sharpen(model.lm_head)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_causal_folder(
    tmp: Path, *, seed: int = 0, chat_template: bool = True, layers: int = 2
) -> Path:
    """Write a random text-only Llama (hidden 32) as a Hugging Face folder."""
    folder = tmp / f"tiny-causal-{seed}-{chat_template}{'' if layers == 2 else f'-{layers}'}"
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if chat_template:
        tokenizer.chat_template = CHATML_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _sharpen(model.lm_head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sharpen(head: torch.nn.Linear) -> None:
    """Give a fresh head logits of a trained model's size, or no adapter could lower the loss."""
    with torch.no_grad():
        head.weight.mul_(20)


def png_data_url(index: int, *, side_pixels: int = IMAGE_SIDE_PIXELS) -> str:
    """A noise image, different for every index, as a data URL."""
    pixels = np.random.default_rng(index).integers(0, 255, (side_pixels, side_pixels, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tiny_chat_rows(count: int, *, images: bool = True) -> list[dict[str, Any]]:
    """Rows in the API's format: one image, a question and a short answer of varying length."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        content: list[dict[str, Any]] = [
            {"type": "text", "text": f"Which digit is {'this' * (index % 3)}?"}
        ]
        if images:
            content.insert(0, {"type": "image_url", "image_url": {"url": png_data_url(index)}})
        answer = {"role": "assistant", "content": f"{index % 10}" * (1 + index % 3)}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as canonical JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
