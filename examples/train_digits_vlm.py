"""Train `examples/digits-vlm` from scratch: a small VLM that reads real handwritten digits.

    python -m examples.train_digits_vlm [--out examples/digits-vlm] [--seed 0] [--threads 2]

Architecture, tokenizer, processor and chat template are those of SmolVLM in small (Idefics3): a
vision tower, a pixel-shuffle connector and a Llama text model. As with its relatives, the vision
tower is pretrained first (here as a classifier, whose head is thrown away), then everything is
trained together on chats. The same seed and thread count on the same machine give the same weights.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own abbreviation
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from examples.digits_images import Digits, encode_png, load_split

IMAGE_SIDE = 32
PATCH_SIDE = 4
SCALE_FACTOR = 2
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE // SCALE_FACTOR) ** 2

QUESTIONS = (
    "Which digit is this?",
    "Which digit is shown?",
    "What digit is this?",
    "What number do you see?",
    "What number is written here?",
    "Read the digit.",
    "Read this number, please.",
    "Please name the handwritten digit.",
    "Tell me the digit in the image.",
    "Can you read this digit?",
    "Which number is in the picture?",
    "Recognize the digit in this image.",
    "digit?",
)

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
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_processor() -> Idefics3Processor:
    """A byte-level BPE tokenizer trained on the chats, SmolVLM's special tokens and template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    corpus = [
        f"User:{question}\nAssistant: {digit}" for question in QUESTIONS for digit in range(10)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIDE},
        max_image_size={"longest_edge": IMAGE_SIDE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def build_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """Fresh weights of the small architecture, with SmolVLM's layer names."""
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
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIDE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            **special,
        },
        **special,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model


def chat(question: str, digit: int | None = None) -> list[dict[str, object]]:
    """One question about one image, and its answer when a digit is given."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages: list[dict[str, object]] = [{"role": "user", "content": parts}]
    if digit is not None:
        answer = [{"type": "text", "text": str(digit)}]
        messages.append({"role": "assistant", "content": answer})
    return messages


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, turn, slant, scale and fade some of the pictures a little, and leave the others.

    Args:
        pictures: `(n, 1, 32, 32)` between 0 and 1.
        generator: The source of all randomness.

    Returns:
        The same shape and range.
    """
    count = len(pictures)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def some(share: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) < share)[:, None, None, None]

    angle = between(-0.26, 0.26)
    scale_x, scale_y, slant = between(0.85, 1.2), between(0.85, 1.2), between(-0.2, 0.2)
    rows = torch.stack([
        torch.stack([scale_x * angle.cos(), slant - angle.sin(), between(-0.2, 0.2)], dim=1),
        torch.stack([angle.sin(), scale_y * angle.cos(), between(-0.2, 0.2)], dim=1),
    ], dim=1)  # fmt: skip
    grid = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, align_corners=False)
    contrast = between(0.7, 1.15)[:, None, None, None]
    noise = between(0, 0.05)[:, None, None, None] * torch.randn(moved.shape, generator=generator)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1)), 3, stride=1)
    changed = (torch.where(some(0.4), blurred, moved) * contrast + noise).clamp(0, 1)
    # Resampling smooths every edge; without untouched pictures the model never learns theirs.
    return torch.where(some(0.4), pictures, changed)


def to_pixel_values(pictures: torch.Tensor) -> torch.Tensor:
    """What the processor makes of 32-pixel pictures: `(n, 1, 32, 32)` to `(n, 1, 3, 32, 32)`."""
    return ((pictures - 0.5) / 0.5).expand(-1, 3, -1, -1)[:, None]


def batches(
    digits: Digits, *, size: int, steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `steps` batches of augmented pixel values and labels, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.from_numpy(digits.pictures).float()[:, None] / 255
    labels = torch.from_numpy(digits.labels)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:size], order[size:]
        yield to_pixel_values(augment(pictures[chosen], generator)), labels[chosen]


