"""The first set of vision-language families."""

from pathlib import Path

from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.weights import save_random

SMOLVLM_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"),
    *("<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ ' ' + part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def llama(tokenizer, *, layers: int = 2, **options):
    """A text model's config in small."""
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        **token_ids(tokenizer),
        **options,
    }


def siglip(**options):
    """A vision model's config in small: 16 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **options,
    }


def build_idefics3(folder: Path) -> None:
    tokenizer = byte_tokenizer(
        SMOLVLM_TOKENS,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE
    )
    config = Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config=siglip(),
        text_config=llama(tokenizer),
        **token_ids(tokenizer),
    )
    save_random(Idefics3ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


CASES: tuple[FamilyCase, ...] = (
    FamilyCase(model_type="idefics3", reads_images=True, build=build_idefics3),
)
