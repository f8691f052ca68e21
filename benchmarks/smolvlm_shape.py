"""A base model of SmolVLM-256M's exact shape with random weights, and rows to train it on.

The published weights are not needed to time a step: the shape decides. Tokenizer, processor and
chat template are those of `examples/digits-vlm` (SmolVLM's classes), set to SmolVLM's image size.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3Config

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-vlm"
IMAGE_SIDE_PIXELS = 512
IMAGE_TOKENS = 64


def smolvlm_256m_config(image_token_id: int) -> Idefics3Config:
    """The true shape: vision 12 x 768, text 30 x 576, 9 heads, 3 key-value heads."""
    return Idefics3Config(
        image_token_id=image_token_id,
        scale_factor=4,
        pad_token_id=0,
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": IMAGE_SIDE_PIXELS,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
    )


def write_model(folder: Path) -> Path:
    """Write the model and its processor as a local Hugging Face folder, once."""
    if (folder / "model.safetensors").exists():
        return folder
    processor = AutoProcessor.from_pretrained(EXAMPLE, local_files_only=True)
    processor.image_seq_len = IMAGE_TOKENS
    processor.image_processor.size = {"longest_edge": IMAGE_SIDE_PIXELS}
    processor.image_processor.max_image_size = {"longest_edge": IMAGE_SIDE_PIXELS}
    torch.manual_seed(0)
    image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = AutoModelForImageTextToText.from_config(smolvlm_256m_config(image_token_id))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_rows(path: Path, *, num_rows: int, num_words: int) -> Path:
    """Write chat rows with one 512-pixel image and an answer of about `num_words` words."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            words = " ".join(random.choice(["this", "digit", "is", "a", "which"], num_words))
            user = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Which digit is this?"},
            ]
            messages = [
                {"role": "user", "content": user},
                {"role": "assistant", "content": words},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