def optimizer_for(parameters: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors (norms and biases)."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, *, step: int, steps: int) -> None:
    """Linear warm-up over the first twentieth, then a cosine to nearly nothing."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    for group in optimizer.param_groups:
        group["lr"] = rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def pretrain_vision(
    model: Idefics3ForConditionalGeneration,
    digits: Digits,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train the vision tower as a classifier; its linear head is then forgotten."""
    tower = model.model.vision_model
    head = nn.Linear(tower.config.hidden_size, 10)
    parameters = [*tower.parameters(), *head.parameters()]
    rate = 2e-3
    optimizer = optimizer_for(parameters, rate)
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(
        batches(digits, size=batch_size, steps=steps, seed=seed)
    ):
        set_rate(optimizer, rate, step=step, steps=steps)
        features = tower(pixel_values=pixels[:, 0]).last_hidden_state.mean(dim=1)
        loss = F.cross_entropy(head(features), labels, label_smoothing=0.05)
        step_once(loss, optimizer, parameters)
        if step % 50 == 0 or step + 1 == steps:
            report("vision", step, steps, loss, started)


def train_chats(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    digits: Digits,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train everything on questions and answers; the loss covers the answers alone."""
    parameters = list(model.parameters())
    rate = 2e-3
    optimizer = optimizer_for(parameters, rate)
    encoded = {
        (question, digit): encode_chat(processor, question, digit)
        for question in QUESTIONS
        for digit in range(10)
    }
    words = np.random.default_rng(seed)
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(
        batches(digits, size=batch_size, steps=steps, seed=seed + 1)
    ):
        set_rate(optimizer, rate, step=step, steps=steps)
        # One phrasing a batch: rows of equal length need no padding.
        question = QUESTIONS[int(words.integers(len(QUESTIONS)))]
        ids = torch.stack([encoded[question, int(label)] for label in labels])
        answer_start = ids.shape[1] - 4  # " ", the digit, <end_of_utterance>, newline
        targets = ids[:, answer_start:-1]
        logits = model(input_ids=ids[:, :-1], pixel_values=pixels, use_cache=False).logits
        predicted = logits[:, answer_start - 1 : -1]
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), label_smoothing=0.02)
        step_once(loss, optimizer, parameters)
        if step % 50 == 0 or step + 1 == steps:
            report("chat", step, steps, loss, started)


def encode_chat(processor: Idefics3Processor, question: str, digit: int) -> torch.Tensor:
    """Token ids of a chat with its answer, the image placeholder expanded as the processor does."""
    text = processor.apply_chat_template(chat(question, digit))
    blank = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
    return processor(text=text, images=[[blank]], return_tensors="pt")["input_ids"][0]


def step_once(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> None:
    """One clipped optimizer step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def report(stage: str, step: int, steps: int, loss: torch.Tensor, started: float) -> None:
    """Print one line of progress."""
    seconds = time.perf_counter() - started
    print(f"{stage} step {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


@torch.inference_mode()
def accuracy(folder: Path, digits: Digits, *, question: str = QUESTIONS[0]) -> float:
    """The share of pictures whose generated answer is exactly the digit, as any user would ask."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right = 0
    for start in range(0, len(digits.labels), 33):
        pictures = digits.pictures[start : start + 33]
        images = [[Image.open(io.BytesIO(encode_png(picture)))] for picture in pictures]
        prompt = processor.apply_chat_template(chat(question), add_generation_prompt=True)
        inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers = processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        labels = digits.labels[start : start + 33]
        right += sum(a.strip() == str(label) for a, label in zip(answers, labels, strict=True))
    return right / len(digits.labels)


def main() -> None:
    """Train, save, and measure by generation on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits-vlm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=800)
    parser.add_argument("--chat-steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train, held_out = load_split()
    processor = build_processor()
    model = build_model(processor)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters,"
        f" {len(processor.tokenizer)} tokens"
    )
    settings = {"batch_size": options.batch_size, "seed": options.seed}
    pretrain_vision(model, train, steps=options.vision_steps, **settings)
    train_chats(model, processor, train, steps=options.chat_steps, **settings)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    scores = {q: round(accuracy(options.out, held_out, question=q), 4) for q in QUESTIONS[:3]}
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
